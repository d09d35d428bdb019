"""Derivatives of a network along a path: the one place through which sCM, TBCM, MeanFlow, TMD and BOOT take them.

Forward-mode AD loses derivatives without a word: behind an op without a jvp, a detach, an integer cast, inference mode.
Lost whole, the tangent is missing and `directional_derivative` raises, at no cost.  Lost in part (the time's path cut,
the state's fine), the tangent looks sound, and only another estimate shows it: `check_jvp`, once before training.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.diffusion.schedules import like
from fewstep.diffusion.tangent_rules import LOST, Lost
from fewstep.diffusion.tangents import Tangents

Function = Callable[..., Tensor]
Mode = Literal["exact", "dual", "central", "forward"]

STEP = 1e-4
"""Of time.  A network of 1000 t holds sin(1000 t): fashion-dit's central differences in float32 are wrong by 56% at the
5e-3 of TMD, 5% at 1e-3, 0.07% at 1e-4, 0.5% at 1e-5.  Where a network takes t itself, 5e-3 is near float32's best."""
STATE = 50.0
"""The state may move so much farther than time, relative to its size: 5e-3, the best for float32 and no 1000 t."""
LADDER = tuple(1e-2 / 4**k for k in range(6))


class Derivative(NamedTuple):
    """f at the primals, in f's dtype, and its derivative, in float32 or better and never with a graph."""

    value: Tensor
    tangent: Tensor


def directional_derivative(
    f: Function,
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    *,
    mode: Mode = "exact",
    step: float | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    graph: bool = False,
) -> Derivative:
    """f and its derivative along a direction, sample by sample: J = sum_i (df / d primal_i) tangent_i.

    sCM, TBCM: F(x / sigma_d, t) along (dx/dt / sigma_d, 1), both times cos t sin t     [arXiv:2410.11081, section 5.1]
    MeanFlow: u(z, r, t) along (v, 0, 1)     [arXiv:2505.13447]      BOOT: y(e, t) along (0, 1)     [arXiv:2306.05544]
    exact: a tangent beside each value of one ordinary forward, see `Tangents`.
    dual: torch's dual numbers, for networks with autograd.Functions of their own; attention on the math kernel, the
    only one that has a jvp.  Costs 4 to 9 forwards, and one more for a graph.
    central: (f(h) - f(-h)) / 2h, error O(h^2); at an end of `bounds`, sample by sample, (4 f(h) - 3 f(0) - f(2h)) / 2h
    to the inside.  2 calls beside the value's.  TMD's, with 5e-3     [arXiv:2601.09881]
    forward: (f(h) - f(0)) / h, error O(h), backwards at the upper end.  1 call beside the value's; 2% wrong at STEP on
    the embedded teachers, best (0.6%) at 3e-5.

    f: (primals) -> [B, ...], samples independent.  primals: states [B, ...] and times [B] within `bounds`, floats.
    tangents: of their primals' shapes; None = constant.
    step: of finite differences, how far the fastest time moves (default STEP); the state moves at most STATE times as
    far, relative to its size.  They are evaluated in float32 or better; half precision is refused, being all noise.
    graph: whether the value carries one (if gradients are enabled); the tangent never does.
    All calls draw the same random numbers, so that dropout is one function.

    Raises ValueError for what does not fit, RuntimeError if forward-mode AD finds no derivative.
    """
    _check(primals, tangents, mode, step)
    again = _replaying(f, primals[0].device)
    with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
        if mode == "exact":
            value, tangent = _beside(f, primals, tangents)
        else:
            value = f(*primals)
            tangent = (
                _dual(again, primals, tangents)
                if mode == "dual"
                else _difference(again, value.detach(), primals, tangents, mode, step or STEP, bounds)
            )
    if tangent is None:
        raise Lost("this function")
    return Derivative(value, _wide(tangent))


@torch.no_grad()
def check_jvp(
    f: Function,
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    *,
    names: Sequence[str] = (),
    mode: Mode = "exact",
    step: float | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    tolerance: float = 0.02,
) -> dict[str, float]:
    """Whether `directional_derivative` tells the truth about f; called once, on real inputs, before training.

    Each input is moved alone, so that a sound derivative by the state cannot hide a lost one by time.  The oracle is
    central differences at six steps, a factor 4 apart: the pair of neighbours that agree best gives the value and its
    uncertainty.  Costs the derivative and 13 calls an input; one or two samples are enough.
    Give f the network's raw output: a view such as x0 adds smooth terms in t, behind which a time that the network only
    looks up in a table can hide.  What contributes less than `tolerance` is not seen.

    names: of the inputs, for messages.  The rest: see `directional_derivative`.
    Returns name -> relative error, an input that f ignores having error 0.
    Raises RuntimeError naming the input whose derivative is lost or wrong, or if the differences never agree.
    """
    _check(primals, tangents, mode, step)
    names = tuple(names) or tuple(f"primals[{i}]" for i in range(len(primals)))
    again, report = _replaying(f, primals[0].device), {}
    value = again(*primals)
    for i, (name, tangent) in enumerate(zip(names, tangents, strict=True)):
        if tangent is None:
            continue
        alone = [tangent if j == i else None for j in range(len(tangents))]
        steps = [_difference(again, value, primals, alone, "central", h, bounds) for h in LADDER]
        if mode in ("exact", "dual"):
            try:
                found = _beside(again, primals, alone)[1] if mode == "exact" else _dual(again, primals, alone)
            except Lost as error:
                raise RuntimeError(f"the derivative by {name} is lost: {error}") from error
            found = torch.zeros_like(steps[0]) if found is None else _wide(found)
            remedy = LOST
        else:
            found = _difference(again, value, primals, alone, mode, step or STEP, bounds)
            remedy = f"the step {step or STEP:g} does not suit this network's time scale."
        report[name] = _error(found, steps, tolerance, name, remedy)
    return report


def _error(found: Tensor, steps: Sequence[Tensor], tolerance: float, name: str, remedy: str) -> float:
    """Relative error of a derivative, judged by differences at falling steps; RuntimeError if it is not small."""
    changes = any(bool(d.any()) for d in steps)
    if not found.any() and changes:
        raise RuntimeError(f"the derivative by {name} is lost: it is zero, but {name} changes the output; {remedy}")
    gaps = torch.stack([torch.linalg.vector_norm(a - b) for a, b in pairwise(steps)]).nan_to_num(float("inf"))
    best = int(gaps.argmin())
    wanted, doubt = steps[best + 1], float(gaps[best])
    size = float(torch.linalg.vector_norm(wanted))
    if not doubt <= 0.25 * size or (changes and size == 0):  # half precision rounds the smallest steps away
        raise RuntimeError(
            f"the derivative by {name} cannot be checked: finite differences disagree by {doubt:.2g} of {size:.2g}. "
            "The function is noise or jumps: half precision inside, an integer time, non-finite outputs."
        )
    error = float(torch.linalg.vector_norm(found - wanted))
    if not error <= max(tolerance * size, 3 * doubt):
        raise RuntimeError(
            f"the derivative by {name} is wrong by {error:.2g} of {size:.2g}, allowed {tolerance:.1%}; {remedy}"
        )
    return error / size if size else 0.0


def _check(primals: Sequence[Tensor], tangents: Sequence[Tensor | None], mode: str, step: float | None) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"no mode {mode!r}; known: {', '.join(get_args(Mode))}.")
    if step is not None and (mode in ("exact", "dual") or not step > 0):
        raise ValueError(f"step={step} has no meaning in mode {mode!r}; finite differences take a positive one.")
    if len(primals) != len(tangents) or all(tangent is None for tangent in tangents):
        raise ValueError(f"one tangent for each of {len(primals)} primals, not all None; got {len(tangents)}.")
    for i, (primal, tangent) in enumerate(zip(primals, tangents)):
        if tangent is None:
            continue
        if primal.ndim < 1 or len(primal) != len(primals[0]) or tangent.shape != primal.shape:
            shapes = f"{list(tangent.shape)} for primal {list(primal.shape)}"
            raise ValueError(f"tangent {i} must have its primal's shape [B, ...], B = {len(primals[0])}: got {shapes}.")
        if not (primal.is_floating_point() and tangent.is_floating_point()):
            raise ValueError(
                f"primal {i} moves, so it and its tangent must be floats: {primal.dtype}, {tangent.dtype}."
            )
    if torch.is_inference_mode_enabled():
        raise RuntimeError("torch.inference_mode drops forward-mode tangents silently; use torch.no_grad.")
    device = primals[0].device.type
    if mode in ("central", "forward") and torch.is_autocast_enabled(device):
        raise ValueError("finite differences under autocast are noise; wrap them in autocast(enabled=False).")


def _beside(f: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Value, with a graph if gradients are enabled, and tangent, None where no path leads to the output."""
    with Tangents() as moving:
        value = f(*(p if d is None else moving.move(p, d) for p, d in zip(primals, tangents, strict=True)))
        return value, moving.of(value)


@torch.no_grad()
def _dual(f: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor | None:
    """The tangent by torch's dual numbers; None where no path leads from a tangent to the output.

    torch.func.jvp would put zeros there, which nobody can tell from a derivative that is zero.
    """
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        duals = [
            p if d is None else forward_ad.make_dual(p, d.detach().to(p))
            for p, d in zip(primals, tangents, strict=True)
        ]
        return forward_ad.unpack_dual(f(*duals)).tangent


@torch.no_grad()
def _difference(
    f: Function,
    value: Tensor,
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    mode: Mode,
    step: float,
    bounds: tuple[float, float],
) -> Tensor:
    """Finite differences within the bounds of the times, sample by sample; value: f at the primals."""
    if value.dtype.itemsize < 4:
        noise = torch.finfo(value.dtype).eps / step
        raise ValueError(
            f"a {value.dtype} network's finite differences are noise, {noise:.0f} times its output at step {step:g}; "
            "run the network in float32, or use mode='exact'."
        )
    wide, moves = [_wide(p) for p in primals], [d if d is None else _wide(d.detach()) for d in tangents]

    def moved(offset: Tensor) -> list[Tensor]:
        return [p if d is None else p + like(offset, p).to(p) * d for p, d in zip(wide, moves, strict=True)]

    def inside(offset: Tensor) -> Tensor:
        held = torch.ones_like(offset, dtype=torch.bool)
        for p, d in zip(moved(offset), moves, strict=True):
            if p.ndim == 1 and d is not None:
                held = held & (p >= bounds[0]) & (p <= bounds[1])
        return held

    def at(offset: Tensor) -> Tensor:
        return _wide(f(*moved(offset)))

    h, here = _stride(wide, moves, step), _wide(value)
    if mode == "forward":
        h = _somewhere(torch.where(inside(h), h, -h), inside, bounds)
        return (at(h) - here) / like(h, here).to(here)
    both = inside(h) & inside(-h)
    h = torch.where(both | inside(2 * h), h, -h)
    far = _somewhere(torch.where(both, -h, 2 * h), inside, bounds)
    near_change, far_change, h = at(h) - here, at(far) - here, like(h, here).to(here)
    return torch.where(like(both, here), near_change - far_change, 4 * near_change - far_change) / (2 * h)


def _stride(primals: Sequence[Tensor], tangents: Sequence[Tensor | None], step: float) -> Tensor:
    """How far to go along the tangents, [B]: no time moves more than step, no state more than STATE step of its size.

    A derivative is linear in the tangents; dividing by their speed makes its finite difference so, too.
    """
    speeds = []
    for p, d in zip(primals, tangents, strict=True):
        if d is not None and p.ndim == 1:
            speeds.append(d.abs())
        elif d is not None:
            size = torch.hypot(_rms(p), torch.ones((), dtype=p.dtype, device=p.device))
            speeds.append(_rms(d) / size / STATE)
    speed = torch.stack([s.double() for s in speeds]).amax(0)
    return torch.where(speed > 0, step / speed, step)


def _rms(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1).sqrt()


def _somewhere(offset: Tensor, inside: Callable[[Tensor], Tensor], bounds: tuple[float, float]) -> Tensor:
    """offset where its point is within the bounds, else NaN; on the CPU an error (elsewhere it would synchronise)."""
    held = inside(offset)
    if held.device.type == "cpu" and not bool(held.all()):
        bad = held.logical_not().nonzero()[:, 0].tolist()
        raise ValueError(f"times must be in {list(bounds)} with room for two steps to one side; samples {bad} are not.")
    return torch.where(held, offset, float("nan"))


def _replaying(f: Function, device: torch.device) -> Function:
    """f with every call drawing the random numbers that f would draw now; torch's generators stay where they are."""
    cpu = torch.get_rng_state()
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def again(*points: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[device] if gpu is not None else []):
            torch.set_rng_state(cpu)
            if gpu is not None:
                torch.cuda.set_rng_state(gpu, device)
            return f(*points)

    return again


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
