"""Prompts to conditions by the pipeline's own encoder."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fewstep.teachers.codecs import PipelineEncoder
from fewstep.teachers.pipelines import load_teacher

PROMPTS = ["a photo of a bag", "an ankle boot, black and white"]


def test_embedding_does_not_depend_on_batch_neighbours(folder, tmp_path):
    """Fails if a batch is encoded in one call: the pipeline pads to its longest prompt, then again to 16 in front,
    which are the same side with the embedded teacher's tokenizer but not with others."""
    copy = Path(shutil.copytree(folder, tmp_path / "right"))
    config = copy / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"padding_side": "right"}))
    teacher = load_teacher(str(copy))
    together = teacher.encode([*PROMPTS, "coat", ""])
    for i, prompt in enumerate([*PROMPTS, "coat", ""]):
        assert torch.equal(together.tensors["text"][i : i + 1], teacher.encode([prompt]).tensors["text"])


def test_empty_prompt_is_the_unconditional_branch(teacher):
    found = teacher.encode(PROMPTS)
    assert torch.equal(found.null["text"], teacher.encode([""]).tensors["text"])
    assert not torch.equal(found.tensors["text"][0], found.null["text"][0])


def rows(*lengths):
    """An encoder whose prompt "n" is n rows of n + 1; the empty prompt is two rows of ones."""
    encoder = PipelineEncoder(lambda prompt: {"text": torch.full((1, int(prompt or 2), 3), int(prompt or 0) + 1.0)})
    return encoder([str(n) for n in lengths])


def test_shorter_prompts_are_padded_and_their_length_is_told():
    found = rows(4, 2, 5)
    assert found.tensors["length"].tolist() == [4, 2, 5] and found.null["length"].tolist() == [2]
    assert found.tensors["text"].shape == (3, 5, 3) and found.null["text"].shape == (1, 5, 3)
    assert [int((row != 0).all(1).sum()) for row in found.tensors["text"]] == [4, 2, 5]


def test_unconditional_rows_are_as_long_as_the_empty_prompt():
    """Fails if `length` of the null is left out: its padding would be taken for text."""
    found = rows(4, 5).unconditional()
    assert found.tensors["length"].tolist() == [2, 2]
    assert torch.equal(found.tensors["text"][:, :2], torch.ones(2, 2, 3))


@pytest.mark.parametrize(("lengths", "told"), [((2, 2), False), ((4, 4), True)])
def test_length_is_left_out_where_all_are_equal(lengths, told):
    """The empty prompt counts: guidance runs on it."""
    assert ("length" in rows(*lengths).tensors) is told


def test_pictures_are_rendered_with_a_gradient_and_not_clamped(teacher):
    """`decode` is `render`, clamped.  Fails if either is the other's graph or clamp."""
    latents = (30 * torch.randn(2, *teacher.shape)).requires_grad_()
    shown = teacher.codec.render(latents)
    assert shown.abs().max() > 1
    assert torch.equal(teacher.codec.decode(latents), shown.detach().clamp(-1, 1))
    shown.sum().backward()
    assert latents.grad is not None and latents.grad.abs().max() > 0


def test_features_are_every_stages_maps(teacher):
    images = (torch.rand(2, 1, 16, 16) * 2 - 1).requires_grad_()
    maps = teacher.codec.features(images)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 8), (2, 8, 4, 4), (2, 8, 4, 4)]
    maps[-1].sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0
