"""Shards: rows as they were written, of every dtype, and files that are not whole."""

from pathlib import Path

import pytest
import torch

from fewstep.training.shards import DTYPES, OPEN, Shards


def written(folder: Path, count: int = 7, size: int = 3, **tensors: torch.Tensor) -> Shards:
    """`count` rows of x = 0, 1, ... [2], and of further tensors."""
    shards = Shards(folder, count, size)
    rows = {"x": torch.arange(count)[:, None].expand(count, 2), **tensors}
    for start in shards.starts():
        of = shards.rows(start)
        shards.write(start, {name: value[of.start : of.stop] for name, value in rows.items()})
    return shards


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 3)])
def test_rows_are_those_that_were_written(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]):
    """Fails with a dtype under another's name, and for rows without dimensions."""
    values = (torch.randn(7, *shape, generator=torch.Generator().manual_seed(0)) * 50).abs().to(dtype)
    shards = written(tmp_path, values=values)
    for i in (6, 0, 4):
        row = shards.row(i)
        assert row["values"].dtype == dtype and torch.equal(row["values"], values[i : i + 1])
        assert row["x"].tolist() == [[i, i]]
    assert list(shards.row(2, "x")) == ["x"]


def test_few_files_are_open_at_a_time(tmp_path: Path):
    shards = written(tmp_path, count=3 * OPEN, size=1)
    assert [int(shards.row(i)["x"][0, 0]) for i in range(3 * OPEN)] == list(range(3 * OPEN))
    assert shards._file.cache_info().currsize == OPEN


def test_files_that_are_not_whole_are_told(tmp_path: Path):
    shards = written(tmp_path)
    assert all(shards.whole(start) for start in shards.starts())
    assert not Shards(tmp_path, 8, 3).whole(6)  # of seven rows, it holds one
    path = shards.path(3)
    path.write_bytes(path.read_bytes()[:-1])
    assert not shards.whole(3)
    with pytest.raises(ValueError, match=r"00000003\.safetensors is damaged \(it is cut off\); delete it"):
        shards.row(5)
    path.unlink()
    with pytest.raises(ValueError, match="delete it and start again"):
        Shards(tmp_path, 7, 3).row(4)
