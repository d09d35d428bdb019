"""bitsandbytes' AdamW through a stand-in with the traits of its state: bytes, a shared table, an int, a nested name."""

import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fewstep.config import resolve
from fewstep.planning.plan import plan
from fewstep.training.checks import check_surroundings
from fewstep.training.optim import OptimConfig, build_optimizer
from fewstep.training.options import TrainConfig

NESTED = "__bnb_optimizer_quant_state__"


class AdamW8bit(torch.optim.Optimizer):
    """Momentum in bytes; casts nothing as it loads, as bitsandbytes does not."""

    def __init__(self, params, lr, betas, eps, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.table = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p] or {"step": 0, NESTED: {"qmap1": self.table}}
                self.state[p] = state
                inner, count = state[NESTED], state["step"] + 1
                old = inner["qmap1"][inner["state1"].long()] * inner["absmax1"] if count > 1 else 0
                mean = group["betas"][0] * old + p.grad
                inner["absmax1"] = mean.abs().max().clamp(min=1e-12)
                inner["state1"] = ((mean / inner["absmax1"] + 1) * 127.5).round().to(torch.uint8)
                state["step"] = count
                p.sub_(mean, alpha=group["lr"] / count)

    def load_state_dict(self, state_dict):
        saved = deepcopy(state_dict)
        for index, p in enumerate(self.param_groups[0]["params"]):
            if index in saved["state"]:
                self.state[p] = saved["state"][index]
        self.param_groups[0] |= {k: v for k, v in saved["param_groups"][0].items() if k != "params"}


@pytest.fixture
def bitsandbytes(monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["bitsandbytes"].__spec__ = object()  # type: ignore[assignment]  # what find_spec asks for
    sys.modules["bitsandbytes.optim"].AdamW8bit = AdamW8bit  # type: ignore[attr-defined]


EIGHT = OptimConfig(kind="adamw8bit", lr=0.02, betas=(0.5, 0.9), weight_decay=0.1)


def test_its_settings_are_the_players(bitsandbytes):
    made = build_optimizer([torch.nn.Parameter(torch.zeros(2))], EIGHT)
    assert isinstance(made, AdamW8bit)
    assert made.defaults == {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-8, "weight_decay": 0.1}


def test_a_resumed_run_is_an_unbroken_one(bitsandbytes, trainer_of, tmp_path: Path):
    """Fails if bytes come back as floats, without the count of steps, or if the shared table cannot be saved."""
    train = {"generator": EIGHT, "critic": EIGHT}
    made = [trainer_of(out=tmp_path / name, **train) for name in ("whole", "first", "second")]
    whole, first, second = made
    for iteration in range(5):
        whole.step(iteration)
    for iteration in range(3):
        first.step(iteration)
    second.load(first.save())
    for iteration in range(3, 5):
        second.step(iteration)
    for turn in ("generator", "critic"):
        for a, b in zip(whole.trio.weights(turn), second.trio.weights(turn), strict=True):
            assert torch.equal(a, b)
            states = [t.optimizers[turn].optimizer.state[p][NESTED]["state1"] for t, p in ((whole, a), (second, b))]
            assert states[1].dtype == torch.uint8 and torch.equal(*states)


def test_it_is_refused_where_it_is_not_installed():
    with pytest.raises(ValueError, match=r"train\.critic\.kind = 'adamw8bit' needs .*pip install bitsandbytes"):
        check_surroundings(TrainConfig(critic=EIGHT))


@pytest.mark.usefixtures("bitsandbytes")
def test_it_is_refused_on_the_cpu():
    with pytest.raises(ValueError, match="needs a CUDA device"):
        check_surroundings(TrainConfig(generator=EIGHT, device="cpu"))


def test_a_plan_counts_two_bytes_a_weight():
    """And a float32 scale for 256 of them, twice; tensors of less than 4096 weights keep eight bytes each."""
    given = {"teacher": {"name": "fashion-unet"}, "method": {"name": "dmd2"}, "train": {"batch_size": 1}}
    kinds = [f"train.{player}.kind=adamw8bit" for player in ("generator", "critic")]
    made = plan(resolve(given=given, sets=kinds), device="cpu")
    weights = sum(made.trained.values())
    assert (2 + 8 / 256) * weights < made.bytes("critic")["optimiser"] < 1.1 * (2 + 8 / 256) * weights
