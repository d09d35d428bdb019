"""Encoded prompts: the same batches from memory and disk, whatever happened on the way to the disk."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fewstep.teachers.codecs import PipelineEncoder
from fewstep.training import cache, embeddings
from fewstep.training.cache import Share
from fewstep.training.data import PromptData
from fewstep.training.embeddings import Encoder, Layout, StoredConditions, Where
from fewstep.training.prompts import store_texts
from fewstep.types import Condition

PROMPTS = tuple(f"{'ab' * (i // 2 % 3 + 1)} {i}" for i in range(23))
"""The first two are as long as the empty one, so that their piece says nothing of lengths."""
ALL = torch.arange(len(PROMPTS))


class Text:
    """A pipeline's encoder: tokens as long as their prompt, in bfloat16, and a vector of each in float32; counts the
    prompts that it encodes."""

    def __init__(self, stop: int = 999, ragged: bool = True) -> None:
        self.seen, self.stop, self.ragged = 0, stop, ragged
        self.rows = PipelineEncoder(self.row)

    def row(self, prompt: str) -> dict[str, torch.Tensor]:
        length = (len(prompt) or 4) if self.ragged else 4
        seed = int.from_bytes(prompt.encode(), "big") % 2**31
        text = torch.randn(1, length, 3, generator=torch.Generator().manual_seed(seed)).bfloat16()
        return {"text": text, "pooled": text.float().mean(1)}

    def __call__(self, prompts: Sequence[str]) -> Condition:
        self.seen += len(prompts)
        if self.seen > self.stop:
            raise KeyboardInterrupt
        return self.rows(prompts)


@pytest.fixture(autouse=True)
def _small_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SHARD", 5)
    monkeypatch.setattr(embeddings, "PIECE", 2)


def encoder(text: Text, where: Where = "disk", card: str = "a", share: Share | None = None) -> Encoder:
    return Encoder(text, {"of": card}, where=where, console=Console(quiet=True), share=share)


def stored(text: Text | None = None, **options) -> StoredConditions:
    found = encoder(text or Text(), **options)(PROMPTS)
    assert isinstance(found, StoredConditions)
    return found


def same(one: Condition, other: Condition) -> bool:
    """Bit for bit, dtypes and empty prompts too."""
    pairs = [(one.tensors, other.tensors), (one.null, other.null)]
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a) for a, b in pairs
    )


def shard(start: int) -> Path:
    (path,) = (cache.cache_folder() / "prompts").rglob(f"{start:08d}.safetensors")
    return path


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("count", [23, 20, 1])
def test_rows_from_disk_are_those_of_one_call(ragged: bool, count: int):
    """Fails if shards keep lengths of their own, if one without "length" lacks it, or with float32 on the disk."""
    prompts, rows = PROMPTS[:count], ALL[:count].flip(0)
    whole = Text(ragged=ragged)(prompts)
    assert ("length" in whole.tensors) == (ragged and count > 2)
    for where in ("disk", "memory"):
        assert same(encoder(Text(ragged=ragged), where)(prompts)[rows], whole[rows])


def test_batches_from_disk_are_those_from_memory(tmp_path: Path):
    """Prompts on the disk, too; samples in any split, as ranks and micro-batches ask for them."""
    memory = PromptData(PROMPTS, encoder(Text(), "memory"), (2,), 0)
    disk = PromptData(store_texts(PROMPTS, tmp_path / "texts"), encoder(Text()), (2,), 0)
    assert disk.digest == memory.digest
    for ids in (range(40, 48), range(7), (30, 2, 30)):
        one, other = disk.batch(ids), memory.batch(ids)
        assert same(one.cond, other.cond) and one.prompts == other.prompts


def test_complete_cache_needs_no_encoder():
    first, again = stored(), Text()
    assert same(stored(again)[ALL], first[ALL]) and again.seen == 0


def test_auto_goes_to_the_disk_where_memory_would_not_do(monkeypatch: pytest.MonkeyPatch):
    """The bytes of a row among the first ones times the prompts; the limit itself is still memory."""
    size = sum(value.nbytes for value in Text()(PROMPTS[:2])[:1].tensors.values())
    monkeypatch.setattr(embeddings, "MEMORY", size * len(PROMPTS))
    assert isinstance(encoder(Text(), "auto")(PROMPTS), Condition)
    monkeypatch.setattr(embeddings, "MEMORY", size * len(PROMPTS) - 1)
    assert isinstance(encoder(Text(), "auto")(PROMPTS), StoredConditions)


def test_killed_encoding_goes_on_at_the_first_missing_shard():
    """What was written is not touched, and the whole is as if it had not been killed."""
    with pytest.raises(KeyboardInterrupt):
        stored(Text(stop=13))  # two to plan with, five, five, and into the third shard
    times = {path: path.stat().st_mtime_ns for path in shard(0).parent.glob("*.safetensors")}
    assert len(times) == 2
    rest = Text()
    found = stored(rest)
    assert rest.seen == len(PROMPTS) - 10
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert same(found[ALL], stored(card="whole")[ALL])


def test_another_encoder_or_other_prompts_have_another_cache():
    """Fails if the folder is named by the prompts or by the encoder alone."""
    stored()
    other, more = Text(), Text()
    stored(other, card="b")
    encoder(more)(PROMPTS[:-1])
    assert other.seen > len(PROMPTS) and more.seen > len(PROMPTS) - 1
    assert len(list((cache.cache_folder() / "prompts").iterdir())) == 3


def test_a_shard_that_is_cut_off_is_made_again(caplog: pytest.LogCaptureFixture):
    whole = stored()[ALL]
    kept = shard(5).read_bytes()
    shard(5).write_bytes(kept[:-3])
    text = Text()
    assert same(stored(text)[ALL], whole) and text.seen == 5 and shard(5).read_bytes() == kept
    assert "00000005.safetensors is damaged" in caplog.text


def test_a_byte_that_differs_is_found_when_its_row_is_read():
    """And the other rows are still good.  Fails without the checksums: a wrong number would be trained on."""
    stored()
    data = bytearray(shard(5).read_bytes())
    text = load_file(shard(5))["text"]
    at = bytes(data).index(text[2].view(torch.uint8).numpy().tobytes())
    data[at] ^= 1
    shard(5).write_bytes(data)
    found = stored()
    found[torch.tensor([5, 6, 8, 9])]
    with pytest.raises(ValueError, match=r"00000005\.safetensors is damaged \(bytes differ .*; delete it and"):
        found[torch.tensor([7])]
    shard(5).unlink()
    again = Text()
    assert same(stored(again)[ALL], stored(card="whole")[ALL]) and again.seen == 5


def test_a_shard_of_another_cache_is_refused():
    """Fails if only names and shapes are looked at."""
    stored()
    own = shard(5)
    stored(card="b")
    (foreign,) = (path for path in own.parent.parent.rglob(own.name) if path != own)
    own.write_bytes(foreign.read_bytes())
    with pytest.raises(ValueError, match=r"00000005\.safetensors belongs to other data .*; delete it and start again"):
        stored()


def test_a_damaged_index_names_the_remedy():
    stored()
    (shard(0).parent / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged .*; delete its folder"):
        stored()


def test_ranks_encode_every_other_shard_and_read_the_same(monkeypatch: pytest.MonkeyPatch):
    """Each encodes its share, then waits; what is missing afterwards (a folder that is not shared) it makes itself."""
    texts, states = [Text(), Text()], []

    class Waits:
        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None:
            states.append(sorted(path.stem for path in shard(0).parent.glob("*.safetensors")))

    found = [stored(text, share=Share(rank, 2, Waits)) for rank, text in enumerate(texts)]
    assert states[0] == ["00000000", "00000010", "00000020"]
    assert same(found[0][ALL], found[1][ALL]) and same(found[1][ALL], stored(card="alone")[ALL])


def test_a_disk_without_room_is_found_before_encoding(monkeypatch: pytest.MonkeyPatch):
    """Fails if a shard finds it, after hours."""
    text = Text()
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(ValueError, match=r"take .* GB left; make room, or set FEWSTEP_CACHE"):
        stored(text)
    assert text.seen == 2


def test_values_that_are_not_finite_are_refused():
    """One NaN would turn up as a diverged run, hours later.  Fails without the check."""

    def broken(prompts: Sequence[str]) -> Condition:
        return Condition({"text": torch.full((len(prompts), 2, 3), float("nan"))})

    for where in ("memory", "disk", "auto"):
        with pytest.raises(ValueError, match=r"non-finite values in \['text'\]"):
            Encoder(broken, {}, where=where, console=Console(quiet=True))(PROMPTS)


def test_conditions_without_tensors_or_empty_prompt_are_kept():
    """A closed-form teacher of one class is told nothing; another has labels, which are integers."""
    for encode in (lambda prompts: Condition(), lambda prompts: Condition({"class": torch.arange(len(prompts)) % 2})):
        found = Encoder(encode, {"of": str(encode)}, where="disk", console=Console(quiet=True))(PROMPTS)
        assert same(found[torch.tensor([4, 2])], encode(PROMPTS)[torch.tensor([0, 0])])


def test_rows_that_differ_in_more_than_length_are_refused():
    with pytest.raises(ValueError, match=r"rows of 'text' shaped \[2, 3\] and \[2, 4\]"):
        Layout.of([{"text": (2, 3)}, {"text": (2, 4)}])


def test_progress_is_told_for_every_row(monkeypatch: pytest.MonkeyPatch):
    """A shard that only the empty prompt is in, and one where it is beside others."""
    told: list[int] = []

    class Bar:
        def __init__(self, what: str, total: int, console: object) -> None:
            told.append(-total)

        def __enter__(self):
            return told.append

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(embeddings, "bar", Bar)
    cases: tuple[tuple[Where, int, int], ...] = (
        ("memory", 23, 23),
        ("disk", 23, 24),
        ("disk", 23, 24),
        ("disk", 20, 21),
    )
    for where, count, total in cases:
        encoder(Text(), where)(PROMPTS[:count])
        assert told[0] == -total and sum(told[1:]) == total, where
        told.clear()
