"""All figures of one set of samples from one pass of each network, and their mean over seeds."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.metrics.clip_score import FASHION_CLIP, ClipScorer, load_clip_scorer
from fewstep.metrics.features import (
    FASHION_CLASSIFIER,
    FashionClassifier,
    extract,
    file_sha256,
    load_fashion_classifier,
    load_reference,
)
from fewstep.metrics.frechet import Moments, moments_distance
from fewstep.metrics.kernel import kernel_distance, subset_kernel_distance
from fewstep.metrics.manifold import manifold, neighbour_radii

K, K_DENSITY = 3, 5
SUBSET_SIZE, NUM_SUBSETS, SUBSET_SEED = 1000, 100, 0
BATCH = 500

FEATURES_FILE = "features.safetensors"
TEST_FILE = "test_reference.safetensors"
CARD_FILE = "references.json"


@dataclass(frozen=True)
class Suite:
    """The networks and references that samples are held against.

    train, test: feature moments of the 60,000 training and of the 10,000 test images.  reals: [N, 128] float64 features
    of training images.  labels: prompt -> class in 0..9.  scorer: None leaves the CLIP score out.  sources: what the
    references and networks are, for the protocol.
    """

    classifier: FashionClassifier
    train: Moments
    test: Moments
    reals: Tensor
    labels: Mapping[str, int] = field(default_factory=dict)
    scorer: ClipScorer | None = None
    sources: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def radii(self) -> Tensor:
        """Distances of every real feature to its nearest others, [N, 5]; worked out once."""
        return neighbour_radii(self.reals, max(K, K_DENSITY))

    @property
    def protocol(self) -> dict[str, Any]:
        """What fixes the figures besides the samples; rows of different protocols belong in different columns."""
        settings = {"k": K, "k_density": K_DENSITY, "n_reals": len(self.reals)}
        subsets = {"subset_size": SUBSET_SIZE, "num_subsets": NUM_SUBSETS, "subset_seed": SUBSET_SEED}
        clip = self.scorer.protocol if self.scorer else {}
        return {**self.sources, **settings, **subsets, **clip}

    def measure_all(self, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Every figure of N samples, each picture going once through the classifier and once through the CLIP.

        fmd, fmd_test: Frechet distance to the training and to the test images.  kmd, kmd_std: `subset_kernel_distance`,
        KID's formula on these features and therefore not called KID; left out with a warning below 1000 samples.
        kmd_full: `kernel_distance`, which has no noise from drawing subsets.  precision, recall, density, coverage,
        nearest: `manifold`.  clip_score: 100 cos, unclamped.  agreement: share of samples classified as the prompt
        says; left out where a prompt has no label.

        images: [N, 1, 32, 32] in [-1, 1] or uint8, on the CPU, read in batches; N > 3.  prompts: N.  Raises ValueError
        if they do not go together or if a number is not finite: as a byte it would be some grey.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images do not go with {len(prompts)} prompts; one prompt per image.")
        if not bool(images.isfinite().all()):
            raise ValueError("images hold numbers that are not finite; such a model has diverged and has no figures.")
        features, logits = extract(self.classifier, images, batch_size=BATCH)
        figures = self.measure_features(features)
        if self.scorer is not None:
            figures["clip_score"] = 100 * float(self.scorer.cosines(images, prompts, batch_size=BATCH).mean())
        wanted = [self.labels.get(prompt, -1) for prompt in prompts]
        if min(wanted) >= 0:
            figures["agreement"] = float((logits.argmax(1) == torch.tensor(wanted)).double().mean())
        return figures

    def measure_features(self, features: Tensor) -> dict[str, float]:
        """The figures of `measure_all` that need neither prompts nor pictures.  features: [N, 128], N > 3."""
        moments = Moments.of(features)
        figures = {
            "fmd": moments_distance(moments, self.train),
            "fmd_test": moments_distance(moments, self.test),
            "kmd_full": kernel_distance(features, self.reals),
        }
        if len(features) >= SUBSET_SIZE:
            generator = torch.Generator().manual_seed(SUBSET_SEED)
            options = {"subset_size": SUBSET_SIZE, "num_subsets": NUM_SUBSETS}
            distance = subset_kernel_distance(features, self.reals, generator, **options)
            figures |= {"kmd": distance.mean, "kmd_std": distance.std}
        else:
            warnings.warn(
                f"{len(features)} samples are fewer than the {SUBSET_SIZE} of a subset: no kernel distance; precision "
                f"to coverage are comparable only at equal sample counts, best at {len(self.reals)}.",
                stacklevel=2,
            )
        return figures | manifold(features, self.reals, k=K, k_density=K_DENSITY, radii=self.radii)._asdict()


def load_suite(
    labels: Mapping[str, int], *, folder: Path = FASHION_CLASSIFIER, clip: Path | None = FASHION_CLIP
) -> Suite:
    """The suite of the packaged classifier, references and CLIP.

    labels: prompt -> class.  folder: classifier and references.  clip: None leaves the CLIP score out.  Raises
    FileNotFoundError for missing files, ValueError for references of another classifier and for a CLIP that is refused.
    """
    card_path = folder / CARD_FILE
    if not card_path.is_file():
        raise FileNotFoundError(
            f"no references at {card_path}; build them: python -m fewstep.teachers.fashion_build --stage references"
        )
    card = json.loads(card_path.read_text(encoding="utf-8"))
    if card["extractor_sha256"] != file_sha256(folder / "model.safetensors"):
        raise ValueError(f"{card_path} belongs to another classifier than the one beside it; build it again.")
    stored = load_file(folder / TEST_FILE)
    count = int(stored["n"])
    return Suite(
        classifier=load_fashion_classifier(folder),
        train=load_reference(folder),
        test=Moments(count, stored["mu"], stored["sigma"] * (count - 1)),
        reals=load_file(folder / FEATURES_FILE)["features"].double(),
        labels=labels,
        scorer=None if clip is None else load_clip_scorer(clip),
        sources={name: value for name, value in card.items() if name.endswith(("sha256", "reals"))},
    )


def over_seeds(rows: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and standard deviation (divisor n - 1) of every figure over runs that differ in their seed alone.

    rows: at least two, with the same figures in each; otherwise ValueError.
    """
    if len(rows) < 2:
        raise ValueError(f"a spread over seeds needs at least 2 rows, got {len(rows)}.")
    names = list(rows[0])
    for row in rows:
        if set(row) != set(names):
            raise ValueError(f"rows have different figures: {sorted(set(row) ^ set(names))} are not in all of them.")
    table = torch.tensor([[row[name] for name in names] for row in rows], dtype=torch.float64)
    return dict(zip(names, table.mean(0).tolist())), dict(zip(names, table.std(0).tolist()))
