"""Claims about the suite: the figures of the single metrics, from one pass, with references that belong together."""

import json
import shutil

import pytest
import torch

from fewstep.metrics import suite as module
from fewstep.metrics.features import FASHION_CLASSIFIER, FashionClassifier, extract
from fewstep.metrics.frechet import Moments, moments_distance
from fewstep.metrics.kernel import kernel_distance, subset_kernel_distance
from fewstep.metrics.manifold import manifold
from fewstep.metrics.protocols import protocol_hash
from fewstep.metrics.suite import CARD_FILE, Suite, load_suite, over_seeds

needs_references = pytest.mark.skipif(
    not (FASHION_CLASSIFIER / CARD_FILE).is_file(), reason="the references are not built yet"
)
LABELS = {"bag": 8, "coat": 4}


class Scorer:
    """Stands in for a ClipScorer: cosine 0.1 for a bag, 0.3 for a coat; counts its passes."""

    def __init__(self) -> None:
        self.protocol = {"clip_sha256": "x"}
        self.passes = 0

    def cosines(self, images, prompts, *, batch_size):
        self.passes += 1
        return torch.tensor([0.1 if prompt == "bag" else 0.3 for prompt in prompts], dtype=torch.float64)


def pictures(n: int, seed: int) -> torch.Tensor:
    return torch.randint(256, (n, 1, 32, 32), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.fixture
def suite(monkeypatch) -> Suite:
    """A random classifier held against 150 random pictures; subsets of 20, so that the tests have enough samples."""
    monkeypatch.setattr(module, "SUBSET_SIZE", 20)
    monkeypatch.setattr(module, "NUM_SUBSETS", 3)
    torch.manual_seed(0)
    classifier = FashionClassifier().eval().requires_grad_(False)
    reals, _ = extract(classifier, pictures(150, 0))
    test, _ = extract(classifier, pictures(140, 1))
    return Suite(classifier, Moments.of(reals), Moments.of(test), reals.double(), LABELS, Scorer())  # type: ignore


def test_figures_are_those_of_the_single_metrics(suite):
    """Mutations: train and test moments exchanged, k of precision and density, CLIP without its factor of 100."""
    images, prompts = pictures(130, 2), ["bag", "coat"] * 65
    found = suite.measure_all(images, prompts)
    features, logits = extract(suite.classifier, images)
    kernel = subset_kernel_distance(
        features, suite.reals, torch.Generator().manual_seed(0), subset_size=20, num_subsets=3
    )
    expected = {
        "fmd": moments_distance(Moments.of(features), suite.train),
        "fmd_test": moments_distance(Moments.of(features), suite.test),
        "kmd_full": kernel_distance(features, suite.reals),
        "kmd": kernel.mean,
        "kmd_std": kernel.std,
        **manifold(features, suite.reals, k=3, k_density=5)._asdict(),
        "clip_score": 20.0,
        "agreement": float((logits.argmax(1) == torch.tensor([8, 4] * 65)).double().mean()),
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9), name
    assert found["fmd"] != pytest.approx(found["fmd_test"], rel=1e-2)


def test_every_picture_goes_once_through_each_network(suite, monkeypatch):
    """130 pictures in batches of 50: three calls of the classifier, one of the scorer."""
    monkeypatch.setattr(module, "BATCH", 50)
    sizes = []
    hook = suite.classifier.register_forward_hook(lambda _, args, output: sizes.append(len(args[0])))
    suite.measure_all(pictures(130, 2), ["bag"] * 130)
    hook.remove()
    assert sizes == [50, 50, 30] and suite.scorer.passes == 1


def test_figures_repeat(suite):
    """The subsets have a seed of their own: measuring twice, with other random numbers in between, changes nothing."""
    images, prompts = pictures(130, 2), ["bag"] * 130
    first = suite.measure_all(images, prompts)
    torch.rand(7)
    assert suite.measure_all(images, prompts) == first


def test_what_cannot_be_known_is_left_out(suite, monkeypatch):
    """No label, no agreement; too few samples for a subset, no kernel distance, and a warning that says so."""
    assert "agreement" not in suite.measure_all(pictures(130, 2), ["bag"] * 129 + ["a cat"])
    monkeypatch.setattr(module, "SUBSET_SIZE", 131)
    with pytest.warns(UserWarning, match="130 samples are fewer than the 131"):
        assert "kmd" not in suite.measure_all(pictures(130, 2), ["bag"] * 130)


def test_pictures_and_prompts_must_go_together(suite):
    with pytest.raises(ValueError, match="3 images do not go with 2 prompts"):
        suite.measure_all(pictures(3, 0), ["bag", "coat"])


def test_a_diverged_model_has_no_figures(suite):
    """`quantise` makes a byte of nan, and a black picture is better than many."""
    images = torch.zeros(130, 1, 32, 32)
    images[70, 0, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        suite.measure_all(images, ["bag"] * 130)


def test_protocol_changes_with_what_fixes_the_figures(suite, monkeypatch):
    """k, subsets, the number of reals and the CLIP are part of it; the samples are not."""
    before = protocol_hash(suite.protocol)
    assert protocol_hash(suite.protocol) == before and suite.protocol["clip_sha256"] == "x"
    monkeypatch.setattr(module, "NUM_SUBSETS", 4)
    assert protocol_hash(suite.protocol) != before


def test_mean_and_spread_over_seeds():
    """Divisor n - 1: 1, 2, 6 have mean 3 and variance (4 + 1 + 9) / 2."""
    mean, std = over_seeds([{"fmd": 1.0, "kmd": 0.0}, {"kmd": 0.0, "fmd": 2.0}, {"fmd": 6.0, "kmd": 0.0}])
    assert mean == {"fmd": 3.0, "kmd": 0.0}
    assert std == {"fmd": pytest.approx(7**0.5, rel=1e-12), "kmd": 0.0}


@pytest.mark.parametrize(
    "rows, message",
    [([{"fmd": 1.0}], "at least 2"), ([{"fmd": 1.0, "kmd": 2.0}, {"fmd": 1.0}], r"\['kmd'\]")],
)
def test_rows_that_have_no_common_spread_are_refused(rows, message):
    """One seed has no spread, and a figure missing from one row is not averaged over the others."""
    with pytest.raises(ValueError, match=message):
        over_seeds(rows)


def test_missing_references_name_the_stage(tmp_path):
    with pytest.raises(FileNotFoundError, match="--stage references"):
        load_suite({}, folder=tmp_path)


@needs_references
def test_references_of_another_classifier_are_refused(tmp_path):
    """Features of one network say nothing beside those of another."""
    for path in FASHION_CLASSIFIER.iterdir():
        shutil.copy(path, tmp_path)
    card = json.loads((tmp_path / CARD_FILE).read_text())
    (tmp_path / CARD_FILE).write_text(json.dumps(card | {"extractor_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="another classifier"):
        load_suite({}, folder=tmp_path, clip=None)


@needs_references
def test_packaged_references_are_10000_reals_and_their_moments_fit():
    """The reals are a balanced sixth of the training images, so their Frechet distance to all is that of a subset."""
    suite = load_suite(LABELS, clip=None)
    assert suite.reals.shape == (10_000, 128) and suite.test.count == 10_000 and suite.train.count == 60_000
    assert moments_distance(Moments.of(suite.reals), suite.train) < 0.15  # 10,000 test images: 0.05
    card = json.loads((FASHION_CLASSIFIER / "card.json").read_text())
    distance = moments_distance(suite.test, suite.train)
    assert distance == pytest.approx(card["fmd_of_the_10000_test_images"], rel=1e-3)
    stored = json.loads((FASHION_CLASSIFIER / CARD_FILE).read_text())
    assert stored["test_images_measured_as_samples"]["fmd"] == pytest.approx(distance, rel=1e-9)


@needs_references
def test_packaged_suite_gives_the_present_figures():
    """fmd and agreement are those of the teacher's `measure`: stored rows stay comparable."""
    from fewstep.teachers.fashion import fashion_evaluation

    evaluation = fashion_evaluation(FASHION_CLASSIFIER.parent / "fashion-dit")
    assert evaluation is not None
    images, prompts = pictures(140, 3), ["a bag", "a coat"] * 70
    with pytest.warns(UserWarning, match="fewer than"):
        found = load_suite({"a bag": 8, "a coat": 4}, clip=None).measure_all(images, prompts)
    for name, value in evaluation.measure(images, prompts).items():
        assert found[name] == pytest.approx(value, rel=1e-9), name
