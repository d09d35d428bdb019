"""ImageReward's score of each picture and its prompt, by `image-reward` 1.5 (github.com/THUDM/ImageReward).

Options: checkpoint, a file that is here already; med_config, the file that belongs to it.
Run with the package and small random networks; not yet with the real weights.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version

MODEL = "ImageReward-v1.0"
DOWNLOADED = "~/.cache/ImageReward/ImageReward.pt"
"""Where `ImageReward.load` puts it."""


def main() -> None:
    """Read the request, and write the answer."""
    asked, began = json.load(sys.stdin), time.monotonic()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    options, device = asked["options"], device_of(asked["device"])
    check(options)
    told = {"contract": 1, "metric": asked["metric"], "package": package("image-reward"), "scores": {}}
    if asked["items"]:
        score, checkpoint = load(options, device)
        told["weights"] = {os.path.basename(checkpoint): sha256(checkpoint)}
        for item in asked["items"]:
            told["scores"][item["file"]] = score(os.path.join(asked["folder"], item["file"]), item["prompt"])
            print(f"progress: {len(told['scores'])}/{len(asked['items'])}", file=sys.stderr)
    told["seconds"] = time.monotonic() - began
    with answer:
        json.dump(told, answer)


def check(options: dict) -> None:
    """All that can be known without weights, for which a request without pictures asks: ImportError or OSError."""
    importlib.import_module("ImageReward")
    for path in options.values():
        os.stat(path)


def load(options: dict, device: str) -> tuple:
    """(file, prompt) -> reward, and the checkpoint that it is by."""
    import ImageReward  # type: ignore
    import torch

    checkpoint = options.get("checkpoint")
    model = ImageReward.load(checkpoint or MODEL, device=device, med_config=options.get("med_config"))

    def score(file: str, prompt: str) -> float:
        with torch.no_grad():
            return float(model.score(prompt, file))

    return score, checkpoint or os.path.expanduser(DOWNLOADED)


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


if __name__ == "__main__":
    main()
