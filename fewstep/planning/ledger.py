"""Live memory of tensors without numbers: who holds how many bytes, when they were most, and the FLOPs on the way."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Category = Literal["weights", "gradients", "optimiser", "ema", "activations"]
"""Whose memory it is; activations are all that nobody claimed, temporaries of a loss too."""
CATEGORIES: tuple[Category, ...] = get_args(Category)


@dataclass(frozen=True)
class Peak:
    """Bytes of each category at the moment when all together were most, and the FLOPs of the whole part."""

    bytes: dict[Category, int]
    flops: int

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return sum(self.bytes.values())


class Ledger(TorchDispatchMode):
    """Books every storage on the meta device from the op that makes it until nothing refers to it any more.

    Within the context every op is seen, also those of a backward pass: a storage is booked once, however many views it
    has, and an op in place books nothing.  `making` is the category of what is new.
    before: called before each op.
    A truth value that is asked of a tensor is True, as there are no numbers: "is the gradient finite?"
    Raises ValueError for an op that wants to know numbers, or has no kernel that does without.
    """

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.making: Category = "activations"
        self.live: Counter[Category] = Counter()
        self.flops = 0
        self._before = before
        self._booked: dict[int, tuple[Any, Category, int]] = {}
        self._most = 0
        self._at_most: dict[Category, int] = {}

    # -- the book -----------------------------------------------------------------------------------------------

    def claim(self, tensors: Iterable[Tensor | None], category: Category) -> None:
        """Book these tensors' storages under a category, those that are booked already as well."""
        for tensor in tensors:
            if tensor is not None and tensor.is_meta:
                self._book(tensor, category)

    @contextmanager
    def part(self, parts: dict[str, Peak], name: str) -> Iterator[None]:
        """Put the peak and the FLOPs of the enclosed ops into `parts` under a name."""
        self._most, self._at_most, before = self._held(), dict(self.live), self.flops
        yield
        parts[name] = Peak({kind: self._at_most.get(kind, 0) for kind in CATEGORIES}, self.flops - before)

    def _held(self) -> int:
        return sum(self.live.values())

    def _book(self, tensor: Tensor, category: Category) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if (known := self._booked.get(address)) is not None:
            self.live[known[1]] -= known[2]
        reference = weakref.ref(storage, lambda _: self._strike(address))
        self._booked[address] = reference, category, size
        self.live[category] += size
        if (held := self._held()) > self._most:
            self._most, self._at_most = held, dict(self.live)

    def _strike(self, address: int) -> None:
        _, category, size = self._booked.pop(address)
        self.live[category] -= size

    # -- the ops ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self._before()
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return _answer(args[0])
        try:
            out = func(*args, **(kwargs or {}))
        except NotImplementedError as error:
            raise ValueError(
                f"{func} cannot run without numbers, so that this method cannot be planned ({error}); train a few "
                "iterations and read the device's own peak"
            ) from error
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_meta and tensor.untyped_storage()._cdata not in self._booked:
                self._book(tensor, self.making)
        return out


def _answer(value: Tensor) -> bool:
    if value.dtype == torch.bool:
        return True
    raise ValueError(
        "this method branches on a number that a tensor holds, and in a plan none does; train a few iterations and "
        "read the device's own peak"
    )
