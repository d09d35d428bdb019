"""One call, any view; taps by forward hooks that leave nothing behind."""

import pytest
import torch
from torch.testing import assert_close

from fewstep.diffusion import RectifiedFlow
from fewstep.models.backbones import CogView4
from fewstep.models.denoiser import Denoiser
from fewstep.teachers import gaussian
from fewstep.types import Condition
from tests.tiny_pipeline import LATENTS, tiny_transformer


def student():
    teacher = gaussian(fit_steps=0)
    return teacher.student()


def test_times_must_be_one_per_sample():
    """Fails if a scalar is broadcast in silence: [1] against [B] hides a reversed or missing batch dimension."""
    with pytest.raises(ValueError, match=r"t must be \[B\] = \[3\]"):
        student()(torch.zeros(3, 2), torch.tensor([0.5]), Condition())


def test_taps_return_module_outputs_and_remove_their_hooks():
    net = student()
    x, t = torch.randn(3, 2), torch.full((3,), 0.5)
    pred = net(x, t, Condition(), taps=("layers.0", "layers.1"))
    assert set(pred.taps) == {"layers.0", "layers.1"}
    assert pred.taps["layers.1"].shape == (3, 128)
    assert not any(m._forward_hooks for m in net.modules())
    assert not net(x, t, Condition()).taps


def test_an_unknown_tap_is_named():
    with pytest.raises(LookupError, match=r"blocks\.7"):
        student()(torch.zeros(3, 2), torch.zeros(3), Condition(), taps=("blocks.7",))


def test_what_runs_twice_in_one_forward_cannot_be_tapped():
    """Prompts of two lengths take two calls.  Fails if the last call's features stand for the whole batch."""
    net = Denoiser(CogView4(tiny_transformer(), 4), RectifiedFlow(), "flow")
    cond = Condition({"text": torch.randn(3, 16, 16), "length": torch.tensor([5, 16, 5])})
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.0 ran twice"):
        net(torch.randn(3, *LATENTS), torch.full((3,), 0.5), cond, taps=("transformer_blocks.0",))


def test_a_bf16_network_answers_in_float32_views():
    """Fails if x0 is formed in the network's dtype."""
    net = student().to(torch.bfloat16)
    pred = net(torch.randn(3, 2), torch.full((3,), 0.5), Condition())
    assert pred.raw.dtype == torch.bfloat16 and pred.x0.dtype == torch.float32


def test_cogview4_is_called_as_its_pipeline_calls_it():
    torch.manual_seed(0)
    net = tiny_transformer().eval()
    x, t, text = torch.randn(3, *LATENTS), torch.tensor([1.0, 0.748, 0.25]), torch.randn(3, 16, 16)
    size = torch.full((3, 2), 4.0 * LATENTS[-1])
    with torch.no_grad():
        expected = net(
            hidden_states=x,
            encoder_hidden_states=text,
            timestep=torch.tensor([1000.0, 748.0, 250.0]),
            original_size=size,
            target_size=size,
            crop_coords=torch.zeros(3, 2),
            return_dict=False,
        )[0]
        pred = Denoiser(CogView4(net, 4), RectifiedFlow(), "flow")(x, t, Condition({"text": text}))
    assert_close(pred.raw, expected)
    assert_close(pred.x0, x - t[:, None, None, None] * expected)
