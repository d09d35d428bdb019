"""Fidelity and variety by nearest neighbours: precision, recall, density, coverage, distance to the nearest real."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 500


class Manifold(NamedTuple):
    """precision, recall, coverage in [0, 1]; density >= 0, about 1 for good samples; nearest: a mean distance >= 0."""

    precision: float
    recall: float
    density: float
    coverage: float
    nearest: float


def neighbour_radii(features: Tensor, k: int) -> Tensor:
    """Distance of every vector to its k nearest others, nearest first: column k - 1 is NND_k.

    features: [N, D], any float dtype, taken to float64; 1 <= k < N, else ValueError.  Returns [N, k] float64.  A vector
    is no neighbour of itself, a copy of it is one.
    """
    if features.ndim != 2 or not 1 <= k < len(features):
        raise ValueError(f"k must be in 1..N - 1 for features [N, D], got k {k} and shape {tuple(features.shape)}.")
    wide = _centred(features, features)
    found = []
    for start, squares in _squared_distances(wide, wide):
        rows = torch.arange(len(squares))
        squares[rows, start + rows] = torch.inf
        found.append(squares.topk(k, largest=False).values.sqrt())
    return torch.cat(found)


def manifold(fake: Tensor, real: Tensor, *, k: int = 3, k_density: int = 5, radii: Tensor | None = None) -> Manifold:
    """All five figures in one pass over the distances, with B_k(x) the closed ball around x up to its k-th neighbour.

    precision = share of fakes in any B_k(real),  recall = share of reals in any B_k(fake),  k = 3   [arXiv:1904.06991]
    density = sum_j #{i: fake_j in B_l(real_i)} / (l M),  coverage = share of reals with a fake in B_l(real),  l = 5
                                                                                                     [arXiv:2002.09797]
    nearest = mean over j of min_i |fake_j - real_i|; where it is far below that of held-out reals, samples are copies

    fake: [M, D], real: [N, D], any float dtype, taken to float64.  k, k_density: k and l, at their papers' defaults.
    radii: `neighbour_radii(real, max(k, k_density))` where that is known.  Both papers' figures depend on M and N:
    compare at equal sizes, best M = N.  Raises ValueError for wrong shapes or sets not larger than k. The `prdc`
    package takes open balls, which differ only in exact ties.
    """
    if fake.ndim != 2 or real.ndim != 2 or fake.shape[1] != real.shape[1]:
        raise ValueError(f"features must be [M, D] and [N, D], got {tuple(fake.shape)} and {tuple(real.shape)}.")
    radii = neighbour_radii(real, max(k, k_density)) if radii is None else radii
    if radii.shape[0] != len(real) or radii.shape[1] < max(k, k_density):
        raise ValueError(f"radii must be [{len(real)}, {max(k, k_density)} or more], got {tuple(radii.shape)}.")
    of_real, of_real_dense = radii[:, k - 1].square(), radii[:, k_density - 1].square()
    of_fake = neighbour_radii(fake, k)[:, k - 1].square()
    precise = balls = 0
    reached = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    closest = []
    for start, squares in _squared_distances(_centred(fake, real), _centred(real, real)):
        precise += int((squares <= of_real).any(1).sum())
        reached |= (squares <= of_fake[start : start + len(squares), None]).any(0)
        inside = squares <= of_real_dense
        balls += int(inside.sum())
        covered |= inside.any(0)
        closest.append(squares.argmin(1))
    return Manifold(
        precision=precise / len(fake),
        recall=float(reached.double().mean()),
        density=balls / (k_density * len(fake)),
        coverage=float(covered.double().mean()),
        nearest=float(_distance_to(fake, real, torch.cat(closest)).mean()),
    )


def nearest_distances(samples: Tensor, references: Tensor) -> Tensor:
    """Euclidean distance of every sample to the nearest reference, exactly 0 for a copy.

    samples: [M, D], references: [N, D], any float dtype, taken to float64.  Returns [M] float64.
    """
    blocks = _squared_distances(_centred(samples, references), _centred(references, references))
    closest = [squares.argmin(1) for _, squares in blocks]
    return _distance_to(samples, references, torch.cat(closest))


def _distance_to(samples: Tensor, references: Tensor, index: Tensor) -> Tensor:
    """|samples - references[index]| without the rounding of a matrix product, [M] float64."""
    gap = samples.detach().to("cpu", torch.float64) - references.detach().to("cpu", torch.float64)[index]
    return gap.square().sum(1).sqrt()


def _centred(features: Tensor, origin: Tensor) -> Tensor:
    """float64 features relative to the mean of origin: |x|^2 + |y|^2 - 2 x.y loses digits far from zero."""
    return features.detach().to("cpu", torch.float64) - origin.detach().to("cpu", torch.float64).mean(0)


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, squared distances [B, N]) of blocks of x: [M, D] to all of y: [N, D].

    Rounding of about 1e-16 |x|^2 is cut off at 0. 500 rows against 10,000 are 40 MB, where all at once would be 800.
    """
    norms = y.square().sum(1)
    for start in range(0, len(x), BLOCK):
        part = x[start : start + BLOCK]
        squares = torch.addmm(norms, part, y.T, alpha=-2).add_(part.square().sum(1, keepdim=True))
        yield start, squares.clamp_(min=0)
