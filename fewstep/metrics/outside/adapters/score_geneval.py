"""GenEval's verdict on each picture, by the evaluator of github.com/djghosh13/geneval: 1 if it is correct, else 0.

Options: results, the file that the evaluator wrote already; or evaluator, the folder of its repository, and detector,
the folder of the Mask2Former that its download_models.sh fetched.  The evaluator needs a GPU and its own environment.
Written against the evaluator's source; not yet run with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

from fewstep_adapter import answer, sha256  # type: ignore

DETECTOR = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth"


def scored(asked: dict) -> dict:
    """The answer to a request."""
    options, items = asked["options"], asked["items"]
    if not items:
        check(options)
        return {"scores": {}}
    if "results" in options:
        return {"scores": verdicts(options["results"], items)}
    with tempfile.TemporaryDirectory() as folder:
        scores = verdicts(evaluated(asked, folder), items)
    return {"scores": scores, "weights": {DETECTOR: sha256(os.path.join(options["detector"], DETECTOR))}}


def check(options: dict) -> None:
    """All that can be known without pictures, for which a request without any asks.

    The evaluator imports everything, and looks for its GPU, before it prints its help.
    """
    if "results" in options:
        verdicts(options["results"], [])
        return
    os.stat(os.path.join(options["detector"], DETECTOR))
    run(options, "--help")


def run(options: dict, *arguments: str) -> None:
    """Run the evaluator.  Where it fails this exits as it did, so that the last lines are the evaluator's own."""
    script = os.path.join(options["evaluator"], "evaluation", "evaluate_images.py")
    code = subprocess.run([sys.executable, script, *arguments], check=False).returncode
    if code != 0:
        sys.exit(code)


def evaluated(asked: dict, folder: str) -> str:
    """The file of results, of the pictures as the evaluator wants them: each prompt's beside its description.

    Raises ValueError for others than PNG files, which the evaluator passes over.
    """
    images, results = os.path.join(folder, "images"), os.path.join(folder, "results.jsonl")
    for item in asked["items"]:
        if not item["file"].endswith(".png"):
            raise ValueError(f"GenEval's evaluator reads PNG files alone, not {item['file']}")
        link = os.path.join(images, item["file"])
        os.makedirs(os.path.dirname(link), exist_ok=True)
        os.symlink(os.path.join(asked["folder"], item["file"]), link)
        described = os.path.join(os.path.dirname(os.path.dirname(link)), "metadata.jsonl")
        with open(described, "w", encoding="utf-8") as file:
            json.dump(item["extra"], file)
    run(asked["options"], images, "--outfile", results, "--model-path", asked["options"]["detector"])
    return results


def verdicts(results: str, items: list) -> dict:
    """1 or 0 by file, from JSON lines of `filename`, `tag` and `correct`.  Raises ValueError for another task's."""
    tags, scores = {item["file"]: item["extra"]["tag"] for item in items}, {}
    with open(results, encoding="utf-8") as lines:
        for found in map(json.loads, lines):
            file = "/".join(found["filename"].replace(os.sep, "/").split("/")[-3:])  # 00012/samples/0003.png
            if tags.get(file, found["tag"]) != found["tag"]:
                raise ValueError(f"{file} is of the task {tags[file]}, and {results} has it under {found['tag']}")
            scores[file] = float(found["correct"])
    return scores


if __name__ == "__main__":
    answer(scored)
