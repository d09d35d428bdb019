"""Kernel distance between two sets of features: unbiased MMD^2 with a cubic kernel, which on Inception features is KID.

Unlike the Frechet distance it assumes no Gaussians and has no bias at small n, so its value may be negative.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1000
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


class KernelDistance(NamedTuple):
    """Mean and standard deviation (divisor n - 1) of the distance over random subsets; std is not an error of mean."""

    mean: float
    std: float


def kernel_distance(fake: Tensor, real: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of all given features.

    MMD^2 = sum_(i!=j) k(x_i, x_j) / (m (m - 1)) + sum_(i!=j) k(y_i, y_j) / (n (n - 1)) - 2 sum_(ij) k(x_i, y_j) / (m n)
    k(x, y) = (x . y / D + 1)^3            [arXiv:1801.01401; the estimator: Gretton et al., JMLR 13, 2012]

    fake: [M, D], real: [N, D], any float dtype, taken to float64; M, N >= 2.  Returns a float, possibly below 0. Works
    in blocks of 1000 x 1000, so memory does not grow with M N.  Raises ValueError for other shapes or smaller sets.
    """
    fake, real = _checked(fake, real)
    within = [_sum_of_others(features) / (len(features) * (len(features) - 1)) for features in (fake, real)]
    between = sum(float(_kernel(x, y).sum()) for x in fake.split(BLOCK) for y in real.split(BLOCK))
    return within[0] + within[1] - 2 * between / (len(fake) * len(real))


def subset_kernel_distance(
    fake: Tensor, real: Tensor, generator: torch.Generator, *, subset_size: int = 1000, num_subsets: int = 100
) -> KernelDistance:
    """Mean and spread of `kernel_distance` over pairs of random subsets, the form in which KID is published.

    KID = mean over num_subsets of MMD^2(subset of fake, subset of real)   [arXiv:1801.01401; defaults of clean-fid]

    fake: [M, D], real: [N, D], any float dtype; 2 <= subset_size <= min(M, N), num_subsets >= 2.  generator: of the
    CPU; each pair of subsets is drawn from it without replacement.  Where clean-fid shrinks the subsets of small sets
    in silence this raises ValueError, because figures of different subset sizes have different spreads.
    """
    fake, real = _checked(fake, real)
    smallest = min(len(fake), len(real))
    if not 2 <= subset_size <= smallest:
        raise ValueError(f"subset_size must be in 2..{smallest}, the smaller set's size, got {subset_size}.")
    if num_subsets < 2:
        raise ValueError(f"num_subsets must be at least 2 to have a spread, got {num_subsets}.")

    def subset(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:subset_size]]

    values = [kernel_distance(subset(fake), subset(real)) for _ in range(num_subsets)]
    values = torch.tensor(values, dtype=torch.float64)
    return KernelDistance(float(values.mean()), float(values.std()))


def gaussian_distance(fake: Tensor, real: Tensor, *, sigma: float = CMMD_SIGMA, scale: float = CMMD_SCALE) -> float:
    """Squared maximum mean discrepancy with a Gaussian kernel, which on unit embeddings of CLIP ViT-L/14-336 is CMMD.

    scale (mean_(ij) k(x_i, x_j) + mean_(ij) k(y_i, y_j) - 2 mean_(ij) k(x_i, y_j)),  k = exp(-|x - y|^2 / (2 sigma^2))
                                                                                                     [arXiv:2401.09603]

    The means include i = j, as in the code of published figures: the estimate of least variance, biased upwards by
    about scale (1 - E k) (1 / M + 1 / N) and never below 0 but by rounding.

    fake: [M, D], real: [N, D], any float dtype, taken to float64; M, N >= 2.  Works in blocks, as `kernel_distance`.
    """
    fake, real = _checked(fake, real)

    def mean(first: Tensor, second: Tensor) -> float:
        """Of k - 1, which is small beside 1: expm1 keeps its digits, and the ones cancel."""
        total = 0.0
        for x in first.split(BLOCK):
            for y in second.split(BLOCK):
                squares = torch.addmm(y.square().sum(1), x, y.T, alpha=-2).add_(x.square().sum(1, keepdim=True))
                total += float(torch.expm1(squares.clamp_(min=0) / (-2 * sigma**2)).sum())
        return total / (len(first) * len(second))

    return scale * (mean(fake, fake) + mean(real, real) - 2 * mean(fake, real))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """k(x_i, y_j), [B, C], of x: [B, D] and y: [C, D]."""
    inner = torch.addmm(torch.ones((), dtype=x.dtype), x, y.T, alpha=1 / x.shape[1])
    return inner * inner * inner


def _sum_of_others(features: Tensor) -> float:
    """Sum of k(x_i, x_j) over all ordered pairs i != j."""
    blocks = features.split(BLOCK)
    total = 0.0
    for index, block in enumerate(blocks):
        square = _kernel(block, block)
        total += float(square.sum() - square.trace())
        total += 2 * sum(float(_kernel(block, other).sum()) for other in blocks[index + 1 :])
    return total


def _checked(fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in float64 on the CPU, after their shapes were found to fit."""
    if fake.ndim != 2 or real.ndim != 2 or fake.shape[1] != real.shape[1]:
        raise ValueError(f"features must be [M, D] and [N, D], got {tuple(fake.shape)} and {tuple(real.shape)}.")
    if min(len(fake), len(real)) < 2:
        raise ValueError(f"an unbiased estimate needs at least 2 features per set, got {len(fake)} and {len(real)}.")
    return fake.detach().to("cpu", torch.float64), real.detach().to("cpu", torch.float64)
