"""Claims about the one pass and its figures: those of the single metrics, under their names."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from fewstep.metrics import look as module
from fewstep.metrics.extractors import Extractor
from fewstep.metrics.frechet import Moments, moments_distance
from fewstep.metrics.inception import inception_score
from fewstep.metrics.kernel import gaussian_distance, subset_kernel_distance
from fewstep.metrics.look import figures_of, look
from fewstep.metrics.manifold import manifold
from fewstep.metrics.protocols import PROTOCOLS
from fewstep.metrics.reference import Gaussian, Reference

PROTOCOL = replace(PROTOCOLS["edm-fid50k"], count=60)


def corners(images: torch.Tensor) -> torch.Tensor:
    return images[:, :, 0, :2].flatten(1).float() / 50


@pytest.fixture
def extractor(monkeypatch) -> Extractor:
    """Six pixels of a picture and a head of three classes; subsets of 20."""
    monkeypatch.setattr(module, "SUBSET_SIZE", 20)
    monkeypatch.setattr(module, "NUM_SUBSETS", 3)
    head = torch.randn(3, 6, generator=torch.Generator().manual_seed(9))
    return Extractor("inception", 6, 3, "tf1-bilinear", "ab", True, corners, head)


def pictures(n: int, seed: int) -> torch.Tensor:
    return torch.randint(256, (n, 3, 4, 5), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def reference_of(images: torch.Tensor, **parts: torch.Tensor) -> Reference:
    made = {name: Gaussian.of(Moments.of(corners(part))) for name, part in parts.items()}
    return Reference(Gaussian.of(Moments.of(corners(images))), made, corners(images))


def test_figures_are_those_of_the_single_metrics(extractor):
    """Mutations: fakes and reals exchanged, k of precision and density, the kernel distance of the moments' set."""
    fake, real = pictures(60, 0), pictures(50, 1)
    seen = look(extractor, zip(fake.split(7)))
    found = figures_of(seen, PROTOCOL, extractor, reference_of(real), ["kid", "manifold", "inception_score"])
    x, y = corners(fake), corners(real)
    kernel = subset_kernel_distance(x, y, torch.Generator().manual_seed(0), subset_size=20, num_subsets=3)
    expected = {
        "FID": moments_distance(Moments.of(x), Moments.of(y)),
        "IS": inception_score(x, extractor.head)[0],
        "KID": kernel.mean,
        **manifold(x, y, k=3, k_density=5)._asdict(),
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9), name


@dataclass(frozen=True)
class Scorer:
    """A CLIP by whose cosine a picture's first number meets its prompt."""

    figure: str = "score"
    factor: float = 3.0
    protocol: dict[str, Any] = field(default_factory=dict)

    def cosines(self, images, prompts):
        return images[:, 0, 0, 0].double() * torch.tensor([float(prompt) for prompt in prompts])


def test_every_picture_goes_once_through_each_network(extractor):
    """Batches of any size give the same figures, with each prompt at its own picture."""

    images, prompts = pictures(60, 0), [str(i) for i in range(60)]
    done: list[int] = []
    seen = look(extractor, zip(images.split(25)), scorer=Scorer(), prompts=prompts, advance=done.append)
    assert done == [25, 25, 10] and seen.moments.count == 60
    assert seen.cosines is not None
    assert seen.cosines.tolist() == [i * float(image[0, 0, 0]) for i, image in enumerate(images)]
    found = figures_of(seen, PROTOCOL, extractor, reference_of(pictures(50, 1)), scorer=Scorer())
    assert found["score"] == pytest.approx(3 * float(seen.cosines.mean()), rel=1e-12)


def test_a_scorer_may_be_shown_the_pictures_otherwise(extractor):
    """Mutation: the CLIP sees what is cropped and resized for the extractor."""
    images, others = pictures(6, 0), pictures(6, 1)
    seen = look(extractor, zip(images.split(4), others.split(4)), scorer=Scorer(), prompts=["1"] * 6)
    assert torch.equal(seen.features, corners(images)) and seen.cosines is not None
    assert seen.cosines.tolist() == others[:, 0, 0, 0].tolist()


def test_categories_have_figures_of_their_own(extractor):
    """Each of its own pictures against its own reals; mutation: against all reals."""
    fake, art, food = pictures(60, 0), pictures(40, 1), pictures(40, 2)
    groups = ["art", "food"] * 30
    reference = reference_of(torch.cat([art, food]), art=art, food=food)
    found = figures_of(look(extractor, [(fake,)]), PROTOCOL, extractor, reference, groups=groups)
    for rows, real, name in ((slice(0, None, 2), art, "FID art"), (slice(1, None, 2), food, "FID food")):
        own = moments_distance(Moments.of(corners(fake[rows])), Moments.of(corners(real)))
        assert found[name] == pytest.approx(own, rel=1e-9)


def test_names_follow_weights_and_count(extractor):
    """Mutation: the CLIP score, of another network, loses its name with Inception's."""
    seen = replace(look(extractor, [(pictures(30, 0),)]), cosines=torch.ones(30))
    found = figures_of(
        seen, PROTOCOL, replace(extractor, verified=False), reference_of(pictures(50, 1)), scorer=Scorer()
    )
    assert list(found) == ["FD[inception-unverified]@30", "score@30"]


def test_cmmd_compares_features():
    clip = Extractor("clip", 6, 3, "torch bicubic to 336", "ab", True, corners)
    protocol, fake, real = replace(PROTOCOLS["cmmd-coco30k"], count=60), pictures(60, 0), pictures(50, 1)
    found = figures_of(look(clip, [(fake,)]), protocol, clip, reference_of(real))
    assert found == {"CMMD": pytest.approx(gaussian_distance(corners(fake), corners(real)), rel=1e-12)}
    with pytest.raises(ValueError, match="mmd compares features, and the reference keeps none"):
        figures_of(look(clip, [(fake,)]), protocol, clip, replace(reference_of(real), features=None))
    with pytest.raises(ValueError, match="of Inception's classes"):
        figures_of(look(clip, [(fake,)]), protocol, clip, reference_of(real), ["inception_score"])


def test_features_that_are_not_finite_are_refused(extractor):
    broken = replace(extractor, embed=lambda images: corners(images) / 0)
    with pytest.raises(ValueError, match="not finite"):
        look(broken, [(pictures(3, 0),)])
