"""How fast the fused operators are, beside plain torch, torch.compile and copying memory.

    python -m eval.bench_ops [NAME ...] [--seconds S] [--threads N] [--device cuda]

A line of JSON for each contender goes to eval/results/bench_ops.jsonl, or bench_ops_cuda.jsonl, in place of the named
operators' last ones.
Contenders take turns; `of_copy` compares with a copy of as many bytes in the same run.  On a machine that does other
things too, `best_us` says more than `median_us`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from eval import bench_attention, bench_norm, bench_score_difference
from eval.bench_case import Case, measure, row

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "eval" / "results"
CASES = (bench_score_difference.cases, bench_attention.cases, bench_norm.cases)
"""Functions that list cases; those of another operator are one more."""


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="operators; by default all")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each contender at each shape")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = [case for listed in CASES for case in listed(options.device)]
    known = sorted({case.operator for case in found})
    if odd := sorted(set(options.names) - set(known)):
        parser.error(f"no operator named {', '.join(odd)}; allowed: {', '.join(known)}")
    results = RESULTS / ("bench_ops.jsonl" if options.device == "cpu" else "bench_ops_cuda.jsonl")
    for operator in dict.fromkeys(
        case.operator for case in found if not options.names or case.operator in options.names
    ):
        cases = [case for case in found if case.operator == operator]
        rows = [told | environment(options.device) for case in cases for told in rows_of(case, options.seconds)]
        keep(results, rows)


def rows_of(case: Case, seconds: float) -> list[dict[str, Any]]:
    """One of each contender, the copy first; printed as they come."""
    copy, *others = measure(case, seconds)
    rows = [row(case, timing, copy) for timing in (copy, *others)]
    for told in rows:
        figures = told.get("skipped") or "{best_us} us best, {median_us} median of {n}, {of_copy} of copy".format(
            **told
        )
        print(f"{case.operator} {case.name}: {told['contender']}: {figures}", flush=True)
    return rows


def environment(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on."""
    told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    processor = f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": told.stdout.strip(),
    }


def keep(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in place of the same operators' old ones."""
    measured = {told["operator"] for told in rows}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    others = [line for line in lines if json.loads(line)["operator"] not in measured]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in [*others, *map(json.dumps, rows)]), encoding="utf-8")


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
