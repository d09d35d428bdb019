"""What is asked for, and whether it can be measured, before any weights are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.environment import device_of
from fewstep.metrics.clip_score import read_clip
from fewstep.metrics.extractors import Extractor, load_extractor
from fewstep.metrics.image_folder import check_sizes
from fewstep.metrics.look import Scorer
from fewstep.metrics.open_clip_score import check_open_clip, read_open_clip
from fewstep.metrics.protocols import ALSO, DMD2_CLIP, Protocol, find_protocol
from fewstep.metrics.reference import (
    Reference,
    check_enough,
)
from fewstep.metrics.suite import SUBSET_SIZE
from fewstep.metrics.weights import check_sha256


@dataclass(frozen=True)
class Request:
    """What to measure by, before the pictures are named.

    protocol: its name.  reference: an npz file or a folder of real images.  also: of `protocols.ALSO`.  weights,
    sha256, unverified: as in `extractors.load_extractor`.  clip: a folder for a CLIP score, open_clip's for
    `protocols.DMD2_CLIP` and else a CLIPModel.  clip_sha256: of open_clip's weights.  prompts: a file, image i's prompt
    its line i in the order of the files' names.
    """

    protocol: str
    reference: Path | None = None
    also: Sequence[str] = ()
    weights: Path | None = None
    sha256: str | None = None
    unverified: bool = False
    clip: Path | None = None
    clip_sha256: str | None = None
    prompts: Path | None = None
    device: str = "auto"

    def extractor(self) -> Extractor:
        """The protocol's."""
        protocol = find_protocol(self.protocol)
        return load_extractor(
            protocol.extractor,
            resize=protocol.resize,
            weights=self.weights,
            sha256=self.sha256,
            allow_unverified=self.unverified,
            device=device_of(self.device),
        )

    def scorer(self) -> Scorer | None:
        """The protocol's CLIP, if one was given."""
        if self.clip is None or self.protocol not in DMD2_CLIP:
            return None if self.clip is None else read_clip(self.clip, device=device_of(self.device))
        return read_open_clip(self.clip, sha256=self.clip_sha256, device=device_of(self.device))


def check_asked(target: Path, request: Request) -> None:
    """Raises LookupError for figures that there are not, OSError for missing folders, ValueError for wrong flags."""
    if unknown := set(request.also) - set(ALSO):
        raise LookupError(f"no figure named {', '.join(sorted(unknown))}; --also takes {', '.join(ALSO)}")
    if request.clip_sha256 is not None and (request.clip is None or request.protocol not in DMD2_CLIP):
        raise ValueError(f"--clip-sha256 goes with --clip FOLDER and {' or '.join(sorted(DMD2_CLIP))}; leave it out")
    for given in (request.sha256, request.clip_sha256):
        if given is not None:
            check_sha256(given)
    if request.clip is not None and request.protocol in DMD2_CLIP:
        check_open_clip(request.clip, request.clip_sha256)
    if not target.is_dir():
        raise FileNotFoundError(f"no run or folder of images at {target}")


def checked_files(files: Sequence[Path], protocol: Protocol, n: int | None, seeds: int) -> int:
    """How many there are.  Raises ValueError for more than the protocol's, and for sizes that it does not take."""
    if n is not None or seeds != 1:
        raise ValueError("--n and --seeds are of a run's student; a folder is measured whole")
    if len(files) > protocol.count:
        raise ValueError(
            f"{len(files)} images are more than the {protocol.count} of {protocol.name}; move the others away, since "
            "the figure depends on their number"
        )
    check_sizes(files, protocol)
    return len(files)


def check_samples(
    n: int,
    files: Sequence[Path] | None,
    protocol: Protocol,
    also: Sequence[str],
    reference: Reference | None,
    say: Callable[[str], None],
) -> None:
    """Raises ValueError for too few samples; says so where they only rename the figures."""
    if "kid" in also and n < SUBSET_SIZE:
        raise ValueError(f"kid is a mean over subsets of {SUBSET_SIZE}, and there are {n} images; leave it out")
    if reference is not None:
        check_enough(n, len(reference.whole.mu), protocol, "the set of samples")
        for category in protocol.categories if files is not None else ():
            own = sum(path.parent.name == category for path in files or ())
            check_enough(own, len(reference.whole.mu), protocol, f"the set of {category}")
    if n < protocol.count:
        say(
            f"{n} images are fewer than the {protocol.count} of {protocol.name}: its figures are named @{n} and do not "
            "compare with published ones"
        )


def prompts_of(request: Request, count: int, *, folder: bool) -> Sequence[str]:
    """Of the file; () where there is none, which a folder with a CLIP score may not have."""
    if request.prompts is None:
        if folder and request.clip is not None:
            raise ValueError("a CLIP score needs the images' prompts: --prompts FILE, line i of image i by name")
        return ()
    from fewstep.training.prompts import read_prompts

    prompts = read_prompts(request.prompts)
    if folder and len(prompts) != count:
        raise ValueError(f"{request.prompts} holds {len(prompts)} prompts for {count} images; one line each is needed")
    return prompts
