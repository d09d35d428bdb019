"""Families of networks are called with what each was trained on."""

import pytest
import torch
from torch.testing import assert_close

from fewstep.diffusion import VPTable
from fewstep.models.backbones import CogView4, UNet2DCondition
from fewstep.models.denoiser import Denoiser
from fewstep.types import Condition
from tests.tiny_pipeline import LATENTS, tiny_transformer, tiny_unet


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return tiny_transformer().eval().double()


@pytest.mark.parametrize("lengths", [(32, 16, 48, 16), (16, 16, 16, 16)])
def test_mixed_batch_of_lengths_equals_each_row_alone(net, lengths):
    """Values and gradients, float64.  Fails if padding reaches the network, or rows come back in another order."""
    x = torch.randn(4, *LATENTS, dtype=torch.float64, requires_grad=True)
    text, times = torch.randn(4, 48, 16, dtype=torch.float64), torch.tensor([900.0, 500.0, 20.0, 1.0])
    backbone = CogView4(net, 4)
    mixed = backbone(x, times, Condition({"text": text, "length": torch.tensor(lengths)}))
    alone = torch.cat(
        [
            backbone(x[i : i + 1], times[i : i + 1], Condition({"text": text[i : i + 1, :n]}))
            for i, n in enumerate(lengths)
        ]
    )
    assert_close(mixed, alone, atol=1e-12, rtol=0)
    weight = torch.randn_like(mixed)
    (found,) = torch.autograd.grad((mixed * weight).sum(), x)
    (expected,) = torch.autograd.grad((alone * weight).sum(), x)
    assert_close(found, expected, atol=1e-12, rtol=0)
    padded = backbone(x, times, Condition({"text": text}))
    assert (padded - alone).abs().max() > 1e-6  # else any length would do


def test_unet_is_told_every_index_as_a_whole_number():
    """All 1000 of a table.  Fails if the product is taken in float64: 748 / 999 * 999 is 747.99."""
    index = torch.arange(1000)
    backbone = UNet2DCondition(torch.nn.Identity())
    for times in (index / 999, (index.double() / 999).float()):
        assert torch.equal(backbone.network_time(times), index.float())
        assert not torch.equal(backbone.network_time(times).double(), times.double() * 999)


def test_unet_is_told_times_between_indices_too():
    assert_close(UNet2DCondition(torch.nn.Identity()).network_time(torch.tensor([0.0005])), torch.tensor([0.4995]))


def test_unets_bottleneck_is_tapped():
    denoiser = Denoiser(UNet2DCondition(tiny_unet()), VPTable.scaled_linear(), "eps")
    cond = Condition({"text": torch.randn(3, 16, 16)})
    found = denoiser(torch.randn(3, *LATENTS), torch.full((3,), 0.5), cond, taps=denoiser.backbone.taps).taps
    assert {name: feature.shape for name, feature in found.items()} == {"mid_block": (3, 16, 2, 2)}


def test_unet_is_called_as_its_pipeline_calls_it():
    torch.manual_seed(0)
    net = tiny_unet().eval()
    x, text = torch.randn(3, *LATENTS), torch.randn(3, 16, 16)
    with torch.no_grad():
        whole = net(x, torch.tensor([999, 748, 20]), encoder_hidden_states=text).sample
        ours = UNet2DCondition(net)(x, torch.tensor([999.0, 748.0, 20.0]), Condition({"text": text}))
    assert_close(ours, whole)
