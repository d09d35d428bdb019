"""A diffusers pipeline as a teacher does what the pipeline does.  The pipeline is tiny and untrained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import CogView4Pipeline
from torch.testing import assert_close

from fewstep.sampling import sample_teacher
from fewstep.teachers.fashion_build.captions import CLASS_NAMES
from fewstep.teachers.folders import check_folder
from fewstep.teachers.pipelines import _fashion_prompts, from_pipeline, load_teacher
from tests.tiny_pipeline import LATENTS, build

PROMPTS = ["a photo of a bag", "an ankle boot, black and white"]
SCHEDULERS = {
    "plain": {},
    "shift": {"shift": 3.0},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_image_seq_len": 4, "base_shift": 0.5},
    "exponential": {"use_dynamic_shifting": True, "base_image_seq_len": 4, "base_shift": 0.5, "max_shift": 0.5},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipeline folders by what their scheduler does; the same weights in all."""
    root = tmp_path_factory.mktemp("pipelines")
    return {name: build(root / name, **settings) for name, settings in SCHEDULERS.items()}


@pytest.fixture(scope="module")
def teacher(folders):
    return load_teacher(str(folders["plain"]))


def pipeline(folder: Path) -> CogView4Pipeline:
    pipe = CogView4Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_folder_loads_as_a_teacher_of_its_shape(teacher, folders):
    assert teacher.shape == LATENTS
    assert teacher.folder == folders["plain"]
    assert teacher.card.name == str(folders["plain"])
    assert (teacher.denoiser.predicts, type(teacher.denoiser.schedule).__name__) == ("flow", "RectifiedFlow")


def test_network_is_told_times_from_0_to_1000(teacher):
    """Fails if the network's time is t, or 0..999."""
    assert_close(
        teacher.denoiser.backbone.network_time(torch.tensor([0.0, 0.25, 1.0])), torch.tensor([0.0, 250.0, 1000.0])
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("steps", "guidance"), [(7, 2.5), (3, 1.0)])
def test_teacher_samples_what_its_pipeline_samples(folders, scheduler, steps, guidance):
    """Latents and images, < 1e-4.  Fails if the network is told the shifted time: its scheduler shifts the noise level
    only (seen with "shift", "linear" and "exponential")."""
    teacher, pipe = load_teacher(str(folders[scheduler])), pipeline(folders[scheduler])
    ours = sample_teacher(teacher, 2, PROMPTS, 5, num_steps=steps, guidance=guidance)
    for i, prompt in enumerate(PROMPTS):
        made = pipe(
            prompt,
            generator=torch.Generator("cpu").manual_seed(5 + i),
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=pipe.tokenizer.model_max_length,
            output_type="latent",
        ).images
        decoded = pipe.vae.decode(made / pipe.vae.config.scaling_factor, return_dict=False)[0].detach()
        assert_close(teacher.codec.decode(made), decoded.clamp(-1, 1), atol=1e-6, rtol=0)
        assert_close(ours[i : i + 1], decoded.clamp(-1, 1), atol=1e-4, rtol=0)
        assert decoded.std() > 0.05  # an image that is all one grey would equal any other


def test_latents_are_those_of_the_pipeline(teacher, folders):
    class Bare:
        def decode(self, x):
            return x

    ours = sample_teacher(replace(teacher, codec=Bare()), 1, PROMPTS[:1], 3, num_steps=5, guidance=2.0)
    made = pipeline(folders["plain"])(
        PROMPTS[0],
        generator=torch.Generator("cpu").manual_seed(3),
        num_inference_steps=5,
        guidance_scale=2.0,
        max_sequence_length=16,
        output_type="latent",
    ).images
    assert_close(ours, made, atol=1e-4, rtol=0)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_grid_is_the_pipelines_whole_timesteps(teacher, steps):
    grid = teacher.grid(steps)
    assert grid.shape == (steps + 1,)
    assert grid[0] == 1 and grid[-1] == 0
    assert_close(grid * 1000, (grid * 1000).round(), atol=1e-3, rtol=0)


def test_embedding_does_not_depend_on_batch_neighbours(folders, tmp_path):
    """Fails if a batch is encoded in one call: the pipeline pads to its longest prompt, then again to 16 in front,
    which are the same side with the embedded teacher's tokenizer but not with others."""
    folder = Path(shutil.copytree(folders["plain"], tmp_path / "right"))
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"padding_side": "right"}))
    teacher = load_teacher(str(folder))
    together = teacher.encode([*PROMPTS, "coat", ""])
    for i, prompt in enumerate([*PROMPTS, "coat", ""]):
        assert torch.equal(together.tensors["text"][i : i + 1], teacher.encode([prompt]).tensors["text"])


def test_empty_prompt_is_the_unconditional_branch(teacher):
    found = teacher.encode(PROMPTS)
    assert torch.equal(found.null["text"], teacher.encode([""]).tensors["text"])
    assert not torch.equal(found.tensors["text"][0], found.null["text"][0])


def test_loaded_weights_are_float32_and_nothing_else_is_read(teacher):
    assert {p.dtype for p in teacher.denoiser.parameters()} == {torch.float32}


def test_hub_id_without_a_network_is_a_clean_error():
    """conftest.py sets HF_HUB_OFFLINE."""
    with pytest.raises(ValueError, match="cannot load the pipeline 'nobody/nothing'"):
        load_teacher("nobody/nothing")


def test_name_that_is_neither_registered_nor_a_folder_nor_a_hub_id_is_refused():
    with pytest.raises(LookupError, match=r"no teacher named 'fashion_dti'\. Did you mean 'fashion-dit'\?"):
        load_teacher("fashion_dti")


def test_unknown_option_is_refused(folders):
    with pytest.raises(ValueError, match="modes"):
        load_teacher(str(folders["plain"]), modes=3)


def test_remote_code_in_a_folder_is_not_run(folders, tmp_path):
    """A pipeline class of the folder's own module.  Fails if the class's name is not checked before loading."""
    folder = Path(shutil.copytree(folders["plain"], tmp_path / "evil"))
    (folder / "evil.py").write_text("raise SystemExit('remote code was run')\n")
    index = json.loads((folder / "model_index.json").read_text())
    for change in ({"_class_name": ["evil", "Evil"]}, {"transformer": ["evil", "Evil"]}):
        (folder / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises((ValueError, LookupError)):
            load_teacher(str(folder))


@pytest.mark.parametrize("name", ["a.bin", "transformer/b.pt", "vae/c.ckpt", "d.pth", "x/e.pkl", "f.pickle"])
def test_pickles_are_refused_before_loading(folders, tmp_path, name):
    folder = Path(shutil.copytree(folders["plain"], tmp_path / "teacher"))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="pickled weights"):
        check_folder(folder)


def test_unknown_pipeline_class_names_the_known_ones(folders, tmp_path):
    folder = Path(shutil.copytree(folders["plain"], tmp_path / "teacher"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(LookupError, match=r"no pipeline class named 'FluxPipeline'.*Known: CogView4Pipeline"):
        from_pipeline(str(folder))


def test_embedded_teachers_first_prompts_are_one_of_each_class():
    """The rows of the preview and of the demo's grid, and balanced classes for any number of images."""
    prompts = _fashion_prompts()
    assert prompts[:10] == tuple(f"a photo of {article}" for article, _ in CLASS_NAMES)
    assert len(prompts) == len(set(prompts)) == 100
