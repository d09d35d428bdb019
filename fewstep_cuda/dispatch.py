"""Which implementation of an operator runs: the caller's argument, else FEWSTEP_KERNELS, else the fastest that can.

One asked for by name runs or raises.  Left to choose, `auto` takes the first of the device's order that can run, has
the operator and takes the inputs' dtype; a compiler that is missing is said once.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("fewstep")

REFERENCE, CHUNKED, CPU, TRITON, CUDA, AUTO = "reference", "chunked", "cpu", "triton", "cuda", "auto"
BACKENDS = (REFERENCE, CHUNKED, CPU, TRITON, CUDA)
HALF = (torch.float32, torch.bfloat16, torch.float16)
DTYPES: dict[str, tuple[torch.dtype, ...] | None] = {
    REFERENCE: None,
    CHUNKED: None,
    CPU: (torch.float32,),
    TRITON: HALF,
    CUDA: HALF,
}
"""What a backend takes; None = every float."""
DEVICES = {CPU: "cpu", TRITON: "cuda", CUDA: "cuda"}
"""Where a backend runs; those not named run anywhere, and Triton's interpreter on the CPU."""
COMPILED = (CPU, CUDA)
"""Backends with sources that a compiler of this machine must make first."""
ORDER = {"cuda": (CUDA, TRITON, CHUNKED, REFERENCE), "cpu": (CPU, CHUNKED, REFERENCE), "meta": (CHUNKED, REFERENCE)}
"""What `auto` tries, by the inputs' device; on others, the reference.  Plans run on meta: of memory, as the kernels."""
KERNELS: dict[str, dict[str, str]] = {
    "attention_jvp": {
        REFERENCE: "fewstep_cuda.attention_jvp:reference",
        CHUNKED: "fewstep_cuda.attention_chunked:chunked",
        CPU: "fewstep_cuda.cpu.attention_jvp:forward",
        TRITON: "fewstep_cuda.triton.attention_jvp:forward",
    },
    "attention_jvp_backward": {
        REFERENCE: "fewstep_cuda.attention_jvp:reference_backward",
        CHUNKED: "fewstep_cuda.attention_chunked:chunked_backward",
        CPU: "fewstep_cuda.cpu.attention_jvp:backward",
        TRITON: "fewstep_cuda.triton.attention_jvp:backward",
    },
    "score_difference": {
        REFERENCE: "fewstep_cuda.score_difference:reference",
        CPU: "fewstep_cuda.cpu.score_difference:launch",
        TRITON: "fewstep_cuda.triton.score_difference:launch",
        CUDA: "fewstep_cuda.cuda.score_difference:launch",
    },
    "score_difference_from_raw": {
        REFERENCE: "fewstep_cuda.score_difference:reference_from_raw",
        CPU: "fewstep_cuda.cpu.score_difference:launch_from_raw",
        TRITON: "fewstep_cuda.triton.score_difference:launch_from_raw",
        CUDA: "fewstep_cuda.cuda.score_difference:launch_from_raw",
    },
    "score_difference_two": {
        REFERENCE: "fewstep_cuda.score_difference_two:reference",
        CPU: "fewstep_cuda.cpu.score_difference:launch_two",
        TRITON: "fewstep_cuda.triton.score_difference:launch_two",
        CUDA: "fewstep_cuda.cuda.score_difference:launch_two",
    },
    "score_identity": {
        REFERENCE: "fewstep_cuda.score_identity:reference",
        CPU: "fewstep_cuda.cpu.score_difference:launch_identity",
        TRITON: "fewstep_cuda.triton.score_difference:launch_identity",
        CUDA: "fewstep_cuda.cuda.score_difference:launch_identity",
    },
    "tangent_normalise": {
        REFERENCE: "fewstep_cuda.tangent_normalise:reference",
        CPU: "fewstep_cuda.cpu.score_difference:launch_normalise",
        TRITON: "fewstep_cuda.triton.score_difference:launch_normalise",
        CUDA: "fewstep_cuda.cuda.score_difference:launch_normalise",
    },
    "adaln": {
        REFERENCE: "fewstep_cuda.norm_jvp:reference",
        CPU: "fewstep_cuda.cpu.norm_jvp:adaln",
        TRITON: "fewstep_cuda.triton.norm_jvp:adaln",
    },
    "qk_norm_rope": {
        REFERENCE: "fewstep_cuda.norm_jvp:reference",
        CPU: "fewstep_cuda.cpu.norm_jvp:qk_norm_rope",
        TRITON: "fewstep_cuda.triton.norm_jvp:qk_norm_rope",
    },
    "group_norm_silu": {
        REFERENCE: "fewstep_cuda.norm_jvp:reference",
        CPU: "fewstep_cuda.cpu.norm_jvp:group_norm_silu",
        TRITON: "fewstep_cuda.triton.norm_jvp:group_norm_silu",
    },
    "gated_residual": {
        REFERENCE: "fewstep_cuda.norm_jvp:gated_reference",
        CPU: "fewstep_cuda.cpu.norm_jvp:gated_residual",
        TRITON: "fewstep_cuda.triton.norm_jvp:gated_residual",
    },
}
"""Operator -> backend -> module:function.  A kernel is one file in `fewstep_cuda/<backend>/` and one line here.

All of an operator's functions have the same signature: they get checked inputs of one device, and no gradients.
"""


def backends() -> dict[str, str]:
    """Name of each backend -> "ok", or why it cannot run here."""
    return {name: _status(name) for name in BACKENDS}


def operators() -> dict[str, list[str]]:
    """Name of each operator -> the backends that have it."""
    return {name: list(found) for name, found in KERNELS.items()}


def check_environment() -> None:
    """Raise ValueError if FEWSTEP_KERNELS names no backend; whether one can run is asked at each call."""
    name = os.environ.get("FEWSTEP_KERNELS") or AUTO
    if name not in (AUTO, *BACKENDS):
        raise ValueError(_unknown("FEWSTEP_KERNELS", name))


def _unknown(source: str, name: str) -> str:
    return f"{source}={name!r}: no such backend; known: {', '.join((AUTO, *BACKENDS))}"


def kernel(operator: str, tensors: Sequence[Tensor | None], backend: str | None = None) -> Callable[..., Any]:
    """The function that runs an operator on these tensors (None: an input that was left out).

    backend: a name, "auto", or None for what FEWSTEP_KERNELS says, which is "auto" if it says nothing.
    Raises ValueError, with the reason and the remedy, if the one that was asked for by name cannot run.
    """
    source = "backend" if backend is not None else "FEWSTEP_KERNELS"
    name = backend if backend is not None else os.environ.get("FEWSTEP_KERNELS") or AUTO
    found = [tensor for tensor in tensors if tensor is not None]
    if name == AUTO:
        return _load(KERNELS[operator][_automatic(operator, found)])
    if name not in BACKENDS:
        raise ValueError(_unknown(source, name))
    if refusal := _refusal(operator, name, found):
        usable = ", ".join(known for known in KERNELS[operator] if not _refusal(operator, known, found))
        raise ValueError(f"{source}={name!r} cannot run {operator}: {refusal}; usable here: auto, {usable}")
    return _load(KERNELS[operator][name])


def _automatic(operator: str, tensors: Sequence[Tensor]) -> str:
    for name in ORDER.get(tensors[0].device.type, (REFERENCE,)):
        refusal = _refusal(operator, name, tensors)
        if not refusal:
            return name
        if missing := name == CPU and name in KERNELS[operator] and _missing(operator, name):
            _say_once(missing)
    return REFERENCE


def _refusal(operator: str, name: str, tensors: Sequence[Tensor]) -> str:
    """Why a backend cannot run an operator on these tensors; "" if it can."""
    if name not in KERNELS[operator]:
        return f"it has no kernel for it, only {', '.join(KERNELS[operator])} have"
    takes, wanted = DTYPES[name], DEVICES.get(name)
    if takes and (bad := {tensor.dtype for tensor in tensors} - set(takes)):
        return f"it takes {', '.join(map(str, takes))}, not {', '.join(map(str, bad))}"
    on = tensors[0].device.type
    if wanted and on != wanted and not (name == TRITON and interpreted()):
        return f"its tensors must be on {wanted}, not {on}"
    return _missing(operator, name)


def _missing(operator: str, name: str) -> str:
    """What this machine lacks for a backend's kernel of an operator; "" if nothing.  Compiles what is not yet."""
    status = _status(name)
    if status != "ok" or name not in COMPILED:
        return "" if status == "ok" else status
    source = KERNELS[operator][name].partition(":")[0].rpartition(".")[2]
    return _load(f"fewstep_cuda.{name}:failure")(source)


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _status(name: str) -> str:
    return "ok" if name in (REFERENCE, CHUNKED) else _load(f"fewstep_cuda.{name}:status")()


@cache
def _load(where: str) -> Callable[..., Any]:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


@cache
def _say_once(why: str) -> None:
    log.warning("kernels: %s; operators run in plain torch, which is slower", why)
