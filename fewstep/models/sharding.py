"""Networks of which each process holds a part: PyTorch's fully_shard, FSDP2     [arXiv:2304.11277]

A weight lies in N parts along its first dimension, one on each of N processes, as a DTensor.  A unit of a network is
gathered for its forward and again for its backward pass, which leaves the mean gradient's part; optimiser, average and
clipping work on parts as they do on whole weights.  So all processes must call a network equally often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def units(network: nn.Module) -> list[nn.Module]:
    """What of a network is gathered at a time, inner ones first, itself last: it has what is in no other unit.

    These are the blocks that diffusers names for the purpose, and all direct children, lists opened.  A child needs a
    unit of its own even if it is small: a loss of features alone runs back through the network's first layers but not
    through its output, at which the network's own unit would be gathered again.
    """
    named = set(getattr(network, "_no_split_modules", None) or ())
    found = [*_children(network), *(m for m in network.modules() if type(m).__name__ in named)]
    wanted = {id(m) for m in found if next(m.parameters(), None) is not None} | {id(network)}
    return [m for m in reversed(list(network.modules())) if id(m) in wanted]


def gathered(network: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Bytes of a sharded network's weights that are whole at the most: a unit's and those of the units around it.

    dtype: in which they are gathered, None for their own.
    """
    apart = {id(unit) for unit in units(network)}

    def own(module: nn.Module) -> int:
        mine = sum(p.numel() * (dtype or p.dtype).itemsize for p in module.parameters(recurse=False))
        return mine + sum(own(child) for child in module.children() if id(child) not in apart)

    def most(module: nn.Module, around: int) -> int:
        here = around + (own(module) if id(module) in apart else 0)
        return max([here, *(most(child, here) for child in module.children())])

    return most(network, 0)


def shard(networks: Mapping[nn.Module, torch.dtype | None], device: torch.device) -> None:
    """Leave of each network's weights this process's part on the device, in place; every process must call it.

    networks: each with the dtype that its weights are gathered in, None for their own.  Weights that several of them
    share stay shared, and must never train.  Other owners of the weights keep them whole, where they are.
    """
    mesh = init_device_mesh(device.type, (get_world_size(),))
    _disown(list(networks))
    owners = Counter(id(p) for network in networks for p in network.parameters())
    parts: dict[int, nn.Parameter] = {}
    for network, dtype in networks.items():
        shared = {name: id(p) for name, p in network.named_parameters() if owners[id(p)] > 1}
        # Inputs are not cast with the weights: times up to 1000 do not fit bf16's 8 bits.
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False
        )
        for unit in units(network):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        network.register_forward_hook(_forget)
        for name, key in shared.items():
            _put(network, name, parts.setdefault(key, network.get_parameter(name)))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that lies in parts, on every process, all of which must ask; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor if `like`, of the same shape, lies in parts; else the tensor itself."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def spread_state(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`spread` of each tensor whose name `like` has."""
    return {name: spread(value, like.get(name, value)) for name, value in state.items()}


def held(tensors: Sequence[Tensor]) -> int:
    """Bytes that this process holds of them."""
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.itemsize for t in local)


def _children(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _children(child)
        else:
            yield child


def _disown(networks: Sequence[nn.Module]) -> None:
    """Give the networks parameters of their own around the same numbers, as shared among them as before.

    fully_shard moves a parameter to the device for every owner; a loaded teacher's would then stay there whole.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in chain.from_iterable(network.modules() for network in networks):
        for name, p in list(module.named_parameters(recurse=False)):
            made.setdefault(p, nn.Parameter(p.data, requires_grad=p.requires_grad))
            setattr(module, name, made[p])


def _forget(network: nn.Module, *_: object) -> None:
    """Drop the order of calls without gradient: the list would grow until a backward pass, and may never see one."""
    if not torch.is_grad_enabled():
        cast(FSDPModule, network).reset_iter_state()


def _put(network: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    setattr(network.get_submodule(owner), last, parameter)
