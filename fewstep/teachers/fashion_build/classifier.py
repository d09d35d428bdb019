"""Stage `classifier`: train the metric's network, store it and the moments of its features on the training images."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.metrics.features import (
    FEATURE_DIM,
    FashionClassifier,
    dequantise,
    extract,
    file_sha256,
    load_fashion_classifier,
)
from fewstep.metrics.frechet import Moments, moments_distance
from fewstep.teachers.fashion_build.data import load_pictures
from fewstep.teachers.fashion_build.loop import Plan, train, write_json, write_tensors

log = logging.getLogger(__name__)

# Six epochs: after 18 the features of training and test images lay further apart (FMD 0.28 at a trace of 903, against
# 0.11 at 412), which makes the distance to the training images depend on what the network has memorised.
BATCH = 250
CLASSIFIER_PLAN = Plan(
    name="classifier",
    minutes=5.0,
    steps=6 * 60000 // BATCH,
    peak_lr=2e-3,
    warmup=0.2,
    weight_decay=0.05,
    ema=0.99,
    seed=1,
)

# The pilot classifier in whose scale the thresholds of the evaluation design were set had this trace (design: 165).
REFERENCE_TRACE = 165.0


def protocol_of(folder: Path) -> dict:
    """What fixes an FMD figure besides the samples: extractor, reference and quantisation, by content hash."""
    return {
        "metric": "FMD",
        "feature": "fashion-classifier, 128 pre-activation features",
        "extractor_sha256": file_sha256(folder / "model.safetensors"),
        "reference_sha256": file_sha256(folder / "reference.safetensors"),
        "reference": "60,000 training images of Fashion-MNIST, 32x32 zero padded",
        "n_reference": 60000,
        "scale": f"trace of the reference covariance = {REFERENCE_TRACE:g}",
        "quantisation": "uint8 = trunc(clip(127.5 x + 128, 0, 255))",
        "covariance_divisor": "n - 1",
    }


def protocol_hash(protocol: dict) -> str:
    """SHA-256 of the protocol's canonical JSON (sorted keys, no spaces, ASCII)."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def build_classifier(data: Path, out: Path, work: Path, minutes: float | None = None) -> None:
    """Train (about 5 minutes), write model.safetensors (fp16), reference.safetensors (float64) and card.json."""
    folder = out / "fashion-classifier"
    if (folder / "card.json").is_file():
        log.info("classifier: finished before, %s", folder)
        return
    pictures = load_pictures("train", data)

    def loss_of(model: FashionClassifier, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pictures.images), (BATCH,), generator=generator)
        _, logits = model(dequantise(pictures.images[index]))
        return F.cross_entropy(logits, pictures.labels[index])

    torch.manual_seed(CLASSIFIER_PLAN.seed)
    plan = CLASSIFIER_PLAN if minutes is None else replace(CLASSIFIER_PLAN, minutes=minutes, steps=None)
    trained = train(plan, FashionClassifier(), loss_of, work)
    trace = float(Moments.of(extract(trained, pictures.images)[0]).cov.trace())
    log.info("classifier: trace of the covariance %.1f before the scale is fixed", trace)
    fix_gauge(trained, trace)
    state = {name: v.half() if v.is_floating_point() else v for name, v in trained.state_dict().items()}
    write_tensors(folder / "model.safetensors", state)
    iterations = json.loads((work / "classifier.json").read_text(encoding="utf-8"))["iteration"]
    measure_classifier(data, folder, iterations * BATCH / len(pictures.images))


@torch.no_grad()
def fix_gauge(model: FashionClassifier, trace: float) -> None:
    """Scale the features so that the trace of their covariance becomes REFERENCE_TRACE; the logits do not change.

    The ReLU after the features is positively homogeneous, so their scale (and with it every FMD) is not determined by
    the classification task: W -> c W before it and W -> W / c behind it is the same classifier.
    """
    factor = (REFERENCE_TRACE / trace) ** 0.5
    model.features.weight *= factor
    model.features.bias *= factor
    model.logits.weight /= factor


def measure_classifier(data: Path, folder: Path, epochs: float) -> None:
    """Reference moments and the card, both computed with the weights as stored."""
    model = load_fashion_classifier(folder)
    train_set, test_set = load_pictures("train", data), load_pictures("t10k", data)
    reference = Moments.empty(FEATURE_DIM).update(extract(model, train_set.images)[0])
    n = torch.tensor(reference.count, dtype=torch.int64)
    write_tensors(folder / "reference.safetensors", {"mu": reference.mean, "sigma": reference.cov, "n": n})
    features, logits = extract(model, test_set.images)
    protocol = protocol_of(folder)
    card = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": {"images": 60000, "epochs": epochs, "batch": BATCH, "seed": CLASSIFIER_PLAN.seed},
        "test_accuracy": float((logits.argmax(1) == test_set.labels).double().mean()),
        "trace_of_reference_covariance": float(reference.cov.trace()),
        "fmd_of_the_first_2000_test_images": moments_distance(Moments.of(features[:2000]), reference),
        "fmd_of_the_10000_test_images": moments_distance(Moments.of(features), reference),
        "protocol": protocol,
        "protocol_hash": protocol_hash(protocol),
        "licence": "weights Apache-2.0; data Fashion-MNIST, MIT",
        "use": "measurement only; it must not train a generator, a discriminator or a VAE",
    }
    write_json(folder / "card.json", card)
    log.info("classifier: %s", card)
