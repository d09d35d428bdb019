"""What a GPU does otherwise than the meta device: fused attention, and autocast with its kept copies of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LOWER = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d.input", "matmul", "einsum")
FLOAT32 = ("layer_norm", "group_norm", "rms_norm", "softmax.int", "log_softmax.int", "cosine_similarity")
"""What autocast computes in its dtype and in float32 on CUDA, of the ops that others are made of    [torch.amp]"""
ATTENTION = "scaled_dot_product_attention"


class Fused:
    """A context in which the meta device behaves as a GPU: see the module.

    Its own attention takes the math path, whose memory is of N^2, and it knows no autocast.  torch.autocast("cpu") is
    the switch: that is what a trainer on the CPU sets, and what gradient checkpointing sets again as it recomputes.
    As on a GPU a weight that trains is cast once in a context and the copy kept until its end, where `forget` is to be
    called.  A backward pass has a context for each block that it computes again: copies are not kept there.
    Ops are overridden for the meta device alone, below Python: a recomputation in a backward pass meets them too.
    """

    def __init__(self, keeps: Callable[[Tensor], None] = lambda copy: None) -> None:
        """keeps: told of each kept copy of a weight."""
        self._casts: dict[int, Tensor] = {}
        self._keeps = keeps

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within it ops on the meta device are overridden."""
        library = torch.library.Library("aten", "IMPL")
        for name in LOWER:
            library.impl(name, self._casting(name, lower=True), "AutogradMeta")
        for name in FLOAT32:
            library.impl(name, self._casting(name, lower=False), "AutogradMeta")
        library.impl(ATTENTION, self._attention, "AutogradMeta")
        try:
            yield
        finally:
            self._casts.clear()
            library._destroy()

    def _casting(self, name: str, *, lower: bool) -> Callable[..., Tensor]:
        packet, _, overload = name.partition(".")
        decompose = getattr(getattr(torch.ops.aten, packet), overload or "default").decompose

        def run(*args: Any, **kwargs: Any) -> Tensor:
            return decompose(*self._cast(args, lower), **self._cast(kwargs, lower))

        return run

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        return fused_attention(*self._cast(args, True), **self._cast(kwargs, True))

    def _cast(self, x: Any, lower: bool) -> Any:
        """Every float tensor in x as autocast gives it to such an op; x itself without autocast."""
        if not torch.is_autocast_enabled("cpu"):
            return x
        if isinstance(x, list | tuple):
            return type(x)(self._cast(item, lower) for item in x)
        if isinstance(x, dict):
            return {name: self._cast(item, lower) for name, item in x.items()}
        dtype = torch.get_autocast_dtype("cpu") if lower else torch.float32
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype in (dtype, torch.float64):
            return x
        recomputing = torch._C._current_graph_task_id() != -1
        if recomputing or not (lower and x.is_leaf and x.requires_grad):
            return x.to(dtype)
        if id(x) not in self._casts:
            self._casts[id(x)] = x.to(dtype)
            self._keeps(self._casts[id(x)])
        return self._casts[id(x)]

    def forget(self) -> None:
        """Drop the copies of weights: their autocast context has ended."""
        self._casts.clear()


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the shapes of PyTorch's own fused kernels: flash, or the memory-efficient one for masks and float32.

    Arguments and result as of scaled_dot_product_attention, on the meta device.
    """
    more: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    if q.ndim == 3:
        mask = None if attn_mask is None else attn_mask.unsqueeze(-3)
        return fused_attention(q[:, None], k[:, None], v[:, None], mask, **more)[:, 0]
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)
        attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
    record = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, record, **more)[0]
