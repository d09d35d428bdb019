"""What pictures are held against: a file, the packaged one, or real images that are looked at first."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file

from fewstep.measuring.pictures import of_files, seen_by
from fewstep.measuring.request import Request
from fewstep.metrics.extractors import Extractor
from fewstep.metrics.features import FASHION_CLASSIFIER, load_reference
from fewstep.metrics.frechet import Moments
from fewstep.metrics.image_folder import check_sizes, image_files
from fewstep.metrics.look import Seen
from fewstep.metrics.protocols import Protocol, find_protocol
from fewstep.metrics.reference import (
    Gaussian,
    Reference,
    check_enough,
    check_reference,
    meta_of,
    read_reference,
    write_reference,
)
from fewstep.metrics.suite import FEATURES_FILE
from fewstep.processes import ALONE, Processes


def given_reference(request: Request, protocol: Protocol, comparing: Set[str]) -> tuple[Reference | None, str]:
    """The reference and what it is called; None for a folder, which an extractor must look at first."""
    path = request.reference
    if path is None and protocol.extractor == "fashion":
        features = load_file(FASHION_CLASSIFIER / FEATURES_FILE)["features"].float()
        return Reference(Gaussian.of(load_reference()), features=features), "packaged"
    if path is None:
        raise ValueError(f"{protocol.name} needs --reference FILE.npz or a FOLDER of {protocol.reference}")
    if path.is_dir():
        check_sizes(image_files(path, protocol), protocol)
        return None, str(path)
    reference = read_reference(path)
    check_reference(reference, protocol, str(path))
    if comparing and reference.features is None:
        raise ValueError(
            f"{path} holds moments alone, and {', '.join(sorted(comparing))} compares features: name the folder of "
            "real images, or make the file with `fewstep reference --features`"
        )
    return reference, str(path)


def make_reference(
    folder: Path,
    request: Request,
    to: Path,
    *,
    features: bool = False,
    console: Console | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Moments of a folder of real images as an npz file, and their features if wanted.  Returns the path."""
    protocol = find_protocol(request.protocol)
    if to.suffix != ".npz":
        raise ValueError(f"--to {to} should end in .npz")
    if to.exists():
        raise FileExistsError(f"{to} exists; choose another --to")
    check_sizes(image_files(folder, protocol), protocol)
    made = made_of(folder, protocol, request.extractor(), processes.console(console), processes)
    if processes.main:
        write_reference(made if features else Reference(made.whole, made.parts, meta=made.meta), to)
    return to


def made_of(
    folder: Path, protocol: Protocol, extractor: Extractor, console: Console | None, processes: Processes
) -> Reference:
    """The moments, of each category too, and the features of a folder of real images."""
    files = image_files(folder, protocol)
    check_enough(len(files), extractor.dim, protocol, str(folder))
    pictures = of_files(files, [protocol], extractor.channels)
    seen = seen_by(extractor, len(files), pictures, processes, console, f"reference {folder}")
    return processes.on_main(_reference_of, seen, files, folder, protocol, extractor)


def _reference_of(
    seen: Seen, files: Sequence[Path], folder: Path, protocol: Protocol, extractor: Extractor
) -> Reference:
    parts = {}
    for name in protocol.categories:
        rows = [i for i, path in enumerate(files) if path.parent.name == name]
        check_enough(len(rows), extractor.dim, protocol, f"{folder}/{name}")
        parts[name] = Gaussian.of(Moments.of(seen.features[rows]))
    return Reference(Gaussian.of(seen.moments), parts, seen.features, meta_of(protocol, extractor))
