"""Pipelines that cannot be taught from, given to `fewstep distill`: each one clear message before any training.

With the refusals of a hub (test_hub.py), of damaged folders (test_bad_inputs.py), of single files
(unit/teachers/test_single.py) and of pushes (test_push.py), these are the bad inputs of whoever brings a teacher.
"""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.test_bad_inputs import check_refused
from tests.tiny_pipeline import build_stable_diffusion, build_stable_diffusion_xl


def edit(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def retype(folder: Path, dtype: torch.dtype) -> None:
    """Store every other weight of the UNet in another type."""
    (path,) = (folder / "unet").glob("*.safetensors")
    tensors = {name: v.to(dtype) if i % 2 else v for i, (name, v) in enumerate(load_file(path).items())}
    save_file(tensors, path, metadata={"format": "pt"})


def replace_vae(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    diffusers.AutoencoderKL(latent_channels=8, block_out_channels=(32,)).save_pretrained(folder / "vae")


def replace_text(folder: Path) -> None:
    """By one of SDXL's, which is 24 wide."""
    wide = build_stable_diffusion_xl(folder.parent / "xl", width=24)
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(wide / "text_encoder_2", folder / "text_encoder")
    edit(folder / "model_index.json", text_encoder=["transformers", "CLIPTextModelWithProjection"])


def no_change(_: Path) -> None:
    pass


SCHEDULER = "scheduler/scheduler_config.json"
CASES = {
    "no-vae": (lambda f: shutil.rmtree(f / "vae"), ["has no vae, which its model_index.json names"]),
    "no-tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), ["has no tokenizer", "take the whole repository"]),
    "unknown-scheduler": (
        lambda f: edit(f / "model_index.json", scheduler=["diffusers", "FooScheduler"]),
        ["cannot load the pipeline", "no class `FooScheduler`"],
    ),
    "scheduler-without-betas": (
        lambda f: edit(f / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]),
        ["FlowMatchEulerDiscreteScheduler has no betas", "DDIMScheduler"],
    ),
    "unknown-betas": (lambda f: edit(f / SCHEDULER, beta_schedule="wavy"), ["cannot load the pipeline", "wavy"]),
    "unknown-prediction": (
        lambda f: edit(f / SCHEDULER, prediction_type="flow"),
        ["prediction_type 'flow' is unknown here", "epsilon, v_prediction, sample"],
    ),
    "broken-config": (lambda f: (f / "unet" / "config.json").write_text("{"), ["unet/config.json", "not a valid JSON"]),
    "told-more": (
        lambda f: edit(f / "unet" / "config.json", time_cond_proj_dim=4),
        ["missing weights: unet needs"],
    ),
    "quantised": (lambda f: retype(f, torch.int8), ["holds quantised weights", "is I8", "float16 or bfloat16"]),
    "another-vae": (replace_vae, ["parts of different models", "the VAE's latent channels is 8, and its UNet takes 4"]),
    "another-text": (replace_text, ["parts of different models", "the text encoders' width is 24", "takes 16"]),
}
OPTIONS = {
    "dtype": ("int8", ["teacher.dtype='int8'", "fp32, bf16, fp16"]),
    "variant": ("fp16", ["cannot load the pipeline", "variant"]),
    "revision": ("main", ["teacher.revision='main' goes with a hub id", "is a folder; leave it out"]),
    "config": ("sd15", ["teacher.config='sd15' goes with a file", "is a folder; leave it out"]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return build_stable_diffusion(tmp_path_factory.mktemp("whole") / "sd")


@pytest.fixture
def refused(cli, whole, tmp_path):
    """refused(change, words, *flags): distilling from a changed copy ends with one message, and there is no run."""

    def check(change, words, *flags):
        folder = Path(shutil.copytree(whole, tmp_path / "teacher"))
        change(folder)
        (tmp_path / "p.txt").write_text("a coat\n")
        command = ["distill", "--method", "dmd2", "--teacher", folder, "--prompts", tmp_path / "p.txt"]
        done = cli(*command, "--set", "method.guidance=2", "--iterations", "1", "--out", tmp_path / "run", *flags)
        check_refused(done, *words)
        assert not (tmp_path / "run" / "config.yaml").exists()

    return check


@pytest.mark.parametrize("case", CASES)
def test_pipeline_that_cannot_teach_is_refused(refused, case):
    refused(*CASES[case])


@pytest.mark.parametrize("option", OPTIONS)
def test_option_that_does_not_go_with_a_folder_is_refused(refused, option):
    value, words = OPTIONS[option]
    refused(no_change, words, "--set", f"teacher.{option}={value}")


def test_mixed_dtypes_are_loaded_as_one(whole, tmp_path):
    """No mistake: halves and singles beside each other are one network in the dtype that is asked for."""
    from fewstep.teachers.pipelines import load_teacher

    folder = Path(shutil.copytree(whole, tmp_path / "teacher"))
    retype(folder, torch.float16)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert {p.dtype for p in load_teacher(str(folder), dtype=name).denoiser.parameters()} == {dtype}


FILES = {
    "pickle": ("model.ckpt", b"\x80\x04.", ["model.ckpt is a pickle", "take the .safetensors of the same model"]),
    "damaged": ("model.safetensors", b"\x80\x04.", ["model.safetensors is no safetensors file, or it is cut off"]),
    "absent": ("other.safetensors", None, ["no file at", "a .safetensors file, a diffusers folder or a hub id"]),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("named", [True, False], ids=["sd15", "file"])
def test_file_that_cannot_teach_is_refused(cli, tmp_path, case, named):
    """By a published name's source, and as the teacher."""
    name, content, words = FILES[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "p.txt").write_text("a coat\n")
    teacher = ["sd15", "--set", f"teacher.source={tmp_path / name}"] if named else [tmp_path / name]
    flags = ["--prompts", tmp_path / "p.txt", "--set", "train.sharing=lora", "--out", tmp_path / "run"]
    check_refused(cli("distill", "--method", "dmd2", "--teacher", *teacher, *flags), *words)
