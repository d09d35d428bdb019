"""The small network on points in pieces, so that a flow head can be cut off it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.schedules import Coefficients
from fewstep.models.split import State, split
from fewstep.teachers.points import PointBackbone
from fewstep.teachers.toy import EVERY_CLASS
from fewstep.types import Condition


class SplitPoints:
    """PointBackbone in pieces; its two hidden layers are its blocks.

    The network hears of a time only where it hears of the point: with the first block.  A head that begins later is
    told by what its fusion makes of the time.
    """

    def __init__(self, backbone: PointBackbone) -> None:
        self.backbone = backbone
        self.net: Any = backbone.module

    @property
    def depth(self) -> int:
        """Its hidden layers."""
        return len(self.net.layers)

    @property
    def widths(self) -> tuple[int, int]:
        """One for all: the time is added to the rest."""
        width = self.net.classes.embedding_dim
        return width, width

    def enter(self, x: Tensor, t: Tensor, cond: Condition) -> State:
        """The first layer's answers to the point and to the time, apart."""
        net = self.net
        label = cond.tensors.get("class")
        label = torch.full((len(x),), EVERY_CLASS, device=x.device) if label is None else label
        _, y, variance = self._centred(x, t)
        angles = t[:, None] * net.frequencies.to(t)
        features = torch.cat([t[:, None], angles.sin(), angles.cos()], 1).to(x)
        point = (y / variance.sqrt()).flatten(1).to(x.dtype)
        nothing, still = torch.zeros_like(point), torch.zeros_like(features)
        # Linear in both together: its bias goes with the point.
        tokens = net.inner(torch.cat([point, still], 1)) + net.classes(label + 1)
        time = net.inner(torch.cat([nothing, features], 1)) - net.inner(torch.cat([nothing, still], 1))
        return State(tokens, time, None)

    def blocks(self, state: State, start: int, stop: int) -> State:
        """Residual layers."""
        hidden = state.tokens + state.time if start == 0 else state.tokens
        for layer in self.net.layers[start:stop]:
            hidden = hidden + layer(nn.functional.silu(hidden))
        return state._replace(tokens=hidden)

    def leave(self, state: State, x: Tensor, t: Tensor) -> Tensor:
        """The last layer, between the backbone's skip and output scales."""
        raw = self.net.outer(nn.functional.silu(state.tokens)).reshape(x.shape)
        c, y, variance = self._centred(x, t)
        mean, std = self.backbone.mean.to(y), self.backbone.std.to(y)
        return (mean + c.alpha * std.square() / variance * y + c.sigma * std / variance.sqrt() * raw).to(x.dtype)

    def _centred(self, x: Tensor, t: Tensor) -> tuple[Coefficients, Tensor, Tensor]:
        """The schedule at t, x less its mean there, and its variance; see PointBackbone."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        c = self.backbone.schedule.at(t.to(x.dtype)).like(x)
        variance = (c.alpha * self.backbone.std.to(x)).square() + c.sigma.square()
        return c, x - c.alpha * self.backbone.mean.to(x), variance


split.register(PointBackbone, SplitPoints)
