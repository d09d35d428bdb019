"""What a GPU does otherwise than the meta device: fused attention, and autocast with its kept copies of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ATTENTION = F.scaled_dot_product_attention

LOWER = frozenset(
    [
        *(ATTENTION, F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d),
        *(torch.matmul, torch.bmm, torch.mm, torch.mv, torch.addmm, torch.addmv, torch.baddbmm, torch.einsum),
        *(Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.mv, Tensor.__matmul__),
    ]
)
"""What autocast computes in its dtype on CUDA, as far as networks here call it     [torch.amp, "CUDA Ops"]"""
FLOAT32 = frozenset(
    [
        *(F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.normalize, F.mse_loss, F.l1_loss, F.softplus),
        *(torch.softmax, torch.exp, torch.log, torch.pow, torch.rsqrt, torch.reciprocal, torch.cumsum, torch.norm),
        *(torch.sum, torch.prod, Tensor.exp, Tensor.log, Tensor.pow, Tensor.__pow__, Tensor.rsqrt, Tensor.softmax),
        *(Tensor.sum, Tensor.prod, Tensor.norm, Tensor.reciprocal, Tensor.cumsum, torch.linalg.vector_norm),
    ]
)
"""What it computes in float32."""


class Fused(TorchFunctionMode):
    """Attention as the kernels of a GPU take it, whose memory grows with N, not N^2; and autocast.

    The meta device runs attention on the math path and knows no autocast.  torch.autocast("cpu") is the switch: that
    is what a trainer on the CPU sets, and what gradient checkpointing sets again as it recomputes.  As on a GPU a
    weight that trains is cast once in a context and the copy is kept until its end; `forget` is to be called before
    each op, and notices that end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._casts: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu") and (func in LOWER or func in FLOAT32):
            dtype = torch.get_autocast_dtype("cpu") if func in LOWER else torch.float32
            args, kwargs = [self._cast(x, dtype) for x in args], {k: self._cast(x, dtype) for k, x in kwargs.items()}
        if func is ATTENTION and args[0].is_meta:
            return fused_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, x: Any, dtype: torch.dtype) -> Any:
        if isinstance(x, list | tuple):
            return type(x)(self._cast(item, dtype) for item in x)
        if not isinstance(x, Tensor) or not x.is_meta or not x.is_floating_point() or x.dtype in (dtype, torch.float64):
            return x
        if not (x.is_leaf and x.requires_grad and dtype != torch.float32):
            return x.to(dtype)
        if id(x) not in self._casts:
            with torch.enable_grad():  # a copy made in a forward without gradient serves the next one, with
                self._casts[id(x)] = x.to(dtype)
        return self._casts[id(x)]

    def forget(self) -> None:
        """Drop the copies of weights if their autocast context has ended."""
        if self._casts and not torch.is_autocast_enabled("cpu"):
            self._casts.clear()


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the shapes of PyTorch's own fused kernels: flash, or the memory-efficient one for masks and float32.

    Arguments and result as of scaled_dot_product_attention, on the meta device.
    """
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    if q.ndim == 3:
        mask = None if attn_mask is None else attn_mask.unsqueeze(-3)
        more = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        return fused_attention(q[:, None], k[:, None], v[:, None], mask, **more)[:, 0]
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)
        attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
    record = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q, k, v, attn_mask, record, dropout_p, is_causal, scale=scale)[0]
