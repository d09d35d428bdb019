"""Live memory of tensors without numbers: who holds how many bytes, when they were most, and the FLOPs on the way."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Category = Literal["weights", "gradients", "optimiser", "ema", "gathered", "activations"]
"""Whose memory it is; gathered is what FSDP has whole at a time, activations are all that nobody claimed, temporaries
of a loss too."""
CATEGORIES: tuple[Category, ...] = get_args(Category)
PLAIN = (int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Peak:
    """Bytes of each category at the moment when all together were most, and the FLOPs of the whole part.

    activations: the most that they were, which may be at another moment than that.
    """

    bytes: dict[Category, int]
    flops: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class _Shape:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Ledger(TorchDispatchMode):
    """Books every storage on the meta device from the op that makes it until nothing refers to it any more.

    Within the context every op is seen, also those of a backward pass: a storage is booked once, however many views it
    has, and an op in place books nothing.  `making` is the category of what is new.
    A truth value that is asked of a tensor is True, as there are no numbers: "is the gradient finite?"  Floats that are
    copied to the CPU are zeros there.
    Raises ValueError for an op that wants to know numbers, or has no kernel that does without.
    """

    def __init__(self) -> None:
        super().__init__()
        self.making: Category = "activations"
        self.live: Counter[Category] = Counter()
        self.flops = 0
        self._booked: dict[int, tuple[Any, Category, int]] = {}
        self._most = self._activations = 0
        self._at_most: dict[Category, int] = {}
        self._known: dict[Any, tuple[Any, int]] = {}

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
        self._activations = self.live["activations"]
        yield
        parts[name] = Peak(
            {kind: self._at_most.get(kind, 0) for kind in CATEGORIES}, self.flops - before, self._activations
        )

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
        self._activations = max(self._activations, self.live["activations"])
        if (held := self._held()) > self._most:
            self._most, self._at_most = held, dict(self.live)

    def _strike(self, address: int) -> None:
        _, category, size = self._booked.pop(address)
        self.live[category] -= size

    # -- the ops ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return _answer(args[0])
        if func is torch.ops.aten._to_copy.default and _leaves(args[0], kwargs or {}):
            return torch.zeros_like(args[0], **{"device": "cpu", "dtype": (kwargs or {}).get("dtype")})
        out, flops = self._run(func, args, kwargs or {})
        self.flops += flops
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_meta and tensor.untyped_storage()._cdata not in self._booked:
                self._book(tensor, self.making)
        return out

    def _run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, int]:
        """What an op makes, and its FLOPs.

        Kernels of the meta device take up to a millisecond of Python, and a network repeats its shapes a hundred times:
        what an op that makes new tensors made of such inputs before is made again by itself.
        """
        if _in_place(func) and _on_meta(args[0]):
            return (args[0] if func._schema.returns else None), 0
        if not _fresh(func):
            return _called(func, args, kwargs), 0
        try:
            signature = func, _signature(args), _signature(tuple(kwargs.items()))
            known = self._known.get(signature)
        except TypeError:  # an argument that is neither hashable nor on the meta device
            return _called(func, args, kwargs), 0
        if known is not None:
            made, flops = known
            return _again(made), flops
        out = _called(func, args, kwargs)
        flops = _flops(func, args, kwargs, out)
        with suppress(TypeError):  # made elsewhere
            self._known[signature] = _recipe(out), flops
        return out, flops


def _flops(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """By torch's own formulas; but those take the weights' gradient of a convolution in groups for that of a dense one.

    Either gradient of a convolution costs as much as its forward.
    """
    if func is torch.ops.aten.convolution_backward.default:
        grad, x, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
        return 2 * (x if transposed else grad).numel() * weight[0].numel() * sum(map(bool, wanted[:2]))
    count = flop_registry.get(func._overloadpacket)
    return 0 if count is None else count(*args, **kwargs, out_val=out)


def _called(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    try:
        return func(*args, **kwargs)
    except NotImplementedError as error:
        raise ValueError(
            f"{func} cannot run without numbers, so that this method cannot be planned; train a few iterations and "
            "read the device's own peak"
        ) from error


@cache
def _in_place(func: Any) -> bool:
    """Whether an op changes the numbers of its first argument, or of a list of those, and nothing else."""
    name, tags = func._schema.name, func.tags
    return name.startswith("aten::") and name.endswith("_") and torch.Tag.inplace_view not in tags


def _on_meta(x: Any) -> bool:
    """Of a tensor, or a list of tensors of one device."""
    first = x[0] if isinstance(x, tuple | list) and x else x
    return isinstance(first, Tensor) and first.is_meta


@cache
def _fresh(func: Any) -> bool:
    """Whether an op makes new tensors, and neither views nor changes others."""
    schema = func._schema
    return (
        func.namespace == "aten"
        and not schema.is_mutable
        and all(value.alias_info is None for value in (*schema.arguments, *schema.returns))
    )


def _signature(x: Any) -> Any:
    """Hashable; equal for inputs of which an op makes the same."""
    if isinstance(x, Tensor):
        if not x.is_meta:
            raise TypeError("of a tensor elsewhere, numbers may matter")
        return x.shape, x.stride(), x.dtype
    if isinstance(x, tuple | list):
        return tuple([_signature(item) for item in x])
    if not isinstance(x, PLAIN):
        raise TypeError(f"a {type(x).__name__} cannot be compared")
    return type(x), x  # 1, 1.0 and True are equal


def _recipe(out: Any) -> Any:
    """By what `_again` makes such an output."""
    if isinstance(out, Tensor):
        if not out.is_meta:
            raise TypeError("made on another device")
        return _Shape(tuple(out.shape), out.stride(), out.dtype)
    if isinstance(out, tuple | list):
        return type(out)([_recipe(item) for item in out])
    return out


def _again(made: Any) -> Any:
    if isinstance(made, _Shape):
        return torch.empty_strided(made.size, made.stride, dtype=made.dtype, device="meta")
    if isinstance(made, tuple | list):
        return type(made)([_again(item) for item in made])
    return made


def _leaves(x: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether this copies floats to the CPU, as times that are worked out there."""
    to = kwargs.get("device")
    return x.is_meta and x.is_floating_point() and to is not None and torch.device(to).type == "cpu"


def _answer(value: Tensor) -> bool:
    if value.dtype == torch.bool:
        return True
    raise ValueError(
        "this method branches on a number that a tensor holds, and in a plan none does; train a few iterations and "
        "read the device's own peak"
    )
