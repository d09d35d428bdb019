"""Transformers in pieces: what a student needs that runs some of a network's blocks more often than others."""

from __future__ import annotations

from functools import singledispatch
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fewstep.models.backbones import CogView4
from fewstep.models.denoiser import Backbone
from fewstep.types import Condition


class State(NamedTuple):
    """What goes from one block to the next.

    tokens: [B, ..., C], those of the picture.  time: [B, E], the time's embedding.  rest: what else the blocks need.
    """

    tokens: Tensor
    time: Tensor
    rest: Any


class Split(Protocol):
    """A network as three pieces:  leave(blocks(enter(x, t, cond), 0, depth), x, t)  is its own forward.

    Of the same network twice entered, tokens and time of one may go on in the other's state.  t: [B] in [0, 1].
    """

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        ...

    @property
    def widths(self) -> tuple[int, int]:
        """C and E of its states."""
        ...

    def enter(self, x: Tensor, t: Tensor, cond: Condition) -> State:
        """Everything before the first block."""
        ...

    def blocks(self, state: State, start: int, stop: int) -> State:
        """Blocks start .. stop - 1."""
        ...

    def leave(self, state: State, x: Tensor, t: Tensor) -> Tensor:
        """The raw output about x at t, x's shape, from the last block's state."""
        ...


@singledispatch
def split(backbone: Backbone) -> Split:
    """The pieces of a family's network.  Raises ValueError for families that have none registered here."""
    raise ValueError(
        f"{type(backbone.module).__name__} is no chain of blocks over tokens, so no flow head can be cut off it; take "
        "a transformer, as fashion-dit, or another method, as dmd2"
    )


class SplitCogView4:
    """CogView4Transformer2DModel in pieces.  rest: the text's tokens, the rotary embedding, the rows of patches."""

    PIECES = ("rope", "patch_embed", "time_condition_embed", "transformer_blocks", "norm_out", "proj_out")

    def __init__(self, backbone: CogView4) -> None:
        self.backbone = backbone
        self.net: Any = backbone.module
        missing = [name for name in self.PIECES if not hasattr(self.net, name)]
        if missing:
            raise ValueError(
                f"this {type(self.net).__name__} has no {', '.join(missing)}: diffusers has changed it, so it cannot "
                "be run in pieces; use the version of diffusers that fewstep names"
            )

    @property
    def depth(self) -> int:
        """Its transformer blocks."""
        return len(self.net.transformer_blocks)

    @property
    def widths(self) -> tuple[int, int]:
        """Of its tokens and of what modulates its blocks."""
        config = self.net.config
        return config.num_attention_heads * config.attention_head_dim, config.time_embed_dim

    def enter(self, x: Tensor, t: Tensor, cond: Condition) -> State:
        """Patches, text, positions, and the embedding of time and sizes before its activation."""
        net = self.net
        text, lengths = cond.tensors["text"].to(x.dtype), cond.tensors.get("length")
        if lengths is not None:
            known = lengths.unique().tolist()
            if len(known) > 1:
                raise ValueError(
                    f"a flow head needs one call for the whole batch, but its prompts have {known} tokens, which take "
                    "one call each; give prompts (and a negative prompt) of one padded length"
                )
            text = text[:, : known[0]]
        scale, (height, width) = self.backbone.vae_scale, x.shape[-2:]
        size = torch.tensor([height * scale, width * scale], dtype=x.dtype, device=x.device).expand(len(x), 2)
        time = net.time_condition_embed(self.backbone.network_time(t), size, size, torch.zeros_like(size), x.dtype)
        tokens, text = net.patch_embed(x, text)
        return State(tokens, time, (text, net.rope(x), height // net.config.patch_size))

    def blocks(self, state: State, start: int, stop: int) -> State:
        """Picture and text go through them side by side."""
        net = self.net
        tokens, (text, positions, rows) = state.tokens, state.rest
        time = nn.functional.silu(state.time)
        for block in net.transformer_blocks[start:stop]:
            if torch.is_grad_enabled() and net.gradient_checkpointing:
                tokens, text = net._gradient_checkpointing_func(block, tokens, text, time, positions)
            else:
                tokens, text = block(tokens, text, time, positions)
        return State(tokens, state.time, (text, positions, rows))

    def leave(self, state: State, x: Tensor, t: Tensor) -> Tensor:
        """Norm, projection, and patches back to pictures."""
        net = self.net
        patches = net.proj_out(net.norm_out(state.tokens, nn.functional.silu(state.time)))
        p = net.config.patch_size
        cells = patches.unflatten(1, (state.rest[2], -1)).unflatten(3, (-1, p, p))  # [B, rows, columns, C, p, p]
        return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


split.register(CogView4, SplitCogView4)
