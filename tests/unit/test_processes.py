"""Shares of processes; what they gather is in tests/invariants/test_eval_processes.py."""

import pytest
import torch

from fewstep.processes import ALONE, Processes


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(("n", "batch"), [(1, 50), (50, 50), (137, 50), (151, 50), (7, 1), (10, 3)])
def test_shares_are_the_batches_that_one_process_has(n, batch, count):
    """Together all of them, and as many on each.  Mutation: n samples divided evenly, which cuts batches in two."""
    alone = [range(start, min(start + batch, n)) for start in range(0, n, batch)]
    shares = [Processes(rank, count).share(n, batch) for rank in range(count)]
    cut = [[share[i : i + batch] for i in range(0, len(share), batch)] for share in shares]
    assert {part for parts in cut for part in parts} == set(alone)
    assert len({len(parts) for parts in cut}) == 1
    assert shares == [Processes(0, count).share(n, batch, rank) for rank in range(count)]


def test_one_process_does_all_by_itself():
    made = ALONE.gather(5, 2, lambda own: (torch.arange(own.start, own.stop),))
    assert torch.equal(made[0], torch.arange(5)) and ALONE.on_main(max, 3, 4) == 4 and ALONE.main


def test_the_others_begin_when_the_main_one_has_done_its_work(monkeypatch):
    """Mutation: all at once, so that each downloads what it lacks."""
    done: list[str] = []
    monkeypatch.setattr("torch.distributed.barrier", lambda group: done.append("wait"))
    for rank in (0, 1):
        Processes(rank, 2).main_first(lambda: done.append("work"))
    assert done == ["work", "wait", "wait", "work"]
    assert ALONE.main_first(lambda: 3) == 3
