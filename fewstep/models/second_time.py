"""A student that is told two times: the one that its input is at, and the one that it is to go to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fewstep.models.adapters import add_own, own_parts
from fewstep.models.denoiser import Backbone, Denoiser, uncompiled
from fewstep.types import Condition

UNTIL = "until"


def with_second_time(network: Denoiser, seed: int = 0) -> Denoiser:
    """The network, told "until" of `Condition.extra` too, in place; at the start it hears nothing of it.

    The time is embedded by a small network of its own, added to the embedding of the first.  Only its last layer is
    zero: were all of them, no gradient would reach any weight.
    seed: of the other layers' values, the same on every process.
    Raises ValueError if the network's family names no time embedding.
    """
    module, name = network.backbone.module, network.backbone.time_embedding
    if not name:
        raise ValueError(
            f"{type(module).__name__} names no time embedding to add a second time to; its call adapter can, as "
            "`time_embedding`"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_own(module, UNTIL, TimeMLP(_last_linear(module.get_submodule(name)).out_features))
    network.backbone = SecondTime(network.backbone)
    return network


class TimeMLP(nn.Module):
    """A time [B] in [0, 1] -> [B, width], zero at first.  Its features turn slowly, so that derivatives stay tame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(5), persistent=False)
        self.inner = nn.Linear(11, width)
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    frequencies: Tensor

    def forward(self, time: Tensor) -> Tensor:
        """[B, width], in the parameters' dtype."""
        angles = time[:, None] * self.frequencies.to(time)
        features = torch.cat([time[:, None], angles.sin(), angles.cos()], 1).to(self.inner.weight.dtype)
        return self.outer(nn.functional.silu(self.inner(features)))


class SecondTime(Backbone):
    """A family's call adapter, whose network's time embedding gets another one added.  Made by `with_second_time`."""

    def __init__(self, inner: Backbone) -> None:
        super().__init__(inner.module)
        self.inner, self.one_call = inner, inner.one_call

    def network_time(self, t: Tensor) -> Tensor:
        """As the plain network's."""
        return self.inner.network_time(t)

    def guide(self, c: Tensor, u: Tensor, scale: float) -> Tensor:
        """As the plain network's."""
        return self.inner.guide(c, u, scale)

    def forward(self, x: Tensor, network_time: Tensor, cond: Condition) -> Tensor:
        """The raw output; `cond.extra["until"]` is [B] float32 in [0, 1].  Raises ValueError if it is missing."""
        if UNTIL not in cond.extra:
            raise ValueError("this network is told the time to which it goes; give cond.also(until=[B])")
        part, until = own_parts(self.module)[UNTIL], cond.extra[UNTIL]
        with _added(self.module.get_submodule(self.time_embedding), lambda: part(until)), uncompiled():
            return self.inner(x, network_time, cond)

    @property
    def taps(self) -> tuple[str, ...]:
        """As the plain network's."""
        return self.inner.taps

    @property
    def time_embedding(self) -> str:
        """As the plain network's."""
        return self.inner.time_embedding

    @property
    def extras(self) -> frozenset[str]:
        """The second time."""
        return self.inner.extras | {UNTIL}

    def checkpoint_activations(self) -> None:
        """As the plain network's."""
        self.inner.checkpoint_activations()

    @torch.no_grad()
    def plain_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the second time, which is 0 in one step: what it adds there goes into the first embedding's bias."""
        embedding = self.module.get_submodule(self.time_embedding)
        bias = f"{_name_of(self.module, _last_linear(embedding))}.bias".replace(".base_layer.", ".")
        if getattr(embedding, "post_act", None) is not None or bias not in state:
            raise ValueError(f"the second time of {type(self.module).__name__} cannot be folded into its first's bias")
        added = own_parts(self.module)[UNTIL](torch.zeros(1, device=state[bias].device))[0]
        plain = super().plain_state(state)
        return plain | {bias: (plain[bias].float() + added.float()).to(plain[bias].dtype)}


@contextmanager
def _added(embedding: nn.Module, make: Callable[[], Tensor]) -> Iterator[None]:
    """Within it the module's output [B, D] has what `make` makes added, row by row.

    It is made within the network's forward: what is sharded with a network cannot run before it.
    """

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        value = make()
        if output.shape != value.shape:
            raise ValueError(
                f"a second time needs one call for the whole batch, got {len(output)} of {len(value)} rows in one: "
                "prompts of different padded lengths take one call each; give prompts of one padded length"
            )
        return output + value.to(output.dtype)

    handle = embedding.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _last_linear(module: nn.Module) -> nn.Linear:
    """The linear layer that makes the module's output; of an adapted one, the plain layer within."""
    if isinstance(module, nn.Linear):
        return module
    return [m for name, m in module.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in f".{name}"][-1]


def _name_of(module: nn.Module, part: nn.Module) -> str:
    return next(name for name, found in module.named_modules() if found is part)
