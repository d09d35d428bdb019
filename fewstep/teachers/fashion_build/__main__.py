"""Command line of the build; every stage goes on where it was stopped and is skipped once finished."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from fewstep.teachers.fashion_build.card import build_card
from fewstep.teachers.fashion_build.classifier import build_classifier
from fewstep.teachers.fashion_build.clip import build_clip
from fewstep.teachers.fashion_build.data import DEBIAN_FOLDER
from fewstep.teachers.fashion_build.dit import build_dit
from fewstep.teachers.fashion_build.reals import build_reals
from fewstep.teachers.fashion_build.references import build_references
from fewstep.teachers.fashion_build.text import build_text
from fewstep.teachers.fashion_build.unet import build_unet
from fewstep.teachers.fashion_build.vae import build_vae

DEFAULT_OUT = Path(__file__).parents[1] / "weights"
STAGES = {
    "classifier": build_classifier,
    "references": build_references,
    "text": build_text,
    "clip": build_clip,
    "vae": build_vae,
    "dit": build_dit,
    "reals": build_reals,
    "unet": build_unet,
    "card": build_card,
}


def main() -> None:
    """Parse the options and run one stage, or all in order."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.teachers.fashion_build", description=__doc__)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of the four idx files")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the weights")
    parser.add_argument("--work", type=Path, default=Path("build/fashion-dit"), help="folder of restart points")
    parser.add_argument("--minutes", type=float, default=None, help="training minutes instead of the stage's own")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(2)
    for name, build in STAGES.items():
        if options.stage in (name, "all"):
            build(options.data, options.out, options.work, options.minutes)


if __name__ == "__main__":
    main()
