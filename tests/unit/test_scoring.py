"""Claims about scoring a student: pictures under the names of their prompts, and what is none is not written as one."""

from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image

from fewstep.metrics.outside.contract import Item
from fewstep.scoring import _sample


def student(*shape: int):
    """Its picture is the seed's number, counted on, in grey levels."""

    def sample(n, prompts, seed, *, batch_size, progress):
        progress(n)
        return torch.stack([torch.full(shape, (seed + i) / 127.5 - 1) for i in range(n)])

    return SimpleNamespace(sample=sample)


def test_every_picture_is_of_its_own_seed(tmp_path):
    """Beyond a batch, too. Mutation: the first seed for every batch."""
    items, told = [Item(f"photo/{i:05}", "a cat") for i in range(53)], []
    _sample(student(3, 2, 5), items, tmp_path, 7, None, told.append)
    greys = [int(numpy.array(Image.open(tmp_path / f"{item.file}.png")).mean()) for item in items]
    assert greys == [7 + i for i in range(53)] and sum(told) == 53


@pytest.mark.parametrize("shape", [(2,), (2, 4, 4), (3, 2, 4, 4)])
def test_points_latents_and_videos_are_no_pictures(tmp_path, shape):
    with pytest.raises(ValueError, match="which are no pictures"):
        _sample(student(*shape), [Item("a", "a cat")], tmp_path, 0, None, lambda _: None)
