"""Contenders for attention with its tangent; as a script, what memory they need.

    python -m eval.bench_attention [NAME ...] [--length 4096]

As a script: extra peak memory of a call, in MB, each in a process of its own, as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from eval.bench_case import Call, Case, draw, kernels
from fewstep_cuda import attention_jvp

LENGTHS = (128, 256, 1024, 4096)
HEADS, SIZE = 8, 64


def cases(device: str) -> list[Case]:
    """Self-attention of one sample, 8 heads of 64, at four lengths."""
    return [_case(length, device) for length in LENGTHS]


def _case(length: int, device: str) -> Case:
    """moved: q, k, v and their tangents read, two outputs written."""

    def prepared(contender: Callable[..., Any]) -> Call:
        return partial(contender, *inputs(length, device))

    made = {name: partial(prepared, contender) for name, contender in contenders_on(device).items()}
    return Case("attention_jvp", f"N={length}", (1, HEADS, length, SIZE), 8 * 4 * HEADS * length * SIZE, device, made)


def inputs(length: int, device: str = "cpu") -> list[Tensor]:
    """q, k, v and their tangents, [1, 8, length, 64] in float32."""
    return draw((1, HEADS, length, SIZE), 6, device)


def forward(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Any:
    """Attention without a tangent."""
    return F.scaled_dot_product_attention(q, k, v)


def math_forward(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Any:
    """The same on the one kernel that has forward mode."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def math_jvp(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor) -> Any:
    """What a network's derivative costs without a kernel."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(F.scaled_dot_product_attention, (q, k, v), (tq, tk, tv))


def constant_keys(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, *_: Tensor, backend: str) -> Any:
    """Keys and values of a text: two products fewer."""
    return attention_jvp(q, k, v, tq, backend=backend)


def contenders_on(device: str) -> dict[str, Callable[..., Any]]:
    """By name."""
    made: dict[str, Callable[..., Any]] = {
        "SDPA forward": forward,
        "math forward": math_forward,
        "math jvp": math_jvp,
        "chunked": partial(attention_jvp, backend="chunked"),
    }
    for backend in kernels("attention_jvp", device):
        made[f"{backend} kernel"] = partial(attention_jvp, backend=backend)
        made[f"{backend} kernel, constant keys"] = partial(constant_keys, backend=backend)
    return made


def memory(name: str, length: int) -> float:
    """Extra peak memory of a call, in MB, in a process of its own; after a small one, which loads the libraries."""
    program = (
        "import torch; from eval import bench_attention as b; torch.set_num_threads(1);"
        f"call = b.contenders_on('cpu')[{name!r}]; call(*b.inputs(64)); given = b.inputs({length});"
        "before = b.resident('VmRSS'); b.forget_peak(); out = call(*given); print(b.resident('VmHWM') - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def resident(what: str) -> float:
    """MB that this process holds (VmRSS), or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(what))) / 1024


def forget_peak() -> None:
    """VmHWM counts from here."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def main() -> None:
    """Print what each needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = contenders_on("cpu")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--length", type=int, default=4096)
    options = parser.parse_args()
    for name in options.names or known:
        told = {"contender": name, "length": options.length, "extra_mb": round(memory(name, options.length), 1)}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
