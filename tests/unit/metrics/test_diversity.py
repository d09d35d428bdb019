"""Claims about the variety of pictures of one prompt, by closed form; with LPIPS in test_lpips.py."""

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.metrics.diversity import diversities
from fewstep.metrics.features import dequantise


def apart(x: Tensor, y: Tensor) -> Tensor:
    return 127.5 * (x - y).abs().flatten(1).mean(1)


def plain(*levels: int) -> Tensor:
    """Pictures of one grey each."""
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 5, 4)


def test_equal_pictures_do_not_differ():
    assert list(diversities([plain(7, 7, 7)], apart)) == [0.0]


def test_every_pair_counts_once_and_every_prompt_alike():
    """|0-10| + |0-40| + |10-40| over three; mutations: a picture beside itself, or prompts weighing by their pairs."""
    seen: list[int] = []

    def counted(x: Tensor, y: Tensor) -> Tensor:
        seen.append(len(x))
        return apart(x, y)

    found = list(diversities([plain(0, 10, 40), plain(5, 6)], counted))
    assert found == pytest.approx([80 / 3, 1], rel=1e-5)
    assert sum(seen) == 3 + 1


def test_prompts_are_taken_one_at_a_time():
    """All pictures at once would fit no memory.  Mutation: a list of all groups."""
    made: list[int] = []

    def groups():
        for i in range(3):
            made.append(i)
            yield plain(i, i + 2)

    values = diversities(groups(), apart)
    assert next(values) == pytest.approx(2, rel=1e-5) and made == [0]


@pytest.mark.parametrize("k", [0, 1])
def test_one_picture_has_no_pairs(k):
    """Mutation: the mean of no pairs, nan."""
    with pytest.raises(ValueError, match=f"at least 2 of each are needed, got {k}"):
        list(diversities([plain(*range(k)) if k else torch.zeros(0, 3, 5, 4)], apart))


@pytest.mark.parametrize(("size", "small"), [((520, 780), (512, 768)), ((512, 700), (512, 700)), ((30, 40), (30, 40))])
def test_large_pictures_are_brought_to_512(size, small):
    """By PIL; mutation: each edge to 512."""
    pixels = torch.randint(256, (2, 3, *size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    seen: list[Tensor] = []

    def kept(x: Tensor, y: Tensor) -> Tensor:
        seen.extend([x, y])
        return apart(x, y)

    list(diversities([dequantise(pixels)], kept))
    for own, shown in zip(pixels, seen):
        image = Image.fromarray(own.permute(1, 2, 0).numpy()).resize(small[::-1], Image.Resampling.LANCZOS)
        expected = dequantise(torch.from_numpy(numpy.array(image)).permute(2, 0, 1))
        assert torch.equal(shown[0], expected)
