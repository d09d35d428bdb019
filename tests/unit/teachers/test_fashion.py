"""The embedded teachers' prompts, stored figures and missing weights."""

import json

import pytest

from fewstep.teachers import fashion
from fewstep.teachers.fashion import WEIGHTS, fashion_evaluation, fashion_prompts
from fewstep.teachers.fashion_build.captions import CLASS_NAMES
from fewstep.teachers.pipelines import load_teacher


def test_embedded_teachers_first_prompts_are_one_of_each_class():
    """The rows of the preview and of the demo's grid, and balanced classes for any number of images."""
    prompts = fashion_prompts()
    assert prompts[:10] == tuple(f"a photo of {article}" for article, _ in CLASS_NAMES)
    assert len(prompts) == len(set(prompts)) == 100


def test_stored_rows_come_with_their_protocol(tmp_path):
    """Rows measured otherwise are not to be set beside new ones: both hashes are at hand."""
    stored = json.loads((WEIGHTS / "fashion-dit" / "teacher.json").read_text())
    (tmp_path / "teacher.json").write_text(json.dumps(stored | {"protocol_hash": "another"}))
    ours, other = fashion_evaluation(WEIGHTS / "fashion-dit"), fashion_evaluation(tmp_path)
    assert ours.rows_protocol == ours.protocol_hash
    assert other.rows_protocol == "another" and other.rows == ours.rows


@pytest.mark.parametrize("name", ["fashion-dit", "fashion-unet"])
def test_missing_weights_are_named_with_the_remedy(tmp_path, monkeypatch, name):
    monkeypatch.setattr(fashion, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{name}; build them with `make teachers`"):
        load_teacher(name)
