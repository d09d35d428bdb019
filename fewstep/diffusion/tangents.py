"""Forward-mode derivatives beside an ordinary forward: the value keeps its graph, the tangent never has one.

Torch's dual numbers carry both through every operation, so that a value with a graph costs a second forward, attention
must take its quadratic kernel, and gradient checkpointing fails.  Here a mode watches the torch functions that a
network calls.  The value is made by the very call that the network makes; the tangent of its result by a rule of that
function, without graph, or where there is no rule by dual numbers of that one function.  So the backward pass,
recomputation and fused kernels are those of the plain network.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from fewstep.diffusion.tangent_rules import AT_ONCE, IN_PLACE, LOSING, NAMED, RULES, STILL, Lost, dual


class Tangents(TorchFunctionMode):
    """Within it, torch functions carry tangents along.

    `move` names what moves and how; `of` tells the tangent of what was made of it.  What leaves torch's functions loses
    its tangent: a custom autograd.Function or operator in silence (`check_jvp` finds that), a cast to integers or to a
    Python number with a RuntimeError.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tangents = WeakTensorKeyDictionary()

    def move(self, x: Tensor, tangent: Tensor) -> Tensor:
        """x as an object of its own, moving along `tangent`, of x's shape."""
        alias = x.view_as(x)
        self._tangents[alias] = tangent.detach().to(x)
        return alias

    def of(self, x: Any) -> Tensor | None:
        """The tangent of a tensor; None if it stands still, or is none."""
        if not isinstance(x, Tensor) or x not in self._tangents:
            return None
        if (tangent := self._tangents[x]) is None:
            raise Lost("a view whose tensor was changed in place")
        return tangent

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        self._tangents.clear()  # results kept in the graph would keep their tangents

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (self._any(args) or self._any(kwargs.values())):
            return func(*args, **kwargs)
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        if name in LOSING:
            raise Lost(name)
        if name in STILL:
            return func(*args, **kwargs)
        if name in AT_ONCE:
            return AT_ONCE[name](self, func, args, kwargs)
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace"):
            return self._in_place(name.rstrip("_").lstrip("_"), func, args, kwargs)
        out = func(*args, **kwargs)
        found = out if isinstance(out, (tuple, list)) else (out,)
        if any(isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) for x in found):
            with torch.no_grad():
                self.remember(out, self._by_rule(name, func, out, args, kwargs))
        elif name == "to":
            raise Lost(f"a cast to {found[0].dtype}")
        return out

    def _by_rule(self, name: str, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Rules read what is given by place."""
        rule = RULES.get(name, dual) if args and not kwargs.keys() & NAMED else dual
        return rule(self, func, out, args, kwargs)

    def _any(self, values: Iterable[Any]) -> bool:
        for value in values:
            if isinstance(value, Tensor):
                if value in self._tangents:
                    return True
            elif isinstance(value, (tuple, list)) and self._any(value):
                return True
        return False

    def remember(self, out: Any, tangent: Any) -> None:
        """Results of a function, one or several, and how they move (None: not at all)."""
        if isinstance(out, Tensor):
            out, tangent = (out,), (tangent,)
        elif tangent is None:
            return
        for x, moved in zip(out, tangent, strict=True):
            if moved is not None:
                if moved.shape != x.shape:
                    moved = moved.expand(x.shape)
                self._tangents[x] = moved

    def _in_place(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """x += y, x *= y, x[i] = y, silu(x, inplace=True): the tangent is that of the function that makes a new tensor.

        It is computed first: afterwards x is no longer what the rule needs.  Tensors that share x's memory have changed
        with it; their tangents are not known any more, and using them raises.
        """
        x = args[0]
        with torch.no_grad():
            if name == "setitem":
                tangent = self._assigned(*args)
            elif kwargs.get("inplace"):
                apart = kwargs | {"inplace": False}
                tangent = self._by_rule(name, func, func(*args, **apart), args, apart)
            elif name in IN_PLACE:
                plain = getattr(torch.Tensor, name)
                tangent = self._by_rule(name, plain, plain(*args, **kwargs), args, kwargs)
            else:
                raise Lost(f"{func.__name__}, which changes its input")
        out = func(*args, **kwargs)
        memory = x.untyped_storage()._cdata  # not data_ptr, which on the meta device is 0 for all
        for other in [key for key in self._tangents if key is not x and key.untyped_storage()._cdata == memory]:
            self._tangents[other] = None
        if tangent is None:
            self._tangents.pop(x, None)
        else:
            self._tangents[x] = tangent.expand(x.shape).to(x.dtype)
        return out

    def _assigned(self, x: Tensor, index: Any, value: Any) -> Tensor:
        """The tangent of x after x[index] = value."""
        tangent, moved = self.of(x), self.of(value)
        tangent = torch.zeros_like(x) if tangent is None else tangent.clone()
        tangent[index] = 0 if moved is None else moved
        return tangent
