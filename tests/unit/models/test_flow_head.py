"""TMD's student: the teacher at the start, a flow map's rollout, and what is its own."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

import fewstep.teachers.point_split  # noqa: F401 - registers the small network's pieces
from fewstep.diffusion import RectifiedFlow, VPTable
from fewstep.models.adapters import LoRA, add_lora
from fewstep.models.backbones import CogView4, UNet2DCondition
from fewstep.models.denoiser import Denoiser
from fewstep.models.flow_head import FlowHead, flow_head, inner_grid, with_flow_head
from fewstep.teachers import gaussian
from fewstep.types import Condition
from tests.tiny_pipeline import LATENTS, tiny_transformer, tiny_unet

SHUT, OPEN = -30.0, 0.0


def transformer(dtype=torch.float64):
    torch.manual_seed(0)
    return Denoiser(CogView4(tiny_transformer().eval().to(dtype), 4), RectifiedFlow(), "flow")


def points():
    teacher = gaussian(fit_steps=3)
    assert teacher.student is not None
    return teacher.student().double()


def student(network, gate=OPEN, steps=2, **settings):
    return with_flow_head(copy.deepcopy(network), blocks=1, grid=inner_grid(steps, **settings), gate=gate).double()


def inputs(network):
    torch.manual_seed(1)
    shape, text = ((2,), {}) if network.predicts == "x0" else (LATENTS, {"text": torch.randn(3, 16, 16).double()})
    x, noise = torch.randn(2, 3, *shape, dtype=torch.float64)
    return x, noise, torch.tensor([0.999, 0.4, 0.05]), Condition(text)


class Known(FlowHead):
    """A head that is a formula."""

    def __init__(self, head, grid):
        super().__init__(transformer().backbone, "flow", grid, 1)
        self.formula = head

    def head(self, memory, y_s, s, r):
        return self.formula(y_s, s[0].double(), r[0].double())


@pytest.mark.parametrize("make", [transformer, points])
def test_the_student_starts_as_the_teacher_up_to_its_gate(make):
    """Gate shut and told s = t, the head is the teacher's end, whatever it predicts; gate -4 lets in 1.8%.  Fails if
    the second time is not zero at first, or the raw output of an x0 network is taken for a flow."""
    network = make()
    x, noise, t, cond = inputs(network)
    flow = network(x, t, cond).flow
    for gate, allowed in ((SHUT, 1e-9), (-4.0, 0.05)):
        head = flow_head(student(network, gate))
        found = head.head(head.main(x, t, cond), noise, t, 0.3 * t)
        assert (found - flow).norm() <= allowed * flow.norm()
        assert gate == SHUT or (found - flow).norm() > 1e-6 * flow.norm()


@pytest.mark.parametrize("grid", [(0, 1), (0, 0.5, 1), (0, 0.909, 0.95, 1), (0, 0.1, 0.2, 0.9, 1)])
def test_a_constant_head_is_recovered_exactly_on_any_grid(grid):
    """Fails with the sign that the paper prints, y_s + (s - r) u."""
    y, noise = torch.randn(2, 3, *LATENTS, dtype=torch.float64)
    head = Known(lambda y_s, s, r: y, torch.tensor(grid, dtype=torch.float64))
    assert_close(head.roll(None, noise), y, atol=1e-14, rtol=0)


@pytest.mark.parametrize("grid", [(0, 1), (0, 0.5, 1), (0, 0.769, 0.909, 0.968, 1)])
def test_the_mean_velocity_of_a_gaussian_carries_noise_to_it_on_any_grid(grid):
    """y ~ N(m, d^2): the exact flow map has y_s - m (1 - s) = sqrt(V_s / V_1) y_1, V_s = (1 - s)^2 d^2 + s^2.  So the
    rollout of u = (y_s - y_r) / (s - r) ends at m + d y_1.  Fails if the head is taken for u itself."""
    mean, std = 0.7, 0.4
    noise = torch.randn(3, *LATENTS, dtype=torch.float64)

    def head(y_s, s, r):
        spread_s, spread_r = ((((1 - v) * std) ** 2 + v**2).sqrt() for v in (s, r))
        y_r = mean * (1 - r) + spread_r / spread_s * (y_s - mean * (1 - s))
        return noise - (y_s - y_r) / (s - r)

    end = Known(head, torch.tensor(grid, dtype=torch.float64)).roll(None, noise)
    assert_close(end, mean + std * noise, atol=1e-12, rtol=0)


def test_one_inner_step_is_the_head_from_pure_noise():
    network = transformer()
    x, noise, t, cond = inputs(network)
    made = student(network, steps=1)
    head, last = flow_head(made), torch.full((3,), 0.999)
    expected = noise - 0.999 * (noise - head.head(head.main(x, t, cond), noise, last, 0 * last))
    assert_close(made(x, t, cond.also(noise=noise)).flow, expected, atol=1e-6, rtol=0)


def test_the_rollouts_gradient_is_that_of_the_unrolled_graph():
    """Through both inner steps and m.  Fails if a step, or the main part, is cut off."""
    network = transformer()
    x, noise, t, cond = inputs(network)
    made, weight = student(network), torch.randn(3, *LATENTS).double()
    head, weights = flow_head(made), list(made.weights().values())
    with_cuts = []
    for cut_step, cut_main in ((False, False), (True, False), (False, True)):
        memory = head.main(x, t, cond)
        if cut_main:
            state = memory.state
            memory = memory._replace(state=state._replace(tokens=state.tokens.detach()))
        high, low, end = (head.grid[k].expand(3) for k in (2, 1, 0))
        first = noise - (high - low)[0] * (noise - head.head(memory, noise, high, low))
        first = first.detach() if cut_step else first
        y = first - (low - end)[0] * (noise - head.head(memory, first, low, end))
        with_cuts.append(torch.autograd.grad((weight * y).sum(), weights, allow_unused=True))
    made(x, t, cond.also(noise=noise)).flow.mul(weight).sum().backward()
    found = [p.grad for p in weights]

    def gap(others):
        pairs = [(a, b) for a, b in zip(found, others, strict=True) if a is not None]
        return max(float((a - (0 if b is None else b)).abs().max()) for a, b in pairs)

    whole, without_step, without_main = map(gap, with_cuts)
    assert whole < 1e-12
    assert without_step > 1e-3
    assert without_main > 1e-3


def test_the_second_time_says_nothing_at_first_but_learns_at_once():
    """Only its last layer is zero: were all, no weight but the last bias would get a gradient."""
    network = transformer()
    x, noise, t, cond = inputs(network)
    made = student(network)
    head, gap = flow_head(made), made.own["fusion"].gap
    memory, s = head.main(x, t, cond), torch.full((3,), 0.9)
    assert torch.equal(head.head(memory, noise, s, s), head.head(memory, noise, s, 0 * s))
    head.head(memory, noise, s, 0.5 * s).square().sum().backward()
    assert gap.outer.weight.grad.abs().max() > 1e-6
    with torch.no_grad():
        gap.outer.weight.normal_()
    assert not torch.equal(head.head(memory, noise, s, s), head.head(memory, noise, s, 0 * s))


def test_the_gate_and_the_way_in_learn_from_the_start():
    network = transformer()
    x, noise, t, cond = inputs(network)
    made = student(network, gate=-4.0)
    made(x, t, cond.also(noise=noise)).flow.square().sum().backward()
    for name, p in made.own["fusion"].named_parameters():
        assert (p.grad.abs().max() > 0) == (not name.startswith("gap.inner")), name


@pytest.mark.parametrize(
    ("steps", "times"), [(1, (0, 0.999)), (2, (0, 0.909, 0.999)), (4, (0, 0.769, 0.909, 0.968, 0.999))]
)
def test_the_inner_grid_is_the_papers(steps, times):
    assert inner_grid(steps).tolist() == pytest.approx(times, abs=5e-4)


def test_the_grid_time_below():
    head = Known(lambda y_s, s, r: y_s, inner_grid(4))
    s = torch.tensor([0.003, 0.7, 0.77, 0.95, 0.999, 0.9997])
    assert head.below(s).tolist() == pytest.approx([0, 0, 0.769, 0.909, 0.999, 0.999], abs=5e-4)
    assert torch.equal(head.below(head.grid), head.grid)
    assert (head.below(s) <= s).all()


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_it_costs_one_network_and_so_many_heads(steps):
    """Block by block: L - H of the main part once, H of the head at each inner step."""
    network = transformer()
    x, noise, t, cond = inputs(network)
    made, calls = student(network, steps=steps), []
    for block in made.backbone.module.transformer_blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    made(x, t, cond.also(noise=noise))
    assert len(calls) == 1 + steps


@pytest.mark.parametrize("adapted", [False, True])
def test_its_parts_are_saved_and_averaged_with_it(adapted):
    """A twin has values of its own and calls its own blocks.  Fails if the pieces are kept across a copy."""
    network = transformer(torch.float32)
    if adapted:
        add_lora(network.backbone.module, LoRA(rank=2))
    made = with_flow_head(network, blocks=1, grid=inner_grid(2), gate=OPEN)
    assert {name for name in made.state() if name.startswith("own.fusion.")} >= {
        "own.fusion.gate",
        "own.fusion.inner.weight",
    }
    twin = made.twin()
    x, noise, t, cond = (v.float() if isinstance(v, torch.Tensor) else v for v in inputs(network))
    cond = Condition({"text": cond.tensors["text"].float()}).also(noise=noise)
    before = twin(x, t, cond).flow
    with torch.no_grad():
        for p in made.weights().values():
            p.add_(0.1)
    assert torch.equal(twin(x, t, cond).flow, before)
    changed = made(x, t, cond).flow
    assert not torch.equal(changed, before)
    twin.load(made.state())
    assert torch.equal(twin(x, t, cond).flow, changed)


def test_one_seed_gives_one_student():
    first, again, other = (
        with_flow_head(transformer(), blocks=1, grid=inner_grid(2), gate=OPEN, seed=seed) for seed in (3, 3, 4)
    )
    weights = [made.own["fusion"].inner.weight for made in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_what_has_no_flow_head_is_refused():
    settings = {"grid": inner_grid(2), "gate": OPEN}
    unet = Denoiser(UNet2DCondition(tiny_unet()), RectifiedFlow(), "eps")
    with pytest.raises(ValueError, match=r"is no chain of blocks.*take a transformer"):
        with_flow_head(unet, blocks=1, **settings)
    assert not unet.own
    vp = Denoiser(transformer().backbone, VPTable.scaled_linear(), "flow")
    with pytest.raises(ValueError, match="teacher is on VPTable; take a flow teacher"):
        with_flow_head(vp, blocks=1, **settings)
    for blocks in (0, 2):
        with pytest.raises(ValueError, match=f"head_blocks must be in 1..1 of this network's 2, got {blocks}"):
            with_flow_head(transformer(), blocks=blocks, **settings)
    with pytest.raises(ValueError, match="no flow head"):
        flow_head(transformer())


def test_what_it_needs_and_cannot_give_is_said():
    made = student(transformer())
    x, _, t, cond = inputs(transformer())
    assert made.backbone.extras == {"noise"}
    with pytest.raises(ValueError, match=r"give cond.also\(noise="):
        made(x, t, cond)
    with pytest.raises(ValueError, match="no diffusers pipeline"):
        made.plain_state()


def test_grids_fall_to_zero_in_steps():
    for steps in (1, 2, 5):
        grid = inner_grid(steps).tolist()
        assert grid[0] == 0
        assert all(a < b for a, b in pairwise(grid))
