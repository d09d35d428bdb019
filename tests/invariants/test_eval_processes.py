"""An evaluation by several processes is that of one, in all digits, and a second one is the first."""

import json
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from fewstep.metrics.features import dequantise, load_fashion_classifier, load_reference
from fewstep.metrics.frechet import Moments, moments_distance
from tests.invariants.conftest import CommandLine, group_of

FASHION = ("--protocol", "fashion-fmd", "--device", "cpu")


def draw(folder: Path, n: int) -> torch.Tensor:
    """n pictures of the packaged classifier's size; their bytes [n, 1, 32, 32]."""
    folder.mkdir()
    pixels = numpy.random.default_rng(0).integers(0, 256, (n, 32, 32), dtype=numpy.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return torch.from_numpy(pixels)[:, None]


def figures(cli: CommandLine, count: int, *argv: str) -> list[dict[str, float]]:
    """Of the lines that `fewstep eval ARGV` adds in so many processes; the main one alone prints."""
    file = Path(argv[argv.index("--to") + 1])
    done = cli.together(count, "eval", *argv)
    assert [process.code for process in done] == [0] * count, done[-1].log
    assert "| protocol" in done[0].log and all(process.log == "" for process in done[1:])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.unlink()
    return [line["figures"] for line in lines]


def test_a_folder_has_the_figures_of_one_process(cli, tmp_path):
    """137 pictures are three batches, two and two overlapping ones of two processes, and one each of five.

    Mutations: pictures of both shares counted; shares gathered in the order in which they come in; a share that cuts a
    batch of the extractor in two.
    """
    draw(tmp_path / "images", 137)
    asked = (str(tmp_path / "images"), *FASHION, "--to", str(tmp_path / "lines"))
    (one,) = figures(cli, 1, *asked)
    assert list(one) == ["FMD@137"]
    assert [one] == figures(cli, 1, *asked) == figures(cli, 2, *asked) == figures(cli, 5, *asked)


def test_a_folder_of_reals_is_seen_by_all_too(cli, tmp_path):
    draw(tmp_path / "images", 137)
    draw(tmp_path / "reals", 151)
    asked = (
        str(tmp_path / "images"),
        *FASHION,
        "--reference",
        str(tmp_path / "reals"),
        "--to",
        str(tmp_path / "lines"),
    )
    assert figures(cli, 1, *asked) == figures(cli, 2, *asked)


def test_the_distance_depends_on_neither_batches_nor_order():
    """In all digits for equal features, whatever batches they come from; to 1e-12 for another order of theirs.

    To 1e-6 for other batches of the network, which rounds other digits of float32 away when it sees one picture or
    seven; so the batches of an evaluation are the same for any number of processes.
    """
    images = torch.randint(256, (640, 1, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    classifier, real = load_fashion_classifier(), load_reference()

    def features(batch: int, images: torch.Tensor = images) -> torch.Tensor:
        return torch.cat([classifier(dequantise(part))[0] for part in images.split(batch)])

    def distance(seen: torch.Tensor) -> float:
        return moments_distance(Moments.folded(seen), real)

    seen = features(50)
    expected = distance(seen)
    for batch in (1, 7, 64):
        assert distance(features(batch)) == pytest.approx(expected, rel=1e-6)
        assert distance(torch.cat(seen.split(batch))) == expected
    order = torch.randperm(640, generator=torch.Generator().manual_seed(1))
    assert distance(seen[order]) == pytest.approx(expected, rel=1e-12)


def test_one_damaged_picture_ends_all_processes(cli, tmp_path):
    """Only the process that reads it sees it.  Fails by hanging if it leaves by itself, and the others gather."""
    draw(tmp_path / "images", 137)
    last = tmp_path / "images" / "136.png"
    last.write_bytes(last.read_bytes()[:60])
    main, other = cli.together(2, "eval", str(tmp_path / "images"), *FASHION)
    assert (main.code, other.code) == (2, 2)
    assert "another process failed" in main.log and "136.png is damaged" in other.log
    assert not (tmp_path / "images" / "figures.jsonl").exists()


def rows(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "eval.json").read_text())["rows"]


def test_a_run_has_the_figures_of_one_process(cli, tmp_path):
    """700 samples are three batches.  Mutation: every process makes the samples from the first on."""
    run = tmp_path / "run"
    toy = "--teacher gaussian --method dmd2 --iterations 2 --batch-size 4 --device cpu"
    toy += " --set method.guidance=1 --set teacher.fit_steps=2 --set train.evaluate_samples=10 --out"
    assert cli.run("distill", *toy.split(), str(run)).code == 0
    asked = ("eval", str(run), "-n", "700", "--seeds", "2", "--recompute-teacher", "--device", "cpu")
    assert cli.run(*asked).code == 0
    one = rows(run)
    assert [row["model"] for row in one] == ["teacher", "untrained student", "student"]
    for count in (1, 2):
        (run / "eval.json").unlink()
        done = cli.together(count, *asked)
        assert [process.code for process in done] == [0] * count, done[-1].log
        assert rows(run) == one
        assert "| student" in done[0].log and all(process.log == "" for process in done[1:])


def test_a_process_that_waits_for_a_lost_one_is_ended(cli, tmp_path):
    """One of two that are to meet never comes.  Mutation: no deadline, and the test hangs for two hours."""
    draw(tmp_path / "images", 3)
    with group_of(2) as group:
        started = cli.start("eval", str(tmp_path / "images"), *FASHION, RANK="0", LOCAL_RANK="0", **group)
        with pytest.raises(pytest.fail.Exception, match="not all processes ended in 1 s"):
            cli.wait_for([started], seconds=1)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


@pytest.mark.slow
def test_a_student_by_a_protocol_has_the_figures_of_one_process(cli, tmp_path):
    """Each picture of its own prompt and noise; also how those of one prompt differ."""
    run, lines = tmp_path / "run", tmp_path / "lines"
    start = "--teacher fashion-dit --method dmd2 --iterations 1 --batch-size 2 --device cpu"
    assert cli.run("distill", *start.split(), "--set", "train.evaluate_samples=10", "--out", str(run)).code == 0
    asked = (str(run), *FASHION, "-n", "120", "--seeds", "2", "--to", str(lines))
    one = figures(cli, 1, *asked)
    assert len(one) == 3 and one[0] != one[1]
    assert one == figures(cli, 1, *asked) == figures(cli, 2, *asked)
    found = []
    for count in (1, 2, 2):
        options = ("--per-prompt", "3", "-n", "5", "--device", "cpu", "--to", str(lines))
        done = cli.together(count, "diversity", str(run), *options)
        assert [process.code for process in done] == [0] * count, done[-1].log
        found.append(json.loads(lines.read_text().splitlines()[-1])["figures"])
    assert found[0] == found[1] == found[2] and found[0]["feature diversity"] > 0
