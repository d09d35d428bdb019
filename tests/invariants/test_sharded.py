"""Two processes that each hold a part of every network are one that holds all of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.planning.plan import plan
from fewstep.training.fsdp import SWITCH
from tests.invariants import sharded as script
from tests.invariants.conftest import ENVIRONMENT, group_of
from tests.tiny_pipeline import build_sd3

Told = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case's run by one process, in folders "<case>-one", of which some are left at the first checkpoint."""
    folder = tmp_path_factory.mktemp("sharded")
    build_sd3(folder / "sd3")
    (folder / "prompts.txt").write_text("class 0\nclass 1\n")
    holds = {}
    for name in script.CASES:
        trainer = script.trainer_of(name, folder / "one" / name, folder / "sd3")
        trainer.run()
        holds[name] = script.held_by(trainer)
    (folder / "one.json").write_text(json.dumps(holds))
    for name in script.RESUMED:
        shutil.copytree(folder / "one" / name, folder / f"{name}-one")
        shutil.rmtree(folder / f"{name}-one" / "checkpoints" / f"{script.ITERATIONS:08d}")
    return folder


@pytest.fixture(scope="module")
def told(folder: Path) -> Told:
    """What each of two gloo processes saw of the same runs, sharded, in folders "<case>"."""
    with group_of(2) as group:
        processes = [
            subprocess.Popen(
                [sys.executable, script.__file__, str(folder), str(folder / "sd3")],
                env={**ENVIRONMENT, **group, SWITCH: "true", "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            said = [process.communicate(timeout=900)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return [json.loads((folder / f"told.{rank}.json").read_text()) for rank in range(2)]


def saved(run: Path, iteration: int = script.ITERATIONS) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    files = sorted((run / "checkpoints" / f"{iteration:08d}").glob("*.safetensors"))
    assert files
    return {f"{path.stem}.{name}": value for path in files for name, value in load_file(path).items()}


def furthest(made: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of any number, in units of its tensor's largest number, or of 1e-3 if that is more."""
    assert made.keys() == wanted.keys()
    return max(float((made[k] - v).abs().max() / v.abs().max().clamp_min(1e-3)) for k, v in wanted.items() if v.numel())


@pytest.mark.parametrize("name", [name for name in script.CASES if name != "dmd2-bf16"])
def test_sharded_run_is_that_of_one_process(name: str, folder: Path, told: Told):
    """Weights, averages, heads, moments and what was logged, after three iterations; float32, sums in another order.

    They moved by 7e-5 to 2e-3, so 1e-5 of a weight is small beside that.  Fails if the network alone is a unit (a loss
    of features then runs back through weights that nobody has gathered), if gradients are averaged once more or summed,
    and if one process's share of the gradient norm is taken for all.
    """
    one, two = saved(folder / "one" / name), saved(folder / name)
    assert furthest(two, one) < 1e-5
    start = saved(folder / "one" / name, script.STOP)
    moved = [k for k, v in one.items() if k.startswith(("generator.", "fake_score.")) and not torch.equal(v, start[k])]
    assert moved


def test_sharded_run_in_bf16_has_the_gradients_of_one_process(folder: Path, told: Told):
    """As the optimisers' first moments tell; its norms' weights are rounded, too, and bf16 holds 3 digits."""
    one, two = saved(folder / "one" / "dmd2-bf16"), saved(folder / "dmd2-bf16")
    for turn in ("generator", "critic"):
        names = [k for k in one if k.startswith(f"optimizer_{turn}.") and k.endswith(".exp_avg")]
        wanted, made = (torch.cat([saved[k].flatten() for k in names]) for saved in (one, two))
        assert (made - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("name", script.CASES)
def test_each_process_holds_half(name: str, folder: Path, told: Told):
    """Together they hold every byte of one process once, each half of it but for what three rows cannot share evenly.

    Fails if weights that adapters share are divided for each of their networks anew.
    """
    for kind, (_, total) in json.loads((folder / "one.json").read_text())[name].items():
        parts, totals = zip(*(rank[name][kind] for rank in told), strict=True)
        assert sum(parts) == totals[0] == totals[1] == total > 0
        assert max(parts) <= 0.51 * total


def test_plan_counts_what_each_process_holds(folder: Path, told: Told):
    """A plan divides buffers, too, which are 3% of this network and in fact whole everywhere.

    What is gathered is counted while units run: of those that train a plan has it thrice.
    """
    made, held = plan(script.config_of("sid", folder / "sd3"), gpus=2, sharded=True, device="cpu"), told[0]["sid"]
    bytes = made.bytes("critic")
    assert bytes["weights"] + bytes["ema"] == pytest.approx(held["weights"][0], rel=0.05)
    assert bytes["optimiser"] == pytest.approx(held["optimiser"][0], rel=0.05)
    assert bytes["gathered"] == 3 * held["gathered"] > 0


@pytest.mark.parametrize("name", script.RESUMED)
def test_stopped_and_resumed_sharded_run_is_the_unbroken_one(name: str, folder: Path, told: Told):
    """A signal to one process alone stops both after the same iteration; every tensor is the same to the bit."""
    assert told[0][name]["stopped"] == told[1][name]["stopped"]
    assert "stopped by signal 15" in told[0][name]["stopped"]
    again, unbroken = saved(folder / f"{name}-again"), saved(folder / name)
    assert again.keys() == unbroken.keys()
    assert all(torch.equal(again[k], value) for k, value in unbroken.items())


@pytest.mark.parametrize("name", script.RESUMED)
def test_run_of_one_process_goes_on_sharded(name: str, folder: Path, told: Told):
    assert furthest(saved(folder / f"{name}-one"), saved(folder / "one" / name)) < 1e-5


@pytest.mark.parametrize("name", script.RESUMED)
def test_sharded_run_goes_on_in_one_process(name: str, folder: Path, told: Told, tmp_path: Path):
    """Its checkpoint holds whole tensors.  Fails if they are one process's parts."""
    shutil.copytree(folder / name, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"{script.ITERATIONS:08d}")
    script.trainer_of(name, tmp_path / "run", folder / "sd3", resume=True).run()
    assert furthest(saved(tmp_path / "run"), saved(folder / "one" / name)) < 1e-5


def test_main_process_alone_keeps_pictures_and_figures(folder: Path, told: Told):
    run = folder / "dmd2"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "eval/sw@8" in row] == [script.ITERATIONS]
    assert [path.name for path in (run / "previews").iterdir()] == [f"{script.ITERATIONS:08d}.png"]
