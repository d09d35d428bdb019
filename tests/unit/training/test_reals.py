"""Real samples: which ones a step sees, and how a folder of pictures becomes latents."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from fewstep.teachers.base import Reals
from fewstep.training.reals import RealData, captioned_pictures, encoded
from fewstep.types import Condition


def encode(prompts):
    """A prompt's condition is its length."""
    return Condition({"length": torch.tensor([[float(len(p))] for p in prompts])}, {"length": torch.zeros(1, 1)})


def data(count: int = 7, seed: int = 0) -> RealData:
    """Sample i is the number i under a caption of length i mod 3."""
    latents = torch.arange(count).half()[:, None].expand(count, 2)
    return RealData(Reals(latents, tuple("x" * (i % 3) for i in range(count))), encode, seed)


def test_every_sample_keeps_its_own_caption():
    """Fails if captions are drawn by another index than latents."""
    real = data().batch(range(40))
    assert real.x0.dtype == torch.float32
    assert torch.equal(real.x0[:, 0] % 3, real.cond.tensors["length"][:, 0])


def test_an_epoch_holds_each_sample_once_in_an_order_of_its_own():
    epochs = [data().batch(range(7 * e, 7 * e + 7)).x0[:, 0].tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != data(seed=1).batch(range(7)).x0[:, 0].tolist()


def test_the_digest_knows_latents_and_captions():
    latents, captions = torch.zeros(2, 2), ("a", "b")
    digests = {
        RealData(Reals(x, c), encode, 0).digest
        for x, c in ((latents, captions), (latents + 1, captions), (latents, ("a", "c")))
    }
    assert len(digests) == 3


class Codec:
    """Latents are 2x2 means; counts its calls."""

    calls = 0

    def encode(self, images):
        self.calls += 1
        return torch.nn.functional.avg_pool2d(images, 2)

    def image_shape(self, shape):
        return 1, shape[1] * 2, shape[2] * 2


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, size in enumerate([(8, 8), (16, 8), (4, 4)]):
        Image.fromarray(numpy.full(size, 100 * i, dtype=numpy.uint8)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"picture {i}\n")
    return pictures


def test_a_folder_is_encoded_once(folder: Path):
    """Any size of picture.  The second call reads the cache; a changed picture or another teacher is encoded anew."""
    codec, finished = Codec(), []
    reals = encoded(folder, codec, (1, 4, 4), "teacher", finished.append)
    assert reals.captions == ("picture 0", "picture 1", "picture 2") and reals.latents.shape == (3, 1, 4, 4)
    torch.testing.assert_close(
        reals.latents.float().mean((1, 2, 3)), torch.tensor([0.0, 100, 200]) / 127.5 - 1, atol=1e-3, rtol=0
    )
    assert codec.calls == 1 and sum(finished) == 3
    again = encoded(folder, codec, (1, 4, 4), "teacher")
    assert codec.calls == 1 and torch.equal(again.latents, reals.latents)
    Image.fromarray(numpy.full((9, 9), 7, dtype=numpy.uint8)).save(folder / "1.png")
    encoded(folder, codec, (1, 4, 4), "teacher"), encoded(folder, codec, (1, 4, 4), "another")
    assert codec.calls == 3


def test_metadata_names_pictures_and_captions(folder: Path):
    rows = [{"file_name": "2.png", "text": "two"}, {"file_name": "0.png", "text": "zero"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captioned_pictures(folder) == [(folder / "0.png", "zero"), (folder / "2.png", "two")]


def test_mistakes_are_named(folder: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"--data takes a folder"):
        captioned_pictures(tmp_path / "nowhere")
    (folder / "2.txt").unlink()
    with pytest.raises(ValueError, match=r"2\.png has no caption: write 2\.txt"):
        captioned_pictures(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png"}')
    with pytest.raises(ValueError, match="line 1: it must hold"):
        captioned_pictures(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.txt", "text": "no picture"}')
    with pytest.raises(ValueError, match=r"0\.txt cannot be read as a picture"):
        encoded(folder, Codec(), (1, 4, 4), "teacher")
