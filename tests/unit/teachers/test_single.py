"""One file of the original layout as a teacher: the numbers of the pipeline that it was written from."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import fewstep
from fewstep.export import export_run
from fewstep.export_single import original_layout
from fewstep.sampling import sample_teacher
from fewstep.teachers import single
from fewstep.teachers.pipelines import load_teacher, pipeline_class
from tests.tiny_pipeline import build_stable_diffusion, build_stable_diffusion_xl

BUILD = {
    "sd15": (build_stable_diffusion, {}),
    "sd21": (build_stable_diffusion, {"act": "gelu", "prediction_type": "v_prediction"}),
    "sdxl": (build_stable_diffusion_xl, {"width": 24}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """files(name) -> (the file, the folder that it was written from)."""
    root = tmp_path_factory.mktemp("files")

    def get(name):
        folder, file = root / name, root / f"{name}.safetensors"
        if not file.exists():
            write, parts = BUILD[name]
            pipe = diffusers.DiffusionPipeline.from_pretrained(str(write(folder, attention=True, **parts)))
            save_file(original_layout(pipe), file)
        return file, folder

    return get


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FEWSTEP_CACHE", str(folder))
    return folder


@pytest.mark.parametrize("name", BUILD)
def test_file_is_the_teacher_that_its_folder_is(files, name):
    """Fails if a part comes from the configs' folder alone, or another file of the same configs is taken for it."""
    file, folder = files(name)
    ours, theirs = (load_teacher(name, source=str(s), **o) for s, o in ((file, {"config": str(folder)}), (folder, {})))
    assert (ours.card.name, ours.card.source) == (name, str(file))
    prompts = ["a photo of a bag"]
    made = [sample_teacher(teacher, 1, prompts, 3, num_steps=3, guidance=2.0) for teacher in (ours, theirs)]
    assert_close(*made, atol=0, rtol=0)
    assert pipeline_class(str(file)) == pipeline_class(str(folder))


def test_file_is_unpacked_once_and_another_one_apart(files, cache, tmp_path, monkeypatch):
    file, folder = files("sd15")
    load_teacher(str(file), config=str(folder))
    other = tmp_path / "other.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, other)
    load_teacher(str(other), config=str(folder))
    assert len(list((cache / "teachers").iterdir())) == 2
    monkeypatch.setattr(single, "_unpack", None)
    again = load_teacher(str(file), config=str(folder))
    assert again.options == {"config": str(folder)}


def test_half_precision_is_unpacked_as_it_is(files, cache, tmp_path):
    file, folder = files("sd15")
    half = tmp_path / "half.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, half)
    teacher = load_teacher(str(half), config=str(folder))
    (stored,) = cache.rglob("unet/*.safetensors")
    assert {v.dtype for v in load_file(stored).values()} == {torch.float16}
    assert {p.dtype for p in teacher.denoiser.parameters()} == {torch.float32}


def test_a_published_name_takes_the_configs_of_its_pinned_repository(files, monkeypatch):
    file, folder = files("sd15")
    asked = []

    def fetch(source):
        asked.append(source)
        return folder

    monkeypatch.setattr("fewstep.teachers.hub.fetch_configs", fetch)
    teacher = load_teacher("sd15", source=str(file))
    assert asked == ["stable-diffusion-v1-5/stable-diffusion-v1-5@451f4fe16113bff5a5d2269ed5ad43b0592e9a14"]
    assert teacher.options["config"] == asked[0]


def test_student_of_a_file_is_distilled_and_leaves_in_every_form(files, tmp_path):
    """And a LoRA's card loads the file again, where it lies."""
    file, folder = files("sdxl")
    (tmp_path / "prompts.txt").write_text("a photo of a bag\na coat\n")
    lora = {"device": "cpu", "generator": {"lr": 1e-2}, "sharing": "lora", "lora": {"rank": 2}}
    run = fewstep.distill(
        load_teacher(str(file), config=str(folder)),
        out=tmp_path / "run",
        prompts=str(tmp_path / "prompts.txt"),
        iterations=2,
        batch_size=2,
        guidance=2.0,
        num_steps=1,
        train=lora,
    )
    ours = run.student.sample(1, ["a coat"], 5)
    for form in ("pipeline", "single", "lora"):
        made = export_run(run.out, tmp_path / form, form=form)
        code = (made / "README.md").read_text().split("```python\n")[1].split("```")[0]
        names: dict = {"folder": made, "prompt": "a coat", "seed": 5}
        exec(code.replace(").images[0]", ", output_type='pt').images[0]"), names)
        assert_close(2 * names["image"] - 1, ours[0], atol=1e-4, rtol=0)


@pytest.fixture
def wrong(files, tmp_path):
    """wrong(case) -> a file that cannot be a teacher."""

    def make(case):
        file, _ = files("sd15")
        tensors = load_file(file)
        to = tmp_path / ("model.ckpt" if case == "pickle" else "model.safetensors")
        if case in ("pickle", "no-safetensors"):
            to.write_bytes(b"\x80\x04not weights")
            return to
        if case == "cut":
            to.write_bytes(file.read_bytes()[:-100])
            return to
        start = {
            "no-vae": "first_stage_model.",
            "no-text": "cond_stage_model.",
            "lora": "",
            "unet": "cond_stage_model.",
        }
        tensors = {name: v for name, v in tensors.items() if not (case in start and name.startswith(start[case]))}
        if case == "lora":
            tensors = {"lora_unet_mid_block.lora_down.weight": torch.zeros(2, 2)}
        largest = max(tensors, key=lambda name: tensors[name].numel() * ("diffusion_model" in name))
        if case == "shapes":
            tensors[largest] = tensors[largest][:-1].contiguous()
        if case == "lacking":
            del tensors[largest]
        if case == "nan":
            tensors[largest] = torch.full_like(tensors[largest], torch.nan)
        if case != "absent":
            save_file(tensors, to)
        return to

    return make


WRONG = {
    "pickle": ["model.ckpt is a pickle, which can run code", "take the .safetensors of the same model"],
    "absent": ["no file at", "a .safetensors file, a diffusers folder or a hub id"],
    "no-safetensors": ["is no safetensors file, or it is cut off"],
    "cut": ["is no safetensors file, or it is cut off"],
    "lora": ["holds no UNet, no VAE, no text encoder", "Stable Diffusion 1.x, 2.x or SDXL", "no LoRA"],
    "no-vae": ["holds no VAE", "a whole checkpoint"],
    "no-text": ["holds no text encoder", "a whole checkpoint"],
    "shapes": ["cannot load", "of another shape than these configs say"],
    "lacking": ["cannot load", "weights are missing"],
    "nan": ["holds missing or non-finite weights", "unet."],
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_no_teacher_is_named(files, wrong, cache, case):
    _, folder = files("sd15")
    with pytest.raises(ValueError) as refused:
        load_teacher(str(wrong(case)), config=str(folder))
    assert all(words in str(refused.value) for words in WRONG[case]), refused.value
    assert not list(cache.rglob("model_index.json"))


def test_configs_must_be_named_and_fit(files, monkeypatch):
    (file, folder), (_, other) = files("sd15"), files("sdxl")
    with pytest.raises(
        ValueError, match=r"weights alone: .*teacher.config=FOLDER .*--teacher sdxl --set teacher.source="
    ):
        load_teacher(str(file))
    with pytest.raises(ValueError, match=r"is a StableDiffusionPipeline by the names in it, and teacher.config="):
        load_teacher(str(file), config=str(other))
    with pytest.raises(ValueError, match="and this teacher is a StableDiffusionXLPipeline"):
        load_teacher("sdxl", source=str(file), config=str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"hf download stable-.*--include '\*.json'.*then --set teacher.config=FOLDER"):
        load_teacher("sd15", source=str(file))


def test_options_without_effect_are_refused(files):
    file, folder = files("sd15")
    with pytest.raises(ValueError, match=r"teacher.config='x/y' goes with one .safetensors file"):
        load_teacher(str(folder), config="x/y")
    with pytest.raises(ValueError, match=r"teacher.variant='fp16' goes with a folder or hub id"):
        load_teacher(str(file), config=str(folder), variant="fp16")
