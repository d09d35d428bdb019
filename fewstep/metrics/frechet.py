"""Streaming float64 moments and the Frechet distance between two Gaussians, with torch alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1000
"""Rows that `Moments.folded` takes at a time."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter matrix of feature vectors, in float64.

    m2 = sum_i (f_i - mean)(f_i - mean)^T. Two sets are joined exactly by Chan's rule [Chan, Golub, LeVeque 1983, in
    matrix form], so neither the batch size nor the order of merging changes the result beyond rounding, about 1e-15.

    count: int.  mean: [D] float64.  m2: [D, D] float64.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, dim: int) -> Moments:
        """Moments of no vectors of length dim."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of one batch.  features: [N, D], any float dtype, N >= 0."""
        if features.ndim != 2:
            raise ValueError(f"features must be [N, D], got shape {tuple(features.shape)}.")
        if len(features) == 0:
            return cls.empty(features.shape[1])
        wide = features.detach().to("cpu", torch.float64)
        mean = wide.mean(0)
        centred = wide - mean
        return cls(len(wide), mean, centred.T @ centred)

    @classmethod
    def folded(cls, features: Tensor) -> Moments:
        """`of`, 1000 rows at a time: in less memory, and with the same bits whatever batches the rows come from.

        features: [N, D] in order of their samples' index.
        """
        moments = cls.empty(features.shape[1])
        for part in features.split(CHUNK):
            moments = moments.update(part)
        return moments

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together, Chan's rule.  Raises ValueError if the lengths D differ."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"cannot merge features of length {len(self.mean)} with length {len(other.mean)}.")
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        m2 = self.m2 + other.m2 + torch.outer(gap, gap) * (self.count * other.count / count)
        return Moments(count, mean, m2)

    def update(self, features: Tensor) -> Moments:
        """Moments of the set with one more batch.  features: [N, D]."""
        return self.merge(Moments.of(features))

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance m2 / (n - 1), [D, D] float64.  Raises ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {self.count}.")
        return self.m2 / (self.count - 1)


def _sqrt_psd(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semidefinite [D, D] matrix; rounding below zero counts as zero."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """Squared Frechet distance of two Gaussians.

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (R S2 R)^(1/2)),  R = S1^(1/2)     [Dowson and Landau 1982; FID: arXiv:1706.08500]

    mu1, mu2: [D].  sigma1, sigma2: [D, D].  All are taken to float64.  Returns a float >= 0: a negative value can only
    be rounding (about -1e-10 for equal sets) and is returned as 0. The trace of the root is a sum of square roots of
    eigenvalues of the symmetric R S2 R, which is stable where a matrix square root of S1 S2 is not.
    """
    mu1, sigma1, mu2, sigma2 = (part.detach().to("cpu", torch.float64) for part in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != (len(mu1), len(mu1)):
        raise ValueError(
            f"means {tuple(mu1.shape)}, {tuple(mu2.shape)} and covariances {tuple(sigma1.shape)}, "
            f"{tuple(sigma2.shape)} do not belong together; expected [D] and [D, D]."
        )
    root = _sqrt_psd(sigma1)
    product = root @ sigma2 @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    value = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(float(value), 0.0)


def moments_distance(first: Moments, second: Moments) -> float:
    """Squared Frechet distance between two sets given by their moments; warns where n <= D makes it meaningless."""
    for moments in (first, second):
        if moments.count <= len(moments.mean):
            warnings.warn(
                f"{moments.count} samples for {len(moments.mean)} features: the covariance is singular and the "
                "Frechet distance is biased upwards; take more samples.",
                stacklevel=2,
            )
    return frechet_distance(first.mean, first.cov, second.mean, second.cov)
