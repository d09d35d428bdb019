"""Files that a kill leaves whole."""

from pathlib import Path

import pytest

from fewstep import files


def test_write_text_replaces_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fails with path.write_text: a kill between opening and writing leaves an empty file."""
    path = tmp_path / "config.yaml"
    path.write_text("old")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        files.write_text(path, "new")
    assert path.read_text() == "old"
