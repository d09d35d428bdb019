"""What the operators' contracts share: the border's checks, and widening before anything is subtracted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

Operator = TypeVar("Operator", bound=Callable[..., Any])


def eager(operator: Operator) -> Operator:
    """An operator that torch.compile does not look into: it calls other compilers' code, and dynamo no jvp."""
    return cast(Operator, torch.compiler.disable(operator))


def opaque(operator: Operator) -> Operator:
    """An operator that records no graph, either."""
    return eager(cast(Operator, torch.no_grad()(operator)))


def check(operator: str, inputs: Mapping[str, Tensor]) -> None:
    """Raise unless the inputs are floats [B, ...] of one non-empty shape and device that carry no tangents."""
    first = next(iter(inputs.values()))
    shape, device = first.shape, first.device
    # One loop and no generators: this is a fifth of a small call's time.
    for name, tensor in inputs.items():
        if tensor.shape != shape or len(shape) < 2 or not first.numel():
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
            raise ValueError(f"{operator} needs equal, non-empty shapes [B, ...], got {shapes}")
        if not tensor.is_floating_point() or tensor.device != device:
            found = ", ".join(f"{name} {tensor.dtype} on {tensor.device}" for name, tensor in inputs.items())
            raise ValueError(f"{operator} needs floats on one device, got {found}")
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"{operator} is a gradient by definition and has no tangent; {name} carries one")


def check_positive(name: str, value: float, why: str) -> None:
    """Raise ValueError, with the reason, unless a setting is above 0."""
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}: {why}")


def check_floor(floor: float) -> None:
    """Raise ValueError unless the least normaliser is above 0."""
    check_positive("floor", floor, "a sample that equals real_x0 would divide by zero")


def wide(value: Tensor) -> Tensor:
    """float32 or better."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def together(*tensors: Tensor) -> list[Tensor]:
    """All in the widest of their dtypes, float32 at least."""
    widest = torch.float32
    for tensor in tensors:
        widest = torch.promote_types(widest, tensor.dtype)
    return [tensor.to(widest) for tensor in tensors]


def like(per_sample: Tensor, x: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to be multiplied with x [B, ...]."""
    return per_sample.view(-1, *[1] * (x.ndim - 1))
