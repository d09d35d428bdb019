"""What the operators of `fewstep_cuda.norm_jvp` take on this machine, beside the same in plain torch and compiled.

    python -m eval.bench_norm [CASE ...] [--threads 1] [--rounds 5]

One JSON line a case and contender: best and median milliseconds of n calls, the bytes that must move at least, GB/s of
the best, and the same for a copy of as many bytes.  Contenders take turns, a few calls each, so that what else the
machine does hits all of them.  `jvp` is value and tangent, by torch.func.jvp of the composition (eager, compiled) and
by the explicit form (a backend's name); `dual` is the backend through dual numbers, as in a network.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import fewstep_cuda as ops

CALLS = 4
"""In a row, after one that is not timed: the allocator's state is then the contender's own."""
Case = tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Any], list[Tensor]]


def adaln(batch: int, length: int, size: int) -> Case:
    """LayerNorm without weights, modulated."""

    def plain(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, (size,), eps=1e-6) * (1 + scale) + shift

    inputs = [torch.randn(batch, length, size), torch.randn(batch, 1, size), torch.randn(batch, 1, size)]
    return plain, ops.adaln, ops.adaln_jvp, inputs


def heads(batch: int, count: int, length: int, size: int) -> Case:
    """RMSNorm of heads, turned."""
    angle = torch.outer(torch.arange(length), 1e-4 ** (torch.arange(size // 2) / (size // 2))).repeat_interleave(2, 1)
    cos, sin, weight = angle.cos(), angle.sin(), torch.randn(size)

    def plain(q: Tensor) -> Tensor:
        z = F.rms_norm(q, (size,), weight, 1e-6)
        turned = torch.stack((-z[..., 1::2], z[..., 0::2]), -1).flatten(-2)
        return z * cos + turned * sin

    def ours(q: Tensor, backend: str) -> Tensor:
        return ops.qk_norm_rope(q, cos, sin, weight=weight, backend=backend)

    def dual(q: Tensor, tq: Tensor, backend: str) -> Any:
        return ops.qk_norm_rope_jvp(q, cos, sin, tq, weight=weight, backend=backend)

    return plain, ours, dual, [torch.randn(batch, count, length, size)]


def group(batch: int, size: int, side: int) -> Case:
    """GroupNorm in 32 groups and SiLU."""
    weight, bias = torch.randn(size), torch.randn(size)

    def plain(x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, 32, weight, bias, 1e-5))

    def ours(x: Tensor, backend: str) -> Tensor:
        return ops.group_norm_silu(x, 32, weight, bias, backend=backend)

    def dual(x: Tensor, tx: Tensor, backend: str) -> Any:
        return ops.group_norm_silu_jvp(x, 32, weight, bias, tx=tx, backend=backend)

    return plain, ours, dual, [torch.randn(batch, size, side, side)]


def gated(batch: int, length: int, size: int) -> Case:
    """x + gate y."""

    def plain(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        return x + gate * y

    inputs = [torch.randn(batch, length, size), torch.randn(batch, 1, size), torch.randn(batch, length, size)]
    return plain, ops.gated_residual, ops.gated_residual_jvp, inputs


CASES: dict[str, Callable[[], Case]] = {
    "adaln-2x256x1152": lambda: adaln(2, 256, 1152),
    "adaln-2x1024x1152": lambda: adaln(2, 1024, 1152),
    "adaln-1x4096x1536": lambda: adaln(1, 4096, 1536),
    "qk_norm_rope-2x16x1024x64": lambda: heads(2, 16, 1024, 64),
    "group_norm_silu-2x320x64x64": lambda: group(2, 320, 64),
    "gated_residual-2x1024x1152": lambda: gated(2, 1024, 1152),
}


def contenders(case: Case, backend: str = "cpu") -> dict[str, Callable[[], Any]]:
    """Name -> value and tangent."""
    plain, ours, openly, inputs = case
    tangents = [torch.randn_like(x) for x in inputs]

    def jvp(*both: Tensor) -> Any:
        return torch.func.jvp(plain, both[: len(inputs)], both[len(inputs) :])

    def dual() -> Any:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents)]
            return forward_ad.unpack_dual(ours(*duals, backend=backend))

    compiled = torch.compile(jvp)
    return {
        "eager": lambda: jvp(*inputs, *tangents),
        "compile": lambda: compiled(*inputs, *tangents),
        backend: lambda: openly(*inputs, *tangents, backend=backend),
        "dual": dual,
        "copy": lambda: [t.clone() for t in (*inputs, *tangents)],
    }


@torch.no_grad()
def rows(name: str, rounds: int) -> Iterator[dict[str, Any]]:
    """One for each contender of a case."""
    torch.manual_seed(0)
    case = CASES[name]()
    runs = contenders(case)
    seconds: dict[str, list[float]] = {run: [] for run in runs}
    for _ in range(rounds):
        for run, call in runs.items():
            call()
            for _ in range(CALLS):
                start = time.perf_counter()
                call()
                seconds[run].append(time.perf_counter() - start)
    size, value = sum(x.nbytes for x in case[-1]), case[-1][0].nbytes
    for run, found in seconds.items():
        moved = 4 * size if run == "copy" else 2 * (size + value)
        yield {
            "case": name,
            "contender": run,
            "best_ms": round(1e3 * min(found), 4),
            "median_ms": round(1e3 * statistics.median(found), 4),
            "n": len(found),
            "bytes": moved,
            "gb_per_s": round(moved / min(found) / 1e9, 2),
        }


def hardware() -> dict[str, Any]:
    """What the numbers depend on."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all if none is named")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if odd := sorted(set(options.cases) - set(CASES)):
        parser.error(f"no case named {', '.join(odd)}; known: {', '.join(CASES)}")
    torch.set_num_threads(options.threads)
    for name in options.cases or CASES:
        for row in rows(name, options.rounds):
            print(json.dumps(row | hardware()), flush=True)


if __name__ == "__main__":
    main()
