"""A network in pieces is the network."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

import fewstep.teachers.point_split  # noqa: F401 - registers the small network's pieces
from fewstep.models.adapters import LoRA, add_lora
from fewstep.models.backbones import CogView4, UNet2DCondition
from fewstep.models.split import split
from fewstep.teachers import mixture
from fewstep.types import Condition
from tests.tiny_pipeline import LATENTS, tiny_transformer, tiny_unet


def transformer(adapted=False):
    torch.manual_seed(0)
    net = tiny_transformer().eval()
    if adapted:
        add_lora(net, LoRA(rank=2))
        for name, p in net.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(p, std=0.1)
    return CogView4(net, 4)


def inputs(length=16, height=4):
    torch.manual_seed(1)
    x = torch.randn(3, LATENTS[0], height, LATENTS[2])
    return x, torch.tensor([0.999, 0.4, 0.05]), Condition({"text": torch.randn(3, length, 16)})


def in_pieces(backbone, x, t, cond, cuts=()):
    pieces = split(backbone)
    state, ends = pieces.enter(x, t, cond), (0, *cuts, pieces.depth)
    for start, stop in pairwise(ends):
        state = pieces.blocks(state, start, stop)
    return pieces.leave(state, x, t)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("height", [4, 8])
def test_a_transformer_in_pieces_is_the_transformer_bit_by_bit(adapted, height):
    """Fails if a block, an activation or a token's place is lost, with adapters or without, and off the square."""
    backbone, (x, t, cond) = transformer(adapted), inputs(height=height)
    whole = backbone(x, backbone.network_time(t), cond)
    assert torch.equal(in_pieces(backbone, x, t, cond), whole)
    assert torch.equal(in_pieces(backbone, x, t, cond, cuts=(1,)), whole)


def test_padding_of_a_batch_of_one_length_stays_out():
    backbone, (x, t, cond) = transformer(), inputs()
    cond = dataclasses.replace(cond, tensors={**cond.tensors, "length": torch.full((3,), 9)})
    assert torch.equal(in_pieces(backbone, x, t, cond), backbone(x, backbone.network_time(t), cond))


def test_prompts_of_different_lengths_are_refused():
    backbone, (x, t, cond) = transformer(), inputs()
    cond = dataclasses.replace(cond, tensors={**cond.tensors, "length": torch.tensor([9, 16, 9])})
    with pytest.raises(ValueError, match=r"prompts have \[9, 16\] tokens.*give prompts .* of one padded length"):
        split(backbone).enter(x, t, cond)


def test_recomputing_activations_changes_no_gradient():
    """Fails if the pieces forget the network's gradient checkpointing, whose calls are counted, or get it wrong."""
    x, t, cond = inputs()
    found, calls = [], []
    for recomputed in (False, True):
        backbone = transformer()
        if recomputed:
            backbone.checkpoint_activations()
            make = backbone.module._gradient_checkpointing_func
            backbone.module._gradient_checkpointing_func = lambda *given, make=make: calls.append(1) or make(*given)
        in_pieces(backbone.train(), x, t, cond).square().sum().backward()
        found.append([p.grad for p in backbone.parameters() if p.grad is not None])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)
    assert len(calls) == 2


@pytest.mark.parametrize("adapted", [False, True])
def test_the_small_network_in_pieces_is_the_small_network(adapted):
    """Float64: the one layer that hears of point and time together is called once for each, so not bit by bit."""
    teacher = mixture(classes=[0, 1] * 4, fit_steps=3)
    assert teacher.student is not None
    backbone = teacher.student().double().backbone
    if adapted:
        add_lora(backbone.module, LoRA(rank=2))
        for name, p in backbone.module.named_parameters():
            p.data = p.data.double()
            if ".lora_" in name:
                torch.nn.init.normal_(p, std=0.1)
    torch.manual_seed(1)
    x, t = torch.randn(3, 2, dtype=torch.float64), torch.tensor([1.0, 0.4, 0.05])
    for cond in (Condition(), Condition({"class": torch.tensor([0, 1, -1])})):
        assert_close(in_pieces(backbone, x, t, cond, cuts=(1,)), backbone(x, t, cond), atol=1e-12, rtol=1e-12)


def test_a_unet_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"UNet2DConditionModel is no chain of blocks.*take a transformer"):
        split(UNet2DCondition(tiny_unet()))


def test_a_transformer_without_a_piece_is_refused():
    backbone = transformer()
    del backbone.module.norm_out
    with pytest.raises(ValueError, match="has no norm_out: diffusers has changed it"):
        split(backbone)
