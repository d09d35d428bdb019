"""Stage `card`: measure the teacher cell by cell, store the figures in teacher.json and write the model card.

A cell is (sampler steps, CFG, number of samples, seed). Measured with the stored fp16 weights loaded to fp32: FMD
against the moments of the 60,000 training images, and agreement, the share of samples that the shipped classifier
assigns to the prompted class. Both use one classifier, so they are one point of view, not two.
"""

from __future__ import annotations

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import CogView4Pipeline

from fewstep.metrics.features import (
    FEATURE_DIM,
    FashionClassifier,
    extract,
    file_sha256,
    load_fashion_classifier,
    load_reference,
)
from fewstep.metrics.frechet import Moments, moments_distance
from fewstep.teachers.fashion_build.captions import all_captions, balanced_prompts
from fewstep.teachers.fashion_build.classifier import protocol_hash, protocol_of
from fewstep.teachers.fashion_build.loop import read_notes, write_json
from fewstep.teachers.fashion_build.model_card import render_card
from fewstep.teachers.fashion_build.pipeline import encode_captions, euler_sample, load_pipeline, sample_noise
from fewstep.teachers.fashion_build.vae import decode

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


def measure(pipeline: CogView4Pipeline, model: FashionClassifier, reference: Moments, cell: Cell) -> dict:
    """Sample a cell in chunks and return its row: the cell, fmd, agreement and seconds.

    Chunks are shared between one worker per CPU thread, each single-threaded, and merged in order.
    """
    start = time.monotonic()
    captions = all_captions()
    table = dict(zip(captions, encode_captions(pipeline, captions), strict=True))
    empty = encode_captions(pipeline, [""])
    channels = pipeline.transformer.config.in_channels

    def chunk(first: int) -> tuple[Moments, int]:
        count = min(CHUNK, cell.n - first)
        prompts, labels = balanced_prompts(count, first)
        noise = sample_noise(count, channels, seed=cell.seed, start=first)
        text = torch.stack([table[prompt] for prompt in prompts])
        latents = euler_sample(pipeline.transformer, noise, text, empty, num_steps=cell.steps, guidance=cell.cfg)
        features, logits = extract(model, decode(pipeline.vae, latents))
        return Moments.of(features), int((logits.argmax(1) == torch.tensor(labels)).sum())

    moments, agreed = Moments.empty(FEATURE_DIM), 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        for part, hits in pool.map(chunk, range(0, cell.n, CHUNK)):
            moments, agreed = moments.merge(part), agreed + hits
    torch.set_num_threads(threads)
    row = {"fmd": moments_distance(moments, reference), "agreement": agreed / cell.n}
    return asdict(cell) | row | {"seconds": round(time.monotonic() - start, 1)}


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


def empty_report(out: Path) -> dict:
    """teacher.json without rows: the protocol, the weights that it is about, and the VAE's own loss."""
    protocol = protocol_of(out / "fashion-classifier")
    vae = read_notes(out)["vae"]
    folder = out / "fashion-dit"
    return {
        "teacher": "fashion-dit",
        "protocol": protocol,
        "protocol_hash": protocol_hash(protocol),
        "sampling": {
            "sampler": "Euler on CogView4Pipeline's default grid",
            "prompts": "sample i: class i mod 10, template (i // 10) mod 10",
            "noise": 'sample i: torch.Generator("cpu").manual_seed(seed + i)',
            "weights": "fp16 stored, fp32 computed",
        },
        "transformer_sha256": file_sha256(folder / "transformer" / "diffusion_pytorch_model.safetensors"),
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


def build_card(data: Path, out: Path, work: Path, minutes: float | None = None) -> None:
    """Measure pending cells until none is left or the minutes are spent; the report is rewritten after each.

    Neither data nor work is read. Rows of an earlier run are kept only if they are about the same weights and protocol.
    """
    del data, work
    path = out / "fashion-dit" / "teacher.json"
    report = empty_report(out)
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if {**stored, "rows": []} == report:
            report = stored
    pipeline = load_pipeline(out / "fashion-dit")
    model, reference = load_fashion_classifier(out / "fashion-classifier"), load_reference(out / "fashion-classifier")
    start = time.monotonic()
    while (cell := pending(report["rows"])) and (minutes is None or time.monotonic() - start < 60 * minutes):
        row = measure(pipeline, model, reference, cell)
        report["rows"].append(row)
        write_json(path, report)
        log.info("card: %s", row)
        write_card(report, out)
    write_json(path, report)
    write_card(report, out)


def write_card(report: dict, out: Path) -> None:
    """Render README.md anew from the report and the stages' notes."""
    (out / "fashion-dit" / "README.md").write_text(render_card(report, out), encoding="utf-8")
