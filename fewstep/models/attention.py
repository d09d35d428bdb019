"""Whose kernels a diffusers network's attention takes."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

Attention = Literal["auto", "sdpa", "xformers"]
"""auto: as the network comes.  sdpa: torch's own choice among its kernels.  xformers: memory-efficient attention."""


def choose_attention(module: nn.Module, name: Attention) -> None:
    """Let every attention of a diffusers network take these kernels.

    Newer networks are told by `set_attention_backend`; UNets, which do not hear of it, get other processors.
    Raises ValueError for a network whose attention knows one kind only, as CogView4's, and if diffusers refuses.
    """
    if name == "auto":
        return
    from diffusers.models import attention_dispatch
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention as OldAttention
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor

    found = [m for m in module.modules() if isinstance(m, AttentionModuleMixin | OldAttention)]
    processors = [m.processor for m in found]
    if found and all(hasattr(p, "_attention_backend") for p in processors):
        with attention_dispatch.attention_backend("native"):  # it is set for the whole process, and put back here
            try:
                module.set_attention_backend("native" if name == "sdpa" else name)  # type: ignore[operator]
            except RuntimeError as error:
                raise ValueError(f"train.attention = {name!r}: {error}") from error
    elif found and all(type(p) in (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor) for p in processors):
        made: Any = AttnProcessor2_0() if name == "sdpa" else XFormersAttnProcessor()
        for attention in found:
            attention.set_processor(made)
    else:
        raise ValueError(
            f"train.attention = {name!r}: the attention of {type(module).__name__} cannot be chosen; leave it at auto"
        )
