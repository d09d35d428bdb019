"""Claims about the protocols: what their names stand for, and what a figure may be called."""

from dataclasses import fields, replace

import pytest

from fewstep.metrics.extractors import NAMES, RESIZES
from fewstep.metrics.protocols import PROTOCOLS, figure_name, find_protocol


def test_names_stand_for_the_published_settings():
    """As their sources have them; a change of any is another protocol and needs another name."""
    settings = {
        name: (p.extractor, p.resize, p.crop, p.size, p.filter if p.size else None, p.count)
        for name, p in PROTOCOLS.items()
    }
    assert settings == {
        "edm-fid50k": ("inception", "tf1-bilinear", "none", None, None, 50_000),
        "dmd2-coco30k": ("inception", "clean-bicubic", "square", 256, "lanczos", 30_000),
        "dmd2-sdxl-coco10k": ("inception", "clean-bicubic", "square", 512, "lanczos", 10_000),
        "dmd2-sdxl-coco10k-patch": ("inception", "clean-bicubic", "patch", None, None, 10_000),
        "sid-coco30k": ("inception", "tf1-bilinear", "square", 256, "lanczos", 30_000),
        "mjhq30k": ("inception", "clean-bicubic", "none", 1024, "lanczos", 30_000),
        "dinov2-fd50k": ("dinov2", "", "none", None, None, 50_000),
        "cmmd-coco30k": ("clip", "", "square-floor", 336, "bicubic", 30_000),
        "fashion-fmd": ("fashion", "", "none", 32, "lanczos", 10_000),
    }
    assert len(PROTOCOLS["mjhq30k"].categories) == 10
    assert all(p.extractor in NAMES and p.resize in ("", *RESIZES) for p in PROTOCOLS.values())


def test_every_field_changes_the_hash():
    """Mutation: the hash of the name alone, which a change of settings would not show."""
    protocol = PROTOCOLS["edm-fid50k"]
    others = {"count": 1, "size": 8, "figures": ("mmd",), "categories": ("art",), "singular": True}
    changed = [replace(protocol, **{f.name: others.get(f.name, "other")}).hash for f in fields(protocol)]
    assert len({protocol.hash, *changed}) == len(fields(protocol)) + 1
    assert replace(protocol).hash == protocol.hash


@pytest.mark.parametrize(
    ("figure", "protocol", "n", "verified", "name"),
    [
        ("frechet", "edm-fid50k", 50_000, True, "FID"),
        ("frechet", "edm-fid50k", 49_999, True, "FID@49999"),
        ("frechet", "edm-fid50k", 50_000, False, "FD[inception-unverified]"),
        ("frechet", "dmd2-sdxl-coco10k-patch", 10_000, True, "patch FID"),
        ("kid", "dmd2-coco30k", 30_000, False, "KD[inception-unverified]"),
        ("kid", "dmd2-coco30k", 30_000, True, "KID"),
        ("inception_score", "edm-fid50k", 50_000, True, "IS"),
        ("precision", "edm-fid50k", 100, False, "precision[inception-unverified]@100"),
        ("frechet", "dinov2-fd50k", 50_000, True, "FD-DINOv2"),
        ("mmd", "cmmd-coco30k", 30_000, True, "CMMD"),
        ("mmd", "cmmd-coco30k", 30_000, False, "MMD[clip-unverified]"),
        ("frechet", "fashion-fmd", 10_000, True, "FMD"),
    ],
)
def test_a_figure_has_its_published_name_only_where_it_is_that_figure(figure, protocol, n, verified, name):
    """Mutations: unverified weights called FID; 5,000 samples called FID."""
    assert figure_name(figure, PROTOCOLS[protocol], n, verified=verified) == name


def test_an_unknown_protocol_is_refused():
    with pytest.raises(LookupError, match=r"'fid'; known: edm-fid50k, dmd2-coco30k"):
        find_protocol("fid")
