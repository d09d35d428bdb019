"""Exponential moving average of the generator: the student that is evaluated and exported."""

from __future__ import annotations

import torch

from fewstep.models.denoiser import Denoiser


class EMA:
    """A float32 average of a denoiser's weights, with a warm-up so that early averages forget the start.

    After n updates the decay is min(decay, (1 + n) / (10 + n)).  Decay 0 averages nothing and holds no second copy: its
    denoiser is the source itself, to be put into eval mode while it is used.
    Raises ValueError if decay is not in [0, 1).
    """

    def __init__(self, source: Denoiser, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"EMA decay must be in [0, 1), got {decay}; 0 turns averaging off, 0.99 averages about 100 updates"
            )
        self.decay = decay
        self.updates = 0
        self.denoiser = source
        if not decay:
            return
        self.denoiser = source.twin().eval()
        for p in self.denoiser.weights().values():
            p.requires_grad_(False)
            # float32 even for a bf16 student: 1e-3 of an update is lost below bf16's 8 bits.
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))

    def restart(self, source: Denoiser) -> None:
        """Average anew from `source`'s present weights."""
        self.updates = 0
        if source is not self.denoiser:
            self.denoiser.load(source.state())

    @torch.no_grad()
    def update(self, source: Denoiser) -> None:
        """Move the average towards `source`'s present weights; buffers are copied."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        if source is self.denoiser:
            return
        for mean, p in zip(self.denoiser.weights().values(), source.weights().values(), strict=True):
            mean.lerp_(p.to(mean.dtype), 1 - decay)
        for mean, b in zip(self.denoiser.buffers(), source.buffers(), strict=True):
            mean.copy_(b)
