"""What is in memory while a run trains."""

import gc

import pytest
from rich.console import Console
from transformers import CLIPTextModel

from fewstep.config import resolve
from fewstep.teachers.codecs import TextEncoders
from fewstep.teachers.pipelines import load_teacher
from fewstep.training.launch import prepare
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
