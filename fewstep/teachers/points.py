"""What a closed-form teacher's students are made of, and how they are judged: small networks on points."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from fewstep.diffusion import NoiseSchedule
from fewstep.metrics.frechet import Moments, frechet_distance
from fewstep.models.denoiser import Backbone, Denoiser
from fewstep.teachers.toy import EVERY_CLASS, MixtureNet
from fewstep.types import Condition


class PointNet(nn.Module):
    """A small MLP on centred, unit-variance points, their time and their class.

    Three hidden layers of `width`.  Input [B, D], time [B] in [0, 1], class [B] (-1 = all).  Output [B, D].
    slow: it hears of time in waves up to pi t, not 16 pi t.  Continuous-time consistency moves the network along the
    very tangent that it changes, a transport in t, where a wave grows if rate x frequency^2 is large; hence the
    low-frequency embeddings of its papers.
    """

    def __init__(self, dim: int, num_classes: int, width: int = 128, slow: bool = False) -> None:
        super().__init__()
        self.classes = nn.Embedding(num_classes + 1, width)
        waves = torch.tensor([0.125, 0.25, 0.5, 0.75, 1.0]) if slow else 2.0 ** torch.arange(5)
        self.register_buffer("frequencies", math.pi * waves, persistent=False)
        self.inner = nn.Linear(dim + 11, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.outer = nn.Linear(width, dim)

    frequencies: Tensor

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """The raw output, [B, D]."""
        angles = t[:, None] * self.frequencies.to(t)
        time = torch.cat([t[:, None], angles.sin(), angles.cos()], 1).to(x)
        hidden = self.inner(torch.cat([x, time], 1)) + self.classes(label + 1)
        for layer in self.layers:
            hidden = hidden + layer(nn.functional.silu(hidden))
        return self.outer(nn.functional.silu(hidden))


class PointBackbone(Backbone):
    """Preconditioning of EDM generalised to any schedule, centred on the data: an "x0" network.

    V = alpha^2 s^2 + sigma^2,  y = x_t - alpha m
    x0 = m + (alpha s^2 / V) y + (sigma s / sqrt V) F(y / sqrt V, t)     [EDM, arXiv:2206.00364, eq. 7; alpha, m: ours]
    """

    def __init__(self, module: nn.Module, schedule: NoiseSchedule, mean: Tensor, std: Tensor) -> None:
        super().__init__(module)
        self.schedule = schedule
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())

    mean: Tensor
    std: Tensor

    @property
    def taps(self) -> tuple[str, ...]:
        """The last hidden layer."""
        return ("layers.1",)

    @property
    def time_embedding(self) -> str:
        """The first layer, which hears of the time together with the point."""
        return "inner"

    def network_time(self, t: Tensor) -> Tensor:
        """t itself."""
        return t

    def forward(self, x: Tensor, network_time: Tensor, cond: Condition) -> Tensor:
        """The clean estimate, x's shape."""
        label = cond.tensors.get("class")
        label = torch.full((len(x),), EVERY_CLASS, device=x.device) if label is None else label
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        c = self.schedule.at(network_time.to(x.dtype)).like(x)
        mean, std = self.mean.to(x), self.std.to(x)
        y, variance = x - c.alpha * mean, (c.alpha * std).square() + c.sigma.square()
        raw = self.module((y / variance.sqrt()).flatten(1).to(dtype), network_time, label).reshape(x.shape)
        return (mean + c.alpha * std.square() / variance * y + c.sigma * std / variance.sqrt() * raw).to(dtype)


def fitted_student(
    teacher: Denoiser, net: MixtureNet, steps: int, seed: int = 0, *, slow_time: bool = False
) -> Denoiser:
    """A network fitted to the formula by regression, so that distillation starts from the teacher as it always does.

    steps: Adam updates on 256 points each (400 take about a second).  slow_time: see `PointNet`.
    """
    mean, cov = net.moments()
    std = cov.diagonal().clamp_min(1e-12).sqrt().reshape(net.shape)
    count = int(net.classes.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = PointNet(math.prod(net.shape), count, slow=slow_time)
    backbone = PointBackbone(module, teacher.schedule, mean, std).to(next(net.buffers()).device)
    student = Denoiser(backbone, teacher.schedule, "x0")
    optimizer = torch.optim.Adam(student.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        x0 = net.sample(256, generator).to(mean.device)
        t = (torch.randint(1000, (256,), generator=generator) / 999).to(mean.device)
        label = torch.randint(-1, count, (256,), generator=generator).to(mean.device)
        cond = Condition({"class": label})
        x_t = teacher.schedule.add_noise(x0, torch.randn(x0.shape, generator=generator).to(x0), t)
        with torch.no_grad():
            target = teacher(x_t, t, cond).x0
        c = teacher.schedule.at(t).like(x0)
        scale = c.sigma.clamp_min(2e-3) * backbone.std / ((c.alpha * backbone.std).square() + c.sigma.square()).sqrt()
        loss = ((student(x_t, t, cond).x0 - target) / scale).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def judge(net: MixtureNet, x: Tensor) -> dict[str, float]:
    """sw: sliced Wasserstein-1 distance to exact samples.  fd: Frechet distance to the exact moments.  modes: share of
    components that hold at least a quarter of their mass.  inside: share of samples near a component (see `_nearest`).
    """
    flat = x.flatten(1).double().cpu()
    net = copy.deepcopy(net).cpu()
    mean, cov = net.moments()
    seen = Moments.of(flat)
    component, distance = _nearest(net, flat)
    share = torch.bincount(component, minlength=len(net.means)) / len(flat)
    return {
        "sw": sliced_wasserstein(flat, net.sample(len(flat), torch.Generator().manual_seed(0)).flatten(1).double()),
        "fd": frechet_distance(seen.mean, seen.cov, mean.flatten(), cov),
        "modes": float((share >= 0.25 * net.log_weights.exp()).double().mean()),
        "inside": float((distance <= math.sqrt(flat.shape[1]) + 2).double().mean()),
    }


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 64) -> float:
    """Mean over random directions of the 1-Wasserstein distance of the projections; x, y: [N, D], equal N.

    In one dimension the distance is that of sorted values, so it needs neither bins nor a fit.
    """
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(x.shape[1], directions, generator=generator, dtype=x.dtype)
    axes = axes / axes.norm(dim=0)
    return float(((x @ axes).sort(0).values - (y @ axes).sort(0).values).abs().mean())


def _nearest(net: MixtureNet, x: Tensor) -> tuple[Tensor, Tensor]:
    """The component nearest in Mahalanobis distance, and that distance, for each row of x [N, D].

    A component's own samples lie about sqrt(D) away, and within sqrt(D) + 2 with probability above 0.99 for D <= 2.
    """
    y = x[:, None] - net.means
    if net.basis is not None:
        y = torch.einsum("kde,nkd->nke", net.basis, y)
    distance = (y.square() / net.variances.clamp_min(1e-12)).sum(2).sqrt()
    return distance.argmin(1), distance.min(1).values
