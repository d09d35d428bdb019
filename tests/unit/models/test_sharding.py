"""What of a network is gathered at a time, by hand.  tests/invariants/test_sharded: it trains as if it were whole."""

import pytest
import torch
from torch import nn

from fewstep.models.sharding import gathered, held, spread, units, whole
from tests.tiny_networks import FAMILIES, made
from tests.tiny_pipeline import tiny_unet


class Net(nn.Module):
    """Two blocks, of 6 and 12 numbers beside an inner block of 20, between layers of 2 and 3; 5 numbers of its own."""

    _no_split_modules = ("Inner",)

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.zeros(5))
        self.enter = nn.Linear(1, 1)
        self.blocks = nn.ModuleList([nn.Linear(2, 2), Block()])
        self.act = nn.SiLU()
        self.leave = nn.Linear(2, 1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Inner()])
        self.last = nn.Linear(3, 3)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


def test_units_are_children_and_named_blocks_from_the_inside_out():
    net = Net()
    assert units(net) == [net.leave, net.blocks[1].inner[0], net.blocks[1], net.blocks[0], net.enter, net]  # type: ignore[index, union-attr]


def test_most_that_is_whole_is_a_block_and_what_is_around_it():
    net = Net()
    assert gathered(net) == 4 * (5 + 12 + 20) and gathered(net, torch.bfloat16) == 2 * (5 + 12 + 20)
    assert gathered(net.double()) == 8 * (5 + 12 + 20)


@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "cogview4", "unet"])
def test_no_unit_of_a_family_is_most_of_it(name):
    """With as few as two blocks.  Fails for a UNet without the blocks that diffusers names."""
    assert name in FAMILIES
    network = made(name)[0]
    assert gathered(network) < 0.6 * held(list(network.parameters()))


def test_blocks_of_a_unet_are_units():
    kinds = {type(unit).__name__ for unit in units(tiny_unet())}
    assert {"BasicTransformerBlock", "ResnetBlock2D", "TimestepEmbedding", "Conv2d"} <= kinds


def test_whole_tensors_pass():
    x = torch.zeros(3)
    assert whole(x) is x and spread(x, torch.ones(3)) is x and held([x, x]) == 24
