"""Teachers in closed form: the exact denoiser of a Gaussian mixture, with no weights and no training."""

import math

import torch
from torch import Tensor, nn

from fewstep.diffusion.schedules import Coefficients, NoiseSchedule
from fewstep.types import Condition

EVERY_CLASS = -1
"""The null class: the mixture of all components."""


class MixtureNet(nn.Module):
    """E[x0 | x_t] for x0 ~ sum_k w_k N(m_k, C_k), under any schedule; an "x0" network.

    x_t | k ~ N(alpha m_k, V_k),  V_k = alpha^2 C_k + sigma^2 I
    E[x0 | x_t, k] = m_k + alpha C_k V_k^-1 (x_t - alpha m_k),  averaged with p(k | x_t) ~ w_k N(x_t; alpha m_k, V_k).
    A full C_k = Q diag(l) Q^T is decomposed once: V_k is diagonal in the basis Q at every t.

    means: [K, *shape], any shape (an image's [C, H, W], or [D]).  Spread, exactly one of: std [K] (isotropic) or
    [K, *shape] (diagonal), standard deviations >= 0; cov [K, D, D], D = prod(shape), positive semidefinite.
    weights: [K] > 0, normalised here; equal if None.  classes: [K] long >= 0, the class of each component, for
    conditional teachers; a sample's class comes in cond.tensors["class"] [B] long, -1 meaning all components.
    """

    means: Tensor  # [K, D], this and the other buffers float64
    variances: Tensor  # [K, D], the eigenvalues of C_k
    basis: Tensor | None  # [K, D, D], the eigenvectors in columns; None where C_k is diagonal
    log_weights: Tensor  # [K]
    classes: Tensor  # [K]

    def __init__(
        self,
        means: Tensor,
        schedule: NoiseSchedule,
        *,
        std: Tensor | None = None,
        cov: Tensor | None = None,
        weights: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.schedule, self.shape = schedule, tuple(means.shape[1:])
        count, size = len(means), math.prod(self.shape)
        variances, basis = _spectrum(std, cov, count, size)
        share = torch.ones(count) if weights is None else weights
        label = torch.zeros(count, dtype=torch.long) if classes is None else classes
        if share.shape != (count,) or not bool((share > 0).all()):
            raise ValueError(f"weights must be {count} positive numbers, one per mean, got {share.tolist()}.")
        if label.shape != (count,) or label.is_floating_point() or not bool((label >= 0).all()):
            raise ValueError(f"classes must be {count} integers >= 0, one per mean, got {label.tolist()}.")
        self.register_buffer("means", means.double().reshape(count, size))
        self.register_buffer("variances", variances)
        self.register_buffer("basis", basis)
        self.register_buffer("log_weights", share.double().log().log_softmax(0))
        self.register_buffer("classes", label)

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """E[x0 | x_t] (given the class, if cond names one).

        x_t: [B, *shape], any float dtype.  t: [B] float32 in [0, 1], 0 = data.  Returns x_t's shape and dtype; computed
        in float32 or better.
        """
        c, y, variance, log_mass = self._components(x_t, t, cond)
        gain = c.alpha * self.variances.to(y) / variance
        per_component = self.means.to(y) + _rotate(gain * y, None if self.basis is None else self.basis.to(y))
        posterior = log_mass.softmax(dim=1)
        return torch.einsum("bk,bkd->bd", posterior, per_component).reshape(x_t.shape).to(x_t.dtype)

    def log_density(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """log p_t(x_t); its gradient is the exact score.  x_t: [B, *shape].  t: [B] in [0, 1].  Returns [B]."""
        *_, log_mass = self._components(x_t, t, cond)
        return log_mass.logsumexp(dim=1) - 0.5 * math.prod(self.shape) * math.log(2 * math.pi)

    def sample(self, n: int, generator: torch.Generator | None = None, classes: Tensor | None = None) -> Tensor:
        """n draws of x0, of the given classes [n] (-1 or None: all components).  Returns [n, *shape] float32."""
        classes = torch.full((n,), EVERY_CLASS) if classes is None else classes
        weights = self._log_weights(classes.to(self.classes.device)).exp().cpu()
        k = torch.multinomial(weights, 1, generator=generator).squeeze(1).to(self.means.device)
        z = torch.randn(n, 1, self.means.shape[1], generator=generator, dtype=torch.float64).to(self.means.device)
        basis = None if self.basis is None else self.basis[k].unsqueeze(1)
        spread = _rotate(self.variances[k].unsqueeze(1).sqrt() * z, basis).squeeze(1)
        return (self.means[k] + spread).reshape(n, *self.shape).float()

    @property
    def mean(self) -> Tensor:
        """The whole mixture's mean, [*shape] float64."""
        return self.moments()[0]

    @property
    def cov(self) -> Tensor:
        """The whole mixture's covariance, [D, D] float64."""
        return self.moments()[1]

    def moments(self, label: int = EVERY_CLASS) -> tuple[Tensor, Tensor]:
        """Mean [*shape] and covariance [D, D] of one class (-1: of the whole mixture), float64.

        cov = sum_k p_k (C_k + m_k m_k^T) - mean mean^T, taken about the mean.
        """
        p = self._log_weights(torch.tensor([label], device=self.classes.device)).softmax(dim=1)[0]
        mean = p @ self.means
        off = self.means - mean
        if self.basis is None:
            within = torch.diag(p @ self.variances)
        else:
            within = torch.einsum("k,kij,kj,klj->il", p, self.basis, self.variances, self.basis)
        return mean.reshape(self.shape), within + torch.einsum("k,ki,kj->ij", p, off, off)

    def _components(
        self, x_t: Tensor, t: Tensor, cond: Condition | None
    ) -> tuple[Coefficients, Tensor, Tensor, Tensor]:
        """Coefficients; Q^T (x_t - alpha m_k) and V_k's diagonal, [B, K, D]; log(w_k N(x_t)) less 2 pi's, [B, K]."""
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        x = x_t.to(dtype).reshape(len(x_t), 1, -1)
        c = self.schedule.at(t.to(dtype)).like(x)
        y = x - c.alpha * self.means.to(dtype)
        if self.basis is not None:
            y = torch.einsum("kde,bkd->bke", self.basis.to(dtype), y)
        # Clamped for point masses (std 0) without noise: their gain is then 0 / tiny = 0, not 0 / 0.
        variance = (c.alpha**2 * self.variances.to(dtype) + c.sigma**2).clamp_min(torch.finfo(dtype).tiny)
        labels = None if cond is None else cond.tensors.get("class")
        labels = torch.full((len(x),), EVERY_CLASS, device=x.device) if labels is None else labels
        log_mass = self._log_weights(labels).to(dtype) - 0.5 * (y**2 / variance + variance.log()).sum(dim=2)
        return c, y, variance, log_mass

    def _log_weights(self, labels: Tensor) -> Tensor:
        """log p(k | class), [B, K]; -inf for the other classes' components.  labels: [B] long."""
        mine = (labels[:, None] == EVERY_CLASS) | (labels[:, None] == self.classes)
        return self.log_weights.masked_fill(~mine, -torch.inf).log_softmax(dim=1)


def _rotate(y: Tensor, basis: Tensor | None) -> Tensor:
    """Q y, from the eigenbasis back to x's axes.  y: [B, K, D]; basis: [K, D, D] or [B, K, D, D] or None (axes)."""
    return y if basis is None else torch.einsum("...kde,...ke->...kd", basis, y)


def _spectrum(std: Tensor | None, cov: Tensor | None, count: int, size: int) -> tuple[Tensor, Tensor | None]:
    """Variances [K, D] along the axes of `basis` [K, D, D] (None: the coordinate axes), float64."""
    if (std is None) == (cov is None):
        raise ValueError("give exactly one of std ([K] or [K, *shape]) and cov ([K, D, D]).")
    if std is not None:
        if len(std) != count or std.numel() not in (count, count * size) or not bool((std >= 0).all()):
            raise ValueError(f"std must be [K] or [K, *shape], >= 0, for K = {count}; got shape {tuple(std.shape)}.")
        return std.double().reshape(count, -1).square().expand(count, size).contiguous(), None
    assert cov is not None
    if cov.shape != (count, size, size):
        raise ValueError(f"cov must be [K, D, D] = {(count, size, size)}, got {tuple(cov.shape)}.")
    variances, basis = torch.linalg.eigh(cov.double())
    # eigh leaves -1e-16 for a zero direction; a real negative eigenvalue is the caller's mistake.
    if bool((variances < -1e-8 * variances.amax(dim=1, keepdim=True)).any()):
        raise ValueError(f"cov must be positive semidefinite, got eigenvalues down to {variances.min():.3g}.")
    return variances.clamp_min(0), basis
