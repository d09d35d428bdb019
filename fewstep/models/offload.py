"""A network that never trains, on a device only while it is needed there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn


class Offload:
    """Keeps a network's weights on the CPU and brings them to the device for its forward.

    They leave when one of the others is called, so that the two branches of guidance share a visit; but once a call may
    have recorded a graph, whose backward pass reads them, only by `leave`.  As they never change, leaving copies
    nothing: the parameters take up their tensors on the CPU again.
    """

    def __init__(self, network: nn.Module, device: torch.device, others: Iterable[nn.Module] = ()) -> None:
        self._device, self._here, self._recorded = device, False, False
        network.to("cpu" if device.type != "meta" else device)
        fast = device.type == "cuda"  # from pinned memory, that is
        tensors = [*chain(network.parameters(), network.buffers())]
        self._home = [(tensor, tensor.data.pin_memory() if fast else tensor.data) for tensor in tensors]
        network.register_forward_pre_hook(self._called)
        for other in others:
            other.register_forward_pre_hook(self._passed)

    def enter(self) -> None:
        """Bring the weights, unless they are there."""
        if not self._here:
            for tensor, home in self._home:
                tensor.data = torch.empty_like(home, device=self._device).copy_(home, non_blocking=True)
        self._here = True

    def leave(self) -> None:
        """Free the device's memory of them."""
        for tensor, home in self._home if self._here else ():
            tensor.data = home
        self._here = self._recorded = False

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Within it they are there, whatever is called."""
        self.enter()
        self._recorded = True
        try:
            yield
        finally:
            self.leave()

    def _called(self, *_: Any) -> None:
        self.enter()
        self._recorded |= torch.is_grad_enabled()

    def _passed(self, *_: Any) -> None:
        if not self._recorded:
            self.leave()
