"""Claims about the extractors, with seeded stand-ins of the published file formats."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fewstep.metrics import inception
from fewstep.metrics.extractors import load_extractor
from fewstep.metrics.features import FASHION_CLASSIFIER, extract, file_sha256, load_fashion_classifier
from fewstep.metrics.frechet import Moments
from fewstep.metrics.inception import clean_resize, tf1_resize


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


class Tiny(torch.nn.Module):
    """Stands in for Inception: the mean and one corner of each channel, so that the resize shows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(6, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.cat([pixels.mean((2, 3)), pixels[:, :, -1, -1]], 1)


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(inception, "Inception", Tiny)
    torch.save(Tiny().state_dict(), tmp_path / inception.FILE)
    return tmp_path / inception.FILE


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """transformers folders of both families, 16 wide."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
    models = {
        "dinov2": Dinov2Model(Dinov2Config(**small, image_size=56)),
        "clip": CLIPVisionModelWithProjection(
            CLIPVisionConfig(**small, intermediate_size=32, image_size=28, projection_dim=12)
        ),
    }
    made = {name: tmp_path_factory.mktemp(name) for name in models}
    for name, model in models.items():
        model.save_pretrained(made[name])
    return made


@pytest.mark.parametrize("resize", ["tf1-bilinear", "clean-bicubic"])
def test_inception_sees_pictures_by_the_resize_that_is_asked_for(tiny, resize):
    """Mutation: one resize for both, which no figure would tell."""
    images = pictures(2, 3, 40, 23)
    extractor = load_extractor("inception", resize=resize, weights=tiny, allow_unverified=True)
    pixels = (tf1_resize if resize == "tf1-bilinear" else clean_resize)(images)
    assert_close(extractor(images), Tiny()(pixels))
    assert extractor.protocol == {"name": "inception", "dim": 6, "resize": resize, "sha256": file_sha256(tiny)}
    assert extractor.head is not None and extractor.head.shape == (4, 6) and not extractor.verified


def test_dinov2_gives_the_class_token_of_pictures_normalised_at_224(folders):
    """By hand from the weights' own model; mutation: pixels in [-1, 1], the mean over patches."""
    from transformers import Dinov2Model

    images = pictures(2, 3, 40, 23)
    extractor = load_extractor("dinov2", weights=folders["dinov2"], allow_unverified=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (clean_resize(images, 224).permute(0, 2, 3, 1) / 255 - mean) / std
    model = Dinov2Model.from_pretrained(folders["dinov2"]).eval()
    hidden = model(pixel_values=pixels.permute(0, 3, 1, 2)).last_hidden_state
    assert_close(extractor(images), hidden[:, 0].detach(), rtol=1e-4, atol=1e-4)
    assert extractor.dim == 16


def test_clip_gives_unit_embeddings_as_its_own_processor_normalises(folders):
    """A picture of the tower's size needs no resize, so transformers' processor is the oracle."""
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

    images = pictures(2, 3, 28, 28)
    extractor = load_extractor("clip", weights=folders["clip"], allow_unverified=True)
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    pixels = processor(list(images.numpy()), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    seen = CLIPVisionModelWithProjection.from_pretrained(folders["clip"]).eval()(pixel_values=pixels).image_embeds
    assert_close(extractor(images), (seen / seen.norm(dim=1, keepdim=True)).detach(), rtol=1e-4, atol=1e-5)
    assert extractor.dim == 12 and extractor(pictures(1, 3, 50, 31)).shape == (1, 12)


def test_fashion_is_the_packaged_classifier():
    images = pictures(3, 1, 32, 32)
    extractor = load_extractor("fashion")
    assert_close(extractor(images), extract(load_fashion_classifier(), images)[0])
    assert extractor.verified and extractor.sha256 == file_sha256(FASHION_CLASSIFIER / "model.safetensors")


def test_weights_of_no_known_hash_are_refused_unless_vouched_for(folders):
    """DINOv2's and CLIP's hashes are not known here: the publisher's must be given, or the figures are named so."""
    file = folders["dinov2"] / "model.safetensors"
    with pytest.raises(ValueError, match=r"is not known here.*--sha256.*--unverified"):
        load_extractor("dinov2", weights=folders["dinov2"])
    assert load_extractor("dinov2", weights=folders["dinov2"], sha256=file_sha256(file)).verified
    with pytest.raises(ValueError, match="should begin with abcdef01"):
        load_extractor("dinov2", weights=folders["dinov2"], sha256="abcdef01")


@pytest.mark.parametrize("name", ["dinov2", "inception"])
def test_an_empty_hash_is_refused_and_is_not_no_hash(folders, name):
    """Mutation: `sha256 or known`, by which an unset variable is as good as no --sha256."""
    weights = folders["dinov2"] / ("model.safetensors" if name == "inception" else "")
    with pytest.raises(ValueError, match="'' is no SHA-256"):
        load_extractor(name, weights=weights, sha256="", allow_unverified=True)


def test_folders_are_found_by_their_published_names(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"weights of clip: none of clip-vit-large-patch14-336"):
        load_extractor("clip")
    (tmp_path / "clip-vit-large-patch14-336").symlink_to(folders["clip"])
    assert load_extractor("clip", allow_unverified=True).dim == 12
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_extractor("clip", weights=tmp_path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 32, 32), "float32"),
        (pictures(2, 3, 32, 32), r"\[N, 1, H, W\]"),
        (pictures(2, 1, 28, 28), "28x28"),
    ],
    ids=["float", "colour", "size"],
)
def test_what_it_cannot_see_is_refused(images, message):
    """Floats would be taken for bytes: a black picture."""
    with pytest.raises(ValueError, match=message):
        load_extractor("fashion")(images)


@pytest.mark.parametrize(("name", "resize", "known"), [("vgg", "", "dinov2"), ("inception", "area", "tf1-bilinear")])
def test_unknown_names_are_refused_before_weights_are_looked_for(name, resize, known):
    with pytest.raises(LookupError, match=known):
        load_extractor(name, resize=resize)


@pytest.mark.parametrize("seed", range(5))
def test_statistics_do_not_depend_on_how_samples_are_divided(seed):
    """Any split over ranks and batches, merged in any order, is one pass to 1e-12. Mutation: no term of the gap."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(300, 7, generator=generator) * torch.arange(1, 8) + 30
    cuts = sorted(torch.randperm(299, generator=generator)[: 1 + seed * 3].add(1).tolist())
    parts = [Moments.of(part) for part in features[torch.randperm(300, generator=generator)].tensor_split(cuts)]
    while len(parts) > 1:  # ranks meet in pairs, in no order
        first, second = (parts.pop(int(torch.randint(len(parts), (), generator=generator))) for _ in range(2))
        parts.append(first.merge(second))
    whole = Moments.of(features)
    assert parts[0].count == 300
    assert_close(parts[0].mean, whole.mean, rtol=1e-12, atol=0)
    assert_close(parts[0].cov, whole.cov, rtol=1e-12, atol=1e-12 * float(whole.cov.abs().max()))
