"""What derivatives through a whole network cost, by its forward; and a training step that takes them.

    python -m eval.bench_step [NAME ...] [--rounds N] [--threads N]

Contenders take turns, and a round is one call of each.  jvp is `directional_derivative` as it is by default, value and
tangent of one evaluation; dual numbers are torch's own forward mode, whose attention is the math kernel.  A line of
JSON for each goes to eval/results/bench_step.jsonl, in place of the last one of its case.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eval.bench_ops import environment, keep
from eval.memory import prepared

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "eval" / "results" / "bench_step.jsonl"
Call = Callable[[], Any]
NETWORKS: dict[str, dict[str, int]] = {
    "sd3": {"layers": 4, "heads": 8, "size": 32},
    "flux": {"layers": 3, "heads": 8, "side": 16},
    "wan": {"layers": 4, "heads": 6, "frames": 5, "size": 16},
}
"""Small random networks of diffusers' families, of a size that arithmetic and not Python decides about."""
STEPS = {"tbcm step": "configs/fashion_dit_tbcm.yaml", "scm step": "configs/fashion_dit_scm.yaml"}
"""Training steps of fashion-dit with derivatives."""
WARM = 200
"""The first iteration that is taken: by then the derivative has its full share of the loss."""


def main() -> None:
    """Measure, print, keep."""
    names = ["fashion-dit", "fashion-unet", *NETWORKS, *STEPS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all by default: {', '.join(names)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if odd := sorted(set(options.names) - set(names)):
        parser.error(f"no case named {', '.join(odd)}; allowed: {', '.join(names)}")
    torch.set_num_threads(options.threads)
    for name in options.names or names:
        with step(STEPS[name]) if name in STEPS else network(name) as (contenders, told):
            rows = list(measured(name, contenders, options.rounds))
        for row in rows:
            print("{operator}: {contender}: {best_ms} ms best, {median_ms} median of {n}, {ratio} x".format(**row))
        if told:
            print(f"{name}: {told}")
        keep(RESULTS, [row | told | environment() for row in rows])


@contextmanager
def network(name: str) -> Iterator[tuple[dict[str, Call], dict[str, Any]]]:
    """A network's forward, by the default and by the math kernel of attention, and its derivatives."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from fewstep.diffusion import directional_derivative

    f, x = (_random if name in NETWORKS else _embedded)(name)
    t = torch.linspace(0.2, 0.8, len(x))
    where, how = (x, t), (torch.randn_like(x), torch.ones_like(t))

    def math() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return f(x, t)

    contenders: dict[str, Call] = {
        "forward": lambda: f(x, t),
        "forward, math attention": math,
        "jvp": lambda: directional_derivative(f, where, how),
        "jvp, dual numbers": lambda: directional_derivative(f, where, how, mode="dual"),
        "jvp, central differences": lambda: directional_derivative(f, where, how, mode="central"),
    }
    with torch.no_grad():
        ours, theirs = (directional_derivative(f, where, how, mode=mode).tangent for mode in ("exact", "dual"))
        yield contenders, {"relative_error": float((ours - theirs).norm() / theirs.norm())}


@contextmanager
def step(recipe: str) -> Iterator[tuple[dict[str, Call], dict[str, Any]]]:
    """Whole training steps of a recipe, with the derivative as it is and with dual numbers."""
    with prepared(ROOT / recipe, ["method.mode=exact"]) as ours, prepared(ROOT / recipe, ["method.mode=dual"]) as dual:
        told = []
        for trainer in (ours, dual):
            trainer.step(WARM)
            told.append({name: float(trainer.sums[name][-1]) for name in ("consistency", "g/jvp")})
        at = [iter(range(WARM + 1, 10_000)), iter(range(WARM + 1, 10_000))]
        contenders: dict[str, Call] = {
            "step": lambda: ours.step(next(at[0])),
            "step, dual numbers": lambda: dual.step(next(at[1])),
        }
        yield contenders, {f"relative_error of {name}": abs(told[0][name] / told[1][name] - 1) for name in told[0]}


def measured(name: str, contenders: dict[str, Call], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each contender; ratio: to the first one, best by best."""
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    for number in range(rounds + 1):
        for contender, call in contenders.items():
            begun = time.perf_counter()
            call()
            if number:  # the first round warms up
                times[contender].append(time.perf_counter() - begun)
    first = min(next(iter(times.values())))
    for contender, found in times.items():
        told = {"operator": name, "contender": contender, "best_ms": round(1e3 * min(found), 2)}
        told |= {"median_ms": round(1e3 * sorted(found)[len(found) // 2], 2), "n": len(found)}
        yield told | {"ratio": round(min(found) / first, 2)}


def _embedded(name: str) -> tuple[Callable[..., Any], torch.Tensor]:
    from fewstep.api import load_teacher

    teacher = load_teacher(name)
    cond = teacher.encode([teacher.prompts[i % len(teacher.prompts)] for i in range(64)])
    return lambda x, t: teacher.denoiser(x, t, cond).raw, torch.randn(64, *teacher.shape)


def _random(name: str) -> tuple[Callable[..., Any], torch.Tensor]:
    from tests import tiny_networks

    return tiny_networks.made(name, **NETWORKS[name])[1:]


if __name__ == "__main__":
    main()
