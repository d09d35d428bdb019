"""Two processes are one: the same gradients, the same step index, and they stop together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from safetensors.torch import load_file

from tests.invariants import gradients as script
from tests.invariants.conftest import ENVIRONMENT, ROOT, group_of

CONFIGS = ROOT / "configs" / "accelerate"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two gloo processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    with group_of(2) as group:
        processes = [
            subprocess.Popen(
                [sys.executable, script.__file__, str(folder)],
                env={**ENVIRONMENT, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            said = [process.communicate(timeout=240)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return folder


@pytest.mark.parametrize(("num_steps", "variant"), script.CASES)
def test_two_gloo_ranks_give_the_gradient_of_one_process(num_steps: int, variant: str, ranks: Path, tmp_path: Path):
    """Both turns, every parameter; float64, so only the order of 8 terms differs.

    Fails with both ranks on the same samples (`_micro_batches` without the process index), for several steps with a
    step index keyed by the samples, and with a GAN head that each rank seeds by itself.
    """
    one, steps = script.gradients(tmp_path, num_steps, variant=variant)
    for rank in range(2):
        two, their_steps = torch.load(ranks / f"gradients-{variant}{num_steps}.{rank}.pt", weights_only=True)
        assert script.relative_error(two, one) < 1e-10
        assert their_steps == steps
    assert len(set(steps)) > 1 or num_steps == 1


def test_signal_to_one_rank_stops_both_at_the_same_iteration(ranks: Path):
    """The main process alone finds a new best, the other alone gets SIGTERM: both save, both stop.

    Fails by hanging when only the rank that knows goes into `save`: the other waits in the next all-reduce.
    """
    said = [json.loads((ranks / f"stopped.{rank}.json").read_text()) for rank in range(2)]
    assert said[0] == said[1] and "stopped by signal 15" in said[0]
    names = sorted(path.name for path in (ranks / "checkpoints").iterdir())
    assert names == ["00000002", "00000005"]  # the best, which `keep` covers too, and the last


def test_shares_of_the_gradient_are_those_of_two_micro_batches(ranks: Path, tmp_path: Path):
    """A rank's samples are a micro-batch of one process, and both log the mean of the two.

    Fails if the ranks name their terms in different orders, so that one's GAN meets the other's matching term.
    """
    trainer, _ = script.make(script.Trainer, tmp_path, 1, "gan", accumulate=2, iterations=5, log_every=1)
    trainer.run()
    two, one = ([json.loads(line) for line in (out / "metrics.jsonl").open()] for out in (ranks, tmp_path))
    found, wanted = ([(row["grad/dm"], row["grad/gan"]) for row in rows if "grad/gan" in row] for rows in (two, one))
    assert len(wanted) == 4 and all(0 < gan < 0.4 for _, gan in wanted)  # so that exchanged ones would differ
    assert found == [pytest.approx(pair, rel=1e-6) for pair in wanted]


def test_two_processes_make_the_preview_of_one(ranks: Path, tmp_path: Path):
    """The figure's samples and both panels, by number; only the main process has them.

    Mutations: every process makes all, or the samples from the first on.
    """
    main, other = (json.loads((ranks / f"preview.{rank}.json").read_text()) for rank in range(2))
    assert main == script.previewed(tmp_path) and other == {}
    one, two = (Image.open(folder / "previews" / "00000001.png") for folder in (tmp_path, ranks))
    assert one.tobytes() == two.tobytes()


def test_a_checkpoint_that_cannot_be_written_ends_both(ranks: Path):
    """Fails by hanging when the main process leaves `save` with an error that it keeps to itself."""
    main, other = (json.loads((ranks / f"failed.{rank}.json").read_text()) for rank in range(2))
    assert main in ("FileExistsError", "NotADirectoryError") and other == "RuntimeError"


def test_accelerate_reads_our_file_as_two_plain_processes():
    read = load_config_from_file(str(CONFIGS / "ddp.yaml"))
    kind = str(read.distributed_type).rpartition(".")[2]
    assert (kind, read.num_processes, read.num_machines, read.mixed_precision) == ("MULTI_GPU", 2, 1, "no")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["ddp.yaml", "fsdp2.yaml"])
def test_our_file_for_accelerate_starts_two_processes_that_are_one(file: str, tmp_path: Path):
    """By the command line, on gloo; float32, whose last digits the order of a sum changes.

    Fails if only one process starts, whose weights would be the same to the bit.
    """
    command = [
        "-m",
        "fewstep.cli",
        "distill",
        "--device",
        "cpu",
        "--teacher",
        "gaussian",
        "--method",
        "dmd2",
        "--iterations",
        "4",
        "--batch-size",
        "4",
        "--set",
        "method.guidance=1",
        "--set",
        "teacher.fit_steps=2",
        "--set",
        "train.evaluate_samples=10",
        "--out",
    ]
    launch = f"-m accelerate.commands.accelerate_cli launch --config_file {CONFIGS / file}".split()
    for name, start in (("one", []), ("two", [*launch, "--main_process_port", "0"])):
        argv = [sys.executable, *start, *command, str(tmp_path / name)]
        done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    equal = []
    for role in ("generator", "fake_score"):
        one, two = (
            load_file(tmp_path / name / "checkpoints" / "00000004" / f"{role}.safetensors") for name in ("one", "two")
        )
        torch.testing.assert_close(two, one, atol=1e-6, rtol=1e-5)
        equal += [torch.equal(one[name], two[name]) for name in one]
    assert not all(equal)
