"""What can be done to any teacher."""

import pytest
import torch

from fewstep.teachers import gaussian, mixture
from fewstep.teachers.pipelines import load_teacher
from tests.tiny_pipeline import build


def test_a_negative_prompt_takes_the_empty_ones_place():
    """In guidance alone: the prompts' own rows stay.  Fails if it is encoded as one of the batch."""
    teacher = mixture([[-1.0, 0.0], [1.0, 0.0]], [0.1, 0.1], classes=[0, 1], fit_steps=0)
    cond = teacher.against("class 1").encode(["class 0", "class 1", "class 0"])
    assert cond.tensors["class"].tolist() == [0, 1, 0]
    assert cond.unconditional().tensors["class"].tolist() == [1, 1, 1]
    assert teacher.encode(["class 0"]).null["class"].tolist() == [-1]


def test_a_negative_prompt_of_another_length_fits(tmp_path):
    """Rows of the null prompt are as long as the prompts'.  Fails if it is encoded by itself."""
    teacher = load_teacher(str(build(tmp_path / "pipe", max_tokens=48)))
    plain, negative = teacher.encode(["a coat"]), "a grey picture of a pair of trousers on a black background, " * 2
    cond = teacher.against(negative).encode(["a coat"])
    assert cond.null["text"].shape[1] == cond.tensors["text"].shape[1] > plain.tensors["text"].shape[1]
    length = plain.tensors["text"].shape[1]
    torch.testing.assert_close(cond.tensors["text"][:, :length], plain.tensors["text"])
    assert not torch.equal(cond.null["text"][:, :length], plain.null["text"])


def test_without_guidance_there_is_nothing_to_move_away_from():
    with pytest.raises(ValueError, match="no unconditional branch for a negative prompt"):
        gaussian(fit_steps=0).against("class 1")
