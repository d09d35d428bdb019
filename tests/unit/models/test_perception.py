"""LPIPS's form by hand, and which way its gradient goes."""

import pytest
import torch
from torch.testing import assert_close

from fewstep.models.perception import Perception, feature_distance, lpips_of, vgg_lpips
from fewstep.models.trio import Trio


def test_the_distance_by_hand():
    """Two layers of other channels and sizes: unit vectors at a right angle are 2 apart, opposite ones 4.

    Fails for a mean over channels, a sum over places or layers averaged, norms over anything but channels."""
    one = torch.zeros(1, 2, 1, 2)
    one[0, 0] = 3.0  # both places point along the first channel
    other = torch.zeros(1, 2, 1, 2)
    other[0, 1, 0, 0], other[0, 0, 0, 1] = 5.0, 0.1  # the second place agrees, whatever its length
    deep = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None]
    assert_close(lpips_of([one, deep], [other, -2 * deep]), torch.tensor([2.0 / 2 + 4.0]))
    assert lpips_of([one, deep], [7 * one, deep]).item() < 1e-6


def test_each_two_pictures_have_a_distance_of_their_own():
    x, y = torch.randn(2, 3, 4, 5, 5)
    distance = feature_distance(lambda images: [images, images[:, :2, ::2]])
    whole = distance(x, y)
    assert whole.shape == (3,)
    assert_close(whole[1:2], distance(x[1:2], y[1:2]))


def test_the_gradient_goes_through_the_decoder_to_the_first_alone():
    """Fails if the target is part of the graph, or the decoder is run without one."""
    x, y = torch.randn(2, 3, 1, 4, 4).unbind(0)
    x.requires_grad_()
    y.requires_grad_()
    seen = Perception(lambda latents: latents.repeat(1, 2, 1, 1).tanh(), lambda a, b: (a - b).square().sum((1, 2, 3)))
    distance = seen.apart(x, y)
    distance.sum().backward()
    assert distance.shape == (3,) and y.grad is None
    assert x.grad is not None
    assert_close(x.grad, (4 * (x.tanh() - y.tanh()) * (1 - x.tanh().square())).detach())


def test_equal_maps_have_no_gradient_and_no_nan():
    """Channels that are all zero, as after a ReLU: the norm has no derivative there."""
    x = torch.zeros(2, 3, 4, 4, requires_grad=True)
    lpips_of([x.relu()], [torch.zeros(2, 3, 4, 4)]).sum().backward()
    assert x.grad is not None and not x.grad.any()


def test_what_was_not_asked_for_is_missed_by_name():
    blind = Perception(lambda x: x)
    with pytest.raises(ValueError, match="'lpips'"):
        blind.apart(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="'clip'"):
        blind.fits(torch.zeros(1), ["a"])
    with pytest.raises(ValueError, match="'lpips' or 'clip'"):
        Trio(generator=None, real_score=None).sight()  # type: ignore[arg-type]


def test_lpips_names_the_packages_that_it_lacks(monkeypatch):
    monkeypatch.setattr("fewstep.models.perception.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install torchmetrics torchvision"):
        vgg_lpips()
