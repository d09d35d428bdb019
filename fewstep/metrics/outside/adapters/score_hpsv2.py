"""HPSv2's score of each picture and its prompt, by the package `hpsv2` (github.com/tgxs002/HPSv2, 1.2.0).

Scores are cosines; published values are these times 100.  The package's own `hpsv2.score` reads the checkpoint again
at each call, and first downloads weights that it replaces; this does the same with its parts, once.

Options: version, v2.0 or v2.1, whose scales differ; checkpoint, a file that is here already.
Run with the package and a small random network: the same as its `hpsv2.score`.  Not yet run with the real weights.
"""

from __future__ import annotations

import importlib
import os

from fewstep_adapter import answer, device_of, one_by_one, package  # type: ignore

MODEL = "ViT-H-14"


def scored(asked: dict) -> dict:
    """The answer to a request."""
    device = device_of(asked["device"])
    check(asked["options"])
    return {"package": package("hpsv2"), **one_by_one(asked, load, device)}


def check(options: dict) -> None:
    """All that can be known without weights, for which a request without pictures asks: ImportError or OSError."""
    for name in ("hpsv2.src.open_clip", "hpsv2.utils", "huggingface_hub"):
        importlib.import_module(name)
    if "checkpoint" in options:
        os.stat(options["checkpoint"])


def load(options: dict, device: str) -> tuple:
    """(file, prompt) -> cosine, and the checkpoint that it is by."""
    import huggingface_hub  # type: ignore
    import torch
    from hpsv2.src.open_clip import create_model_and_transforms, get_tokenizer  # type: ignore
    from hpsv2.utils import hps_version_map  # type: ignore
    from PIL import Image

    checkpoint = options.get("checkpoint")
    if not checkpoint:
        checkpoint = huggingface_hub.hf_hub_download("xswu/HPSv2", hps_version_map[options["version"]])
    model, _, prepare = create_model_and_transforms(
        MODEL, None, precision="amp", device=device, light_augmentation=True, aug_cfg={}, output_dict=True
    )
    model.load_state_dict(torch.load(checkpoint, map_location=device, weights_only=True)["state_dict"])
    model, tokenizer = model.to(device).eval(), get_tokenizer(MODEL)

    def score(file: str, prompt: str) -> float:
        with Image.open(file) as image:
            pixels = prepare(image.convert("RGB")).unsqueeze(0).to(device)
        with torch.no_grad(), torch.cuda.amp.autocast():
            seen = model(pixels, tokenizer([prompt]).to(device))
            return float((seen["image_features"] @ seen["text_features"].T)[0, 0])

    return score, checkpoint


if __name__ == "__main__":
    answer(scored)
