"""HPSv2's score of each picture and its prompt, by the package `hpsv2` (github.com/tgxs002/HPSv2, 1.2.0).

Scores are cosines; published values are these times 100.  The package's own `hpsv2.score` reads the checkpoint again
at each call, and first downloads weights that it replaces; this does the same with its parts, once.

Options: version, v2.0 or v2.1, whose scales differ; checkpoint, a file that is here already.
Run with the package and a small random network: the same as its `hpsv2.score`.  Not yet run with the real weights.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version

MODEL = "ViT-H-14"


def main() -> None:
    """Read the request, and write the answer."""
    asked, began = json.load(sys.stdin), time.monotonic()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    options, device = asked["options"], device_of(asked["device"])
    check(options)
    told = {"contract": 1, "metric": asked["metric"], "package": package("hpsv2"), "scores": {}}
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
