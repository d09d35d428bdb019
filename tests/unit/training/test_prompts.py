"""Prompt files, and texts that stay on the disk."""

import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import pytest

from fewstep.training import prompts
from fewstep.training.prompts import Texts, copy_in, read_prompts, store_texts, text_hash, write_copy

TEXTS = ("a boot", "un café", "two\nlines", "a coat", "")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def stored(tmp_path: Path) -> Texts:
    return store_texts(iter(TEXTS), tmp_path / "stored")


def test_stored_texts_are_the_sequence_that_was_stored(stored: Texts):
    assert len(stored) == 5 and tuple(stored) == TEXTS
    assert stored[1] == "un café" and stored[-1] == "" and stored[1:4] == TEXTS[1:4] and stored[5:] == ()
    with pytest.raises(IndexError):
        stored[5]


@pytest.mark.parametrize("texts", [TEXTS, ("a", "b c", "d"), ("",), ("\n", "a")])
def test_hash_is_the_same_in_memory_and_on_disk(texts: Sequence[str], tmp_path: Path):
    """Fails if one of them leaves the offsets out."""
    assert text_hash(store_texts(texts, tmp_path / "s")) == text_hash(texts)


def test_hash_tells_line_feeds_within_texts_from_those_between():
    """And is the plain one where texts have none: runs that were started before texts could, go on."""
    assert len({text_hash(t) for t in (("a\nb", "c"), ("a", "b\nc"), ("a", "b", "c"), ("a\nb\nc",))}) == 4
    assert text_hash(("a", "b")) == sha256(b"a\nb").hexdigest()


@pytest.mark.parametrize("name", ["texts", "offsets"])
def test_damaged_texts_are_named(stored: Texts, name: str):
    path = stored.folder / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"stored is damaged .*; delete it"):
        Texts(stored.folder)


def test_large_files_stay_on_disk_and_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same prompts as from memory; a changed file is read anew."""
    path = tmp_path / "p.txt"
    path.write_text("".join(f"prompt {i}\n\n" for i in range(9)))
    few = read_prompts(path)
    monkeypatch.setattr(prompts, "SMALL", 20)
    many = read_prompts(path)
    assert isinstance(few, tuple) and isinstance(many, Texts) and tuple(many) == few
    monkeypatch.setattr(prompts, "store_texts", None)
    assert tuple(read_prompts(path)) == few
    monkeypatch.undo()
    path.write_text("another\n")
    assert read_prompts(path) == ("another",)


def test_slower_of_two_processes_takes_what_the_faster_wrote(stored: Texts):
    """Both wrote into folders of their own; the second rename finds the first's."""
    again = store_texts(iter(TEXTS), stored.folder)
    assert tuple(again) == TEXTS and os.listdir(stored.folder.parent) == ["stored"]


def test_copy_holds_what_lines_cannot(tmp_path: Path):
    """Fails with one prompt a line: two lines would be two prompts."""
    for given in (("a", "b"), ("two\nlines", "é")):
        folder = tmp_path / str(len(given[0]))
        folder.mkdir()
        assert copy_in(folder) is None
        write_copy(given, folder)
        found = copy_in(folder)
        assert found is not None and read_prompts(found) == given


def test_prompt_file_is_one_prompt_a_line(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("a boot\n\n  un café \r\nlast", encoding="utf-8")
    assert read_prompts(path) == ("a boot", "un café", "last")


@pytest.mark.parametrize("text", ["", "\n \n\t\n"])
def test_prompt_file_without_prompts_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(path)


def test_prompt_file_that_is_no_utf8_is_refused(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.txt is not UTF-8 text .* at byte 3"):
        read_prompts(path)


def test_missing_prompt_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no prompt file at"):
        read_prompts(tmp_path / "none.txt")
