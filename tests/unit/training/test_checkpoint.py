import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fewstep.training import checkpoint
from fewstep.training.checkpoint import Checkpoint

STATE = {"iteration": 7, "rate": 0.1, "nested": {"none": None}}


def small(value: float = 1.0) -> Checkpoint:
    return Checkpoint({"ema": {"w": torch.full((3, 2), value)}, "empty": {}}, STATE)


def saved(run: Path, *iterations: int) -> list[Path]:
    return [checkpoint.write(checkpoint.folder_of(run, i), small(i)) for i in iterations]


def names(run: Path) -> list[int]:
    return sorted(int(path.name) for path in checkpoint.all_of(run))


def test_read_gives_what_was_written(tmp_path: Path):
    """Slices and transposes too, as their values and not their storage; bf16 as bf16."""
    base = torch.randn(4, 6)
    tensors = {"slice": base[1:3, ::2], "transpose": base.t(), "bf16": base.bfloat16(), "scalar": torch.tensor(3)}
    back = checkpoint.read(checkpoint.write(tmp_path / "5", Checkpoint({"all": tensors}, STATE)))
    assert back.state == STATE
    for name, tensor in tensors.items():
        assert back.tensors["all"][name].dtype == tensor.dtype
        assert torch.equal(back.tensors["all"][name], tensor)


def test_write_replaces_and_leaves_nothing_beside(tmp_path: Path):
    folder = checkpoint.write(tmp_path / "5", small(1))
    (folder / "stale.safetensors").write_bytes(b"")
    checkpoint.write(folder, small(2))
    assert checkpoint.read(folder).tensors["ema"]["w"].unique() == 2
    assert [p.name for p in tmp_path.iterdir()] == ["5"]
    assert not (folder / "stale.safetensors").exists()


def test_nothing_is_visible_before_everything_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each file and the folder are flushed under a name that no reader looks at.  Fails if written in place."""
    flushed = []

    def flush(path: Path) -> None:
        flushed.append(path)
        assert checkpoint.all_of(tmp_path) == [] or path == tmp_path / "checkpoints"

    monkeypatch.setattr(checkpoint, "flush", flush)
    (folder,) = saved(tmp_path, 5)
    files = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in flushed[:-2]) == files
    assert [path.name for path in flushed[-2:]] == [".writing-00000005", "checkpoints"]


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A full disk, for one.  Fails if the old folder is removed first."""
    folder = checkpoint.write(tmp_path / "5", small(1))

    def full(_path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "flush", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(folder, small(2))
    assert checkpoint.read(folder).tensors["ema"]["w"].unique() == 1


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["ema.safetensors", "empty.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("position", [0, -1, -2])
def test_one_flipped_bit_anywhere_is_damage(name: str, position: int, tmp_path: Path):
    """Same length, so only the sums can tell; in the manifest itself any bit makes it unreadable or unequal."""
    (folder,) = saved(tmp_path, 5)
    assert checkpoint.damage(folder) is None
    flip(folder / name, position)
    assert checkpoint.damage(folder) is not None
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.read(folder)


def test_every_bit_of_the_manifest_counts(tmp_path: Path):
    """Fails if a manifest that no longer parses, or that names other files, is let through."""
    (folder,) = saved(tmp_path, 5)
    manifest = folder / "manifest.json"
    good = manifest.read_bytes()
    space = {i for i, byte in enumerate(good) if byte in b" \n"}  # white space may turn into other white space
    for position in range(len(good)):
        flip(manifest, position)
        assert checkpoint.damage(folder) is not None or position in space
        manifest.write_bytes(good)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "ema.safetensors").unlink(), "ema.safetensors is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff{"), "does not parse"),
        (lambda folder: (folder / "manifest.json").write_text(""), "does not parse"),
        (lambda folder: (folder / "ema.safetensors").write_bytes(b""), "ema.safetensors differs"),
    ],
)
def test_damage_says_what_is_wrong(harm, said: str, tmp_path: Path):
    (folder,) = saved(tmp_path, 5)
    harm(folder)
    assert said in str(checkpoint.damage(folder))


def test_newest_valid_falls_back_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    saved(tmp_path, 5, 10, 100)
    flip(checkpoint.folder_of(tmp_path, 100) / "ema.safetensors", -1)
    assert checkpoint.newest_valid(tmp_path) == checkpoint.folder_of(tmp_path, 10)
    assert "DAMAGED" in caplog.text and "00000100" in caplog.text
    assert checkpoint.newest_valid(tmp_path / "elsewhere") is None


def test_newest_is_by_number_not_by_name(tmp_path: Path):
    """Nine digits sort before eight as text.  Fails with a sort of the names."""
    saved(tmp_path, 99_999_999, 100_000_000)
    newest = checkpoint.newest_valid(tmp_path)
    assert newest is not None and int(newest.name) == 100_000_000


def test_prune_keeps_the_newest_valid_and_the_best(tmp_path: Path):
    """A damaged one does not count.  Fails if `keep` counts folders: 30 would go, and with it the only fall-back."""
    saved(tmp_path, 10, 20, 30, 40, 50)
    flip(checkpoint.folder_of(tmp_path, 40) / "state.json", 0)
    leftover = tmp_path / "checkpoints" / ".writing-00000060"
    leftover.mkdir()
    (tmp_path / "checkpoints" / "notes").mkdir()
    checkpoint.prune(tmp_path, keep=2, best=10)
    assert names(tmp_path) == [10, 30, 50]
    assert not leftover.exists() and (tmp_path / "checkpoints" / "notes").is_dir()


def test_prune_without_a_best_keeps_the_newest(tmp_path: Path):
    saved(tmp_path, 10, 20, 30)
    checkpoint.prune(tmp_path, keep=1, best=None)
    assert names(tmp_path) == [30]


def test_optimizer_survives_packing(tmp_path: Path):
    """The next step is the same to the bit: moments, step counts and the group's settings are all there."""

    def make(lr: float) -> tuple[nn.Module, torch.optim.AdamW]:
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        return net, torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.5, 0.9))

    def descend(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        net(torch.arange(6.0).reshape(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    (net, old), (other, new) = make(0.1), make(0.7)
    for _ in range(3):
        descend(net, old)
    tensors, extra = checkpoint.pack_optimizer(old)
    back = checkpoint.read(checkpoint.write(tmp_path / "1", Checkpoint({"o": tensors}, {"extra": extra})))
    checkpoint.unpack_optimizer(new, back.tensors["o"], json.loads(json.dumps(back.state["extra"])))
    other.load_state_dict(net.state_dict())
    descend(net, old), descend(other, new)
    assert_close(dict(other.named_parameters()), dict(net.named_parameters()), rtol=0, atol=0)


def test_unpacking_into_other_parameters_is_refused():
    net = nn.Linear(3, 2)
    tensors, extra = checkpoint.pack_optimizer(torch.optim.AdamW(net.parameters()))
    with pytest.raises(ValueError, match="doesn't match"):
        checkpoint.unpack_optimizer(torch.optim.AdamW([net.weight]), tensors, extra)


def test_reading_one_file_neither_checks_nor_reads_the_others(tmp_path: Path):
    """A student is a third of a checkpoint.  Its own damage is still found."""
    folder = checkpoint.write(
        tmp_path / "5", Checkpoint({"ema": {"a": torch.ones(2)}, "x": {"b": torch.ones(2)}}, STATE)
    )
    flip(folder / "x.safetensors", -1)
    assert set(checkpoint.read(folder, only="ema").tensors) == {"ema"}
    flip(folder / "ema.safetensors", -1)
    with pytest.raises(ValueError, match=r"ema\.safetensors differs"):
        checkpoint.read(folder, only="ema")
