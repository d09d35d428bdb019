"""What attention with its tangent costs beside attention without: JSON lines, one a case.

    python -m eval.bench_attention [--lengths 128 256 1024 4096] [--heads 8] [--size 64] [--seconds 4]
        [--cases sdpa cpu] [--memory]

Contenders take turns, so that a loaded machine is unfair to none; `best` is to be compared with `best`.  `memory` is
what a process needs beyond what it held before the call, from the kernel's high-water mark; each case has its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep_cuda import attention_jvp, backends

Case = Callable[..., Any]


def sdpa(q, k, v, *_):
    return F.scaled_dot_product_attention(q, k, v)


def math(q, k, v, *_):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def math_jvp(q, k, v, tq, tk, tv):
    """What a network's derivative costs without a kernel: torch has forward mode for this one only."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(F.scaled_dot_product_attention, (q, k, v), (tq, tk, tv))


def chunked(*inputs):
    return attention_jvp(*inputs, backend="chunked")


def cpu(*inputs):
    return attention_jvp(*inputs, backend="cpu")


def cpu_constant_keys(q, k, v, tq, *_):
    """Keys and values of a text: two products fewer."""
    return attention_jvp(q, k, v, tq, backend="cpu")


CASES: dict[str, Case] = {case.__name__: case for case in (sdpa, math, math_jvp, chunked, cpu, cpu_constant_keys)}


def usable() -> dict[str, Case]:
    """The cases that can run here."""
    return {name: case for name, case in CASES.items() if not name.startswith("cpu") or backends()["cpu"] == "ok"}


def inputs(length: int, heads: int, size: int) -> list[torch.Tensor]:
    """q, k, v and their tangents, [1, heads, length, size] in float32."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, length, size, generator=generator) for _ in range(6)]


@torch.no_grad()
def times(cases: dict[str, Case], given: list[torch.Tensor], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, the cases in turn, for about `seconds` in all; after one call each to warm up."""
    for case in cases.values():
        case(*given)
    found: dict[str, list[float]] = {name: [] for name in cases}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, case in cases.items():
            start = time.perf_counter()
            case(*given)
            found[name].append(time.perf_counter() - start)
    return found


def memory(name: str, length: int, heads: int, size: int) -> float:
    """Extra peak memory of a call, in MB, in a process of its own; after a small one, which loads the libraries."""
    program = (
        "import torch, sys; from eval import bench_attention as b; torch.set_num_threads(int(sys.argv[1]));"
        f"torch.set_grad_enabled(False); b.CASES[{name!r}](*b.inputs(64, {heads}, {size}));"
        f"given = b.inputs({length}, {heads}, {size}); before = b.resident('VmRSS'); b.forget_peak();"
        f"out = b.CASES[{name!r}](*given); print(b.resident('VmHWM') - before)"
    )
    command = [sys.executable, "-c", program, str(torch.get_num_threads())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def resident(what: str) -> float:
    """MB that this process holds (VmRSS), or held at most (VmHWM)."""
    line = next(x for x in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if x.startswith(what))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def surroundings() -> dict[str, Any]:
    """Commit, hardware and versions."""
    told = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    model = [x for x in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if x.startswith("model name")]
    return {
        "commit": told.stdout.strip(),
        "processor": model[0].partition(": ")[2] if model else platform.processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 1024, 4096])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing, for each length")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(usable()), help="sdpa is always one")
    parser.add_argument("--memory", action="store_true", help="extra peak memory, too")
    chosen = parser.parse_args()
    print(json.dumps(surroundings()), flush=True)
    for length in chosen.lengths:
        cases = {name: case for name, case in CASES.items() if name in (sdpa.__name__, *chosen.cases)}
        shape = (length, chosen.heads, chosen.size)
        found = times(cases, inputs(*shape), chosen.seconds)
        unit = min(found["sdpa"])
        for name, seconds in found.items():
            line = {
                "case": name,
                "length": length,
                "heads": chosen.heads,
                "size": chosen.size,
                "best_ms": round(1e3 * min(seconds), 3),
                "median_ms": round(1e3 * statistics.median(seconds), 3),
                "n": len(seconds),
                "of_sdpa": round(min(seconds) / unit, 2),
            }
            if chosen.memory:
                line["extra_mb"] = round(memory(name, *shape), 1)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
