"""The order of rows: small sets as torch permutes them, large ones by a Feistel network."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.rng import key
from fewstep.training import order
from fewstep.training.order import Order, permuted


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 300), seed=st.integers(0, 2**62))
def test_the_feistel_order_is_a_permutation_of_any_number(count: int, seed: int):
    """Fails without the walk along the cycle (numbers beyond the end), or with `% count` in its place (twice)."""
    assert sorted(permuted(i, count, seed) for i in range(count)) == list(range(count))


@pytest.mark.parametrize("count", [2**20 + 1, 10_000_019])
def test_large_orders_stay_in_range_and_meet_no_row_twice(count: int):
    rows = Order("prompts", 0, count).rows(range(5000))
    assert rows.min() >= 0 and rows.max() < count and len(rows.unique()) == 5000


def test_large_orders_are_uniform():
    """Mean and correlation of neighbours within four standard errors of those of independent uniform numbers."""
    count, n = 3_000_017, 4000
    x = Order("prompts", 1, count).rows(range(n)).double() / count - 0.5
    assert abs(x.mean()) < 4 * (1 / 12 / n) ** 0.5
    assert abs((x[1:] * x[:-1]).mean() * 12) < 4 / n**0.5


def test_large_orders_differ_by_epoch_seed_and_name():
    """Fails with one key for all."""
    count = order.LARGE + 3
    firsts = [range(epoch * count, epoch * count + 8) for epoch in range(3)]
    made = {
        tuple(Order(name, seed, count).rows(ids).tolist())
        for name in ("prompts", "reals")
        for seed in (0, 1)
        for ids in firsts
    }
    assert len(made) == 12


def test_every_epoch_of_a_large_set_holds_each_row_once(monkeypatch):
    monkeypatch.setattr(order, "LARGE", 5)
    rows = Order("prompts", 0, 7).rows(range(21)).view(3, 7)
    assert torch.equal(rows.sort(1).values, torch.arange(7).expand(3, 7))


def test_small_orders_are_those_of_torch():
    """What runs were trained on must not change."""
    expected = torch.randperm(11, generator=torch.Generator().manual_seed(key(3, "pairs", 2)))
    assert torch.equal(Order("pairs", 3, 11).rows(range(22, 33)), expected)
    assert Order("pairs", 3, 1).rows((0, 5)).tolist() == [0, 0]
