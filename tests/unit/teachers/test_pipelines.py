"""Pipelines by name, folder and hub id: what is loaded, and what is refused before it is."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import are_progress_bars_disabled

from fewstep.teachers.folders import check_folder
from fewstep.teachers.pipelines import from_pipeline, load_teacher
from tests.tiny_pipeline import LATENTS


def test_folder_loads_as_a_teacher_of_its_shape(teacher, folder):
    assert teacher.shape == LATENTS
    assert teacher.folder == folder
    assert teacher.card.name == str(folder)
    assert (teacher.denoiser.predicts, type(teacher.denoiser.schedule).__name__) == ("flow", "RectifiedFlow")


def test_loaded_weights_are_float32_and_nothing_else_is_read(teacher):
    assert {p.dtype for p in teacher.denoiser.parameters()} == {torch.float32}


def test_hub_id_without_a_network_is_a_clean_error():
    """conftest.py sets HF_HUB_OFFLINE."""
    with pytest.raises(ValueError, match="cannot load the pipeline 'nobody/nothing'"):
        load_teacher("nobody/nothing")


def test_name_that_is_neither_registered_nor_a_folder_nor_a_hub_id_is_refused():
    with pytest.raises(LookupError, match=r"no teacher named 'fashion_dti'\. Did you mean 'fashion-dit'\?"):
        load_teacher("fashion_dti")


def test_unknown_option_is_refused(folder):
    with pytest.raises(ValueError, match="modes"):
        load_teacher(str(folder), modes=3)


def test_remote_code_in_a_folder_is_not_run(folder, tmp_path):
    """A pipeline class of the folder's own module.  Fails if the class's name is not checked before loading."""
    copy = Path(shutil.copytree(folder, tmp_path / "evil"))
    (copy / "evil.py").write_text("raise SystemExit('remote code was run')\n")
    index = json.loads((copy / "model_index.json").read_text())
    for change in ({"_class_name": ["evil", "Evil"]}, {"transformer": ["evil", "Evil"]}):
        (copy / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises((ValueError, LookupError)):
            load_teacher(str(copy))


@pytest.mark.parametrize("name", ["a.bin", "transformer/b.pt", "vae/c.ckpt", "d.pth", "x/e.pkl", "f.pickle"])
def test_pickles_are_refused_before_loading(folder, tmp_path, name):
    copy = Path(shutil.copytree(folder, tmp_path / "teacher"))
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="pickled weights"):
        check_folder(copy)


def test_unknown_pipeline_class_names_the_known_ones(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "teacher"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "KolorsPipeline"}))
    with pytest.raises(LookupError, match=r"no pipeline class named 'KolorsPipeline'.*Known: CogView4Pipeline"):
        from_pipeline(str(copy))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub that holds `folder` as "some/one", by the two calls that reach for it.  What was called."""
    calls = []

    def index(source, name, **options):
        calls.append(("index", source, options))
        return str(folder / name)

    def download(source, **options):
        calls.append(("weights", source, options, are_progress_bars_disabled()))
        snapshot = tmp_path / "snapshots" / COMMIT
        return str(snapshot if snapshot.exists() else shutil.copytree(folder, snapshot))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", index)
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    return calls


def test_hub_id_is_loaded_from_the_snapshot_of_its_revision(hub, tmp_path):
    """Its commit is known, and its folder, so that a student can be exported into it."""
    teacher = load_teacher("some/one", revision="main")
    assert [call[:3] for call in hub] == [
        ("index", "some/one", {"revision": "main"}),
        ("weights", "some/one", {"revision": "main", "use_safetensors": True}),
    ]
    assert (teacher.card.name, teacher.card.revision) == ("some/one", COMMIT)
    assert teacher.folder == tmp_path / "snapshots" / COMMIT
    assert teacher.options == {"revision": "main"}


def test_weights_are_fetched_under_visible_bars(hub):
    """Fails if the download is inside `quiet`, which silences the hub's bars with transformers' own."""
    assert diffusers_logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    load_teacher("some/one")
    assert hub[-1][-1] is False


def test_unknown_family_is_refused_before_its_weights_are_fetched(hub, tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda source, name, **_: str(tmp_path / name))
    with pytest.raises(LookupError, match="no pipeline class named 'KolorsPipeline'"):
        load_teacher("some/one")
    assert not hub


def test_option_of_another_family_is_refused_before_its_weights_are_fetched(hub, tmp_path, monkeypatch):
    """Fails if it is the loaded family that complains, after 28 GB."""
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda source, name, **_: str(tmp_path / name))
    said = "teacher.resolution=512: 'some/one' is a WanPipeline, which takes no resolution; allowed are height, width"
    with pytest.raises(ValueError, match=said):
        load_teacher("some/one", resolution=512)
    assert not hub


def test_local_folder_has_no_revision(teacher):
    assert teacher.card.revision is None
