"""ImageReward's score of each picture and its prompt, by `image-reward` 1.5 (github.com/THUDM/ImageReward).

Options: checkpoint, a file that is here already; med_config, the file that belongs to it.
Run with the package and small random networks; not yet with the real weights.
"""

from __future__ import annotations

import importlib
import os

from fewstep_adapter import answer, device_of, one_by_one, package  # type: ignore

MODEL = "ImageReward-v1.0"
DOWNLOADED = "~/.cache/ImageReward/ImageReward.pt"
"""Where `ImageReward.load` puts it."""


def scored(asked: dict) -> dict:
    """The answer to a request."""
    device = device_of(asked["device"])
    check(asked["options"])
    return {"package": package("image-reward"), **one_by_one(asked, load, device)}


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


if __name__ == "__main__":
    answer(scored)
