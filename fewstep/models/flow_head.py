"""TMD's student: a transformer whose last blocks, the flow head, run several times on what the others said once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion import Prediction, RectifiedFlow, shift_time
from fewstep.diffusion.schedules import like
from fewstep.models.adapters import add_own, own_parts
from fewstep.models.denoiser import Backbone, Denoiser
from fewstep.models.second_time import TimeMLP
from fewstep.models.split import Split, State, split
from fewstep.types import Condition, Kind

FUSION = "fusion"


class Fusion(nn.Module):
    """What a flow head has beside the teacher's blocks: the way in of the inner state, its gate and its second time.

    y' = y + g MLP(LN(y) (1 + a) + b), (a, b, g) linear in the time;  h = m + sigmoid(gate) (y' - m)
                                                                            [TMD, arXiv:2601.09881, section 3 and A.1]
    The paper names a gated fusion; that h interpolates, and where the gate starts, are DERIVED.  It modulates with the
    network's own shared projection, which this family has not: the block's own is ours.
    """

    def __init__(self, width: int, time_width: int, gate: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(time_width, 3 * width)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gap = TimeMLP(time_width)
        self.gate = nn.Parameter(torch.tensor(gate))

    def forward(self, main: Tensor, tokens: Tensor, time: Tensor) -> Tensor:
        """The head's tokens h.  main m, tokens y: [B, ..., C].  time: [B, E].  Returns main's shape and dtype."""
        wide = self.gate.dtype
        y = tokens.to(wide)
        shape = (len(y), *[1] * (y.ndim - 2), -1)
        a, b, g = (v.view(shape) for v in self.modulation(nn.functional.silu(time.to(wide))).chunk(3, -1))
        y = y + g * self.outer(nn.functional.gelu(self.inner(self.norm(y) * (1 + a) + b)))
        return (main + self.gate.sigmoid() * (y - main)).to(main.dtype)


class Memory(NamedTuple):
    """What the main part said of x_t at t under a condition: the state after its last block."""

    state: State
    x_t: Tensor
    t: Tensor
    cond: Condition


class FlowHead(Backbone):
    """The network as a conditional flow of y = x_1 - x, the transition's direction.  Made by `with_flow_head`.

    Its pieces are called, never its own forward, so a run's mixed precision does not reach it: it computes in its
    weights' dtype.
    grid: the inner flow's times 0 = s_0 < ... < s_N, [N + 1] float32.  kind: what the plain network predicts.
    """

    def __init__(self, plain: Backbone, kind: Kind, grid: Tensor, blocks: int) -> None:
        super().__init__(plain.module)
        self.plain, self.head_blocks = plain, blocks
        self.kind: Kind = kind
        self.register_buffer("grid", grid, persistent=False)
        split(plain)

    grid: Tensor

    @property
    def pieces(self) -> Split:
        """Of the network; made anew, so that a copy of this one calls its own blocks."""
        return split(self.plain)

    @property
    def extras(self) -> frozenset[str]:
        """The inner flow's noise."""
        return frozenset({"noise"})

    def network_time(self, t: Tensor) -> Tensor:
        """t itself; the pieces know the network's."""
        return t

    def forward(self, x: Tensor, network_time: Tensor, cond: Condition) -> Tensor:
        """y, x's shape, float32 or better.  Raises ValueError without `cond.extra["noise"]`, unit noise [B, ...]."""
        if "noise" not in cond.extra:
            raise ValueError("a flow head starts from noise of its own; give cond.also(noise=[B, C, H, W])")
        return self.roll(self.main(x, network_time, cond), cond.extra["noise"])

    def roll(self, memory: Memory, noise: Tensor) -> Tensor:
        """The inner flow, from unit noise y_1 [B, ...] down to y.

        y_r = y_s - (s - r) u,  u = y_1 - head(y_s, s, r), for (s, r) = (s_N, s_{N-1}), ..., (s_1, 0)
                                                                            [TMD, arXiv:2601.09881, section 3.2]
        The paper prints y_s + (s - r) u, which its own identity u + (s - r) du/ds = v contradicts (DERIVED).
        """
        y = noise
        for k in range(len(self.grid) - 1, 0, -1):
            s, r = self.grid[k].expand(len(y)), self.grid[k - 1].expand(len(y))
            y = y - like(s - r, y).to(y) * (noise - self.head(memory, y, s, r))
        return y

    def main(self, x_t: Tensor, t: Tensor, cond: Condition) -> Memory:
        """All blocks but the head's, on x_t [B, ...] at t [B]."""
        pieces = self.pieces
        state = pieces.blocks(pieces.enter(x_t.to(self.dtype), t, cond), 0, pieces.depth - self.head_blocks)
        return Memory(state, x_t.to(torch.promote_types(x_t.dtype, self.dtype)), t, cond)

    def head(self, memory: Memory, y_s: Tensor, s: Tensor, r: Tensor) -> Tensor:
        """What the last blocks make of y_s [B, ...], at s and bound for r <= s, both [B]: y, float32 or better.

        They are told s by the network's own embedding of a time and s - r by another that starts at zero.
        """
        pieces, fusion = self.pieces, own_parts(self.module)[FUSION]
        assert isinstance(fusion, Fusion)
        tokens, time, _ = pieces.enter(y_s.to(self.dtype), s, memory.cond)
        time = time + fusion.gap(s - r).to(time.dtype)
        tokens = fusion(memory.state.tokens, tokens, time)
        state = memory.state._replace(tokens=tokens, time=time)
        state = pieces.blocks(state, pieces.depth - self.head_blocks, pieces.depth)
        raw = pieces.leave(state, memory.x_t, memory.t)
        return Prediction(raw, memory.x_t, memory.t, self.kind, RectifiedFlow()).flow

    def below(self, s: Tensor) -> Tensor:
        """The largest time of the inner grid that is not above s: [B]."""
        return self.grid[torch.searchsorted(self.grid, s.contiguous(), right=True) - 1]

    def plain_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Refused: no plain network rolls a head out."""
        raise ValueError("a student with a flow head has no diffusers pipeline; use it through fewstep.load_student")

    def checkpoint_activations(self) -> None:
        """As the plain network's."""
        self.plain.checkpoint_activations()


def with_flow_head(network: Denoiser, *, blocks: int, grid: Tensor, gate: float, seed: int = 0) -> Denoiser:
    """The network, in place, with its last `blocks` as a flow head; it then predicts flow from x_t and its own noise.

    Told s = t and with the gate closed, the head is the plain network's end, so that y is the teacher's flow.  Told the
    paper's s = .999 instead, two blocks of fashion-dit are 23% off at t = .7 and 64% at .4: stage 1's to learn.
    grid: see `inner_grid`.  gate: before its sigmoid.  seed: of new values, the same on every process.
    Raises ValueError for networks that cannot be split so, and off rectified flow, where y is no Euler direction.
    """
    if not isinstance(network.schedule, RectifiedFlow):
        raise ValueError(
            f"a flow head's transitions are rectified flow's, this teacher is on {type(network.schedule).__name__}; "
            "take a flow teacher, as fashion-dit, or another method, as dmd2"
        )
    pieces = split(network.backbone)
    if not 0 < blocks < pieces.depth:
        raise ValueError(f"head_blocks must be in 1..{pieces.depth - 1} of this network's {pieces.depth}, got {blocks}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_own(network.backbone.module, FUSION, Fusion(*pieces.widths, gate))
    head = FlowHead(network.backbone, network.predicts, grid, blocks)
    return Denoiser(head, network.schedule, "flow")


def flow_head(network: Denoiser) -> FlowHead:
    """The denoiser's backbone.  Raises ValueError if it is no flow head."""
    if not isinstance(network.backbone, FlowHead):
        raise ValueError("this generator has no flow head; make it with `with_flow_head`")
    return network.backbone


def inner_grid(steps: int, shift: float = 10.0, last: float = 0.999) -> Tensor:
    """s_j = `shift_time`(j / N), but s_N = last: [N + 1] float32 from 0     [TMD, arXiv:2601.09881, section 3.1]

    N = 2: 0, .909, .999.  N = 4: 0, .769, .909, .968, .999.
    """
    grid = shift_time(torch.arange(steps + 1, dtype=torch.float64) / steps, shift)
    grid[-1] = last
    return grid.float()
