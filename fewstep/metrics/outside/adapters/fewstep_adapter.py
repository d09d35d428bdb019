"""What the scripts beside this share: the request, the answer, the device, names and hashes.

It runs in another environment: the standard library of Python 3.8, and torch where a device is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version


def answer(make: Callable[[dict], dict]) -> None:
    """Read the request, and write what `make` answers to it: scores, and what else the contract knows."""
    asked, began = json.load(sys.stdin), time.monotonic()
    written = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print, and what programs that they start do
    told = {"contract": 1, "metric": asked["metric"], **make(asked)}
    told["seconds"] = time.monotonic() - began
    with written:
        json.dump(told, written)


def one_by_one(asked: dict, load: Callable[[dict, str], tuple], device: str) -> dict:
    """Scores of all pictures, one after another, and the hash of the checkpoint that they are by; none of no pictures.

    load: (options, device) -> a function (file, prompt) -> score, and the checkpoint's file.
    """
    if not asked["items"]:
        return {"scores": {}}
    (score, checkpoint), scores = load(asked["options"], device), {}
    for item in asked["items"]:
        scores[item["file"]] = score(os.path.join(asked["folder"], item["file"]), item["prompt"])
        print(f"progress: {len(scores)}/{len(asked['items'])}", file=sys.stderr)
    return {"scores": scores, "weights": {os.path.basename(checkpoint): sha256(checkpoint)}}


def device_of(name: str) -> str:
    """cuda or cpu; auto is cuda if there is one.  Raises ValueError for cuda where there is none."""
    import torch

    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ValueError("device 'cuda' is not available to torch in this environment; usable: auto, cpu")
    return "cuda" if found and name != "cpu" else "cpu"


def package(name: str) -> str | None:
    """Name and version; None for a package that was not installed but lies on the path."""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return None


def sha256(path: str) -> str:
    """Of a file, a mebibyte at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()
