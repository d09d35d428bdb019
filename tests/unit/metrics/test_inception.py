"""Claims about FID's Inception: its file, its resize, its pooling, and what it refuses; torch-fidelity as oracle."""

import hashlib
import io
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from fewstep.metrics import inception as module
from fewstep.metrics.inception import (
    BLOCKS,
    FILE,
    Block,
    Inception,
    clean_resize,
    inception_score,
    load_inception,
    tf1_resize,
)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network() -> Inception:
    """Seeded weights at which activations keep their size, and batch norms that do something."""
    torch.manual_seed(0)
    model = Inception().eval().requires_grad_(False)
    for name, value in model.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(value, nonlinearity="relu")
        elif name.endswith("bn.running_mean"):
            value.uniform_(-0.1, 0.1)
        elif name.endswith("bn.running_var"):
            value.uniform_(0.9, 1.1)
    return model


def test_its_tensors_are_those_of_the_published_file():
    """94 convolutions with norms of 5 tensors each, and 2 of fc."""
    with torch.device("meta"):
        tensors = Inception().state_dict()
    assert len(tensors) == 566
    expected = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5d.branch_pool.bn.num_batches_tracked": (),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch1x1.conv.weight": (320, 2048, 1, 1),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }
    assert {name: tuple(tensors[name].shape) for name in expected} == expected


@pytest.mark.parametrize(("name", "pool"), [("Mixed_5b", "mean"), ("Mixed_7b", "mean"), ("Mixed_7c", "max")])
def test_pooling_is_that_of_the_graph(name, pool):
    """Mutations: padded zeros count in the mean; Mixed_7c takes the mean, as the paper has it."""
    block = Block(5, *BLOCKS[name]).eval()
    x = noise(2, 5, 4, 3) + 3
    inside = F.unfold(torch.ones_like(x), 3, padding=1).view(2, 5, 9, 4, 3).bool()
    windows = F.unfold(x, 3, padding=1).view(2, 5, 9, 4, 3)
    mean = windows.mul(inside).sum(2) / inside.sum(2)
    expected = mean if pool == "mean" else windows.masked_fill(~inside, -torch.inf).amax(2)
    width = block.branch_pool.conv.out_channels
    assert_close(block(x)[:, -width:], block.branch_pool(expected))


def test_pixels_of_the_resize_are_read_without_half_a_pixel():
    """Output i is read at i H / size, by hand in float64; mutations: half-pixel centres, corners aligned, H and W
    exchanged."""
    image = pictures(1, 2, 5, 7)
    height, width = 11, 11
    expected = torch.empty(2, height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            y, x = row * 5 / height, column * 7 / width
            top, left = int(y), int(x)
            bottom, right = min(top + 1, 4), min(left + 1, 6)
            corners = image[0].double()
            upper = corners[:, top, left].lerp(corners[:, top, right], x - left)
            lower = corners[:, bottom, left].lerp(corners[:, bottom, right], x - left)
            expected[:, row, column] = upper.lerp(lower, y - top)
    assert_close(tf1_resize(image, 11)[0].double(), expected, rtol=0, atol=1e-4)
    assert tf1_resize(image, 11).dtype == torch.float32


def test_a_picture_of_the_right_size_is_not_resampled():
    image = pictures(2, 3, 9, 9)
    assert_close(tf1_resize(image, 9), image.float(), rtol=0, atol=0)
    assert_close(clean_resize(image, 9), image.float(), rtol=0, atol=0)


def test_the_clean_resize_is_antialiased_and_not_rounded():
    """A checkerboard shrunk fourfold is grey, where TensorFlow's resize picks single pixels; mutation: uint8 kept."""
    board = (torch.arange(32)[:, None] + torch.arange(32)).remainder(2).mul(255).to(torch.uint8).expand(1, 3, -1, -1)
    assert float((clean_resize(board, 8) - 127.5).abs().max()) < 8
    assert float((tf1_resize(board, 8) - 127.5).abs().min()) == 127.5
    clean = clean_resize(pictures(1, 3, 12, 12), 7)
    assert float((clean - clean.round()).abs().max()) > 0.1 and clean.min() >= 0 and clean.max() <= 255
    channel = Image.fromarray(pictures(1, 3, 12, 12)[0, 1].float().numpy())
    expected = numpy.asarray(channel.resize((7, 7), Image.Resampling.BICUBIC)).clip(0, 255)
    assert_close(clean[0, 1].numpy(), expected)


def test_the_score_is_that_of_its_definition():
    """Against exp of the mutual information, class by class; no bias, parts in order, spread with divisor splits."""
    features, head = noise(10, 4).double(), noise(6, 4, seed=1).double()
    values = []
    for part in (features[:5], features[5:]):
        p = torch.softmax(part @ head.T, 1)
        values.append(float((p * (p / p.mean(0)).log()).sum(1).mean().exp()))
    mean, std = inception_score(features, head, splits=2)
    assert mean == pytest.approx(sum(values) / 2, rel=1e-12)
    assert std == pytest.approx(abs(values[0] - values[1]) / 2, rel=1e-9)
    with pytest.raises(ValueError, match=r"1\.\.10"):
        inception_score(features, head, splits=11)


def test_sure_and_even_predictions_score_the_number_of_classes():
    features = torch.eye(5).repeat(4, 1) * 1000
    assert inception_score(features, torch.eye(5), splits=2)[0] == pytest.approx(5, rel=1e-9)


@pytest.fixture
def places(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """The two documented places, empty."""
    own, hub = tmp_path / "weights", tmp_path / "torch" / "hub" / "checkpoints"
    own.mkdir()
    hub.mkdir(parents=True)
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(own))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return own, hub


def stored(tensors: dict[str, Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def test_weights_are_found_where_the_documentation_says(places):
    own, hub = places
    with pytest.raises(FileNotFoundError, match=r"FID's Inception.*weights or .*checkpoints.*FEWSTEP_WEIGHTS"):
        load_inception()
    (hub / FILE).write_bytes(b"hub")
    with pytest.raises(ValueError, match="checkpoints/weights-inception"):
        load_inception()
    (own / "inception-2015-12-05.safetensors").write_bytes(b"own")
    with pytest.raises(ValueError, match=r"weights/inception-2015-12-05\.safetensors"):
        load_inception()


def test_other_weights_are_refused_before_they_are_read(places, monkeypatch):
    """Fails if the name of the file is believed, or if it is unpickled first."""
    (places[0] / FILE).write_bytes(b"not the published file")
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match=r"should begin with 6726825d.*--sha256.*--unverified"):
        load_inception()


def test_a_pickle_is_read_as_tensors_alone(places):
    """Mutation: weights_only=False, with which a file runs what its author liked."""

    class Planted:
        def __reduce__(self):
            return (Path.touch, (places[0] / "ran",))

    torch.save({"fc.weight": Planted()}, places[0] / FILE)
    with pytest.raises(ValueError, match="566 tensors"):
        load_inception(allow_unverified=True)
    assert not (places[0] / "ran").exists()


def test_a_file_of_other_tensors_is_refused(places):
    (places[0] / FILE).write_bytes(stored({"fc.weight": torch.zeros(1000, 2048)}))
    with pytest.raises(ValueError, match="does not hold Inception's 566 tensors"):
        load_inception(allow_unverified=True)


class Narrow(torch.nn.Module):
    """Stands in for the network where its file and not its size matters."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)


@pytest.mark.parametrize("name", [FILE, "inception-2015-12-05.safetensors"])
def test_a_file_is_verified_by_its_hash_alone(places, monkeypatch, name):
    """Both formats; mutation: a file counts as verified because it was allowed."""
    monkeypatch.setattr(module, "Inception", Narrow)
    tensors, path = {name: value.clone() for name, value in Narrow().state_dict().items()}, places[0] / name
    save_file(tensors, path) if path.suffix == ".safetensors" else path.write_bytes(stored(tensors))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    model, found, verified = load_inception(allow_unverified=True)
    assert found == digest and not verified and not model.training
    assert_close(model.state_dict(), tensors)
    assert load_inception(sha256=digest)[1:] == (digest, True)
    monkeypatch.setattr(module, "KNOWN_SHA256", (digest[:8],))
    assert load_inception()[1:] == (digest, True)
    with pytest.raises(ValueError, match="should begin with 00"):
        load_inception(sha256="0" * 64)


@pytest.mark.slow
def test_features_are_2048_pooled_numbers(network):
    """One small picture through the whole network; the features are not constant over pictures."""
    features = network(tf1_resize(pictures(2, 3, 8, 6)))
    assert features.shape == (2, 2048) and features.dtype == torch.float32
    assert bool(features.isfinite().all()) and float((features[0] - features[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 3, 321, 300)])
def test_torch_fidelity_has_the_same_features_and_logits(network, tmp_path, shape):
    """Its extractor, loading a file with our tensors strictly, from the same bytes: to 1e-4 of their scale."""
    theirs = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is not installed: make oracles"
    )
    torch.save(network.state_dict(), tmp_path / FILE)
    oracle = theirs.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(tmp_path / FILE)
    )
    images = pictures(*shape)
    features, logits = oracle(images)
    own = network(tf1_resize(images))
    assert_close(own, features, rtol=0, atol=1e-4 * float(features.abs().max()))
    assert_close(own @ network.fc.weight.T, logits, rtol=0, atol=1e-4 * float(logits.abs().max()))


def test_clean_fid_resizes_alike():
    resize = pytest.importorskip("cleanfid.resize", reason="clean-fid is not installed: make oracles")
    image = pictures(1, 3, 40, 53)
    theirs = resize.build_resizer("clean")(image[0].permute(1, 2, 0).numpy())
    assert_close(clean_resize(image)[0].permute(1, 2, 0).numpy(), theirs, rtol=0, atol=1e-4)


def test_torch_fidelity_resizes_alike():
    theirs = pytest.importorskip(
        "torch_fidelity.interpolate_compat_tensorflow", reason="torch-fidelity is not installed: make oracles"
    )
    images = pictures(2, 3, 32, 41)
    expected = theirs.interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    assert_close(tf1_resize(images), expected, rtol=0, atol=1e-4)


def test_torch_fidelity_has_the_same_inception_score():
    metric = pytest.importorskip("torch_fidelity.metric_isc", reason="torch-fidelity is not installed: make oracles")
    features, head = noise(60, 8), noise(12, 8, seed=1)
    found = metric.isc_features_to_metric(features @ head.T, splits=10, shuffle=False)
    mean, std = inception_score(features, head)
    assert mean == pytest.approx(found[metric.KEY_METRIC_ISC_MEAN], rel=1e-5)
    assert std == pytest.approx(found[metric.KEY_METRIC_ISC_STD], rel=1e-4)
