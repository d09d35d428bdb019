"""The user's path: distil, list, sample, evaluate, each as a fresh process; what the run folder then holds."""

import csv
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from fewstep.api import load_student

HUBER = '''
from dataclasses import dataclass

import torch

import fewstep
from fewstep.objectives.dmd2 import DMD2
from fewstep.types import Loss


@fewstep.register_objective("{name}")
@dataclass(frozen=True, kw_only=True)
class HuberDMD2(DMD2):
    """DMD2 with a pseudo-Huber critic."""

    c: float = 0.03  # iCT, arXiv:2310.14189, scaled by sqrt(dim) there

    def critic_loss(self, trio, batch, rng):
        """sqrt(|x0_hat - x|^2 + c^2) - c, the mean over the batch."""
        with torch.no_grad():
            x = self.rollout(trio, batch, rng).x
            t = self.law(0, 999).sample(rng, "critic.t", x.device)
            x_t = trio.critic().schedule.add_noise(x, rng.randn_like(x, "critic.eps"), t)
        error = trio.critic()(x_t, t, batch.cond).x0 - x
        loss = ((error.square().flatten(1).sum(1) + self.c**2).sqrt() - self.c).mean()
        return Loss(loss, {{"critic": loss.detach(), "critic/c": torch.tensor(self.c)}})
'''


@pytest.fixture(scope="module")
def journey(shell, tmp_path_factory):
    """distill, list, sample and eval as a user types them: command -> finished process; and the run folder."""
    home = tmp_path_factory.mktemp("home")
    commands = {
        "distill": "--teacher gaussian --method dmd2 --num-steps 2 --iterations 4 --batch-size 4 --lr 1e-3 --seed 3 "
        "--device cpu --out runs/toy --set method.guidance=1 --set teacher.fit_steps=2 --set teacher.mean=[1.0,2.0] "
        "--set train.log_every=2",
        "list": "runs",
        "sample": "runs/toy -n 9 --seed 5",
        "eval": "runs/toy -n 200",
    }
    done = {name: shell(name, *rest.split(), cwd=home) for name, rest in commands.items()}
    assert not any(d.returncode for d in done.values()), [d.stderr for d in done.values()]
    return done, home / "runs" / "toy"


def test_distill_says_what_it_does_and_what_comes_next(journey):
    said = journey[0]["distill"].stderr
    assert "no recipe for this teacher and method: running on untuned defaults" in said
    assert "Next: fewstep eval runs/toy" in said
    assert not journey[0]["distill"].stdout


def test_progress_without_a_terminal_is_plain_lines_with_remaining_time(journey):
    lines = [line for line in journey[0]["distill"].stderr.splitlines() if "images/s" in line]
    assert [line.split()[1] for line in lines] == ["2/4", "4/4"]
    assert all(" ETA 0:0" in line for line in lines)
    assert "\x1b" not in journey[0]["distill"].stderr


def test_run_folder_holds_what_the_readme_says(journey):
    run = journey[1]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "critic" in row] == [2, 4]
    assert {"python", "packages", "processors", "revision", "command"} <= json.loads(
        (run / "environment.json").read_text()
    ).keys()
    assert [p.name for p in sorted((run / "previews").iterdir())] == ["00000004.png"]
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["00000004"]


def test_list_runs_names_the_run_and_how_far_it_is(journey):
    (line,) = [line for line in journey[0]["list"].stdout.splitlines() if "runs/toy" in line]
    assert [word in line for word in ("gaussian", "dmd2", "4/4", " at 4")] == [True] * 4


def test_sample_prints_the_picture_that_it_wrote(journey):
    assert journey[0]["sample"].stdout.strip() == "runs/toy/samples.png"
    assert Image.open(journey[1] / "samples.png").size == (256, 256)


def test_eval_prints_the_table_that_it_wrote(journey):
    table = (journey[1] / "eval.md").read_text()
    assert journey[0]["eval"].stdout.strip() == table.strip()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "teacher",
        "untrained student",
        "student",
    ]


def test_eval_writes_the_same_rows_as_csv_and_json(journey):
    rows = json.loads((journey[1] / "eval.json").read_text())["rows"]
    with (journey[1] / "eval.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["model"], int(line["steps"]), float(line["sw"])) for line in lines] == [
        (row["model"], row["steps"], row["figures"]["sw"]) for row in rows
    ]
    assert [row["steps"] for row in rows] == [50, 2, 2]
    assert {row["n"] for row in rows} == {200}


def test_config_alone_reproduces_the_run(journey, cli, tmp_path):
    """Fails if any setting is left out of config.yaml: the teacher's mean, for one."""
    again = cli("distill", "--config", journey[1] / "config.yaml", "--out", tmp_path / "other")
    assert again.exit_code == 0, again.output
    names = [p.name for p in sorted((journey[1] / "checkpoints" / "00000004").glob("*.safetensors"))]
    assert {"generator.safetensors", "fake_score.safetensors", "ema.safetensors"} <= set(names)
    for name in names:
        first, second = (run / "checkpoints" / "00000004" / name for run in (journey[1], tmp_path / "other"))
        assert first.read_bytes() == second.read_bytes(), name
    assert (journey[1] / "config.yaml").read_text() == (tmp_path / "other" / "config.yaml").read_text()


def test_later_layers_win(cli, tmp_path):
    """defaults < recipe < flags < --set, key by key: a flag's lr keeps the recipe's betas beside it."""
    done = cli(
        "distill", "--teacher", "mixture", "--method", "dmd2", "--iterations", "1", "--batch-size", "8", "--lr", "3e-3",
        "--set", "train.batch_size=4", "--set", "train.critic.lr=7e-3", "--set", "teacher.fit_steps=1",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    train, recipe = saved["train"], "mixture_dmd2.yaml"
    assert train["seed"] == 0  # default
    assert (train["ema"], train["generator"]["betas"]) == (0.99, [0.0, 0.99])  # recipe
    assert (train["iterations"], train["generator"]["lr"]) == (1, 3e-3)  # flags, over the recipe's
    assert (train["batch_size"], train["critic"]["lr"]) == (4, 7e-3)  # --set, over the flags'
    (announced,) = [line for line in done.stderr.splitlines() if line.startswith("recipe ")]
    assert announced.endswith(recipe)


def test_objective_from_a_plugin_trains_and_is_in_the_saved_configuration(cli, toy, tmp_path):
    (tmp_path / "huber.py").write_text(HUBER.format(name="huber_dmd2"))
    toy[toy.index("dmd2")] = "huber-dmd2"
    done = cli(*toy, "--plugin", tmp_path / "huber.py", "--set", "method.c=0.25", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["method"]["c"] == 0.25
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert next(row["critic/c"] for row in rows if "critic" in row) == 0.25
    weights = load_file(tmp_path / "run" / "checkpoints" / "00000002" / "fake_score.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


@pytest.mark.parametrize("words", [["phased-dmd"], ["methods", "phased_dmd"]])
def test_list_tells_all_about_a_method(cli, words):
    """Its paper, what it trains and reads, its stages and constraints, and every setting's source."""
    done = cli("list", *words)
    for said in ("arxiv.org/abs/2510.27684", "generator, fake score, in 2 stages", "reads   prompts", "frozen", "cap"):
        assert said in done.stdout, said
    refused = cli("list", "runs", "dmd2")
    assert refused.exit_code == 2 and "fewstep list methods NAME" in refused.output


def test_list_shows_a_plugins_method_with_its_settings(shell, tmp_path):
    (tmp_path / "huber.py").write_text(HUBER.format(name="huber_dmd2"))
    done = shell("list", "huber_dmd2", "--plugin", tmp_path / "huber.py", COLUMNS="300")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("│ c ")]
    assert "0.03" in line and "arXiv:2310.14189" in line
    assert "DMD2 table 6" in done.stdout  # inherited settings keep their sources


def test_pairs_are_built_once_and_a_run_reads_them(cli, toy, tmp_path):
    build = ["pairs", "--teacher", "gaussian", "--out", tmp_path / "pairs", "--n", "6", "--num-steps", "3"]
    for _ in range(2):
        done = cli(*build, "--device", "cpu")
        assert done.exit_code == 0, done.output
        assert done.stdout.strip() == str(tmp_path / "pairs")
    run = tmp_path / "run"
    done = cli(*toy, "--method", "dmd", "--pairs", tmp_path / "pairs", "--out", run)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("regression", 0) > 0 for row in rows)
    (tmp_path / "pairs").rename(tmp_path / "moved")
    more = [*toy, "--method", "dmd", "--pairs", tmp_path / "moved", "--out", run, "--resume", "--iterations", "3"]
    assert cli(*more).exit_code == 0


def test_export_prints_the_folder_that_it_wrote(cli, pipeline_run, tmp_path):
    done = cli("export", pipeline_run, "--to", tmp_path / "new" / "folder")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(tmp_path / "new" / "folder")
    assert "from_pretrained" in (tmp_path / "new" / "folder" / "README.md").read_text()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["folder"]


def test_a_run_on_a_prompt_file_is_sampled_on_it(pipeline_run):
    """Its teacher brings no prompts.  Fails if the run's own are forgotten after training."""
    assert load_student(pipeline_run).teacher.prompts == ("a photo of a bag", "a coat")


def test_a_moved_prompt_file_does_not_break_a_run(pipeline_run, tmp_path):
    """Fails if the file is only named in config.yaml, or the named one is preferred to the run's copy."""
    run = shutil.copytree(pipeline_run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    for other in (tmp_path / "gone.txt", tmp_path / "changed.txt"):
        (tmp_path / "changed.txt").write_text("another prompt\n")
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"prompts": str(other)}))
        assert load_student(run).teacher.prompts == ("a photo of a bag", "a coat")


def test_sample_and_eval_take_device_and_batch_size(cli, toy_run, tmp_path):
    """Pictures and figures are those of any other batch size, up to rounding."""
    run = shutil.copytree(toy_run, tmp_path / "run")
    figures = []
    for size in ("7", "250"):
        for command in (("sample", run, "-n", "16"), ("eval", run, "-n", "20", "--recompute-teacher")):
            done = cli(*command, "--device", "cpu", "--batch-size", size)
            assert done.exit_code == 0, done.output
        figures.append([row["figures"]["sw"] for row in json.loads((run / "eval.json").read_text())["rows"]])
    assert figures[0] == pytest.approx(figures[1], abs=1e-4)


def test_sample_takes_prompts_and_a_place(cli, pipeline_run, tmp_path):
    """Eight tiles of 16 pixels, four times enlarged, in a row; the first and the fourth share a prompt, not a seed."""
    done = cli(
        "sample",
        pipeline_run,
        "-n",
        8,
        *["--prompt", "bag", "--prompt", "coat", "--prompt", "dress"],
        "--out",
        tmp_path / "x.png",
    )
    assert done.exit_code == 0, done.output
    image = Image.open(tmp_path / "x.png")
    assert image.size == (8 * 65 - 1, 64)


def test_demo_draws_teacher_untrained_and_student(toy_run, tmp_path):
    """The last part of `make demo`, on a run that is already there."""
    from eval.demo import draw

    run = shutil.copytree(toy_run, tmp_path / "run")
    assert draw(run) == run / "grid.png"
    assert Image.open(run / "grid.png").width > 3 * 256


def test_list_kernels_shows_each_backends_state_and_what_it_has(shell):
    """Mutation: a backend that cannot run shown as if it could."""
    done = shell("list", "kernels", COLUMNS="160", CXX="/nonexistent")
    assert done.returncode == 0, done.stderr
    rows = {cells[1].strip(): cells[2:-1] for line in done.stdout.splitlines() if len(cells := line.split("│")) > 3}
    assert rows["reference"][0].strip() == "ok" and "no C++ compiler" in rows["cpu"][0]
    has = [cell.strip() for cell in rows["score_difference"]]
    assert has == ["yes", "", "yes", "yes", "yes"]  # reference, chunked, cpu, triton, cuda
    assert "FEWSTEP_KERNELS" in done.stdout


def test_listing_needs_no_torch():
    """Fails if the command line, or anything that it imports, imports torch."""
    code = """
import sys
for name in ("torch", "diffusers", "transformers", "accelerate", "omegaconf"):
    sys.modules[name] = None  # importing it raises
from typer.testing import CliRunner
from fewstep.cli import app
for what, word in (("teachers", "fashion-dit"), ("methods", "dmd2"), ("dmd2", "guidance")):
    done = CliRunner().invoke(app, ["list", what])
    assert done.exit_code == 0, done.output
    assert word in done.stdout, done.stdout
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Twelve captioned pictures in a tar file, which are its prompts, too; some captions have two lines."""
    path = tmp_path_factory.mktemp("archive") / "0.tar"
    with tarfile.open(path, "w") as made:
        for i in range(12):
            held = io.BytesIO()
            Image.new("L", (20, 16), 20 * i).save(held, "PNG")
            for kind, data in (("json", json.dumps({"text": f"a bag\nnumber {i}"}).encode()), ("png", held.getvalue())):
                info = tarfile.TarInfo(f"{i:03d}.{kind}")
                info.size = len(data)
                made.addfile(info, io.BytesIO(data))
    return path


def test_a_run_from_the_disk_is_the_run_from_memory(cli, pipeline_folder, archive, tmp_path, monkeypatch):
    """Prompts, captions and latents of an archive; the student's bytes are the same.  The run may change where its
    prompts are as it goes on, and is sampled on its copy of them."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fewstep.training.cache.SHARD", 5)
    flags = ["distill", "--teacher", pipeline_folder, "--prompts", archive, "--data", archive, "--method", "dmd2"]
    flags += ["--set", "method.gan_weight=0.1", "--set", "method.guidance=2", "--batch-size", "2", "--device", "cpu"]
    runs = [tmp_path / "run", tmp_path / "other"]
    for run, places in zip(runs, (("auto", "disk"), ("disk", "memory")), strict=True):
        for place, more in zip(places, (["--iterations", 1], ["--iterations", 2, "--resume"]), strict=True):
            done = cli(*flags, "--out", run, *more, "--set", f"train.prompt_cache={place}")
            assert done.exit_code == 0, done.output
    assert len({(run / "checkpoints" / "00000002" / "ema.safetensors").read_bytes() for run in runs}) == 1
    assert len(list((tmp_path / "cache" / "prompts").iterdir())) == 1  # captions are the same texts
    assert load_student(runs[0]).teacher.prompts == tuple(f"a bag\nnumber {i}" for i in range(12))
