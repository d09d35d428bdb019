"""Users' mistakes: exit code 2, one message that names the value and what is allowed or to be done, no traceback.

Almost all run in this process; `test_fresh_process_...` shows that a real one ends the same way.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.training import checkpoint


def check_refused(result, *words: str) -> None:
    """Exit code 2 and one line on stderr that holds every word."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    missing = [word for word in words if word not in lines[0]]
    assert not missing, (missing, lines[0])


SDXL = ("--teacher", "sdxl", "--set", "train.accumulate=1")
FLAGS = {
    "teacher": (["--teacher", "mixtur"], ["'mixtur'", "Did you mean 'mixture'?", "gaussian", "--plugin"]),
    "teacher-path": (["--teacher", "/no/such/folder"], ["'/no/such/folder'", "Known:", "mixture"]),
    "hub-id": (["--teacher", "nobody/nothing"], ["'nobody/nothing'"]),
    "published-without-prompts": ([*SDXL], ["'sdxl' brings no prompts", "--prompts FILE"]),
    "published-without-pictures": (
        [*SDXL, "--prompts", "README.md", "--set", "method.gan_weight=0.1"],
        ["needs real samples (its GAN)", "'sdxl' brings none", "--data FOLDER", "method.gan_weight=0"],
    ),
    "published-source": (
        [*SDXL, "--prompts", "README.md", "--set", "teacher.source=tests"],
        ["tests is no diffusers pipeline folder", "model_index.json is missing"],
    ),
    "method": (["--method", "dmmd2"], ["'dmmd2'", "Did you mean 'dmd2'?", "Known: ", "dmd, dmd2"]),
    "steps-negative": (["--num-steps", "-2"], ["num_steps must be >= 1", "-2"]),
    "steps-zero": (["--num-steps", "0"], ["num_steps must be >= 1", "0"]),
    "iterations": (["--iterations", "0"], ["iterations must be >= 1", "0"]),
    "batch": (["--batch-size", "0"], ["batch_size must be >= 1", "0"]),
    "lr-negative": (["--lr", "-1e-4"], ["lr must be a positive finite number", "-0.0001"]),
    "lr-nan": (["--lr", "nan"], ["lr must be a positive finite number", "nan"]),
    "lr-infinite": (["--lr", "inf"], ["lr must be a positive finite number", "inf"]),
    "sharing": (["--sharing", "shards"], ["train.sharing", "'shards'", "'copies'"]),
    "device": (["--device", "tpu"], ["device 'tpu'", "allowed: auto, cpu, cuda"]),
    "device-mps": (["--device", "mps"], ["device 'mps'", "allowed: auto, cpu, cuda", "no float64"]),
    "precision": (["--precision", "fp8"], ["train.precision", "'fp8'", "'fp32', 'bf16' or 'fp16'"]),
    "resume-and-overwrite": (["--resume", "--overwrite"], ["--resume and --overwrite exclude each other"]),
    "resume-nothing": (["--resume"], ["no run to resume", "config.yaml is missing", "leave --resume out"]),
    "config-missing": (["--config", "nowhere.yaml"], ["no configuration file at nowhere.yaml"]),
    "prompts-missing": (["--prompts", "nowhere.txt"], ["no prompt file at nowhere.txt", "one prompt per line"]),
    "method-without-pairs": (
        ["--method", "dmd"],
        ["needs noise and what the teacher's ODE", "fewstep pairs --teacher"],
    ),
    "pairs-missing": (["--method", "dmd", "--pairs", "nowhere"], ["no pairs at nowhere", "fewstep pairs"]),
    "pairs-without-method": (["--pairs", "nowhere"], ["reads no pairs; leave --pairs out"]),
    "steps-of-dmd": (["--method", "dmd", "--num-steps", "4"], ["num_steps must be 1, got 4", "--method dmd2"]),
    "lpips-without-pairs": (
        ["--method", "dmd", "--set", "method.distance=lpips", "--set", "method.regression_weight=0"],
        ["compares pairs", "leave one out"],
    ),
    "clip-of-points": (
        ["--method", "swiftbrush", "--set", "method.clip_weight=0.1"],
        ["'gaussian' brings none", "method.clip=FOLDER"],
    ),
    "clip-missing": (
        ["--method", "swiftbrush", "--set", "method.clip_weight=0.1", "--set", "method.clip=nowhere"],
        ["'nowhere'", "no model.safetensors there", "CLIPModel"],
    ),
    "black-of-points": (["--method", "tbcm", "--set", "method.black_filter=true"], ["points", "black_filter=false"]),
    "fake-guidance-without-null": (
        ["--method", "sid", "--set", "method.fake_guidance=0"],
        ["method.fake_guidance = 0", "no unconditional branch", "fake_guidance=1"],
    ),
    "plugin-missing": (["--plugin", "nowhere.py"], ["no plugin file at nowhere.py", "path of a Python file"]),
}

SETTINGS = {
    "unknown": ("method.guidence=2", ["method.guidence", "Did you mean 'guidance'?", "method.num_steps"]),
    "unknown-section": ("trian.seed=1", ["trian", "Did you mean 'train'?", "teacher, method, train, prompts"]),
    "unknown-nested": ("train.generator.lrr=1", ["train.generator.lrr", "Did you mean 'lr'?"]),
    "wrong-type": ("train.batch_size=many", ["train.batch_size", "'many'", "valid integer"]),
    "fraction": ("train.iterations=2.5", ["train.iterations", "2.5", "integer"]),
    "no-value": ("train.batch_size", ["'train.batch_size'", "section.name=value"]),
    "section-as-value": ("train=5", ["train must hold named values", "5"]),
    "broken-yaml": ("train.generator.lr={a", ["train.generator.lr={a"]),
    "guidance": ("method.guidance=0", ["guidance must be a positive finite number", "0"]),
    "guidance-without-null": ("method.guidance=2", ["method.guidance = 2", "no unconditional branch", "guidance=1"]),
    "indices": ("method.max_index=1000", ["1000", "high_index < count"]),
    "turns": ("method.turns.critic_per_generator=0", ["critic_per_generator must be >= 1", "0"]),
    "accumulate": ("train.accumulate=3", ["batch_size 4", "not a multiple of accumulate 3"]),
    "ema": ("train.ema=1", ["ema must be in [0, 1)", "1"]),
    "betas": ("train.generator.betas=[0.9,1.0]", ["betas must lie in [0, 1)", "1.0"]),
    "prompt-cache": ("train.prompt_cache=ram", ["train.prompt_cache", "'ram'", "'auto', 'memory' or 'disk'"]),
    "prompts-number": ("prompts=5", ["prompts = 5", "path of a text file"]),
    "teacher-option": ("teacher.modez=3", ["'gaussian'", "modez"]),
    "teacher-schedule": ("teacher.schedule=cosine", ["'cosine'", "flow, vp, edm, trig"]),
    "mean-ragged": ("teacher.mean=[[1,2],[3]]", ["mean", "numbers of one shape"]),
    "cov-shape": ("teacher.cov=[[1,0,0],[0,1,0]]", ["covs must be", "got [1, 2, 3]"]),
    "mean-nan": ("teacher.mean=[.nan,0]", ["mean", "not finite"]),
}


@pytest.mark.parametrize("case", FLAGS)
def test_wrong_flag_is_refused(cli, toy, tmp_path, case):
    flags, words = FLAGS[case]
    check_refused(cli(*toy, "--out", tmp_path / "run", *flags), *words)


@pytest.mark.parametrize("case", SETTINGS)
def test_wrong_setting_is_refused(cli, toy, tmp_path, case):
    setting, words = SETTINGS[case]
    check_refused(cli(*toy, "--out", tmp_path / "run", "--set", setting), *words)


def test_default_guidance_on_a_teacher_without_empty_prompt_names_the_way_out(cli, tmp_path):
    """The method's default is not the user's choice, so the message must be all that is needed."""
    done = cli("distill", "--teacher", "gaussian", "--method", "dmd2", "--out", tmp_path / "run")
    check_refused(done, "method.guidance = 1.75", "no unconditional branch", "use --set method.guidance=1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "cuda"], ["device 'cuda' is not available here", "usable: auto, cpu"]),
        (["--precision", "fp16"], ["precision 'fp16' needs a CUDA device", "use fp32, or bf16"]),
    ],
    ids=["cuda", "fp16"],
)
def test_hardware_that_is_not_there_is_refused(cli, toy, tmp_path, flags, words):
    check_refused(cli(*toy, "--out", tmp_path / "run", *flags), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distill"], ["no teacher named", "--teacher NAME"]),
        (["distill", "--teacher", "gaussian"], ["no method named", "--method NAME"]),
        (["list", "nonsense"], ["'nonsense'", "teachers, methods, runs, ", "dmd2"]),
        (["list", "runs", "--runs", "nowhere"], ["no folder nowhere", "--runs"]),
        (["pairs", "--teacher", "nowhere", "--out", "pairs", "--n", "0"], ["n must be >= 1", "0"]),
        (["sample", "nowhere"], ["no run at nowhere", "config.yaml is missing", "fewstep list runs"]),
        (["eval", "nowhere"], ["no run at nowhere", "config.yaml is missing"]),
        (["export", "nowhere", "--to", "somewhere"], ["no run at nowhere", "config.yaml is missing"]),
    ],
    ids=["no-teacher", "no-method", "list", "list-runs", "pairs", "sample", "eval", "export"],
)
def test_command_without_its_object_is_refused(cli, arguments, words):
    check_refused(cli(*arguments), *words)


FILES = {
    "prompts-empty": ("--prompts", "p.txt", b"\n  \n", ["p.txt holds no prompt", "one per line"]),
    "prompts-latin1": ("--prompts", "p.txt", b"caf\xe9\n", ["p.txt is not UTF-8", "save it as UTF-8"]),
    "prompts-jsonl": (
        "--prompts",
        "p.jsonl",
        b'{"text": "a"}\n{"txt": "b"}',
        ["line 2", '"text" or "prompt"'],
    ),
    "prompts-tar": ("--prompts", "p.tar", b"hello", ["p.tar cannot be read as a tar file", "not compressed"]),
    "data-file": ("--data", "d.zip", b"PK", ["no folder", "d.zip", "a folder of pictures, a .tar or"]),
    "data-tar": ("--data", "d.tar", b"", ["d.tar cannot be read as a tar file", "not compressed"]),
    "config-broken": ("--config", "c.yaml", b"train: [1\n", ["c.yaml is not valid YAML"]),
    "config-list": ("--config", "c.yaml", b"- 1\n- 2\n", ["c.yaml must hold a mapping", "teacher, method, train"]),
    "config-section": ("--config", "c.yaml", b"trainer: {seed: 1}\n", ["trainer", "Did you mean 'train'?"]),
    "config-binary": ("--config", "c.yaml", b"\xff\xfe\x00", ["c.yaml"]),
    "plugin-text": ("--plugin", "p.txt", b"hello", ["p.txt is not a Python file", ".py"]),
    "plugin-syntax": ("--plugin", "p.py", b"x = 1\ndef f(:\n", ["p.py is not valid Python", "line 2"]),
    "plugin-binary": ("--plugin", "p.py", b"x = '\xff\xfe'", ["p.py is not valid Python"]),
}


@pytest.mark.parametrize("case", FILES)
def test_file_that_cannot_be_read_is_refused(cli, toy, tmp_path, case):
    flag, name, content, words = FILES[case]
    (tmp_path / name).write_bytes(content)
    check_refused(cli(*toy, "--out", tmp_path / "run", flag, tmp_path / name), *words)


def test_out_that_is_a_file_is_refused(cli, toy, tmp_path):
    (tmp_path / "run").write_text("mine")
    check_refused(cli(*toy, "--out", tmp_path / "run"), "run is a file", "--out takes a folder")
    check_refused(cli(*toy, "--out", tmp_path / "run" / "below"), str(tmp_path / "run"))


def test_existing_run_is_refused(cli, toy, toy_run):
    check_refused(cli(*toy, "--out", toy_run), "exists and is not empty", "--resume", "--overwrite")


def test_overwriting_a_folder_without_a_run_is_refused_and_deletes_nothing(cli, toy, tmp_path):
    """Fails if --overwrite takes any folder: a mistyped --out would lose somebody's "checkpoints"."""
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "prompts.txt").write_text("mine too, though a run has a file of this name")
    (tmp_path / "figures.jsonl").write_text("of these images, which are measured in their folder")
    check_refused(
        cli(*toy, "--out", tmp_path, "--overwrite"), "holds files but no run", "--overwrite deletes runs only"
    )
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "prompts.txt").is_file() and (tmp_path / "figures.jsonl").is_file()


def test_mistake_beside_overwrite_does_not_cost_the_old_run(cli, toy, toy_run, tmp_path):
    """Fails if the folder is cleared before the teacher is loaded."""
    run = Path(shutil.copytree(toy_run, tmp_path / "run"))
    check_refused(cli(*toy, "--out", run, "--overwrite", "--teacher", "gausian"), "Did you mean 'gaussian'?")
    assert checkpoint.newest_valid(run) is not None


def test_resume_with_another_setting_is_refused(cli, toy, toy_run):
    check_refused(cli(*toy, "--out", toy_run, "--resume", "--seed", "7"), "train.seed: 0 -> 7", "another --out")


DISTILL = ["distill", "--method", "dmd2", "--device", "cpu", "--iterations", "1", "--batch-size", "1"]

# -- teacher folders ----------------------------------------------------------------------------------------------


def spoil(folder: Path, how: str) -> None:
    """Damage a copy of a pipeline folder."""
    index, weights = folder / "model_index.json", folder / "transformer" / "diffusion_pytorch_model.safetensors"
    if how == "no-index":
        index.unlink()
    elif how == "index-broken":
        index.write_text("{")
    elif how == "index-list":
        index.write_text("[1]")
    elif how == "unknown-class":
        index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "CogView9Pipeline"}))
    elif how == "pickle":
        (folder / "vae" / "weights.pkl").write_bytes(b"\x80\x04.")
    elif how == "pytorch-bin":
        weights.rename(weights.with_suffix(".bin"))
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "missing":
        weights.unlink()
    elif how == "karras":
        config = folder / "scheduler" / "scheduler_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_karras_sigmas": True}))
    elif how.startswith("lacks-"):
        (weights,) = (folder / how.removeprefix("lacks-")).glob("*.safetensors")
        tensors = load_file(weights)
        del tensors[max(tensors, key=lambda name: tensors[name].numel())]
        save_file(tensors, weights, metadata={"format": "pt"})
    else:
        tensors = load_file(weights)
        name = next(k for k, v in tensors.items() if v.ndim == 2)
        tensors[name] = torch.full_like(tensors[name], torch.nan) if how == "nan" else tensors[name][:-1].contiguous()
        save_file(tensors, weights, metadata={"format": "pt"})


SPOILT = {
    "no-index": ["no diffusers pipeline folder", "model_index.json is missing"],
    "index-broken": ["model_index.json does not parse"],
    "index-list": ["names no pipeline class"],
    "unknown-class": ["'CogView9Pipeline'", "Did you mean 'CogView4Pipeline'?"],
    "pickle": ["pickled weights", "vae/weights.pkl", "safe_serialization=True"],
    "pytorch-bin": ["pickled weights", "diffusion_pytorch_model.bin"],
    "truncated": ["cannot load the pipeline"],
    "empty": ["cannot load the pipeline"],
    "missing": ["cannot load the pipeline"],
    "karras": ["use_karras_sigmas", "must only be shifted"],
    "nan": ["non-finite weights", "transformer."],
    "lacks-transformer": ["missing weights: transformer needs"],
    "lacks-vae": ["missing weights: vae needs"],
    "lacks-text_encoder": ["missing weights: text_encoder needs"],
    "shapes": ["cannot load the pipeline"],
}


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_pipeline_folder_is_refused(cli, pipeline_folder, tmp_path, how):
    """`lacks-text_encoder` fails if weights are not counted: transformers puts random numbers for a missing tensor."""
    folder = Path(shutil.copytree(pipeline_folder, tmp_path / "teacher"))
    spoil(folder, how)
    check_refused(
        cli(*DISTILL, "--teacher", folder, "--out", tmp_path / "run"),
        *SPOILT[how],
        str(folder) if how not in ("karras", "unknown-class") else "",
    )


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_non_finite_weights_of_any_part_are_refused(cli, pipeline_folder, tmp_path, part):
    """Fails if only the transformer is looked at."""
    folder = Path(shutil.copytree(pipeline_folder, tmp_path / "teacher"))
    (weights,) = (folder / part).glob("*.safetensors")
    tensors = load_file(weights)
    tensors = {k: torch.full_like(v, torch.inf) if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    check_refused(
        cli(*DISTILL, "--teacher", folder, "--out", tmp_path / "run"),
        "non-finite weights",
        f"{part}.",
    )


def test_unknown_option_of_a_pipeline_is_refused(cli, pipeline_folder, tmp_path):
    arguments = [
        "--teacher",
        pipeline_folder,
        "--method",
        "dmd2",
        "--out",
        tmp_path / "run",
        "--set",
        "teacher.modes=3",
    ]
    check_refused(cli("distill", *arguments), str(pipeline_folder), "modes")


# -- finished runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sample", "eval", "export"])
def test_unknown_checkpoint_name_is_refused(cli, toy_run, tmp_path, command):
    further = ["--to", tmp_path / "x"] if command == "export" else []
    check_refused(cli(command, toy_run, "--which", "first", *further), "--which 'first'", "best, last")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "-n", "0"], ["n must be >= 1, got 0"]),
        (["sample", "--num-steps", "-1"], ["num_steps must be >= 1, got -1"]),
        (["sample", "--out", "picture.txt"], [".txt"]),
        (["sample", "--device", "mps"], ["device 'mps'", "allowed: auto, cpu, cuda"]),
        (["sample", "--batch-size", "0"], ["batch_size must be >= 1, got 0"]),
        (["eval", "-n", "0"], ["n must be >= 1, got 0"]),
        (["eval", "--device", "tpu"], ["device 'tpu'", "allowed: auto, cpu, cuda"]),
        (["eval", "--batch-size", "-5"], ["batch_size must be >= 1, got -5"]),
        (["diversity", "--per-prompt", "1"], ["at least 2 of each", "got 1"]),
        (["diversity"], ["compares pictures", "the samples of teacher 'gaussian' are none"]),
    ],
    ids=["n", "steps", "extension", "device", "batch", "eval-n", "eval-device", "eval-batch", "one", "points"],
)
def test_wrong_question_to_a_run_is_refused(cli, toy_run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    check_refused(cli(arguments[0], toy_run, *arguments[1:]), *words)


@pytest.mark.parametrize(
    ("made", "asked", "words"),
    [
        (["--n", "4"], ["--set", "method.guidance=2"], ["sampled with guidance 1", "--set method.guidance=1"]),
        (["--n", "4", "--num-steps", "2"], ["--set", "teacher.mean=[0,0]"], ["whose weights are not those of"]),
    ],
)
def test_pairs_of_another_teacher_or_guidance_are_refused(cli, toy, tmp_path, made, asked, words):
    done = cli("pairs", "--teacher", "gaussian", "--out", tmp_path / "pairs", "--device", "cpu", *made)
    assert done.exit_code == 0, done.output
    flags = ["--method", "dmd", "--pairs", tmp_path / "pairs", "--out", tmp_path / "run", *asked]
    check_refused(cli(*toy, *flags), *words)


def test_a_flow_head_on_a_unet_is_refused_before_its_weights_are_read(cli, tmp_path, monkeypatch):
    """Fails if the network is built first, which a user of a large teacher would wait for."""
    monkeypatch.setattr("fewstep.teachers.pipelines.from_pipeline", None)
    wrong = ("distill", "--teacher", "fashion-unet", "--method", "tmd", "--out", tmp_path / "run")
    check_refused(cli(*wrong), "'tmd'", "'fashion-unet' is a StableDiffusionPipeline", "fashion-dit", "dmd2")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "boot", "--num-steps", "4"], ["num_steps must be 1", "dmd2 or sid"]),
        (["--method", "phased_dmd", "--num-steps", "1"], ["at most num_steps = 1", "method dmd2"]),
        (["--method", "sid", "--set", "method.gan_warmup=9"], ["without a GAN gan_warmup", "give gan_weight > 0"]),
        (["--method", "meanflow", "--set", "method.velocity=data"], ["'data' asks no teacher", "give 1"]),
        (["--method", "tbcm", "--set", "method.grid_steps=1"], ["grid_steps must be >= 2"]),
        (["--method", "dmd"], ["fewstep pairs --teacher gaussian"]),
    ],
)
def test_settings_that_a_method_cannot_have_are_refused(cli, tmp_path, words, said):
    check_refused(cli("distill", "--teacher", "gaussian", *words, "--out", tmp_path / "run"), *said)
    assert not (tmp_path / "run").exists()


def test_pairs_of_other_settings_do_not_mix(cli, tmp_path):
    flags = ["pairs", "--teacher", "gaussian", "--out", tmp_path / "pairs", "--n", "4", "--device", "cpu"]
    assert cli(*flags, "--num-steps", "2").exit_code == 0
    check_refused(cli(*flags, "--num-steps", "3"), "num_steps: 2 -> 3", "Choose another --out")


def test_export_into_an_existing_folder_is_refused(cli, pipeline_run, tmp_path):
    check_refused(cli("export", pipeline_run, "--to", tmp_path), str(tmp_path), "choose a folder that does not exist")


def test_export_of_a_closed_form_student_is_refused(cli, toy_run, tmp_path):
    check_refused(cli("export", toy_run, "--to", tmp_path / "x"), "'gaussian'", "fewstep.load_student")
    assert not (tmp_path / "x").exists()


def test_pipeline_without_prompts_is_refused(cli, pipeline_folder, tmp_path):
    """Fails if the empty prompt stands in: guidance would do nothing, and the student would know no other prompt."""
    wrong = ("distill", "--teacher", pipeline_folder, "--method", "dmd2", "--out", tmp_path / "run")
    check_refused(cli(*wrong), "brings no prompts", "give --prompts FILE")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_evaluation_of_a_teacher_without_one_is_refused(cli, pipeline_run):
    check_refused(cli("eval", pipeline_run), "brings no evaluation", "fewstep sample")


@pytest.mark.parametrize("kind", ["toy_run", "pipeline_run"])
def test_student_that_gives_nan_is_refused(cli, request, tmp_path, kind):
    """Fails if decoding takes what is not finite: the picture would be black, or the scatter plot a traceback."""
    run = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "run"))
    newest = checkpoint.newest_valid(run)
    saved = checkpoint.read(newest)
    ema = {k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in saved.tensors["ema"].items()}
    checkpoint.write(newest, checkpoint.Checkpoint({**saved.tensors, "ema": ema}, saved.state))
    check_refused(cli("sample", run, "-n", "2", "--which", "last"), "not finite", "diverged")
    assert not (run / "samples.png").exists()


def test_run_with_damaged_checkpoints_is_refused(cli, toy_run, tmp_path):
    run = Path(shutil.copytree(toy_run, tmp_path / "run"))
    for path in run.glob("checkpoints/*/ema.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    check_refused(cli("sample", run), "no valid checkpoint")


def test_broken_run_in_a_list_is_named(cli, toy_run, tmp_path):
    run = Path(shutil.copytree(toy_run, tmp_path / "runs" / "broken"))
    (run / "config.yaml").write_text("train: [1\n")
    check_refused(cli("list", "runs", "--runs", tmp_path / "runs"), str(run), "cannot be listed")


def test_runaway_learning_rate_ends_with_advice_and_no_traceback(cli, toy, tmp_path):
    """Not a mistake of form, so exit code 1: the run started, and diverged."""
    done = cli(*toy, "--out", tmp_path / "run", "--lr", "1e30", "--iterations", "60", "--set", "train.log_every=60")
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.output
    assert "diverged" in done.stderr or "non-finite" in done.stderr


# -- real processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["parser", "setting", "plugin"])
def test_fresh_process_ends_with_code_2_and_no_traceback(shell, toy, tmp_path, case):
    (tmp_path / "p.py").write_text("def f(:\n")
    flags = {
        "parser": ["--num-steps", "many"],
        "setting": ["--set", "train.batch_size=many"],
        "plugin": ["--plugin", tmp_path / "p.py"],
    }[case]
    done = shell(*toy, "--out", tmp_path / "run", *flags)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    named = {"parser": "'--num-steps'", "setting": "'many'", "plugin": "p.py is not valid Python (line 1)"}
    assert named[case] in done.stderr
    assert not done.stdout
    assert not (tmp_path / "run").exists()


def test_wrong_flags_answer_without_torch(shell, tmp_path):
    """Fails if the command line imports torch: this takes 3-4 s more, and the broken torch put in its way shows it."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = shell("list", "nonsense", PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[2]}")
    assert done.returncode == 2
    assert "allowed: teachers, methods, runs, " in done.stderr
