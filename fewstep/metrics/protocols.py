"""Protocols of published figures by name: what is measured on which pictures, seen how, and against what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Crop = Literal["none", "square", "square-floor", "patch"]
Figure = Literal["frechet", "mmd", "kid", "manifold", "inception_score"]
PATCH = 299
ALSO: tuple[Figure, ...] = ("kid", "manifold", "inception_score")
"""What may be asked for besides a protocol's own figures."""


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """SHA-256 of a protocol's canonical JSON (sorted keys, no spaces, ASCII)."""
    text = json.dumps(protocol, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


@dataclass(frozen=True)
class Protocol:
    """All that fixes a figure but the pictures and the weights.

    count: of samples; fewer give a figure of another name, since the Frechet distance falls with their number.
    extractor, resize: as in `extractors.load_extractor`.  crop: none leaves pictures as they are, which must then be of
    one size; square takes the middle as long as the shorter edge, at an offset rounded to even or, in square-floor,
    down; patch takes the middle 299x299.  size, filter: of PIL's resize after a crop; without one, pictures must have
    that size.  figures: measured always.  categories: subfolders that have figures of their own, too.  prompts and
    reference: in words.  singular: whether as few samples as features are allowed, with a warning.
    """

    name: str
    source: str
    extractor: Literal["inception", "dinov2", "clip", "fashion"]
    count: int
    prompts: str
    reference: str
    resize: Literal["", "tf1-bilinear", "clean-bicubic"] = ""
    crop: Crop = "none"
    size: int | None = None
    filter: Literal["lanczos", "bicubic"] = "lanczos"
    quantisation: str = "bytes: (127.5 x + 128) clipped, fraction dropped; resized to bytes, too, but by the extractor"
    figures: tuple[Figure, ...] = ("frechet",)
    categories: tuple[str, ...] = ()
    singular: bool = False

    @property
    def hash(self) -> str:
        """Figures of different hashes do not compare."""
        return protocol_hash(asdict(self))


COCO = "captions of COCO 2014 val, one image each"
_TABLE = (
    Protocol(
        name="edm-fid50k",
        source="EDM, arXiv:2206.00364",
        extractor="inception",
        resize="tf1-bilinear",
        count=50_000,
        prompts="none, or classes in equal numbers",
        reference="moments of the whole training set at the samples' size; divisor n - 1",
    ),
    Protocol(
        name="dmd2-coco30k",
        source="DMD2, arXiv:2405.14867",
        extractor="inception",
        resize="clean-bicubic",
        crop="square",
        size=256,
        count=30_000,
        prompts=COCO,
        reference="all images of COCO 2014 val",
    ),
    Protocol(
        name="dmd2-sdxl-coco10k",
        source="DMD2, arXiv:2405.14867",
        extractor="inception",
        resize="clean-bicubic",
        crop="square",
        size=512,
        count=10_000,
        prompts=COCO,
        reference="the 10,000 images of COCO 2014 val that the captions belong to",
    ),
    Protocol(
        name="dmd2-sdxl-coco10k-patch",
        source="DMD2, arXiv:2405.14867",
        extractor="inception",
        resize="clean-bicubic",
        crop="patch",
        count=10_000,
        prompts=COCO,
        reference="the 10,000 images of COCO 2014 val that the captions belong to, at their own size",
    ),
    Protocol(
        name="sid-coco30k",
        source="SiD-LSG, arXiv:2406.01561",
        extractor="inception",
        resize="tf1-bilinear",
        crop="square",
        size=256,
        count=30_000,
        prompts=COCO,
        reference="all images of COCO 2014 val",
    ),
    Protocol(
        name="mjhq30k",
        source="Playground v2.5, arXiv:2402.17245",
        extractor="inception",
        resize="clean-bicubic",
        size=1024,
        count=30_000,
        prompts="MJHQ-30K's, 3,000 of each category",
        reference="the images of MJHQ-30K",
        categories=(
            "animals",
            "art",
            "fashion",
            "food",
            "indoor",
            "landscape",
            "logo",
            "people",
            "plants",
            "vehicles",
        ),
    ),
    Protocol(
        name="dinov2-fd50k",
        source="arXiv:2306.04675",
        extractor="dinov2",
        count=50_000,
        prompts="none, or classes in equal numbers",
        reference="the training set at the samples' size",
    ),
    Protocol(
        name="cmmd-coco30k",
        source="CMMD, arXiv:2401.09603",
        extractor="clip",
        crop="square-floor",
        size=336,
        filter="bicubic",
        count=30_000,
        prompts=COCO,
        reference="images of COCO 2014 val",
        figures=("mmd",),
    ),
    Protocol(
        name="fashion-fmd",
        source="fewstep/metrics/suite.py",
        extractor="fashion",
        size=32,
        count=10_000,
        prompts="the embedded teachers', in turn",
        reference="the 60,000 training images of Fashion-MNIST, packaged",
        singular=True,
    ),
)
PROTOCOLS = {protocol.name: protocol for protocol in _TABLE}
DMD2_CLIP = frozenset({"dmd2-coco30k", "dmd2-sdxl-coco10k"})
"""Protocols whose tables have a CLIP score of their own, see `open_clip_score`."""

_TITLES = {
    ("inception", "frechet"): "FID",
    ("inception", "kid"): "KID",
    ("dinov2", "frechet"): "FD-DINOv2",
    ("dinov2", "kid"): "KD-DINOv2",
    ("clip", "mmd"): "CMMD",
    ("clip", "kid"): "KD-CLIP",
    ("fashion", "frechet"): "FMD",
    ("fashion", "kid"): "KMD",
}
_GENERIC = {"frechet": "FD", "kid": "KD", "mmd": "MMD", "inception_score": "IS"}


def find_protocol(name: str) -> Protocol:
    """The protocol of this name.  Raises LookupError that lists the names."""
    if name not in PROTOCOLS:
        raise LookupError(f"no protocol named {name!r}; known: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def clip_view(protocol: Protocol) -> Protocol:
    """As what a CLIP is shown the pictures: those of `DMD2_CLIP` have one size for it, whatever the extractor's."""
    if protocol.name not in DMD2_CLIP:
        return protocol
    return replace(protocol, crop="square", size=256, filter="lanczos")


def figure_name(figure: str, protocol: Protocol, n: int, *, verified: bool) -> str:
    """What a figure may be called: its published name only of the published weights and as many samples.

    FID, patch FID, FD[inception-unverified], FID@5000.
    """
    plain = _GENERIC.get(figure, figure)
    name = _TITLES.get((protocol.extractor, figure), plain)
    if not verified:
        name = f"{plain}[{protocol.extractor}-unverified]"
    if protocol.crop == "patch":
        name = f"patch {name}"
    return name if n == protocol.count else f"{name}@{n}"
