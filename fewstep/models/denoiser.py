"""One call of any network gives a `Prediction`, from which x0, eps, v, flow and score follow."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion import NoiseSchedule, Prediction
from fewstep.diffusion.prediction import extrapolated
from fewstep.models.adapters import OWN, adapted, load_own, merged, own_parts, own_weights
from fewstep.models.sharding import spread_state
from fewstep.types import Condition, Kind


class Backbone(nn.Module, ABC):
    """Call adapter of one network family: it alone knows the network's time scale and argument names.

    module: the unmodified network.  No parallel wrapper ever takes its place: the trainer averages gradients itself.
    """

    one_call: bool = False
    """Whether prompts of different lengths ("length" of the condition) are one call of the network."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """t, [B] in [0, 1] with 0 = data, on the scale that the network was trained with."""

    @abstractmethod
    def forward(self, x: Tensor, network_time: Tensor, cond: Condition) -> Tensor:
        """The raw output, x's shape.  x: [B, C, H, W], or [B, C, T, H, W] of videos, in the network's dtype."""

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the submodules whose outputs a GAN reads by default; none if the family has no good ones."""
        return ()

    @property
    def time_embedding(self) -> str:
        """Name of the submodule to whose output [B, D] another time's embedding can be added; "" if there is none."""
        return ""

    @property
    def extras(self) -> frozenset[str]:
        """What it reads of `Condition.extra`; samplers supply it (see `objectives.rollout.told`).

        until: the time in [0, 1] down to which this call goes, [B] float32.  noise: unit noise of x's shape.
        """
        return frozenset()

    def conditions(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """One prompt's shapes of what it reads of `Condition.tensors`, for plans; tokens: of its encoded text."""
        return {}

    def feature(self, output: Any, x: Tensor) -> Tensor:
        """Of what a tapped module returns, the picture's part: the first of several by default.

        x: the network's input.
        """
        return output if isinstance(output, Tensor) else output[0]

    def guide(self, c: Tensor, u: Tensor, scale: float) -> Tensor:
        """What the family's pipeline makes of c, the raw output with the prompt, and u, with the empty one: [B, ...].

        float32 or better.  By default classifier-free guidance as it is.
        """
        return extrapolated(c, u, scale)

    def plain_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state of `module` without what was added to it, for one-step use in the network's own pipeline.

        By default what was added is taken to serve training alone, as a learnt weight of the loss does.
        Raises ValueError if nothing but the network with its additions gives its outputs.
        """
        return {name: value for name, value in state.items() if not name.startswith(f"{OWN}.")}

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass instead of keeping them (diffusers' gradient checkpointing).

        Raises ValueError if this network has no such thing.
        """
        enable = getattr(self.module, "enable_gradient_checkpointing", None)
        if enable is None:
            raise ValueError(f"{type(self.module).__name__} knows no gradient checkpointing; leave it off")
        enable()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's floating-point parameters; float32 if it has none."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)


def late(blocks: Sequence[str]) -> tuple[str, ...]:
    """Of a transformer's blocks by name, those at one half, three quarters and the end: FastGen's 15, 22, 29 of 30."""
    count = len(blocks)
    return tuple(blocks[i] for i in sorted({count // 2, 3 * count // 4, count - 1}))


def blocks_of(module: nn.Module, *lists: str) -> list[str]:
    """Names of the blocks in these module lists, one list after the other."""
    return [f"{name}.{i}" for name in lists for i in range(len(list(module.get_submodule(name).children())))]


class Player(nn.Module):
    """A network in a role: what of it trains and is saved."""

    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters that its turns train, by name."""
        return dict(self.named_parameters())

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return self.state_dict()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put a `state` back.  Raises RuntimeError (from torch) if names or shapes differ."""
        self.load_state_dict(spread_state(state, self.state_dict()))

    def networks(self) -> tuple[nn.Module, ...]:
        """The bare networks in it, for whoever prepares them for a device or a precision."""
        return (self,)


class Denoiser(Player):
    """A backbone, the noise schedule that it lives on and what it predicts.

    It decides nothing about gradients: that belongs to objectives and samplers.
    """

    def __init__(self, backbone: Backbone, schedule: NoiseSchedule, predicts: Kind) -> None:
        super().__init__()
        self.backbone = backbone
        self.schedule = schedule
        self.predicts: Kind = predicts

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[str] = ()) -> Prediction:
        """Predict from the noisy x_t [B, C, ..., H, W] at t [B] float32 in [0, 1], 0 = data.

        taps: module names inside the network whose outputs are returned in `Prediction.taps`.
        """
        if t.shape != (x_t.shape[0],):
            raise ValueError(f"t must be [B] = [{x_t.shape[0]}], got {list(t.shape)}; expand a scalar time yourself")
        with _tapped(self.backbone, taps, x_t) as found, uncompiled() if taps else nullcontext():
            raw = self.backbone(x_t.to(self.backbone.dtype), self.backbone.network_time(t), cond)
        return Prediction(raw, x_t, t, self.predicts, self.schedule, taps=dict(found), guide=self.backbone.guide)

    @property
    def own(self) -> nn.ModuleDict:
        """The parts that were added to the network for this role alone, by name."""
        return own_parts(self.backbone.module)

    def weights(self) -> dict[str, nn.Parameter]:
        """What is this role's own: its adapter's parameters and added parts if it is adapted, else all there are."""
        module = self.backbone.module
        return own_weights(module) if adapted(module) else dict(module.named_parameters())

    def state(self) -> dict[str, Tensor]:
        """The adapter's and the added parts' weights if there is an adapter, else the network's state."""
        return dict(self.weights()) if adapted(self.backbone.module) else self.backbone.module.state_dict()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put a `state` back.  Raises RuntimeError or ValueError if names or shapes differ."""
        if adapted(self.backbone.module):
            load_own(self.backbone.module, state)
        else:
            self.backbone.module.load_state_dict(spread_state(state, self.backbone.module.state_dict()))

    def merged_state(self) -> dict[str, Tensor]:
        """The state of the network that gives the same outputs without adapters: they are added to its weights."""
        return merged(self.backbone.module) if adapted(self.backbone.module) else self.state()

    def plain_state(self) -> dict[str, Tensor]:
        """The state of the plain network that gives the same one-step outputs.

        Raises ValueError if added parts cannot be folded into it.
        """
        return self.backbone.plain_state(self.merged_state())

    def networks(self) -> tuple[nn.Module, ...]:
        """The family's own module."""
        return (self.backbone.module,)

    def compile_networks(self) -> None:
        """Let torch.compile make kernels of its networks' forward; modules, names and parameters stay as they are."""
        for module in self.networks():
            module.compile()

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass instead of keeping them; see `Backbone`."""
        self.backbone.checkpoint_activations()

    def twin(self) -> Denoiser:
        """A copy with weights of its own; what is not this role's own (a shared teacher's parameters) stays shared."""
        own = {id(p) for p in self.weights().values()}
        return copy.deepcopy(self, {id(p): p for p in self.parameters() if id(p) not in own})


def uncompiled() -> AbstractContextManager[Any]:
    """Within it compiled networks run as they are written: compiled ones do not see hooks that come and go."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def _tapped(backbone: Backbone, names: Sequence[str], x: Tensor) -> Iterator[dict[str, Tensor]]:
    """Outputs of the named submodules during the enclosed forward.

    The hooks go when the forward returns: under gradient checkpointing they would fire again in the recomputation.
    """
    module, found = backbone.module, {}
    known = dict(module.named_modules()) if names else {}
    missing = [name for name in names if name not in known]
    if missing:
        raise LookupError(f"no submodules named {missing} in {type(module).__name__}; see named_modules()")

    def keep(name: str):
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if name in found:
                raise RuntimeError(f"{name} ran twice in one forward, so its features do not belong to one batch")
            found[name] = backbone.feature(output, x)

        return hook

    handles = [known[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
