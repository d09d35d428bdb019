"""One pass of each network over pictures, and all figures that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.metrics.clip_score import Scorer
from fewstep.metrics.extractors import Extractor
from fewstep.metrics.frechet import Moments, frechet_distance
from fewstep.metrics.inception import inception_score
from fewstep.metrics.kernel import gaussian_distance, subset_kernel_distance
from fewstep.metrics.manifold import manifold
from fewstep.metrics.protocols import Protocol, figure_name
from fewstep.metrics.reference import Gaussian, Reference
from fewstep.metrics.suite import K_DENSITY, NUM_SUBSETS, SUBSET_SEED, SUBSET_SIZE, K

SPLITS = 10
SETTINGS = {
    "kid": {"subset_size": SUBSET_SIZE, "num_subsets": NUM_SUBSETS, "seed": SUBSET_SEED},
    "manifold": {"k": K, "k_density": K_DENSITY},
    "inception_score": {"splits": SPLITS, "bias": False},
}
"""Of figures that a protocol does not fix."""
COMPARING = frozenset({"kid", "manifold", "mmd"})
"""Figures that need the features of the reals, not only their moments."""


@dataclass(frozen=True)
class Seen:
    """What one pass over N pictures leaves: features [N, D] float32, and cosines [N] with the prompts."""

    features: Tensor
    cosines: Tensor | None = None

    @cached_property
    def moments(self) -> Moments:
        return Moments.folded(self.features)


def look(
    extractor: Extractor,
    images: Iterable[tuple[Tensor, ...]],
    *,
    scorer: Scorer | None = None,
    prompts: Sequence[str] = (),
    advance: Callable[[int], object] = int,
) -> Seen:
    """Let every picture go once through each network.

    images: batches [B, C, H, W] uint8, as the extractor and, if otherwise, as the scorer is shown them.  prompts: one
    per picture, where there is a scorer.  advance: is told how many more are done.  Raises ValueError for features that
    are not finite.
    """
    start, parts, cosines = 0, [], []
    for views in images:
        features = extractor(views[0])
        if not bool(features.isfinite().all()):
            raise ValueError(f"{extractor.name} gives features that are not finite: its weights are damaged.")
        parts.append(features)
        if scorer is not None:
            cosines.append(scorer.cosines(views[-1], prompts[start : start + len(features)]))
        start += len(features)
        advance(len(features))
    return Seen(torch.cat(parts), torch.cat(cosines) if cosines else None)


def figures_of(
    seen: Seen,
    protocol: Protocol,
    extractor: Extractor,
    reference: Reference,
    also: Sequence[str] = (),
    groups: Sequence[str] = (),
    scorer: Scorer | None = None,
) -> dict[str, float]:
    """All figures of pictures that were looked at, by what they may be called.

    also: of `protocols.ALSO`.  groups: each picture's category, for the Frechet distance of each that the reference
    has.  scorer: whose cosines there are.  Raises ValueError for an Inception score without classes, and where features
    are to be compared and the reference has none.
    """
    n, found = len(seen.features), dict[str, float]()
    wanted = {*protocol.figures, *also}
    if "frechet" in wanted:
        found["frechet"] = _frechet(seen.moments, reference.whole)
        for name in [name for name in reference.parts if name in groups]:
            rows = [i for i, group in enumerate(groups) if group == name]
            found[f"frechet/{name}"] = _frechet(Moments.of(seen.features[rows]), reference.parts[name])
    if "inception_score" in wanted:
        if extractor.head is None:
            raise ValueError(f"an Inception score is of Inception's classes; {protocol.name} uses {extractor.name}.")
        found["inception_score"] = inception_score(seen.features, extractor.head, splits=SPLITS)[0]
    if comparing := COMPARING & wanted:
        found |= _compared(seen.features, reference.features, comparing)
    figures = {_name(figure, protocol, n, extractor.verified): value for figure, value in found.items()}
    if scorer is not None and seen.cosines is not None:  # of a network of its own: only the count can rename it
        name = scorer.figure if n == protocol.count else f"{scorer.figure}@{n}"
        figures[name] = scorer.factor * float(seen.cosines.mean())
    return figures


def _compared(fake: Tensor, real: Tensor | None, wanted: Set[str]) -> dict[str, float]:
    """The figures of `COMPARING` that are wanted."""
    if real is None:
        raise ValueError(f"{', '.join(sorted(wanted))} compares features, and the reference keeps none.")
    found = {}
    if "mmd" in wanted:
        found["mmd"] = gaussian_distance(fake, real)
    if "kid" in wanted:
        generator = torch.Generator().manual_seed(SUBSET_SEED)
        sizes = {"subset_size": SUBSET_SIZE, "num_subsets": NUM_SUBSETS}
        found["kid"] = subset_kernel_distance(fake, real, generator, **sizes).mean
    if "manifold" in wanted:
        found |= manifold(fake, real, k=K, k_density=K_DENSITY)._asdict()
    return found


def _name(figure: str, protocol: Protocol, n: int, verified: bool) -> str:
    plain, _, category = figure.partition("/")
    name = figure_name(plain, protocol, n, verified=verified)
    return f"{name} {category}" if category else name


def _frechet(moments: Moments, real: Gaussian) -> float:
    return frechet_distance(moments.mean, moments.cov, real.mu, real.sigma)
