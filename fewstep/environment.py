"""Where a run takes place: its device, versions, hardware, git revision.

Nothing secret: no tokens, no user or host names.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")
PACKAGES = ("fewstep", "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy")


CHANGES = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!eval/results")


def cache_folder() -> Path:
    """Where encoded data and unpacked teachers are kept: $FEWSTEP_CACHE, or ~/.cache/fewstep."""
    return Path(os.environ.get("FEWSTEP_CACHE") or Path.home() / ".cache" / "fewstep")


def check_device(name: str) -> None:
    """Raises ValueError unless `name` is one of DEVICES, whether this machine has it or not."""
    if name not in DEVICES:
        raise ValueError(
            f"device {name!r} is not known; allowed: {', '.join(DEVICES)} (mps has no float64, which noise schedules "
            "need)"
        )


def device_of(name: str) -> torch.device:
    """What "auto", "cpu" or "cuda" means here; "auto" is cuda if there is one, else cpu.

    Raises ValueError for any other name, and for cuda where there is none.
    """
    import torch

    check_device(name)
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ValueError("device 'cuda' is not available here; usable: auto, cpu")
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def describe() -> dict[str, Any]:
    """Python, packages, platform, processors, threads, accelerator and the revision of this source tree."""
    import torch

    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "revision": revision(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def revision() -> str | None:
    """The git commit of this source tree, with "+changes" if files differ from it; None for an installed wheel.

    What benchmarks write into eval/results is no change: one would else tell of the other's results.
    """
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, *CHANGES) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
