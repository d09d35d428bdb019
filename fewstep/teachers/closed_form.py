"""Teachers without weights: Gaussians and mixtures whose denoiser is a formula, for tests and first steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion import EDM, NoiseSchedule, RectifiedFlow, TrigFlow, VPTable, time_grid
from fewstep.metrics.frechet import Moments, frechet_distance
from fewstep.models.denoiser import Backbone, Denoiser
from fewstep.teachers.base import Evaluation, Teacher, TeacherCard, register_teacher
from fewstep.teachers.toy import EVERY_CLASS, MixtureNet
from fewstep.types import Condition

SCHEDULES = {"flow": RectifiedFlow, "vp": VPTable.scaled_linear, "edm": EDM, "trig": TrigFlow}


@register_teacher("gaussian")
def gaussian(
    mean: Any = (1.5, -0.5),
    cov: Any = ((0.25, 0.1), (0.1, 0.5)),
    *,
    schedule: str | NoiseSchedule = "flow",
    **options: Any,
) -> Teacher:
    """One Gaussian.

    mean: [*shape].  cov: see `mixture`, without its first dimension.  options: `mixture`'s others.
    """
    mean, cov = _numbers("mean", mean), _numbers("cov", cov)
    made = mixture(mean[None], cov[None], schedule=schedule, name="gaussian", **options)
    return replace(made, options=_recorded(mean=mean, cov=cov, schedule=schedule, **options))


@register_teacher("mixture")
def mixture(
    means: Any = None,
    covs: Any = None,
    weights: Any = None,
    *,
    classes: Any = None,
    schedule: str | NoiseSchedule = "flow",
    modes: int = 8,
    fit_steps: int = 400,
    name: str = "mixture",
) -> Teacher:
    """A Gaussian mixture with its exact denoiser; by default a ring of `modes` narrow Gaussians in the plane.

    means: [K, *shape], any shape.  covs: variances [K] or [K, *shape], or full covariances [K, D, D], D = prod(shape).
    weights: [K], equal by default.  classes: [K] integers >= 0; the prompts are then "class 0", "class 1", ...
    schedule: "flow", "vp", "edm", "trig", or a NoiseSchedule.  fit_steps: how long the small network that generator
    and fake score start from is fitted to the formula (a formula has no weights to start from).
    Nested lists will do for tensors.  Raises ValueError for shapes that do not fit.
    """
    law = SCHEDULES[schedule]() if isinstance(schedule, str) and schedule in SCHEDULES else schedule
    if not isinstance(law, NoiseSchedule):
        raise ValueError(f"no schedule {schedule!r}; allowed: {', '.join(SCHEDULES)}, or a NoiseSchedule object")
    centres = _ring(modes) if means is None else _numbers("means", means)
    spread = _spread(centres, torch.full((len(centres),), 0.02) if covs is None else _numbers("covs", covs))
    net = MixtureNet(
        centres,
        law,
        weights=None if weights is None else _numbers("weights", weights),
        classes=None if classes is None else torch.as_tensor(classes, dtype=torch.long),
        **spread,
    )
    labels = tuple(sorted(set(net.classes.tolist()))) if classes is not None else ()
    denoiser = Denoiser(_Formula(net), law, "x0")
    return Teacher(
        denoiser=denoiser,
        encode=_LabelEncoder(labels),
        codec=_Points(),
        shape=net.shape,
        card=TeacherCard(
            name, "closed form", "Apache-2.0", f"{len(centres)} Gaussians in {math.prod(net.shape)} dimensions"
        ),
        prompts=tuple(f"class {i}" for i in labels) or ("",),
        grid=lambda steps: time_grid(steps, clean_end=True),
        solver="heun",
        evaluation=Evaluation(lambda x, prompts: _judge(net, x), "sw", protocol_hash="closed form"),
        student=lambda: fitted_student(denoiser, net, fit_steps),
        options=_recorded(
            means=means,
            covs=covs,
            weights=weights,
            classes=classes,
            schedule=schedule,
            modes=modes,
            fit_steps=fit_steps,
        ),
    )


class _Formula(Backbone):
    """The exact denoiser behind the interface of a network."""

    def network_time(self, t: Tensor) -> Tensor:
        return t

    def forward(self, x: Tensor, network_time: Tensor, cond: Condition) -> Tensor:
        return self.module(x, network_time, cond)


class PointNet(nn.Module):
    """A small MLP on centred, unit-variance points, their time and their class.

    Three hidden layers of `width`.  Input [B, D], time [B] in [0, 1], class [B] (-1 = all).  Output [B, D].
    """

    def __init__(self, dim: int, num_classes: int, width: int = 128) -> None:
        super().__init__()
        self.classes = nn.Embedding(num_classes + 1, width)
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(5), persistent=False)
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


def fitted_student(teacher: Denoiser, net: MixtureNet, steps: int, seed: int = 0) -> Denoiser:
    """A network fitted to the formula by regression, so that distillation starts from the teacher as it always does.

    steps: Adam updates on 256 points each (400 take about a second).
    """
    mean, cov = net.moments()
    std = cov.diagonal().clamp_min(1e-12).sqrt().reshape(net.shape)
    count = int(net.classes.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = PointNet(math.prod(net.shape), count)
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


class _LabelEncoder:
    """ "class 3" -> 3; no classes: nothing to tell."""

    def __init__(self, labels: Sequence[int]) -> None:
        self.labels = labels

    def __call__(self, prompts: Sequence[str]) -> Condition:
        known = {f"class {i}": i for i in self.labels} or {"": EVERY_CLASS}
        if not self.labels and set(prompts) <= {""}:
            return Condition()
        unknown = sorted(set(prompts) - known.keys())
        if unknown:
            allowed = ", ".join(map(repr, known))
            raise ValueError(f"this closed-form teacher knows no prompt {unknown[0]!r}; allowed: {allowed}")
        ids = torch.tensor([known[p] for p in prompts])
        return Condition({"class": ids}, {"class": torch.tensor([EVERY_CLASS])})


class _Points:
    """Diffusion runs on the data themselves."""

    def decode(self, x: Tensor) -> Tensor:
        return x


def _judge(net: MixtureNet, x: Tensor) -> dict[str, float]:
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


def _ring(modes: int) -> Tensor:
    if modes < 1:
        raise ValueError(f"modes must be >= 1, got {modes}")
    angle = 2 * math.pi * torch.arange(modes) / modes
    return 2 * torch.stack([angle.cos(), angle.sin()], 1)


def _recorded(**given: Any) -> dict[str, Any]:
    """A factory's arguments as a configuration file holds them: None left out, tensors as nested lists.

    A NoiseSchedule object has no name there; it is kept as its text, which no factory accepts: loading such a run's
    student without `teacher=` is then refused instead of using another schedule.
    """
    return {k: _nested(v) if isinstance(v, Tensor | list | tuple) else v for k, v in given.items() if v is not None} | (
        {} if isinstance(given.get("schedule"), str) else {"schedule": repr(given["schedule"])}
    )


def _nested(value: Any) -> Any:
    """Nested lists of the same numbers: float64 keeps every digit of a Python float, where float32 would not."""
    if isinstance(value, Tensor):
        return value.tolist()
    return [_nested(item) for item in value] if isinstance(value, list | tuple) else value


def _numbers(name: str, value: Any) -> Tensor:
    """A finite float tensor from nested lists.  Raises ValueError that names the argument."""
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be (nested lists of) numbers of one shape, got {value!r}: {error}") from error
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds a value that is not finite: {value!r}")
    return tensor


def _spread(means: Tensor, covs: Tensor) -> dict[str, Tensor]:
    """The network's std or cov argument from variances or covariances."""
    count, size = len(means), math.prod(means.shape[1:])
    if covs.shape == (count, size, size) and covs.shape != means.shape:
        return {"cov": covs}
    if covs.shape in ((count,), means.shape):
        if (covs < 0).any():
            raise ValueError(f"covs are variances and must be >= 0, got {covs.min():.3g}")
        return {"std": covs.sqrt()}
    raise ValueError(
        f"covs must be [K] = [{count}], [K, *shape] = {list(means.shape)} or [K, D, D] = {[count, size, size]}, "
        f"got {list(covs.shape)}"
    )
