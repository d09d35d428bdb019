"""What samples are held against: moments of real features, in the npz files of EDM and clean-fid.

mu: [D] and sigma: [D, D] float64, divisor n - 1, are all that others read. Ours add n, meta (JSON: the protocol's hash,
the extractor and its weights' SHA-256), mu_NAME, sigma_NAME and n_NAME of each category, and if wanted features.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from fewstep.metrics.extractors import Extractor
from fewstep.metrics.features import file_sha256
from fewstep.metrics.frechet import Moments
from fewstep.metrics.protocols import Protocol

ASYMMETRY = 1e-6
"""Of the largest entry: what float32 makes of a covariance is far below, what is none is far above."""


@dataclass(frozen=True)
class Gaussian:
    """mu: [D], sigma: [D, D], float64; n: of the features, None where a file does not say."""

    mu: Tensor
    sigma: Tensor
    n: int | None = None

    @classmethod
    def of(cls, moments: Moments) -> Gaussian:
        return cls(moments.mean, moments.cov, moments.count)


@dataclass(frozen=True)
class Reference:
    """whole, and parts by category.  features: [N, D] float32, if kept.  meta: {} where a file does not say."""

    whole: Gaussian
    parts: Mapping[str, Gaussian] = field(default_factory=dict)
    features: Tensor | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    sha256: str | None = None


def meta_of(protocol: Protocol, extractor: Extractor) -> dict[str, Any]:
    """What a reference says of how it was made."""
    return {"protocol": protocol.name, "protocol_hash": protocol.hash, "extractor": extractor.protocol}


def write_reference(reference: Reference, file: Path) -> None:
    """Write an npz without pickles.  Raises ValueError for another suffix and FileExistsError for an existing file."""
    if file.suffix != ".npz":
        raise ValueError(f"{file} should end in .npz")
    if file.exists():
        raise FileExistsError(f"{file} exists; choose another --to")
    arrays: dict[str, Any] = {"meta": numpy.array(json.dumps(dict(reference.meta), sort_keys=True))}
    for suffix, part in {"": reference.whole, **{f"_{name}": part for name, part in reference.parts.items()}}.items():
        arrays |= {f"mu{suffix}": part.mu.numpy(), f"sigma{suffix}": part.sigma.numpy()}
        if part.n is not None:
            arrays[f"n{suffix}"] = numpy.array(part.n)
    if reference.features is not None:
        arrays["features"] = reference.features.numpy()
    file.parent.mkdir(parents=True, exist_ok=True)
    numpy.savez(file, **arrays)


def read_reference(file: Path) -> Reference:
    """A reference of ours, of EDM's or of clean-fid's.  Nothing is unpickled.

    Raises FileNotFoundError if there is none, ValueError for pickles, for missing or odd arrays and for numbers that
    are not finite.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no reference at {file}; `fewstep reference FOLDER --protocol NAME --to FILE.npz`")
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is no npz file; a pickle is not read, since it may run anything: convert it first")
    try:
        with numpy.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} cannot be read without unpickling, or is damaged: {error}") from error
    names = [name.removeprefix("mu_") for name in arrays if name.startswith("mu_")]
    whole = _gaussian(arrays, "", file)
    parts = {name: _gaussian(arrays, f"_{name}", file) for name in names}
    features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
    if features is not None and (features.ndim != 2 or features.shape[1] != len(whole.mu)):
        raise ValueError(f"{file}: features {tuple(features.shape)} do not go with mu of {len(whole.mu)}.")
    if features is not None and not bool(features.isfinite().all()):
        raise ValueError(f"{file}: features hold numbers that are not finite; make the reference anew.")
    try:
        meta = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
    except ValueError as error:
        raise ValueError(f"{file}: meta is no JSON: {error}") from error
    return Reference(whole, parts, features, meta, file_sha256(file))


def check_reference(reference: Reference, protocol: Protocol, name: str) -> None:
    """Raises ValueError for a reference of another protocol; one that does not say is taken at its user's word."""
    made = reference.meta.get("protocol_hash", protocol.hash)
    if made != protocol.hash:
        raise ValueError(
            f"{name} is of protocol {reference.meta.get('protocol')} {made[:12]}, not of {protocol.name} "
            f"{protocol.hash[:12]}: its images were seen otherwise. Make it with `fewstep reference`."
        )
    missing = [category for category in protocol.categories if category not in reference.parts]
    if reference.meta and missing:
        raise ValueError(f"{name} lacks the categories {', '.join(missing)}. Make it with `fewstep reference`.")
    if reference.whole.n is not None:
        check_enough(reference.whole.n, len(reference.whole.mu), protocol, name)


def check_extractor(reference: Reference, extractor: Extractor, name: str) -> None:
    """Raises ValueError for features of another network: they have no distance to these."""
    told = reference.meta.get("extractor", {})
    for key in ("name", "sha256", "resize"):
        mine = extractor.protocol[key]
        if told.get(key, mine) != mine:
            raise ValueError(
                f"{name} was made by an extractor of {key} {told[key]}, these samples by one of {mine}; make it with "
                "the same weights."
            )
    if len(reference.whole.mu) != extractor.dim:
        raise ValueError(f"{name} has {len(reference.whole.mu)} features, {extractor.name} has {extractor.dim}.")


def check_enough(n: int, dim: int, protocol: Protocol, name: str) -> None:
    """Raises ValueError where n <= dim and a protocol with a Frechet distance does not allow it."""
    if "frechet" in protocol.figures and not protocol.singular and n <= dim:
        raise ValueError(
            f"{name} has {n} images for {dim} features: the covariance is singular and the distance no estimate; "
            f"{protocol.name} takes {protocol.count}, and at least {dim + 1} are needed."
        )


def _gaussian(arrays: Mapping[str, Any], suffix: str, file: Path) -> Gaussian:
    missing = [name for name in (f"mu{suffix}", f"sigma{suffix}") if name not in arrays]
    if missing:
        raise ValueError(f"{file} lacks {' and '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}.")
    mu, sigma = (torch.from_numpy(numpy.asarray(arrays[f"{name}{suffix}"], "f8")) for name in ("mu", "sigma"))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{file}: mu{suffix} {tuple(mu.shape)} and sigma {tuple(sigma.shape)} should be [D], [D, D].")
    if not bool(mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError(f"{file}: mu{suffix} or sigma{suffix} hold numbers that are not finite; make it anew.")
    if float((sigma - sigma.T).abs().max()) > ASYMMETRY * float(sigma.abs().max()):
        raise ValueError(f"{file}: sigma{suffix} is not symmetric, so it is no covariance.")
    n = arrays.get(f"n{suffix}")
    return Gaussian(mu, sigma, None if n is None else int(n))
