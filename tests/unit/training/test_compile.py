"""torch.compile of the networks: the same numbers under the same names, refused where it would hide something."""

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from fewstep.config import resolve
from fewstep.models.second_time import with_second_time
from fewstep.objectives.dmd2 import DMD2
from fewstep.teachers.pipelines import load_teacher
from fewstep.training import parallel
from fewstep.training.checks import check_derivatives
from fewstep.training.launch import _accelerator
from fewstep.training.options import TrainConfig
from fewstep.types import Condition
from tests.tiny_pipeline import build_stable_diffusion


@pytest.fixture
def counted(monkeypatch):
    """Networks are traced as ever, and their graphs run as they are.  Counts them."""
    torch._dynamo.reset()
    counter = CompileCounter()
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: real(self, backend=counter))
    return counter


def losses(trainer, iterations=3):
    for iteration in range(iterations):
        trainer.step(iteration)
    return {name: torch.stack(values) for name, values in trainer.sums.items()}


def assert_same_training(trainer_of, tmp_path, **more):
    plain, compiled = (trainer_of(out=tmp_path / str(on), compile=on, **more) for on in (False, True))
    assert_close(losses(compiled), losses(plain), atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(compiled.players.values(), plain.players.values(), strict=True):
        assert [list(p.state()) for p in ours.values()] == [list(p.state()) for p in theirs.values()]


def test_training_is_the_same_and_is_compiled(trainer_of, tmp_path, counted):
    """Three networks of one class, with and without gradients.  Fails if a role is left out or recompiles each step."""
    assert_same_training(trainer_of, tmp_path)
    assert counted.frame_count >= 3
    before = counted.frame_count
    assert_same_training(trainer_of, tmp_path)
    assert counted.frame_count <= 2 * before


@pytest.mark.slow
def test_kernels_give_the_same_losses(trainer_of, tmp_path):
    """By inductor, which takes a C++ compiler and a while."""
    torch._dynamo.reset()
    assert_same_training(trainer_of, tmp_path)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(str(build_stable_diffusion(tmp_path_factory.mktemp("teacher") / "sd")))


def inputs(teacher):
    torch.manual_seed(0)
    cond = teacher.encode(["a bag", "a coat"])
    return torch.randn(2, *teacher.shape), torch.tensor([0.3, 0.8]), cond


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_tapped_from_a_compiled_network(trainer_of, counted, precision):
    """Twice.  Fails if the compiled forward is called: it does not see hooks that came after it was traced."""
    trainer = trainer_of()
    network = trainer.trio.generator
    module = network.backbone.module
    parallel.prepare(module, _accelerator(TrainConfig(device="cpu", precision=precision)))
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests have theirs
    name = next(name for name, part in module.named_modules() if isinstance(part, nn.Linear))
    x, t, cond = torch.randn(3, 2), torch.tensor([0.3, 0.8, 0.9]), trainer.data.batch((0, 1, 2)).cond
    plain = network(x, t, cond, taps=(name,))
    network.compile_networks()
    for _ in range(2):
        assert_close(network(x, t, cond).raw, plain.raw, atol=1e-2, rtol=1e-2)
        assert_close(network(x, t, cond, taps=(name,)).taps[name], plain.taps[name])
    assert counted.frame_count >= 1


def test_a_second_time_is_heard_by_a_compiled_network(teacher, counted):
    x, t, cond = inputs(teacher)
    network = with_second_time(teacher.denoiser.twin(), 0)
    for p in network.own.parameters():
        nn.init.normal_(p)

    def said(until: float) -> torch.Tensor:
        return network(x, t, Condition(cond.tensors, cond.null).also(until=torch.full((2,), until))).raw

    plain = said(0.2), said(0.7)
    network.compile_networks()
    assert not torch.allclose(*plain)
    assert_close((said(0.2), said(0.7)), plain)


@pytest.mark.parametrize(("method", "why"), [("scm", "takes derivatives"), ("tmd", "apart")])
def test_methods_that_look_into_networks_are_refused(method, why):
    given = {"teacher": {"name": "fashion-dit"}, "method": {"name": method}, "train": {"compile": True}}
    with pytest.raises(ValueError, match=f"method '{method}' .*{why}.*train.compile=false"):
        check_derivatives(resolve(given=given))


def test_other_methods_are_not():
    given = {"teacher": {"name": "gaussian"}, "method": {"name": "dmd2"}, "train": {"compile": True}}
    config = resolve(given=given)
    check_derivatives(config)
    assert isinstance(config.objective, DMD2)
