"""What a step keeps for its backward."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.rng import Rng
from fewstep.training.trainer import Trainer
from tests.invariants.gradients import make


class Kept:
    """Bytes that autograd saved for backward within the context."""

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> "Kept":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.count, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.hooks.__exit__(*exc)

    def count(self, tensor: Tensor) -> Tensor:
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor


@pytest.mark.parametrize("num_steps", [1, 4])
def test_generator_loss_keeps_one_generator_forward_and_nothing_of_the_scores(num_steps: int, tmp_path: Path):
    """Its saved bytes are those of the generator's own call, whatever the number of steps; the loss adds a scalar.

    Fails without no_grad around the scores (their input requires grad, so all their activations stay), and for 4 steps
    with a rollout that records its prefix.
    """
    trainer, steps = make(Trainer, tmp_path, num_steps)
    trio, ids = trainer.trio, tuple(range(8))
    batch = trainer.data.batch(ids)
    keyed = (Rng(0, iteration, "generator", ids) for iteration in range(100))
    iteration = [rng.shared_int("rollout.step", num_steps) > 0 for rng in keyed].index(num_steps > 1)
    with trio.turn("generator"):
        with Kept() as loss:
            total = trainer.objective.generator_loss(trio, batch, Rng(0, iteration, "generator", ids)).total
        x_t = torch.randn(8, *batch.shape)
        with Kept() as call:
            x0 = trio.generator(x_t, torch.full((8,), 0.7), batch.cond).x0
    assert total.requires_grad and x0.requires_grad and call.bytes > 0
    assert (steps[0] > 0) == (num_steps > 1)  # with a prefix that could be recorded
    assert abs(loss.bytes - call.bytes) <= 8
