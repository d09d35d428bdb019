import pytest
import torch
from torch.testing import assert_close

from fewstep.diffusion import Prediction, RectifiedFlow, guided
from fewstep.types import Condition

COND = Condition({"shift": torch.tensor([1.0, 2.0, 3.0])}, {"shift": torch.tensor([0.5])})


class Shifting:
    """raw = x_t + shift; remembers what it was called with."""

    def __init__(self, kind="flow", dtype=torch.float32):
        self.kind, self.dtype, self.calls = kind, dtype, []

    def __call__(self, x_t, t, cond, *, taps=()):
        self.calls.append((x_t, t, cond, taps))
        raw = (x_t + cond.tensors["shift"].view(-1, 1)).to(self.dtype)
        return Prediction(raw, x_t, t, self.kind, RectifiedFlow(), taps={name: raw for name in taps})


def states():
    return torch.tensor([[0.5, -1.0], [2.0, 0.0], [1.0, 3.0]]), torch.tensor([0.2, 0.5, 0.9])


def test_scale_one_calls_the_denoiser_once():
    """T7. Fails if scale 1 still evaluates u, which would double the cost of every unguided teacher."""
    denoiser = Shifting()
    x_t, t = states()
    assert torch.equal(guided(denoiser, 1.0)(x_t, t, COND).raw, Shifting()(x_t, t, COND).raw)
    assert len(denoiser.calls) == 1


def test_scale_zero_calls_the_empty_prompt_alone():
    """Fails if the prompt's branch is evaluated for nothing."""
    denoiser = Shifting()
    x_t, t = states()
    assert_close(guided(denoiser, 0.0)(x_t, t, COND).raw, x_t + 0.5)
    assert len(denoiser.calls) == 1
    with pytest.raises(ValueError, match=r"guidance 0\.0 needs an empty prompt"):
        guided(denoiser, 0.0)(x_t, t, Condition({"shift": torch.ones(3)}))


def test_guidance_extrapolates_from_empty_to_prompt():
    """raw = u + g (c - u). Fails as c + g (c - u), Self-Forcing's convention."""
    x_t, t = states()
    raw = guided(Shifting(), 3.0)(x_t, t, COND).raw
    assert_close(raw, x_t + torch.tensor([[0.5 + 3 * 0.5], [0.5 + 3 * 1.5], [0.5 + 3 * 2.5]]))


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
def test_every_view_is_linear_in_the_scale(kind):
    """T7: the kinds are affine at equal x_t, so x0(g) lies on the line through x0(0) and x0(1)."""
    x_t, t = states()
    at = {g: guided(Shifting(kind), g)(x_t, t, COND) for g in (0.0, 1.0, 4.0)}
    for view in ("x0", "eps", "flow"):
        zero, one, four = (getattr(at[g], view) for g in (0.0, 1.0, 4.0))
        assert_close(four, zero + 4 * (one - zero), atol=2e-5, rtol=1e-5)


def test_both_branches_see_the_same_state_and_time():
    """T7. Fails if the empty prompt's branch gets noise or a time of its own."""
    denoiser = Shifting()
    x_t, t = states()
    guided(denoiser, 2.0)(x_t, t, COND)
    (x_c, t_c, cond_c, _), (x_u, t_u, cond_u, _) = denoiser.calls
    assert x_c is x_u is x_t
    assert t_c is t_u is t
    assert cond_c is COND
    assert cond_u.tensors["shift"].tolist() == [0.5, 0.5, 0.5]


def test_branches_are_combined_in_float32():
    """c - u is one bfloat16 unit, 2^-7, and g = 1.75 makes it no bfloat16 number. Fails if combined in bfloat16."""
    x_t, t = torch.ones(1, 2), torch.tensor([0.5])
    cond = Condition({"shift": torch.tensor([2**-7])}, {"shift": torch.tensor([0.0])})
    raw = guided(Shifting(dtype=torch.bfloat16), 1.75)(x_t, t, cond).raw
    assert torch.equal(raw, torch.full((1, 2), 1 + 1.75 * 2**-7))


def test_taps_come_from_the_prompts_branch():
    x_t, t = states()
    pred = guided(Shifting(), 2.0)(x_t, t, COND, taps=["mid"])
    assert torch.equal(pred.taps["mid"], Shifting()(x_t, t, COND).raw)


def test_guidance_without_an_empty_prompt_is_refused():
    x_t, t = states()
    with pytest.raises(ValueError, match=r"guidance 2\.0 needs an empty prompt"):
        guided(Shifting(), 2.0)(x_t, t, Condition({"shift": torch.ones(3)}))
