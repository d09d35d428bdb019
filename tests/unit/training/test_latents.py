"""Captioned pictures to latents: encoded once, in shards, the same from folders, archives, memory and disk."""

import io
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from rich.console import Console

from fewstep.teachers.base import Reals
from fewstep.training import cache, latents
from fewstep.training.cache import Share
from fewstep.training.latents import StoredLatents, captions_of, encoded
from fewstep.training.reals import RealData
from fewstep.types import Condition
from tests.unit.training.test_sources import tar

QUIET = Console(quiet=True)
ALL = torch.arange(5)


class Codec:
    """Latents are 2x2 means; counts the pictures that it encodes."""

    seen = 0
    stop = 99

    def encode(self, images):
        self.seen += len(images)
        if self.seen > self.stop:
            raise KeyboardInterrupt
        return torch.nn.functional.avg_pool2d(images, 2)

    def image_shape(self, shape):
        return 1, shape[1] * 2, shape[2] * 2


def png(i: int) -> bytes:
    """A grey picture of any size."""
    held = io.BytesIO()
    Image.fromarray(numpy.full([(8, 8), (16, 8), (4, 4)][i % 3], 50 * i, dtype=numpy.uint8)).save(held, "PNG")
    return held.getvalue()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SHARD", 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five captioned pictures."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(5):
        (pictures / f"{i}.png").write_bytes(png(i))
        (pictures / f"{i}.txt").write_text(f"picture {i}\n")
    return pictures


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same five, three of them in one tar file and two in another."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, rows in (("0", (0, 1, 2)), ("1", (3, 4))):
        members = [(f"{i}__png", png(i)) for i in rows] + [(f"{i}__txt", f"picture {i}\n") for i in rows]
        tar(folder / f"{name}.tar", **dict(sorted(members)))
    return folder


def made(path: Path, codec: Any = None, card: str = "codec", share: Share | None = None) -> Reals:
    codec = codec if codec is not None else Codec()
    return encoded(path, captions_of(path), codec, (1, 4, 4), {"of": card}, console=QUIET, share=share)


def test_a_folder_is_encoded_once(folder: Path):
    """Any size of picture.  The second call reads the cache; a changed picture or another codec is encoded anew."""
    codec = Codec()
    reals = made(folder, codec)
    assert reals.captions == tuple(f"picture {i}" for i in range(5)) and codec.seen == 5
    assert isinstance(reals.latents, torch.Tensor) and reals.latents.shape == (5, 1, 4, 4)
    expected = 50.0 * ALL / 127.5 - 1
    torch.testing.assert_close(reals.latents.float().mean((1, 2, 3)), expected, atol=1e-3, rtol=0)
    assert torch.equal(made(folder, codec).latents[ALL], reals.latents) and codec.seen == 5
    (folder / "1.png").write_bytes(png(4))
    made(folder, codec), made(folder, codec, "another")
    assert codec.seen == 15


def test_archives_give_what_their_pictures_in_a_folder_give(folder: Path, shards: Path):
    """Fails if a shard of the cache that spans two archives begins again with the second."""
    one, other = made(folder), made(shards)
    assert torch.equal(one.latents[ALL], other.latents[ALL]) and one.captions == other.captions


def test_killed_encoding_goes_on_at_the_first_missing_shard(shards: Path):
    codec = Codec()
    codec.stop = 3
    with pytest.raises(KeyboardInterrupt):
        made(shards, codec)
    again = Codec()
    found = made(shards, again)
    assert again.seen == 3 and torch.equal(found.latents[ALL], made(shards, card="whole").latents[ALL])


def test_two_processes_encode_their_shares(shards: Path):
    """The second finds what the first left: its own shards are every other one."""
    codecs = [Codec(), Codec()]
    codecs[0].stop = 3  # shards 0 and 2 hold three pictures
    with pytest.raises(KeyboardInterrupt):  # where the other process's would be waited for
        made(shards, codecs[0], share=Share(0, 2))
    found = made(shards, codecs[1], share=Share(1, 2))
    assert codecs[1].seen == 2 and torch.equal(found.latents[ALL], made(shards, card="alone").latents[ALL])


def test_training_sees_the_same_from_memory_and_disk(shards: Path, monkeypatch: pytest.MonkeyPatch):
    def encode(prompts):
        return Condition({"last": torch.tensor([[float(p[-1])] for p in prompts])})

    memory = RealData(made(shards), encode, 0)
    monkeypatch.setattr(latents, "MEMORY", 0)
    monkeypatch.setattr("fewstep.training.prompts.SMALL", 0)
    reals = made(shards)
    assert isinstance(reals.latents, StoredLatents) and not isinstance(reals.captions, tuple)
    one, other = memory.batch(range(9)), RealData(reals, encode, 0).batch(range(9))
    assert torch.equal(one.x0, other.x0) and torch.equal(one.cond.tensors["last"], other.cond.tensors["last"])
    torch.testing.assert_close(
        one.x0.mean((1, 2, 3)), 50 * one.cond.tensors["last"][:, 0] / 127.5 - 1, atol=1e-3, rtol=0
    )


def test_mistakes_are_named(folder: Path, shards: Path, tmp_path: Path):
    (folder / "metadata.jsonl").write_text('{"file_name": "0.txt", "text": "no picture"}')
    with pytest.raises(ValueError, match=r"0\.txt cannot be read as a picture"):
        made(folder)
    tar(shards / "2.tar", a__png=b"no picture", a__json=json.dumps({"text": "a"}))
    with pytest.raises(ValueError, match=r"2\.tar, a\.png cannot be read as a picture"):
        made(shards)
    empty = tar(tmp_path / "e.tar", a__txt="a")
    with pytest.raises(ValueError, match=r"e\.tar holds no pictures"):
        captions_of(empty)


def test_latents_that_are_not_finite_are_refused(folder: Path):
    codec = Codec()
    codec.encode = lambda images: torch.full((len(images), 1, 4, 4), 1e6)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="non-finite latents"):
        made(folder, codec)
