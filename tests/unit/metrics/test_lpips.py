"""LPIPS by torchmetrics with a random VGG16, whose weights would have to be downloaded; run by `make oracles`."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from fewstep.metrics.diversity import diversities
from fewstep.metrics.features import dequantise, quantise
from fewstep.models.perception import LPIPS_SIZE, lpips_of, vgg_lpips

lpip = pytest.importorskip("torchmetrics.image.lpip")
torchvision = pytest.importorskip("torchvision")


@pytest.fixture
def random_vgg(monkeypatch):
    from torchmetrics.functional.image import lpips

    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(weights=None)
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained: vgg.features)
    return vgg.features


def enlarged(images):
    return F.interpolate(images.expand(-1, 3, -1, -1), (LPIPS_SIZE, LPIPS_SIZE), mode="bilinear")


def test_small_grey_pictures_are_compared_enlarged_and_with_gradient(random_vgg):
    x, y = torch.rand(2, 2, 1, 12, 12) * 2 - 1
    x.requires_grad_()
    distance = vgg_lpips()(x, y)
    metric = lpip.LearnedPerceptualImagePatchSimilarity(net_type="vgg", reduction="sum")
    assert_close(distance.sum(), metric(enlarged(x), enlarged(y)))
    distance.sum().backward()
    assert distance.shape == (2,) and x.grad is not None and x.grad.abs().max() > 0


def test_with_equal_weights_it_is_our_own_form(random_vgg):
    """The form that the embedded teachers have, on VGG's maps."""
    net = lpip.LearnedPerceptualImagePatchSimilarity(net_type="vgg").net
    for layer in net.lins:
        torch.nn.init.ones_(layer.model[-1].weight)
    x, y = torch.rand(2, 1, 3, 64, 64) * 2 - 1
    maps = [list(net.net(net.scaling_layer(images))) for images in (x, y)]
    assert_close(lpips_of(*maps), net(x, y).flatten(), atol=1e-4, rtol=1e-3)


def test_diversity_is_the_metric_of_all_pairs(random_vgg):
    images = torch.rand(3, 3, 224, 224) * 2 - 1
    pixels = dequantise(quantise(images))
    metric = lpip.LearnedPerceptualImagePatchSimilarity(net_type="vgg")
    for i, j in ((0, 1), (0, 2), (1, 2)):
        metric.update(pixels[i : i + 1], pixels[j : j + 1])
    assert_close(next(diversities([images], vgg_lpips())), float(metric.compute()), rtol=1e-5, atol=0)
