"""Every test runs offline and on one torch thread, so that its numbers do not depend on the machine's load."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)

NOTES = os.environ.get("FEWSTEP_TEST_NOTES")
"""A folder for the names of the tests that were collected and those that ended; what a cut-off run did not reach."""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Every process collects the same; the controller of several processes collects nothing."""
    if NOTES and session.items:
        Path(NOTES, "collected").write_text("".join(f"{item.nodeid}\n" for item in session.items), encoding="utf-8")


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Also called by the processes that run the tests, not only by the one that hears of them."""
    if NOTES and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(NOTES, "ended").open("a", encoding="utf-8") as file:
            file.write(f"{nodeid}\n")


def _draw(
    seed: int = 0, shape: tuple[int, ...] = (3, 2, 5, 4), dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(shape, generator=generator, dtype=torch.float64)
    eps = torch.randn(shape, generator=generator, dtype=torch.float64)
    t = torch.rand(shape[0], generator=generator)
    return x0.to(dtype), eps.to(dtype), t


@pytest.fixture
def draw() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """draw(seed, shape, dtype) -> x0, eps of that shape and t [B] float32 in [0, 1); B, C, H, W all differ."""
    return _draw


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Where a test's run may write; it does not exist yet."""
    return tmp_path / "run"
