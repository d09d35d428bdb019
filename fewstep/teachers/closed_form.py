"""Teachers without weights: Gaussians and mixtures whose denoiser is a formula, for tests and first steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import EDM, NoiseSchedule, RectifiedFlow, TrigFlow, VPTable, time_grid
from fewstep.models.denoiser import Backbone, Denoiser
from fewstep.teachers.base import Evaluation, Reals, Teacher, TeacherCard, register_teacher
from fewstep.teachers.points import fitted_student, judge
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
    slow_time: bool = False,
    name: str = "mixture",
) -> Teacher:
    """A Gaussian mixture with its exact denoiser; by default a ring of `modes` narrow Gaussians in the plane.

    means: [K, *shape], any shape.  covs: variances [K] or [K, *shape], or full covariances [K, D, D], D = prod(shape).
    weights: [K], equal by default.  classes: [K] integers >= 0; the prompts are then "class 0", "class 1", ...
    schedule: "flow", "vp", "edm", "trig", or a NoiseSchedule.  fit_steps: how long the small network that generator
    and fake score start from is fitted to the formula (a formula has no weights to start from).  slow_time: that
    network hears of time in slow waves, which consistency methods need (see `PointNet`).
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
        evaluation=Evaluation(lambda x, prompts: judge(net, x), "sw", protocol_hash="closed form"),
        student=lambda: fitted_student(denoiser, net, fit_steps, slow_time=slow_time),
        reals=lambda: _exact_samples(net, labels),
        options=_recorded(
            means=means,
            covs=covs,
            weights=weights,
            classes=classes,
            schedule=schedule,
            modes=modes,
            fit_steps=fit_steps,
            slow_time=slow_time,
        ),
    )


class _Formula(Backbone):
    """The exact denoiser behind the interface of a network."""

    def network_time(self, t: Tensor) -> Tensor:
        return t

    def forward(self, x: Tensor, network_time: Tensor, cond: Condition) -> Tensor:
        return self.module(x, network_time, cond)


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

    def render(self, x: Tensor) -> Tensor:
        return x

    def encode(self, images: Tensor) -> Tensor:
        return images

    def image_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        raise ValueError("a closed-form teacher's samples are points, not pictures; leave --data out")


def _exact_samples(net: MixtureNet, labels: Sequence[int], count: int = 10_000) -> Reals:
    """Draws of the formula itself, the classes in turn."""
    net = copy.deepcopy(net).cpu()
    classes = torch.tensor([labels[i % len(labels)] if labels else EVERY_CLASS for i in range(count)])
    x0 = net.sample(count, torch.Generator().manual_seed(0), classes)
    return Reals(x0, tuple(f"class {c}" if labels else "" for c in classes.tolist()))


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
