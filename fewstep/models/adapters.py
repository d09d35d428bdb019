"""LoRA roles on shared weights: each role is a skeleton of the network around the teacher's own parameters.

Switching adapters inside one network is the usual way, and a trap: gradient checkpointing recomputes a forward during
the backward pass, when another role's adapter is active by then, and the gradient is silently wrong.  Here a role has
modules of its own, which cost nothing, around tensors that exist once.  Nothing is ever switched.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

from fewstep.models.sharding import spread

Module = TypeVar("Module", bound=nn.Module)

ADAPTER = "default"
"""peft's name for the one adapter that a skeleton carries; our files leave it out."""

OWN = "own"
"""The submodule that holds what was added to a network for one role."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank updates of a role: W + (alpha / rank) B A, B = 0 at the start     [LoRA, arXiv:2106.09685, eq. 3]

    targets: ends of the names of the layers that get one, as "to_q"; none named = every linear layer and convolution
    but depthwise ones, whose few weights no low rank fits.
    """

    rank: int = 64  # DMD2 appendix F, SDXL LoRA
    alpha: float = 8.0  # DMD2 appendix F, SDXL LoRA
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < float("inf"):
            raise ValueError(f"LoRA needs rank >= 1 and a positive finite alpha, got {self.rank} and {self.alpha}")


def share(module: Module) -> Module:
    """Another skeleton of the same network: new modules, hooks and adapters, the same parameters and buffers."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())})


def add_lora(module: nn.Module, config: LoRA, *, seed: int = 0) -> None:
    """Put an adapter that changes nothing yet on the module's layers, in place; its parameters are float32.

    seed: of A's initial values, the same on every process.
    Raises ValueError if a target is the end of no layer's name.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = [
        name
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)
    ]
    wanted = [name for name in layers if not config.targets or name.endswith(config.targets)]
    idle = [end for end in config.targets if not any(name.endswith(end) for name in layers)]
    if idle:
        ends = sorted({re.sub(r"^.*?([^.]*[a-z][^.]*(\.\d+)?)$", r"\1", name) for name in layers})
        raise ValueError(f"no layer's name ends in {idle}; this network has {', '.join(ends)}")
    peft_config = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=wanted)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Without numbers around a network that has none; in a plan it would take seconds to draw them.
        bare = any(p.is_meta for p in module.parameters())
        inject_adapter_in_model(peft_config, module, ADAPTER, low_cpu_mem_usage=bare)
    for name, p in module.named_parameters():
        if ".lora_" in name:  # PEFT gives it the layer's dtype, and AdamW's steps are below the last bit of bf16
            p.data = p.data.float()
    for layer in module.modules():
        if hasattr(layer, "lora_A"):
            layer._cast_input_dtype = _widened  # type: ignore[assignment]


def _widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An adapter's input in its weights' dtype; as it is under autocast, which would narrow it again."""
    place = "cpu" if x.is_meta else x.device.type  # a plan's switch is the CPU's
    return x if torch.is_autocast_enabled(place) else x.to(dtype)


def add_own(module: nn.Module, name: str, part: nn.Module) -> None:
    """Give the network a part that its role alone has: trained, saved and averaged with it, adapted or not.

    It goes on the network's device and is added after adapters, which would else adapt it, too.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if not hasattr(module, OWN):
        module.add_module(OWN, nn.ModuleDict())
    own_parts(module)[name] = part.to(device)


def own_parts(module: nn.Module) -> nn.ModuleDict:
    """What `add_own` added, by name; empty if nothing."""
    return getattr(module, OWN, nn.ModuleDict())


def adapted(module: nn.Module) -> bool:
    """Whether the network carries an adapter."""
    return any(".lora_" in name for name, _ in module.named_parameters())


def own_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters, named as peft saves them, and those of added parts; empty if there are none."""
    found = {n: p for n, p in module.named_parameters() if ".lora_" in n or n.startswith(f"{OWN}.")}
    return {name.replace(f".{ADAPTER}.", "."): p for name, p in found.items()}


def merged(module: nn.Module) -> dict[str, Tensor]:
    """The state of the plain network with the adapter's update added to its weights, under the plain names."""
    from peft.tuners.lora import Conv2d, Linear

    state = {
        name.replace(".base_layer.", "."): value for name, value in module.state_dict().items() if ".lora_" not in name
    }
    for name, layer in module.named_modules():
        if isinstance(layer, Linear | Conv2d):
            weight = state[f"{name}.weight"]
            summed = weight.float() + layer.get_delta_weight(ADAPTER).float()
            state[f"{name}.weight"] = summed.to(weight.dtype)
    return state


def load_own(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put saved `own_weights` back.  Raises ValueError if names or shapes are not this adapter's."""
    weights = own_weights(module)
    mine, theirs = ({name: tuple(p.shape) for name, p in group.items()} for group in (weights, state))
    if mine != theirs:
        odd = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        raise ValueError(f"the saved adapter has other layers or ranks than this one: {odd[0]} and {len(odd) - 1} more")
    for name, p in weights.items():
        p.data.copy_(spread(state[name], p))
