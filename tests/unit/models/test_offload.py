"""A network that visits its device: here the CPU plays both, and weights are there if they are not those at home."""

import pytest
import torch
from torch import nn

from fewstep.models.offload import Offload


class Counted(Offload):
    """Counts its visits."""

    visits = 0

    def enter(self):
        self.visits += not self._here
        super().enter()


@pytest.fixture
def visitor():
    """(network, another, its offload, whether the network's weights and buffers are on the device)."""
    torch.manual_seed(0)
    network, other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval().requires_grad_(False), nn.Linear(3, 3)
    home = [t.data_ptr() for t in network.state_dict().values()]
    offload = Counted(network, torch.device("cpu"), [other])

    def there() -> bool:
        moved = {a != t.data_ptr() for a, t in zip(home, network.state_dict().values(), strict=True)}
        assert len(moved) == 1  # all or none
        return moved.pop()

    return network, other, offload, there


@torch.no_grad()
def test_two_calls_share_a_visit_and_the_next_network_ends_it(visitor):
    network, other, offload, there = visitor
    x, seen = torch.randn(2, 3), []
    before = network.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    network[0].register_forward_hook(lambda *_: seen.append(there()))
    assert not there()
    network(x), network(x)
    assert seen == [True, True] and there() and offload.visits == 1
    other(x)
    assert not there()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network(x)
    assert offload.visits == 2


def test_weights_stay_for_a_backward_pass(visitor):
    """SiD's gradient goes through the real score.  Fails if the next network's call ends the visit all the same."""
    network, other, offload, there = visitor
    x = torch.randn(2, 3, requires_grad=True)
    loss = other(network(x)[:, :3]).sum()
    assert there()
    loss.backward()
    offload.leave()
    assert not there() and x.grad is not None
    with torch.no_grad():
        network(x), other(x)
    assert not there()


@torch.no_grad()
def test_they_can_be_made_to_stay(visitor):
    network, other, offload, there = visitor
    with pytest.raises(KeyError), offload.staying():
        network(torch.randn(2, 3)), other(torch.randn(2, 3))
        assert there()
        raise KeyError
    assert not there()
