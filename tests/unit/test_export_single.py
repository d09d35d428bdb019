"""One file in the original layout: diffusers' reader of that layout finds every tensor again, and the same pictures."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import fewstep
from fewstep.export import export_run
from fewstep.export_single import FILE, original_layout
from fewstep.teachers.published import PUBLISHED
from fewstep.teachers.single import TEXTS
from tests.tiny_pipeline import build, build_stable_diffusion, build_stable_diffusion_xl

PROMPT, SEED = "a photo of a bag", 11
LORA = {"sharing": "lora", "lora": {"rank": 4, "alpha": 6.0}}
STUDENTS = {
    "sd1": (build_stable_diffusion, {}, {"num_steps": 2}, {}),
    "sd2": (build_stable_diffusion, {"act": "gelu", "prediction_type": "v_prediction"}, {"num_steps": 1}, {}),
    "xl": (build_stable_diffusion_xl, {"width": 24}, {"num_steps": 2, "stochastic": False}, {}),
    "xl-lora": (build_stable_diffusion_xl, {"width": 24}, {"num_steps": 4}, LORA),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name) -> (the run, its exported folder, the pipeline folder of the same student)."""
    root, known = tmp_path_factory.mktemp("single"), {}

    def get(name):
        if name not in known:
            write, parts, method, train = STUDENTS[name]
            (root / "prompts.txt").write_text(f"{PROMPT}\na coat\n")
            run = fewstep.distill(
                str(write(root / f"{name}-teacher", attention=True, **parts)),
                out=root / f"{name}-run",
                prompts=str(root / "prompts.txt"),
                iterations=4,
                batch_size=2,
                guidance=2.0,
                train={"device": "cpu", "generator": {"lr": 1e-2}, **train},
                **method,
            )
            single, plain = (export_run(run.out, root / f"{name}-{form}", form=form) for form in ("single", "pipeline"))
            known[name] = run, single, plain
        return known[name]

    return get


def loaded(folder: Path):
    family = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return getattr(diffusers, family).from_single_file(str(folder / FILE), config=str(folder), dtype=torch.float32)


@pytest.mark.parametrize("name", STUDENTS)
def test_every_tensor_comes_back(made, name):
    """Fails if a name is wrong, a tensor is left out, or the text encoder's joined projections are in another order."""
    _, single, plain = made(name)
    ours = diffusers.DiffusionPipeline.from_pretrained(str(plain), dtype=torch.float32)
    theirs, compared = loaded(single), 0
    for part, network in ours.components.items():
        if isinstance(network, torch.nn.Module):
            wanted, found = network.state_dict(), theirs.components[part].state_dict()
            assert wanted.keys() == found.keys()
            compared += sum(bool(value.equal(found[key])) for key, value in wanted.items())
            assert all(value.equal(found[key]) for key, value in wanted.items()), part
    stored = load_file(single / FILE)
    assert compared > 100 and sum(v.numel() for v in stored.values()) == sum(
        p.numel() for network in ours.components.values() if isinstance(network, torch.nn.Module)
        for p in network.parameters()
    )  # fmt: skip


@pytest.mark.parametrize("name", STUDENTS)
def test_cards_call_makes_the_students_pictures(made, name):
    run, single, _ = made(name)
    code = (single / "README.md").read_text().split("```python\n")[1].split("```")[0]
    ours = run.student.sample(1, [PROMPT], SEED)
    names: dict = {"folder": single, "prompt": PROMPT, "seed": SEED}
    exec(code.replace(").images[0]", ", output_type='pt').images[0]"), names)
    assert_close(2 * names["image"] - 1, ours[0], atol=1e-4, rtol=0)
    assert ours.std() > 0.05


def test_no_weights_but_the_file_are_written(made):
    _, single, _ = made("xl")
    assert [p.name for p in single.rglob("*.safetensors")] == [FILE]
    assert not list(single.rglob("*.bin"))


ORIGINAL = [published for published in PUBLISHED if published.pipeline in TEXTS.values()]


@pytest.mark.parametrize("published", ORIGINAL, ids=lambda published: published.name)
def test_published_networks_have_the_names_of_their_originals(published):
    """Names as other programs tell the models apart by, and one for every tensor; on the meta device."""
    if not published.pipeline.startswith("StableDiffusion"):
        pytest.skip("no UNet")
    from fewstep.export_single import _of_unet

    with torch.device("meta"):
        unet: Any = diffusers.UNet2DConditionModel.from_config(published.architecture())
    shapes = {_of_unet(name, unet): tuple(value.shape) for name, value in unet.state_dict().items()}
    assert len(shapes) == len(unet.state_dict())
    attention = "input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"
    last = {"sdxl": 8}.get(published.name, 11)
    assert f"output_blocks.{last}.0.skip_connection.weight" in shapes and f"output_blocks.{last + 1}" not in str(shapes)
    if published.name == "sdxl":
        assert attention.format(2) not in shapes and shapes[attention.format(4)][1] == 2048
        assert shapes["label_emb.0.0.weight"] == (1280, 2816)
        assert "input_blocks.8.1.transformer_blocks.9.attn1.to_q.weight" in shapes
        assert "output_blocks.2.2.conv.weight" in shapes and "output_blocks.5.2.conv.weight" in shapes
    else:
        assert shapes[attention.format(2)][1] == {"sd15": 768}.get(published.name, 1024)
        assert "output_blocks.2.1.conv.weight" in shapes and "output_blocks.5.2.conv.weight" in shapes
        assert "input_blocks.3.0.op.weight" in shapes and "middle_block.1.proj_in.weight" in shapes


def test_other_families_are_refused(tmp_path):
    """Before anything is written."""
    (tmp_path / "prompts.txt").write_text("a coat\n")
    run = fewstep.distill(
        str(build(tmp_path / "teacher")),
        out=tmp_path / "run",
        prompts=str(tmp_path / "prompts.txt"),
        iterations=1,
        batch_size=2,
        guidance=2.0,
        train={"device": "cpu"},
    )
    with pytest.raises(ValueError, match="this student's is a CogView4Pipeline; export it as a pipeline"):
        export_run(run.out, tmp_path / "made", form="single")
    assert not (tmp_path / "made").exists() and not list(tmp_path.glob(".writing*"))


def test_a_part_without_an_original_name_is_refused(tmp_path):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(build_stable_diffusion(tmp_path / "sd")))
    pipe.unet.encoder_hid_proj = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no name for the UNet's encoder_hid_proj\.weight"):
        original_layout(pipe)
