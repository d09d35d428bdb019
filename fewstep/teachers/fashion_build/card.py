"""Stage `card`: measure the teachers cell by cell, store the figures in teacher.json and write the model cards.

A cell is (sampler steps, CFG, number of samples, seed). Measured with the stored fp16 weights loaded to fp32: FMD
against the moments of the 60,000 training images, and agreement, the share of samples that the shipped classifier
assigns to the prompted class. Both use one classifier, so they are one point of view, not two. Cells of many samples
hold every other figure of metrics/suite.py too: some of those mean little from few.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fewstep.metrics.features import file_sha256
from fewstep.metrics.suite import Suite, load_suite
from fewstep.sampling import sample_teacher
from fewstep.teachers.fashion_build.captions import all_captions, balanced_prompts, caption_labels
from fewstep.teachers.fashion_build.classifier import protocol_hash, protocol_of
from fewstep.teachers.fashion_build.loop import read_json, read_notes, write_json
from fewstep.teachers.fashion_build.model_card import render_card
from fewstep.teachers.fashion_build.pipeline import encode_captions, euler_sample, load_pipeline, sample_noise
from fewstep.teachers.fashion_build.vae import decode
from fewstep.teachers.pipelines import from_pipeline

log = logging.getLogger(__name__)

STEP_COUNTS = (50, 1, 4, 10, 25)  # the one that everything else needs first, then the cheap ones
GUIDANCES = (1.5, 2.0, 1.0, 3.0, 4.0)
FEW, MANY = 2000, 10000
FEW_SEED, MANY_SEED = 0, 1_000_000
CHUNK = 100


@dataclass(frozen=True)
class Cell:
    """One measurement to make: sampler steps, CFG, number of samples, and the seed of sample 0 (sample i: seed + i)."""

    steps: int
    cfg: float
    n: int
    seed: int


Draw = Callable[[Cell, int, int], Tensor]
"""(cell, first, count) -> pictures of samples first .. first + count - 1: [count, 1, 32, 32] in [-1, 1], nearly."""


@dataclass(frozen=True)
class Subject:
    """A teacher that is measured once the stage that trains it is finished.

    name, stage, network: of its folder, of that stage and of the part that it trains.  sampler: in words.
    opened: how the folder is loaded and sampled.
    """

    name: str
    stage: str
    network: str
    sampler: str
    opened: Callable[[Path], Draw]


def draw_of_transformer(folder: Path) -> Draw:
    """Euler steps on the pipeline's grid, every caption encoded once."""
    pipeline = load_pipeline(folder)
    captions = all_captions()
    table = dict(zip(captions, encode_captions(pipeline, captions), strict=True))
    empty = encode_captions(pipeline, [""])

    def draw(cell: Cell, first: int, count: int) -> Tensor:
        prompts, _ = balanced_prompts(count, first)
        noise = sample_noise(count, pipeline.transformer.config.in_channels, seed=cell.seed, start=first)
        text = torch.stack([table[prompt] for prompt in prompts])
        latents = euler_sample(pipeline.transformer, noise, text, empty, num_steps=cell.steps, guidance=cell.cfg)
        return decode(pipeline.vae, latents)

    return draw


def draw_of_teacher(folder: Path) -> Draw:
    """The package's own sampler, as a user gets it."""
    teacher = from_pipeline(str(folder))

    def draw(cell: Cell, first: int, count: int) -> Tensor:
        prompts, _ = balanced_prompts(count, first)
        return sample_teacher(
            teacher, count, prompts, cell.seed + first, num_steps=cell.steps, guidance=cell.cfg, batch_size=count
        )

    return draw


SUBJECTS = (
    Subject("fashion-dit", "dit", "transformer", "Euler on CogView4Pipeline's default grid", draw_of_transformer),
    Subject("fashion-unet", "unet", "unet", "DDIM on StableDiffusionPipeline's grid, trailing", draw_of_teacher),
)


@cache
def suite_of(out: Path) -> Suite:
    """The classifier, CLIP and references of a folder of weights."""
    return load_suite(caption_labels(), folder=out / "fashion-classifier", clip=out / "fashion-clip")


def measure(draw: Draw, suite: Suite, cell: Cell, *, workers: int) -> dict:
    """Sample a cell in chunks, shared between single-threaded workers, and return its row: cell, figures, seconds."""
    start = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(workers) as pool:
        firsts = range(0, cell.n, CHUNK)
        parts = list(pool.map(lambda first: draw(cell, first, min(CHUNK, cell.n - first)), firsts))
    torch.set_num_threads(threads)
    figures = suite.measure_all(torch.cat(parts), balanced_prompts(cell.n)[0])
    if cell.n < MANY:
        figures = {name: figures[name] for name in ("fmd", "agreement")}
    return asdict(cell) | figures | {"seconds": round(time.monotonic() - start, 1)}


def pending(rows: list[dict]) -> Cell | None:
    """The next cell in order of value, or None: first 50 steps, few samples at CFG 1.5, 2, 1 and many at the best.

    Then every other step count at the same three guidances and its best with many samples, then CFG 3 and 4 everywhere,
    and at last many samples wherever these changed the best.
    """
    known = {(row["steps"], row["cfg"], row["n"]): row for row in rows}
    for guidances in (GUIDANCES[:3], GUIDANCES):
        for steps in STEP_COUNTS:
            for cfg in guidances:
                if (steps, cfg, FEW) not in known:
                    return Cell(steps, cfg, FEW, FEW_SEED)
            _, best = min((known[steps, cfg, FEW]["fmd"], cfg) for cfg in guidances)
            if (steps, best, MANY) not in known:
                return Cell(steps, best, MANY, MANY_SEED)
    return None


def empty_report(subject: Subject, out: Path) -> dict:
    """teacher.json without rows: the protocol, the weights that it is about, and the VAE's own loss."""
    protocol = protocol_of(out / "fashion-classifier")
    vae = read_notes(out, subject.name)["vae"]
    folder = out / subject.name
    return {
        "teacher": subject.name,
        "protocol": protocol,
        "protocol_hash": protocol_hash(protocol),
        "sampling": {
            "sampler": subject.sampler,
            "prompts": "sample i: class i mod 10, template (i // 10) mod 10",
            "noise": 'sample i: torch.Generator("cpu").manual_seed(seed + i)',
            "weights": "fp16 stored, fp32 computed",
        },
        f"{subject.network}_sha256": file_sha256(folder / subject.network / "diffusion_pytorch_model.safetensors"),
        "vae_sha256": file_sha256(folder / "vae" / "diffusion_pytorch_model.safetensors"),
        "text_encoder_sha256": file_sha256(folder / "text_encoder" / "model.safetensors"),
        "vae_reconstruction": {
            "n": 10000,
            "images": "test",
            "fmd": vae["fmd_of_10000_reconstructed_test_images"],
            "mean_squared_error": vae["mean_squared_error"],
        },
        "rows": [],
    }


def stored_report(subject: Subject, out: Path) -> dict:
    """The report so far. Rows of an earlier run are kept only if they are about the same weights and protocol."""
    report, path = empty_report(subject, out), out / subject.name / "teacher.json"
    if path.is_file():
        stored = read_json(path)
        if {**stored, "rows": []} == report:
            return stored
    return report


def build_card(data: Path, out: Path, work: Path, minutes: float | None = None) -> None:
    """Measure pending cells, of one finished teacher after the other in turn, until none is left or the minutes are
    spent; a report is rewritten after each of its cells.  Neither data nor work is read."""
    del data, work
    reports = {s: stored_report(s, out) for s in SUBJECTS if s.stage in read_notes(out, s.name)}
    for subject, report in reports.items():
        write_report(subject, report, out)
    draws = {s: s.opened(out / s.name) for s, report in reports.items() if pending(report["rows"])}
    suite = suite_of(out)
    start, workers = time.monotonic(), torch.get_num_threads()
    while waiting := [s for s, report in reports.items() if pending(report["rows"])]:
        for subject in waiting:
            cell = pending(reports[subject]["rows"])
            if cell is None or (minutes is not None and time.monotonic() - start >= 60 * minutes):
                return
            row = measure(draws[subject], suite, cell, workers=workers)
            reports[subject]["rows"].append(row)
            write_report(subject, reports[subject], out)
            log.info("card: %s %s", subject.name, row)


def write_report(subject: Subject, report: dict, out: Path) -> None:
    """teacher.json, and README.md rendered anew from it and the stages' notes."""
    write_json(out / subject.name / "teacher.json", report)
    (out / subject.name / "README.md").write_text(render_card(report, out), encoding="utf-8")
