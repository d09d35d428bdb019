"""Measuring what each term of a loss pulls with changes nothing, to the bit."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.diffusion import RectifiedFlow
from fewstep.models.backbones import CogView4
from fewstep.models.denoiser import Denoiser
from fewstep.models.trio import Trio
from fewstep.objectives import decoupled_dmd, dmd2, sid
from fewstep.objectives.decoupled_dmd import DecoupledDMD
from fewstep.objectives.dmd2 import DMD2
from fewstep.objectives.sid import SiD
from fewstep.rng import Rng
from fewstep.training.trainer import Trainer
from fewstep.types import Batch, Condition, Loss, Real
from tests.invariants.gradients import make
from tests.tiny_pipeline import tiny_transformer

METHODS = {
    "dmd2": DMD2(guidance=2.0, gan_weight=0.5),
    "decoupled": DecoupledDMD(guidance=2.0, gan_weight=0.5),
    "sid": SiD(guidance=2.0, gan_weight=0.5, gan_head="learned"),
}

TERMS = {"dmd2": {"dm", "gan"}, "decoupled": {"dm", "ca", "gan"}, "sid": {"sid", "gan"}}


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """unwatched() takes the measuring away."""

    def take() -> None:
        for module in (decoupled_dmd, dmd2, sid):
            monkeypatch.setattr(module, "watched", lambda x, term, norms: x)

    return take


def test_a_run_is_the_same_with_and_without(unwatched: Any, tmp_path: Path):
    """Weights and all other figures after four iterations of four micro-batches.

    Fails if a gradient comes back from its node scaled, and with shares taken before the backward pass.
    """

    def trained(out: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        trainer, _ = make(Trainer, out, 2, "gan", accumulate=4, iterations=4, log_every=1)
        trainer.run()
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        networks = {"generator": trainer.trio.generator, "fake": trainer.trio.critic()}
        return rows, {f"{n}.{k}": p.detach() for n, net in networks.items() for k, p in net.weights().items()}

    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    rows, weights = trained(tmp_path / "with")
    unwatched()
    plain, wanted = trained(tmp_path / "without")
    for row, other in zip(rows, plain, strict=True):
        if row["iteration"] > 1:  # at first the head has not moved, and matching is alone
            assert 0 < row.pop("grad/gan") == pytest.approx(1 - row.pop("grad/dm"), abs=1e-6)
        assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("name", METHODS)
def test_recomputed_activations_are_measured_once_and_alike(name: str, unwatched: Any):
    """Gradient checkpointing: the same norms, and the generator's gradient as without measuring.

    Fails if two terms share a node: three are then summed in another order.
    """
    players, given = transformers(METHODS[name])
    loss, _ = stepped(players, given, METHODS[name])
    for role in (players.generator, players.critic()):
        role.backbone.checkpoint_activations()
    again, found = stepped(players, given, METHODS[name])
    assert loss.grads.keys() == TERMS[name] and all(grad.abs().max() > 0 for grad in loss.grads.values())
    torch.testing.assert_close(again.grads, loss.grads, rtol=1e-5, atol=1e-7)
    unwatched()
    without, plain = stepped(players, given, METHODS[name])
    assert len(without.grads) < 2 and all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def transformers(method: Any) -> tuple[Trio, Batch]:
    """Three small networks that differ, with a head, and a batch."""
    torch.manual_seed(0)
    first = Denoiser(CogView4(tiny_transformer(), 4), RectifiedFlow(), "flow")
    made = [first, copy.deepcopy(first), copy.deepcopy(first)]
    with torch.no_grad():
        for network in made[1:]:
            for p in network.parameters():
                p += 0.05 * torch.randn_like(p)
    players = Trio(generator=made[0], real_score=made[1], fake_score=made[2])
    cond = Condition({"text": torch.randn(2, 5, 16)}, {"text": torch.zeros(1, 5, 16)})
    given = Batch(cond, (4, 4, 4), (0, 1), Real(torch.randn(2, 4, 4, 4), cond))
    players.add_head(method.features(players), given, seed=1)
    return players, given


def stepped(players: Trio, given: Batch, method: Any) -> tuple[Loss, list[torch.Tensor]]:
    """The generator's loss after its backward, and the gradients."""
    players.generator.zero_grad(set_to_none=True)
    with players.turn("generator"):
        loss = method.generator_loss(players, given, Rng(0, 2, "generator", given.sample_ids))
        loss.total.backward()
    return loss, [p.grad.clone() for p in players.generator.parameters() if p.grad is not None]
