"""What is in memory while a run trains."""

import gc
from itertools import chain

import pytest
import torch
from rich.console import Console
from transformers import CLIPTextModel

from fewstep.config import resolve
from fewstep.models.offload import Offload
from fewstep.objectives.dmd2 import DMD2
from fewstep.objectives.sid import SiD
from fewstep.planning.plan import plan
from fewstep.teachers.codecs import TextEncoders
from fewstep.teachers.pipelines import load_teacher
from fewstep.training.launch import prepare
from fewstep.training.options import TrainConfig
from tests.tiny_pipeline import build, build_stable_diffusion


def text_models() -> int:
    gc.collect()
    return sum(isinstance(found, CLIPTextModel) for found in gc.get_objects())


@pytest.mark.parametrize("make", [build, build_stable_diffusion])
@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_no_text_encoder_is_in_memory_during_training(make, cache, tmp_path, monkeypatch):
    """Nor is one loaded again for a preview, or by a run that goes on from its checkpoint; a later prompt has it again.

    Fails if the preview's prompts, the negative or the empty one are not encoded before, or anything holds the encoder.
    """
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    folder, prompts = make(tmp_path / "teacher"), tmp_path / "prompts.txt"
    prompts.write_text("a photo of a coat\na bag\nan ankle boot\n")
    train = {"batch_size": 2, "device": "cpu", "evaluate_every": 1, "evaluate_samples": 1, "prompt_cache": cache}
    texts = {"prompts": str(prompts), "negative_prompt": "a shirt"}
    before, quiet, restored = text_models(), Console(quiet=True), []
    restore = TextEncoders.restore
    monkeypatch.setattr(TextEncoders, "restore", lambda self: (restored.append(text_models()), restore(self)))
    for iterations in (1, 2):
        given = {"teacher": {"name": str(folder)}, "method": {"name": "dmd2"}, **texts}
        config = resolve(given=given | {"train": train | {"iterations": iterations}})
        load = lambda: load_teacher(str(folder))  # noqa: E731
        trainer, teacher = prepare(config, tmp_path / "run", load, resume=iterations == 2, console=quiet)
        assert text_models() == before
        restored.clear()
        trainer.run()
        assert not restored and text_models() == before
        assert (tmp_path / "run" / "previews" / f"{iterations:08d}.png").is_file()
    teacher.encode(["a dress"])
    assert text_models() == before + 1


@pytest.mark.parametrize("method", ["dmd2", "sid"])
def test_an_offloaded_teacher_trains_the_same_student(method, trainer_of, tmp_path):
    """Bit by bit; the CPU plays the device.  On the CPU itself nothing is moved."""
    objective = {"dmd2": DMD2, "sid": SiD}[method](guidance=1.0)
    plain, away = (trainer_of(objective, out=tmp_path / str(on), offload_teacher=on) for on in (False, True))
    assert away.offload is None
    trained = [network for networks in away.players.values() for network in networks.values()]
    away.offload = Offload(away.trio.real_score, torch.device("cpu"), trained)
    home = [p.data_ptr() for p in chain(away.trio.real_score.parameters(), away.trio.real_score.buffers())]
    for iteration in range(4):
        plain.step(iteration), away.step(iteration)
        assert home == [p.data_ptr() for p in chain(away.trio.real_score.parameters(), away.trio.real_score.buffers())]
    for turn in ("generator", "critic"):
        assert all(map(torch.equal, plain.trio.weights(turn), away.trio.weights(turn)))


def test_offloading_is_refused_for_shared_weights():
    with pytest.raises(ValueError, match=r"offload_teacher has no use with sharing 'lora-fake'.*--sharing copies"):
        TrainConfig(offload_teacher=True, sharing="lora-fake")


def test_a_plan_counts_an_offloaded_teacher_only_while_it_visits():
    """Not at the critic's peak, where DMD2 asks the teacher nothing."""
    given = {"teacher": {"name": "fashion-unet"}, "method": {"name": "dmd2"}, "train": {"batch_size": 1}}
    held = [plan(resolve(given=given, sets=[f"train.offload_teacher={on}"]), device="cpu") for on in ("false", "true")]
    weights = [made.bytes("critic")["weights"] for made in held]
    assert weights[1] == pytest.approx(2 / 3 * weights[0], rel=1e-3)
    assert held[1].parts["generator"].calls == held[0].parts["generator"].calls
