"""Stage `references`: features of real images beside the classifier, which figures by nearest neighbours need."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from fewstep.metrics.features import extract, file_sha256, load_fashion_classifier, load_reference
from fewstep.metrics.frechet import Moments
from fewstep.metrics.suite import CARD_FILE, FEATURES_FILE, TEST_FILE, Suite
from fewstep.teachers.fashion_build.captions import CLASS_NAMES
from fewstep.teachers.fashion_build.data import load_pictures
from fewstep.teachers.fashion_build.loop import write_json, write_tensors

log = logging.getLogger(__name__)

PER_CLASS = 1000


def first_of_each_class(labels: Tensor, count: int = PER_CLASS) -> Tensor:
    """Positions of the first `count` images of every class, in the order of the file.  labels: [N].  [10 count] int64.

    Balanced, as evaluation prompts are.  Raises ValueError if a class has fewer.
    """
    parts = [torch.nonzero(labels == label)[:count, 0] for label in range(len(CLASS_NAMES))]
    if short := [label for label, part in enumerate(parts) if len(part) < count]:
        raise ValueError(f"classes {short} have fewer than {count} images.")
    return torch.cat(parts).sort().values


def build_references(data: Path, out: Path, work: Path, minutes: float | None = None) -> None:
    """Write features of 10,000 training images (fp16), moments of the test images, and what the test images score.

    work and minutes are those of every stage; nothing is trained here.
    """
    folder = out / "fashion-classifier"
    if (folder / CARD_FILE).is_file():
        log.info("references: finished before, %s", folder)
        return
    classifier = load_fashion_classifier(folder)
    train_set, test_set = load_pictures("train", data), load_pictures("t10k", data)
    index = first_of_each_class(train_set.labels)
    features = extract(classifier, train_set.images[index])[0].half()
    write_tensors(folder / FEATURES_FILE, {"features": features, "index": index.int()})
    held_out, logits = extract(classifier, test_set.images)
    test = Moments.of(held_out)
    n = torch.tensor(test.count, dtype=torch.int64)
    write_tensors(folder / TEST_FILE, {"mu": test.mean, "sigma": test.cov, "n": n})
    suite = Suite(classifier, load_reference(folder), test, features.double())
    agreement = float((logits.argmax(1) == test_set.labels).double().mean())
    names = {"extractor": "model.safetensors", "reference": "reference.safetensors"}
    names |= {"reals": FEATURES_FILE, "test_reference": TEST_FILE}
    card = {f"{name}_sha256": file_sha256(folder / file) for name, file in names.items()} | {
        "reals": f"the first {PER_CLASS} training images of each class, features in fp16; positions stored as `index`",
        "test_images_measured_as_samples": suite.measure_features(held_out) | {"agreement": agreement},
        "copies_of_the_reals_measured_as_samples": suite.measure_features(features),
    }
    write_json(folder / CARD_FILE, card)
    log.info("references: %s", card)
