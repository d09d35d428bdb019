"""Scores that other environments give, by name: the adapter, the pictures, how the environment is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fewstep.metrics.means import Mean
from fewstep.metrics.outside.contract import Answer, Item
from fewstep.metrics.outside.figures import geneval, hpsv2, imagereward, plain, vbench_figures

ADAPTERS = Path(__file__).with_name("adapters")
Summary = Callable[[str, Sequence[Item], Answer], dict[str, Mean]]


@dataclass(frozen=True)
class Score:
    """What a name stands for.

    title: of its figures.  version: of the adapter and of what is made of its answer; figures of two do not compare.
    layout: of the pictures: a line of a file each, HPSv2's styles, GenEval's tasks, or videos named by their prompts.
    count: of a published figure; fewer rename it; None: no such number.  settings: options that are part of the name.
    options: which the user may give, in words; they name places, and change no figure.  required: sets of them, one of
    which must be there, if any.  environment: how to make it.
    """

    name: str
    title: str
    source: str
    adapter: Path
    summary: Summary
    environment: str
    layout: Literal["lines", "styles", "tasks", "videos"] = "lines"
    count: int | None = None
    prompts: str = "any, a line of a file for each image in the order of their names"
    settings: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    required: Sequence[Sequence[str]] = ()
    version: int = 1


def _hpsv2(version: str) -> Score:
    return Score(
        name=f"hpsv2.{version[-1]}",
        title=f"HPSv2.{version[-1]}",
        source="arXiv:2306.09341",
        adapter=ADAPTERS / "score_hpsv2.py",
        summary=hpsv2,
        # The wheel on PyPI lacks the vocabulary; its open_clip imports turtle.
        environment="pip install git+https://github.com/tgxs002/HPSv2, in a Python that has tkinter",
        layout="styles",
        count=4 * 800,
        prompts="800 of each of 4 styles: a folder of anime.json, concept-art.json, paintings.json, photo.json",
        settings={"version": version},
        options={"checkpoint": "HPS_v2_compressed.pt or HPS_v2.1_compressed.pt, where it is here already"},
    )


_RESULTS = "or none, for results that another machine wrote: --option results=FILE"
_TABLE = (
    _hpsv2("v2.1"),
    _hpsv2("v2.0"),
    Score(
        name="imagereward",
        title="ImageReward",
        source="arXiv:2304.05977",
        adapter=ADAPTERS / "score_imagereward.py",
        summary=imagereward,
        environment="pip install image-reward 'transformers<4.55' git+https://github.com/openai/CLIP",
        options={"checkpoint": "ImageReward.pt, where it is here already", "med_config": "its med_config.json"},
    ),
    Score(
        name="geneval",
        title="GenEval",
        source="arXiv:2310.11513",
        adapter=ADAPTERS / "score_geneval.py",
        summary=geneval,
        environment="conda env create -f environment.yml in a clone of https://github.com/djghosh13/geneval, and mmdet "
        f"2.x; {_RESULTS}",
        layout="tasks",
        count=553 * 4,
        prompts="4 images of each of 553: its evaluation_metadata.jsonl",
        options={
            "evaluator": "the clone",
            "detector": "the folder of its Mask2Former",
            "results": "what its evaluate_images.py wrote",
        },
        required=(("results",), ("evaluator", "detector")),
    ),
    Score(
        name="vbench",
        title="VBench",
        source="arXiv:2311.17982",
        adapter=ADAPTERS / "score_vbench.py",
        summary=vbench_figures,
        environment=f"pip install vbench, with torch for CUDA 11.8 or 12.1, and detectron2; {_RESULTS}",
        layout="videos",
        count=946 * 5,
        prompts="5 videos of each of 946, named PROMPT-0.mp4 to PROMPT-4.mp4",
        options={
            "results": "what its evaluate.py wrote; several with commas between",
            "local": "1 where its weights are in $VBENCH_CACHE_DIR",
            "full_info": "its VBench_full_info.json, where it is not beside the package",
        },
    ),
)
SCORES = {score.name: score for score in _TABLE}


def is_ours(score: Score) -> bool:
    """Whether it is of the table.  A user's own is called as its file, which may be called like one of these."""
    return SCORES.get(score.name) is score


def find_score(name: str) -> Score:
    """The score of this name, or a user's own: a file that ends in .py, called as it is.

    Raises LookupError that lists the names, FileNotFoundError for no such file.
    """
    if not name.endswith(".py"):
        if name not in SCORES:
            raise LookupError(f"no score named {name!r}; known: {', '.join(SCORES)}, or an adapter's FILE.py")
        return SCORES[name]
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {path}")
    return Score(path.stem, path.stem, str(path), path, plain, "It needs what the adapter imports.")
