"""What FSDP cannot divide, refused before anything is loaded.  What it can: tests/invariants/test_sharded."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

import fewstep
from fewstep.models.adapters import LoRA
from fewstep.models.trio import Trio
from fewstep.teachers import mixture
from fewstep.training import fsdp
from fewstep.types import Batch, Condition
from tests.invariants.conftest import ROOT

FILE = ROOT / "configs" / "accelerate" / "fsdp2.yaml"


@pytest.mark.parametrize(
    ("variables", "method", "train", "said"),
    [
        ({"FSDP_VERSION": "1"}, "dmd2", {}, "fsdp_version: 1; give fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "dmd2", {}, "fsdp_offload_params: true; .*leave it out"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "dmd2", {}, "give --gradient-checkpointing"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "dmd2", {}, "give true"),
        ({}, "tbcm", {}, r"'tbcm' takes derivatives.*configs/accelerate/ddp\.yaml"),
        ({}, "tmd", {}, r"'tmd' runs a network's blocks apart.*configs/accelerate/ddp\.yaml"),
        ({}, "dmd2", {"compile": True}, "train.compile does not go with FSDP; leave it out"),
        ({}, "dmd2", {"offload_teacher": True}, "train.offload_teacher does not go with FSDP"),
    ],
)
def test_what_fsdp_cannot_do_is_refused_before_anything_is_loaded(
    monkeypatch, tmp_path, variables, method, train, said
):
    """accelerate launch hands its file on by the environment; a hub id would be fetched."""
    for name, value in {fsdp.SWITCH: "true", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        fewstep.distill("no/such", method, iterations=1, out=tmp_path / "run", train={"device": "cpu", **train})


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"precision": "fp16"}, "give bf16"), ({"critic": SimpleNamespace(kind="adamw8bit")}, "train.critic.kind")],
)
def test_what_needs_a_gpu_is_refused_too(changed, said):
    plain = {"precision": "fp32", "compile": False, "offload_teacher": False}
    train = SimpleNamespace(**(plain | dict.fromkeys(("generator", "critic"), SimpleNamespace(kind="adamw")) | changed))
    objective = SimpleNamespace(needs=frozenset())
    config: Any = SimpleNamespace(train=train, objective=objective, teacher="sdxl", teacher_options={})
    with pytest.raises(ValueError, match=said):
        fsdp.check_request(config)


def test_dit_is_refused(monkeypatch, tmp_path):
    """torch would only say that a storage has no bytes, in the middle of the first call."""
    monkeypatch.setenv(fsdp.SWITCH, "true")
    with pytest.raises(ValueError, match=r"'dit-xl-2-256' cannot be divided.*configs/accelerate/ddp"):
        fewstep.distill("dit-xl-2-256", "dmd2", iterations=1, out=tmp_path / "run", train={"device": "cpu"})


def test_prompts_of_several_lengths_are_refused():
    """They take one call each, so that processes would wait for each other for ever."""
    cond = Condition({"text": torch.zeros(1, 3, 2), "length": torch.tensor([2])})
    with pytest.raises(ValueError, match="one padded length"):
        fsdp.check_batch(Batch(cond, (1,), (0,)))
    fsdp.check_batch(Batch(Condition({"text": torch.zeros(1, 3, 2)}), (1,), (0,)))


@pytest.mark.parametrize("sharing", ["copies", "lora"])
def test_full_networks_that_train_are_gathered_in_bf16(sharing):
    """Not the teacher, whose weights are of one dtype anyway, nor adapters, whose gradients would be rounded."""
    teacher = mixture(fit_steps=0)
    roles: Any = frozenset({"fake_score"})
    trio = Trio.build(teacher.denoiser, roles, sharing=sharing, lora=LoRA(rank=2), init=teacher.student)
    trained = [trio.generator, trio.critic()]
    dtypes = fsdp.gathered([trio.real_score], trained, bf16=True)
    wanted = torch.bfloat16 if sharing == "copies" else None
    assert [dtypes[n.networks()[0]] for n in (trio.real_score, *trained)] == [None, wanted, wanted]
    assert set(fsdp.gathered([trio.real_score], trained, bf16=False).values()) == {None}


def test_without_a_file_for_fsdp_nothing_is_divided(monkeypatch):
    monkeypatch.delenv(fsdp.SWITCH, raising=False)
    two: Any = SimpleNamespace(num_processes=2)
    assert not fsdp.asked() and not fsdp.divides(two)
    monkeypatch.setenv(fsdp.SWITCH, "true")
    assert fsdp.divides(two) and not fsdp.divides(SimpleNamespace(num_processes=1))  # type: ignore[arg-type]


def test_accelerate_reads_our_file_as_two_processes_of_fsdp2():
    read: Any = load_config_from_file(str(FILE))
    kind = str(read.distributed_type).rpartition(".")[2]
    assert (kind, read.num_processes, read.mixed_precision) == ("FSDP", 2, "no")
    assert read.fsdp_config["fsdp_version"] == 2 and read.fsdp_config["fsdp_reshard_after_forward"] is True
