"""Sources of prompts and pictures: what is read of each format, and how mistakes are named."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from fewstep.training.sources import captioned_pictures, pictures_in, tar_shards, text_files, texts_in


def tar(path: Path, **members: str | bytes) -> Path:
    """A tar file; KEY__jpg="..." is its member KEY.jpg."""
    with tarfile.open(path, "w") as made:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return path


def test_lines_end_as_python_has_them(tmp_path: Path):
    """Fails with lines ended by line feeds alone, and with blank ones kept."""
    path = tmp_path / "p.txt"
    path.write_bytes("a boot\r\n\n  un café \r\u2028last".encode())
    assert list(texts_in(path)) == ["a boot", "un café", "last"]


def test_byte_that_is_no_utf8_is_counted_from_the_start_of_the_file(tmp_path: Path):
    """Fails if it is counted from the start of its line."""
    path = tmp_path / "p.txt"
    path.write_bytes(b"a boot\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"p\.txt is not UTF-8 text .* at byte 10"):
        list(texts_in(path))


def test_jsonl_holds_texts_of_several_lines(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    rows = [{"text": "two\nlines"}, {"prompt": "a\u2028b", "id": 3}, {"file_name": "x.png", "text": " a coat "}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in [*rows, {"text": ""}]), encoding="utf-8")
    assert list(texts_in(path)) == ["two\nlines", "a\u2028b", "a coat"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": ', "line 2 is not JSON"),
        ("[1]", 'line 2: it must be an object with "text" or "prompt"'),
        ('{"texts": "a"}', "line 2: it must be an object"),
        ('{"text": 3}', "line 2: it must be an object"),
    ],
)
def test_bad_line_of_jsonl_is_named(tmp_path: Path, line: str, said: str):
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "a"}\n' + line)
    with pytest.raises(ValueError, match=said):
        list(texts_in(path))


def test_parquet_is_read_by_its_column(tmp_path: Path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    parquet.write_table(arrow.table({"text": [1, 2, 3], "prompt": ["a\nb", None, " c "]}), path)
    assert list(texts_in(path)) == ["a\nb", "c"]
    parquet.write_table(arrow.table({"texts": ["a"], "n": [1]}), path)
    with pytest.raises(ValueError, match=r"no column of strings named text, .*; it has texts \(string\), n"):
        list(texts_in(path))
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"p\.parquet cannot be read as parquet"):
        list(texts_in(path))


def test_parquet_without_its_library_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fewstep.training.sources.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        list(texts_in(tmp_path / "p.parquet"))


def test_tar_members_of_a_key_make_a_sample(tmp_path: Path):
    """Keys end at the first dot of a name; what is neither picture nor caption is passed over."""
    path = tar(
        tmp_path / "0.tar",
        **{"a/0__png": b"P0", "a/0__txt": " a boot\n", "a/0__cls": "7", "a/1__seg__png": b"-", "a/1__json": "{}"},
        **{"b/0__JPG": b"P1", "b/0__json": '{"caption": "two\\nlines"}'},
    )
    found = list(pictures_in(path))
    assert [p.caption for p in found] == ["a boot", "two\nlines"]
    assert [p.read() for p in pictures_in(path)] == [b"P0", b"P1"]
    assert found[1].name == f"{path}, b/0.jpg"


def test_tar_captions_are_prompts(tmp_path: Path):
    assert list(texts_in(tar(tmp_path / "0.tar", x__txt="a", y__json='{"prompt": "b"}', z__jpg=b""))) == ["a", "b"]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"a__png": b"", "b__txt": "b"}, r"a has no caption: put a\.txt or a\.json right beside"),
        ({"a__png": b"", "a__json": "{"}, r"a\.json is not JSON"),
        ({"a__png": b"", "a__json": '{"x": 1}'}, r"a\.json: it must be an object"),
        ({"a__png": b"", "a__txt": b"\xff"}, r"a\.txt is not UTF-8"),
    ],
)
def test_picture_without_caption_in_a_tar_is_named(tmp_path: Path, members: dict[str, str | bytes], said: str):
    with pytest.raises(ValueError, match=said):
        list(pictures_in(tar(tmp_path / "0.tar", **members)))


@pytest.mark.parametrize("how", ["cut", "compressed", "text"])
def test_tar_that_is_none_is_named(tmp_path: Path, how: str):
    path = tar(tmp_path / "0.tar", a__png=b"x" * 2000, a__txt="a")
    if how == "compressed":
        with tarfile.open(path, "w:gz") as made:
            made.add(__file__, "a.txt")
    else:
        path.write_bytes(path.read_bytes()[:1000] if how == "cut" else b"hello")
    with pytest.raises(ValueError, match=r"0\.tar cannot be read as a tar file .*; shards are whole and"):
        [picture.read() for picture in pictures_in(path)]


def test_folder_of_shards_is_read_by_name(tmp_path: Path):
    for name, text in (("1", "b"), ("0", "a")):
        tar(tmp_path / f"{name}.tar", **{f"{name}__txt": text, f"{name}__png": b""})
    assert [p.name for p in text_files(tmp_path)] == ["0.tar", "1.tar"] == [p.name for p in tar_shards(tmp_path)]
    assert [p.caption for p in pictures_in(tmp_path)] == ["a", "b"]
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"holds \.jsonl and \.tar files; name one"):
        text_files(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.jsonl, \.parquet or \.tar shard"):
        text_files(tmp_path / "empty")


def test_metadata_names_pictures_and_captions(tmp_path: Path):
    rows = [{"file_name": "2.png", "text": "two"}, {"file_name": "0.png", "text": "zero"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captioned_pictures(tmp_path) == [(tmp_path / "0.png", "zero"), (tmp_path / "2.png", "two")]


def test_mistakes_of_a_folder_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"--data takes a folder"):
        captioned_pictures(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no pictures"):
        captioned_pictures(tmp_path)
    (tmp_path / "2.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2\.png has no caption: write 2\.txt"):
        captioned_pictures(tmp_path)
    for row in ('{"file_name": "0.png"}', '{"file_name": "0.png", "text": 3}', "[]"):
        (tmp_path / "metadata.jsonl").write_text(row)
        with pytest.raises(ValueError, match="line 1: it must hold"):
            captioned_pictures(tmp_path)
