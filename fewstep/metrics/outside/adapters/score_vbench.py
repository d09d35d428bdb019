"""VBench's scores of videos in sixteen dimensions, by the package `vbench` (github.com/Vchitect/VBench, 0.1.5).

Each video has scores in the dimensions that its prompt belongs to; the figures are the package's own, some of which are
means over frames and not over videos.  Standard mode: videos are called PROMPT-0.mp4 to PROMPT-4.mp4.

Options: results, a file that the package wrote already, or several with commas between; local, 1 where its weights are
in $VBENCH_CACHE_DIR; full_info, its list of prompts, by default the one that comes with it.
Run with the package in the one dimension that needs no weights, temporal flickering; not yet in the others.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

from fewstep_adapter import answer, device_of, package  # type: ignore

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "appearance_style",
    "temporal_style",
    "overall_consistency",
)


def scored(asked: dict) -> dict:
    """The answer to a request."""
    if "results" in asked["options"]:
        found = {}
        for path in asked["options"]["results"].split(","):
            found.update(read(path))
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = evaluated(asked, folder)
    if not asked["items"]:  # only whether it could be made was asked
        found = {}
    scores = {item["file"]: {} for item in asked["items"]}  # a video in which a dimension sees nothing has none
    for dimension, (_, videos) in found.items():
        for video in videos:
            scores.setdefault(os.path.basename(video["video_path"]), {})[dimension] = float(video["video_results"])
    figures = {dimension: float(figure) for dimension, (figure, _) in found.items()}
    return {"scores": scores, "figures": figures, "package": package("vbench")}


def evaluated(asked: dict, folder: str) -> dict:
    """[figure, scores of videos] by dimension, one after another; without videos of none."""
    import torch
    import vbench  # type: ignore

    options, found = asked["options"], {}
    info = options.get("full_info") or os.path.join(os.path.dirname(vbench.__file__), "VBench_full_info.json")
    device = torch.device(device_of(asked["device"]))
    bench = vbench.VBench(device, info, folder)  # type: ignore
    for dimension in DIMENSIONS if asked["items"] else ():
        bench.evaluate(
            videos_path=asked["folder"],
            name=dimension,
            dimension_list=[dimension],
            local=options.get("local") == "1",
            read_frame=False,
            mode="vbench_standard",
            imaging_quality_preprocessing_mode="longer",
        )
        found.update(read(os.path.join(folder, dimension + "_eval_results.json")))
        print(f"progress: {len(found)}/{len(DIMENSIONS)}", file=sys.stderr)
    return found


def read(path: str) -> dict:
    """A file of results."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


if __name__ == "__main__":
    answer(scored)
