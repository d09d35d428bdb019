"""What a process holds while it encodes many prompts into the cache, and while it streams batches from there.

    python -m eval.cache_memory 100000

The encoder is a stand-in that costs nothing: it gives [77, 768] float16 for each prompt, as Stable Diffusion's does
(118 KB; 100,000 prompts take 11.8 GB of disk, which are freed at the end; --length makes rows shorter).  Prompts of 200
letters come from a text file.  Every tenth of the way VmRSS is printed with its two parts: RssAnon, what the process
holds, and RssFile, pages of files that the system may take back.  Linux only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from fewstep.training.data import PromptData
from fewstep.training.embeddings import Encoder
from fewstep.training.prompts import read_prompts
from fewstep.types import Condition

BATCH = 64
PARTS = ("VmRSS", "RssAnon", "RssFile")


class StandIn:
    """Gives each prompt its own multiple of one table; reports memory every tenth of `total` prompts."""

    def __init__(self, length: int, total: int) -> None:
        self.table = torch.randn(1, length, 768, generator=torch.Generator().manual_seed(0)).half()
        self.every, self.seen, self.began = max(1, total // 10), 0, time.monotonic()

    def rows(self, prompts: Sequence[str]) -> torch.Tensor:
        """[B, length, 768] float16."""
        scales = torch.tensor([float(int(prompt.split()[0]) % 97) for prompt in prompts])
        return self.table * scales[:, None, None].half()

    def __call__(self, prompts: Sequence[str]) -> Condition:
        before = self.seen // self.every
        self.seen += len(prompts)
        if self.seen // self.every > before:
            report(f"cached {self.seen:,} prompts, {time.monotonic() - self.began:.0f} s")
        return Condition({"text": self.rows(prompts)}, {"text": self.table})


def report(what: str) -> None:
    """One line with this process's memory in MiB."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    held = "  ".join(f"{part} {int(lines[part].split()[0]) // 1024:>5}" for part in PARTS)
    print(f"{held}  {what}", flush=True)


def measure(count: int, length: int, batches: int, folder: Path) -> None:
    """Write `count` prompts, cache them below `folder`, stream that many batches.  Raises ValueError for wrong rows."""
    os.environ["FEWSTEP_CACHE"] = str(folder / "cache")
    report("start")
    with (folder / "prompts.txt").open("w") as file:
        file.writelines(f"{i} {'a red boot ' * 18}\n" for i in range(count))
    prompts = read_prompts(folder / "prompts.txt")
    report(f"read prompts: {type(prompts).__name__}")
    encode = StandIn(length, count)
    cached = Encoder(encode, {"of": "stand-in"}, where="disk", console=Console(quiet=True))
    data = PromptData(prompts, cached, (4, 64, 64), 0)
    report("cached")
    seconds = 0.0
    for step in range(batches):
        began = time.monotonic()
        batch = data.batch(range(step * BATCH, (step + 1) * BATCH))
        seconds += time.monotonic() - began
        if not torch.equal(batch.cond.tensors["text"], encode.rows(batch.prompts)):
            raise ValueError(f"batch {step} is not what was encoded")
        if (step + 1) % max(1, batches // 10) == 0:
            report(f"streamed {(step + 1) * BATCH:,} prompts, {1000 * seconds / (step + 1):.1f} ms a batch of {BATCH}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("count", type=int, nargs="?", default=100_000)
    parser.add_argument("--length", type=int, default=77, help="tokens a prompt")
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the disk has room")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        needed, free = chosen.count * chosen.length * 768 * 2, shutil.disk_usage(folder).free
        if needed * 1.1 > free:
            raise SystemExit(
                f"{needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free; try --length 8"
            )
        measure(chosen.count, chosen.length, chosen.batches, Path(folder))


if __name__ == "__main__":
    main()
