"""An exported folder makes fewstep's pictures in diffusers alone, by the call that its card gives."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch.testing import assert_close

import fewstep
from fewstep import pictures
from fewstep.export import export_run, model_card
from fewstep.students import untrained_student
from tests.tiny_pipeline import build, build_stable_diffusion, build_stable_diffusion_xl

PROMPT, SEED = "a photo of a bag", 11
LORA = {"device": "cpu", "generator": {"lr": 1e-2}, "sharing": "lora", "lora": {"rank": 4, "alpha": 6.0}}
STUDENTS = {
    "one-step": {"num_steps": 1},
    "deterministic": {"num_steps": 4, "stochastic": False},
    "stochastic": {"num_steps": 2, "stochastic": True},
    "shifted": {"num_steps": 2, "stochastic": False},
    "unet-stochastic": {"num_steps": 4, "stochastic": True},
    "unet-deterministic": {"num_steps": 3, "stochastic": False},
    "unet-v": {"num_steps": 4, "stochastic": True},
    "told-earlier": {"num_steps": 1, "first_time": 0.4},
    "unet-told-earlier": {"num_steps": 1, "first_time": 0.4},
    "unet-told-earlier-4": {"num_steps": 4, "first_time": 0.4},
    "lower": {"method": "sid", "num_steps": 1},
    "lower-stochastic": {"method": "sid", "num_steps": 4},
    "unet-lower": {"method": "sid", "num_steps": 4},
    "unet-v-lower": {"method": "sid", "num_steps": 1},
    "second-time": {"method": "boot", "num_steps": 1},
    "unet-second-time": {"method": "boot", "num_steps": 1, "first_time": 0.4},
    "xl-stochastic": {"num_steps": 4, "stochastic": True},
    "xl-told-earlier": {"num_steps": 1, "first_time": 0.4},
    "unet-lora": {"num_steps": 2, "train": LORA},
    "xl-lora": {"num_steps": 4, "train": LORA},
    "dit-lora": {"num_steps": 1, "train": LORA},
}
ADAPTERS = [
    ("unet-lora", "lora"),
    ("unet-lora", "kohya"),
    ("xl-lora", "lora"),
    ("xl-lora", "kohya"),
    ("dit-lora", "lora"),
]
ALONE = """
import importlib.abc, json, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("fewstep", "fewstep_cuda"):
            raise ModuleNotFoundError(f"{name} is not installed here")
sys.meta_path.insert(0, Blocked())
try:
    import fewstep
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("fewstep is importable")
import torch
torch.set_num_threads(1)
for folder, code in json.loads(sys.stdin.read()).items():
    for i in range(2):
        names = {"folder": folder, "prompt": PROMPT, "seed": SEED + i}
        exec(code.replace(").images[0]", ", output_type='pt').images[0]"), names)
        torch.save(names["image"], f"{folder}/made{i}.pt")
assert not any(name.split(".")[0] == "fewstep" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of a few iterations by name: a tiny pipeline, distilled to students of every kind."""
    root = tmp_path_factory.mktemp("export")
    teachers = {
        "shifted": build(root / "shift", shift=3.0),
        "unet-v": build_stable_diffusion(root / "v", prediction_type="v_prediction", beta_schedule="linear"),
        "unet": build_stable_diffusion(root / "unet"),
        "xl": build_stable_diffusion_xl(root / "xl"),
        "": build(root / "plain"),
    }
    (root / "prompts.txt").write_text(f"{PROMPT}\na coat\n")
    options = {
        "prompts": str(root / "prompts.txt"),
        "iterations": 6,
        "batch_size": 2,
        "guidance": 2.0,
        "train": {"device": "cpu", "generator": {"lr": 1e-2}},
    }
    return {
        name: fewstep.distill(
            str(next(folder for start, folder in teachers.items() if name.startswith(start))),
            out=root / f"run-{name}",
            **{**options, **kind},
        )
        for name, kind in STUDENTS.items()
    }


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    made = {name: export_run(run.out, root / name) for name, run in runs.items()}
    return made | {
        f"{name} as {form}": export_run(runs[name].out, root / f"{name}-{form}", form=form) for name, form in ADAPTERS
    }


def call_of(folder: Path) -> str:
    """The card's example, word for word."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    return code


@pytest.fixture(scope="module")
def alone(exported):
    """The card's call, executed in a process that cannot import fewstep: name -> two images [1, H, W] in [-1, 1]."""
    code = ALONE.replace("PROMPT", repr(PROMPT)).replace("SEED", str(SEED))
    calls = json.dumps({str(folder): call_of(folder) for folder in exported.values()})
    done = subprocess.run([sys.executable, "-I", "-c", code], input=calls, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return {
        name: [2 * torch.load(folder / f"made{i}.pt", weights_only=True) - 1 for i in range(2)]
        for name, folder in exported.items()
    }


@pytest.mark.parametrize("kind", [*STUDENTS, *(f"{name} as {form}" for name, form in ADAPTERS)])
def test_pipeline_alone_makes_the_students_images(runs, alone, kind):
    """< 1e-4 in fp32.  Fails if the teacher's weights, scheduler or shift, other times or another seeding are exported
    ("shifted": if the network's timesteps are taken for the noise levels; "unet": if betas or prediction type are
    others, or x_t is blended into x0 by LCM's own scalings; "told": if the noise is scaled to the time told;
    "lower": if it is not scaled to the first step's level; "lora": if the adapters are left out; "as": if a file for
    the teacher's own pipeline lacks layers, or the scale of B)."""
    ours = runs[kind.partition(" ")[0]].student.sample(2, [PROMPT], SEED)
    for i in range(2):
        assert_close(alone[kind][i], ours[i], atol=1e-4, rtol=0)
    assert ours.std() > 0.05
    assert (ours[0] - ours[1]).abs().max() > 1e-2


def test_student_differs_from_its_teacher(runs):
    """Else the equality above would hold for an export without the student's weights."""
    run = runs["one-step"]
    before = untrained_student(run.out, teacher=run.teacher).sample(2, [PROMPT], SEED)
    assert (run.student.sample(2, [PROMPT], SEED) - before).abs().max() > 1e-2


def test_card_says_how_each_image_is_seeded(exported):
    texts = {name: (folder / "README.md").read_text() for name, folder in exported.items()}
    for name in ("one-step", "deterministic", "unet-stochastic", "unet-deterministic"):
        assert "generator=torch.Generator('cpu').manual_seed(seed)" in call_of(exported[name])
        assert "manual_seed(SEED + i)" in texts[name]
    assert "torch.manual_seed(seed)\nimage = pipe(prompt, generator=None" in call_of(exported["stochastic"])
    assert "does not hand its generator to the scheduler" in texts["stochastic"]


def test_card_gives_the_students_times(exported):
    assert "num_inference_steps=4, timesteps=[1000, 750, 500, 250], guidance_scale=1.0" in call_of(
        exported["deterministic"]
    )
    assert "sigmas" not in call_of(exported["deterministic"])
    assert "timesteps=[1000, 250], sigmas=[1.0, 0.5]" in call_of(exported["shifted"])  # 3u / (1 + 2u) = .5 at u = .25
    assert "timesteps=[999, 749, 499, 249], guidance_scale=1.0" in call_of(exported["unet-stochastic"])
    assert "timesteps=[625, 468, 312, 156], guidance_scale=1.0" in call_of(exported["unet-lower"])


def test_card_hands_over_latents_where_the_student_starts_lower(exported):
    """One generator draws them first and then the steps' noise; or the global one, where the pipeline hands none on."""
    code = call_of(exported["unet-lower"])
    assert "generator = torch.Generator('cpu').manual_seed(seed)\nlatents = 0.92856" in code
    assert (
        "* torch.randn((1, 4, 4, 4), generator=generator)\nimage = pipe(prompt, generator=generator, latents=" in code
    )
    alone = "torch.manual_seed(seed)\ngenerator = None\nlatents = 0.714 * "
    assert alone in call_of(exported["lower-stochastic"])
    assert "latents" not in call_of(exported["one-step"])


def test_card_owns_up_to_rounded_times(runs):
    """Under a scheduler's shift, three steps are told to the network as fractions, and the pipeline rounds them."""
    for name, expected in (("deterministic", False), ("shifted", True)):
        student = runs[name].student
        third = replace(student, sampler=replace(student.sampler, num_steps=3))
        assert ("Up to rounding" in model_card(third, {}, runs[name].out)) is expected


def test_card_quotes_figures_of_this_checkpoint_only(runs, tmp_path):
    """Fails if the run's table is quoted whichever checkpoint it is of."""
    student = runs["one-step"].student
    row = {"model": "student", "steps": 1, "n": 100, "seed": 0, "figures": {"fmd": 1.25}}
    for measured, quoted in ((student.iteration, True), (student.iteration + 1, False), (None, False)):
        (tmp_path / "eval.json").write_text(json.dumps({"rows": [row], "which": "best", "iteration": measured}))
        card = model_card(student, {}, tmp_path, "last")
        assert ("| student | 1 | - | 100 | 1.25 |" in card) is quoted
        assert ("not measured yet: `fewstep eval RUN --which last`" in card) is not quoted


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_front_matter_tells_the_hub_what_it_is(runs, exported):
    """The teacher is the base model only where it came from the hub: else its name is a place on this machine."""
    run = runs["unet-lora"]
    for name, lora in (("unet-lora", False), ("unet-lora as lora", True), ("unet-lora as kohya", True)):
        front = front_matter((exported[name] / "README.md").read_text())
        assert (front["library_name"], front["pipeline_tag"]) == ("diffusers", "text-to-image")
        assert front["tags"] == ["fewstep", "distillation", "dmd2", "2-step", *(["lora"] if lora else [])]
        assert (front["license"], front["license_name"]) == ("unknown", "unknown") and "base_model" not in front
    licences = {
        "CreativeML Open RAIL++-M": "openrail++",
        "CreativeML Open RAIL-M": "creativeml-openrail-m",
        "Apache-2.0 (data: some)": "apache-2.0",
        "Some Research Licence: v1": "other",
    }
    for licence, identifier in licences.items():
        card = replace(run.teacher.card, name="sdxl", source="some/one", revision="0123abc", licence=licence)
        front = front_matter(model_card(replace(run.student, teacher=replace(run.teacher, card=card)), {}, run.out))
        assert (front["license"], front["license_name"]) == (identifier, licence.partition(" (")[0])
        assert front["base_model"] == "some/one"


def test_card_repeats_what_binds_the_teachers_users(runs, exported):
    run = runs["one-step"]
    card = replace(run.teacher.card, restrictions=("its licence allows no commercial use", "it is secret"))
    bound = replace(run.student, teacher=replace(run.teacher, card=card))
    said = "**Restricted**, as its teacher is: its licence allows no commercial use, and it is secret."
    assert said in model_card(bound, {}, run.out)
    assert "Restricted" not in (exported["one-step"] / "README.md").read_text()


def test_picture_is_of_the_students_first_images(runs, exported):
    """Small, and made from the seeds and prompts that the card says."""
    folder, shown = exported["unet-stochastic"], [PROMPT, "a coat", PROMPT, "a coat"]
    made = Image.open(folder / "samples.png")
    images = runs["unet-stochastic"].student.sample(4, shown, 0)
    assert list(made.convert("L").getdata()) == list(pictures.panel(images, 4, scale=8).convert("L").getdata())
    assert max(made.size) <= 1024
    said = 'Seeds 0 to 3, not chosen: "a photo of a bag", "a coat", "a photo of a bag", "a coat".'
    assert said in (folder / "README.md").read_text()


def test_recipe_is_the_runs_without_places_of_this_machine(runs, exported):
    """Fails if a card or recipe tells the user's folders, but for a LoRA's teacher, which must be found."""
    folder, run = exported["unet-stochastic"], runs["unet-stochastic"]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["method"] == run.config.to_dict()["method"] and recipe["train"]["generator"]["lr"] == 1e-2
    assert (recipe["teacher"]["name"], recipe["prompts"]) == ("unet", "prompts.txt")
    told = (folder / "README.md").read_text() + (folder / "recipe.yaml").read_text()
    assert str(run.out.parent) not in told
    assert "Distilled by dmd2: 6 iterations of 2" in told


def test_preset_names_scheduler_and_steps(exported):
    text = (exported["unet-stochastic"] / "README.md").read_text()
    (preset,) = re.findall(r"```json\n(.*?)\n```", text, re.S)
    told = {"scheduler": "LCMScheduler", "timesteps": [999, 749, 499, 249], "guidance_scale": 1.0}
    assert json.loads(preset) == told


def test_without_prompts_or_samples_there_is_no_picture(runs, tmp_path):
    folder = export_run(runs["one-step"].out, tmp_path / "none", samples=0)
    assert not (folder / "samples.png").exists() and "samples.png" not in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="samples must be >= 0, got -1; 0 leaves the picture out"):
        export_run(runs["one-step"].out, tmp_path / "other", samples=-1)


def test_card_names_the_teachers_revision(runs):
    run = runs["one-step"]
    card = replace(run.teacher.card, name="some/one", revision="0123abc")
    hub = replace(run.student, teacher=replace(run.teacher, card=card))
    assert "from some/one at revision 0123abc\n" in model_card(hub, {}, run.out)
    assert "revision" not in model_card(run.student, {}, run.out)


def test_exported_weights_are_safetensors(exported):
    names = {p.suffix for p in exported["one-step"].rglob("*") if p.is_file()} - {".pt"}
    assert ".safetensors" in names
    assert not names & {".bin", ".pkl", ".ckpt", ".pth"}


def test_existing_folder_is_left_alone(runs, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists; choose a folder that does not exist yet"):
        export_run(runs["one-step"].out, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_failed_export_leaves_no_folder(runs, tmp_path, monkeypatch):
    """Fails if the folder is written in place: half a pipeline would look like one."""

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("fewstep.export.model_card", fail)
    with pytest.raises(OSError, match="disk full"):
        export_run(runs["one-step"].out, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_no_token_is_stored(tmp_path, monkeypatch):
    """Neither in the run folder nor in the export.  Fails if the environment is recorded as it is."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_user")
    options = {"iterations": 1, "batch_size": 2, "guidance": 2.0, "train": {"device": "cpu"}}
    (tmp_path / "prompts.txt").write_text("a coat\n")
    options["prompts"] = str(tmp_path / "prompts.txt")
    run = fewstep.distill(str(build(tmp_path / "teacher")), out=tmp_path / "run", **options)
    export_run(run.out, tmp_path / "exported")
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 20
    assert not [p for p in files if b"hf_secret_of_the_user" in p.read_bytes()]


def test_lora_file_of_a_full_network_is_refused(runs, tmp_path):
    with pytest.raises(
        ValueError, match=r"is a full network \(sharing 'copies'\), not an adapter; export it as a pipeline"
    ):
        export_run(runs["one-step"].out, tmp_path / "student", form="lora")
    assert not list(tmp_path.iterdir())


def test_kohyas_names_are_for_unets(runs, tmp_path):
    with pytest.raises(ValueError, match="kohya's names are for UNets here; use the format lora"):
        export_run(runs["dit-lora"].out, tmp_path / "student", form="kohya")
    assert not list(tmp_path.iterdir())
