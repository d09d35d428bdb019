"""Claims about the adapters, by stand-ins that have the real packages' names and signatures and no weights.

What is not shown: that the real packages work so; they cannot be installed beside ours.  The adapters' docstrings say
what was run by hand.
"""

import hashlib
import json
import sys
import textwrap
from pathlib import Path

import pytest

from fewstep.metrics.outside.contract import Item, Request
from fewstep.metrics.outside.figures import TASKS
from fewstep.metrics.outside.process import Place, ask
from fewstep.metrics.outside.scores import SCORES

NO_TORCH = """
class no_grad:
    def __enter__(self): ...
    def __exit__(self, *_): ...

def device(name):
    return name

class cuda:
    is_available = staticmethod(lambda: __import__("os").environ.get("CUDA_VISIBLE_DEVICES") == "0")
"""


@pytest.fixture
def stage(tmp_path):
    """stage(files): another environment's Python, a script that shows ours these modules and no others of ours."""

    def built(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / "site" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path / "site"}" exec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        return python

    return built


def asked(name: str, python: Path, folder: Path, items, told=None, device="cpu", **options):
    score = SCORES[name]
    request = Request(name, folder, items, device, dict(score.settings) | options)
    return ask(Place(python, score.adapter, score.environment), request, timeout=120, advance=told)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


NUMBERS = (
    NO_TORCH
    + """
import json
from types import SimpleNamespace

class Number(float):
    T = property(lambda self: self)
    def unsqueeze(self, dim): return self
    def to(self, device): return self
    def __matmul__(self, other): return Number(self * other)
    def __getitem__(self, index): return float(self)

def load(path, map_location, weights_only):
    assert map_location == "cpu" and weights_only
    with open(path) as file:
        return json.load(file)

cuda.amp = SimpleNamespace(autocast=no_grad)
"""
)
"""Tensors of one number."""
HPSV2 = """
from torch import Number

class Model:
    def load_state_dict(self, state): self.scale = state["scale"]
    def to(self, device): return self
    def eval(self):
        self.training = False
        return self
    def __call__(self, image, text):
        assert not self.training
        return {"image_features": image, "text_features": Number(self.scale * text)}

def create_model_and_transforms(
    model_name, pretrained=None, precision="fp32", device="cpu", jit=False, force_quick_gelu=False,
    force_custom_text=False, force_patch_dropout=None, force_image_size=None, pretrained_image=False,
    pretrained_hf=True, image_mean=None, image_std=None, aug_cfg=None, cache_dir=None, light_augmentation=False,
    output_dict=None, with_score_predictor=False, with_region_predictor=False,
):
    print("Loading model ...")
    assert (model_name, pretrained, precision, light_augmentation, output_dict) == ("ViT-H-14", None, "amp", True, True)
    return Model(), None, lambda image: Number(image.getpixel((0, 0))[0])

def get_tokenizer(model_name):
    assert model_name == "ViT-H-14"
    return lambda texts: Number(len(texts[0]))
"""


@pytest.mark.parametrize("version", ["v2.1", "v2.0"])
def test_hpsv2_is_the_cosine_by_the_checkpoint_of_its_version(stage, tmp_path, version):
    """Of a picture and its own prompt; what the package prints is no answer."""
    from PIL import Image

    scale = 1.0 if version == "v2.1" else 2.0
    (tmp_path / version).write_text(json.dumps({"state_dict": {"scale": scale}}))
    fetch = f"""
        def hf_hub_download(repo_id, filename):
            assert repo_id == "xswu/HPSv2"
            return {str(tmp_path)!r} + "/" + filename
    """
    python = stage(
        {
            "torch.py": NUMBERS,
            "huggingface_hub.py": fetch,
            "hpsv2/__init__.py": "",
            "hpsv2/utils.py": "hps_version_map = {'v2.0': 'v2.0', 'v2.1': 'v2.1'}\n",
            "hpsv2/src/__init__.py": "",
            "hpsv2/src/open_clip.py": HPSV2,
        }
    )
    for grey in (2, 3):  # which the package would refuse to see
        Image.new("L", (4, 5), grey).save(tmp_path / f"{grey}.png")
    told = []
    answer = asked("hps" + version, python, tmp_path, [Item("2.png", "cats"), Item("3.png", "a")], told.append)
    assert answer.scores == {"2.png": 8.0 * scale, "3.png": 3.0 * scale} and told == [1, 1]
    assert answer.weights == {version: sha256(tmp_path / version)} and answer.package is None


def test_imagereward_is_the_models_score(stage, tmp_path):
    python = stage(
        {
            "torch.py": NO_TORCH,
            "ImageReward.py": """
                import os
                class Model:
                    def score(self, prompt, image):
                        assert isinstance(prompt, str) and os.path.isfile(image)
                        return len(prompt) - 10.0
                def load(name="ImageReward-v1.0", device="cuda", download_root=None, med_config=None):
                    print("load checkpoint from", name)
                    assert device == "cpu" and os.path.isfile(name) and med_config is None
                    return Model()
            """,
        }
    )
    for name in ("a.png", "ImageReward.pt"):
        (tmp_path / name).write_bytes(b"x")
    answer = asked(
        "imagereward", python, tmp_path, [Item("a.png", "cats")], checkpoint=str(tmp_path / "ImageReward.pt")
    )
    assert answer.scores == {"a.png": -6.0}
    assert answer.weights == {"ImageReward.pt": sha256(tmp_path / "ImageReward.pt")}


EVALUATOR = """
import argparse, json, os
parser = argparse.ArgumentParser()
parser.add_argument("imagedir", type=str)
parser.add_argument("--outfile", type=str, default="results.jsonl")
parser.add_argument("--model-config", type=str, default=None)
parser.add_argument("--model-path", type=str, default="./")
args = parser.parse_args()
print("loading")
with open(args.outfile, "w") as out:
    for folder in os.listdir(args.imagedir):
        metadata = json.load(open(os.path.join(args.imagedir, folder, "metadata.jsonl")))
        for name in os.listdir(os.path.join(args.imagedir, folder, "samples")):
            path = os.path.join(args.imagedir, folder, "samples", name)
            row = {"filename": path, "tag": metadata["tag"], "prompt": metadata["prompt"]}
            print(json.dumps(row | {"correct": open(path).read() == metadata["include"]}), file=out)
"""


@pytest.fixture
def drawn(tmp_path) -> list[Item]:
    """A picture of each of two tasks, as GenEval lays them out; the first is what its prompt includes."""
    items = []
    for i, text in enumerate(("cat", "dog")):
        path = tmp_path / "images" / f"{i:05}" / "samples" / "0000.png"
        path.parent.mkdir(parents=True)
        path.write_text(text)
        extra = {"tag": TASKS[i], "include": "cat", "prompt": f"a {text}"}
        items.append(Item(path.relative_to(tmp_path / "images").as_posix(), f"a {text}", 0, extra))
    return items


def test_geneval_runs_the_evaluator_on_its_layout(stage, drawn, tmp_path):
    (tmp_path / "clone" / "evaluation").mkdir(parents=True)
    (tmp_path / "clone" / "evaluation" / "evaluate_images.py").write_text(EVALUATOR)
    detector = tmp_path / "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth"
    detector.write_bytes(b"x")
    places = {"evaluator": str(tmp_path / "clone"), "detector": str(tmp_path)}
    answer = asked("geneval", stage({}), tmp_path / "images", drawn, **places)
    assert answer.scores == {"00000/samples/0000.png": 1.0, "00001/samples/0000.png": 0.0}
    assert answer.weights == {detector.name: sha256(detector)}
    with pytest.raises(ChildProcessError, match=r"PNG files alone, not 00000/samples/0000\.jpg"):
        asked("geneval", stage({}), tmp_path, [Item("00000/samples/0000.jpg", "a cat", 0, {"tag": "colors"})], **places)


def test_geneval_reads_results_of_another_machine(stage, drawn, tmp_path):
    rows = [{"filename": f"/far/{i.file}", "tag": i.extra["tag"], "correct": True} for i in drawn]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = asked("geneval", stage({}), tmp_path / "images", drawn, results=str(results))
    assert set(answer.scores.values()) == {1.0} and answer.weights == {}
    results.write_text(json.dumps(rows[0] | {"tag": "colors"}) + "\n")
    with pytest.raises(ChildProcessError, match=r"is of the task single_object, and .* has it under colors"):
        asked("geneval", stage({}), tmp_path / "images", drawn, results=str(results))
    results.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match=r"1 of 2 files; '00001/samples/0000\.png' is missing"):
        asked("geneval", stage({}), tmp_path / "images", drawn, results=str(results))


VBENCH = """
import json, os

class VBench(object):
    def __init__(self, device, full_info_dir, output_path):
        assert device == "cpu" and full_info_dir == os.path.join(os.path.dirname(__file__), "VBench_full_info.json")
        self.output_path = output_path

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        assert mode == "vbench_standard" and kwargs == {"imaging_quality_preprocessing_mode": "longer"} and local
        print("cur_full_info_path")
        results = {}
        for dimension in dimension_list:
            video = {"video_path": os.path.join(videos_path, "a cat-0.mp4"), "video_results": True}
            results[dimension] = [0.5, [] if dimension == "color" else [video]]
        with open(os.path.join(self.output_path, name + "_eval_results.json"), "w") as file:
            json.dump(results, file)
"""
VIDEOS = [Item("a cat-0.mp4", "a cat"), Item("a red dog-0.mp4", "a red dog")]


def test_vbench_runs_dimension_by_dimension(stage, tmp_path):
    """A video in which no object was found has no score; a verdict counts as a number."""
    python, told = stage({"torch.py": NO_TORCH, "vbench/__init__.py": VBENCH}), []
    answer = asked("vbench", python, tmp_path, VIDEOS, told.append, local="1")
    assert len(answer.figures) == 16 and answer.figures["scene"] == 0.5
    assert answer.scores["a red dog-0.mp4"] == {} and sum(told) == 2
    assert answer.scores["a cat-0.mp4"] == {name: 1.0 for name in answer.figures if name != "color"}


def test_vbench_reads_results_of_another_machine(stage, tmp_path):
    """Of several files, as of several runs; nothing needs to be installed."""
    video = {"video_path": "/far/a cat-0.mp4", "video_results": 0.25}
    for name in ("scene", "color"):
        (tmp_path / f"{name}.json").write_text(json.dumps({name: [0.5, [video]]}))
    results = f"{tmp_path}/scene.json,{tmp_path}/color.json"
    answer = asked("vbench", stage({}), tmp_path, VIDEOS, results=results)
    assert answer.figures == {"scene": 0.5, "color": 0.5} and answer.package is None
    assert answer.scores == {"a cat-0.mp4": {"scene": 0.25, "color": 0.25}, "a red dog-0.mp4": {}}


EMPTY = {
    "torch.py": NO_TORCH,
    "huggingface_hub.py": "def hf_hub_download(*_): return 'nowhere'\n",
    "hpsv2/__init__.py": "",
    "hpsv2/utils.py": "hps_version_map = {'v2.1': ''}\n",
    "hpsv2/src/__init__.py": "",
    "hpsv2/src/open_clip.py": "",
    "ImageReward.py": "",
    "vbench/__init__.py": "VBench = print\n",
}
"""Packages that can be imported, and nothing more."""


@pytest.mark.parametrize("name", ["hpsv2.1", "imagereward", "vbench"])
def test_without_pictures_nothing_is_loaded(stage, tmp_path, name):
    """The package is imported, which the next test shows.  Mutation: a model is made for no picture."""
    answer = asked(name, stage(EMPTY), tmp_path, [])
    assert (answer.scores, answer.figures, answer.weights) == ({}, {}, {})


def test_without_pictures_geneval_looks_for_its_evaluator(stage, tmp_path):
    """And for the detector, or the results.  Mutation: an answer before either was looked for."""
    results, places = tmp_path / "results.jsonl", {"evaluator": str(tmp_path), "detector": str(tmp_path)}
    with pytest.raises(ChildProcessError, match=r"No such file .*results"):
        asked("geneval", stage({}), tmp_path, [], results=str(results))
    results.write_text(json.dumps({"filename": "00000/samples/0000.png", "tag": "colors", "correct": True}) + "\n")
    assert asked("geneval", stage({}), tmp_path, [], results=str(results)).scores == {}
    with pytest.raises(ChildProcessError, match=r"No such file .*mask2former"):
        asked("geneval", stage({}), tmp_path, [], **places)
    (tmp_path / "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth").write_bytes(b"x")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluate_images.py").write_text("import mmdet\n")
    with pytest.raises(ChildProcessError, match="No module named 'mmdet'"):
        asked("geneval", stage({}), tmp_path, [], **places)
    (tmp_path / "evaluation" / "evaluate_images.py").write_text(EVALUATOR)
    assert asked("geneval", stage({}), tmp_path, [], **places).scores == {}


ON = {
    "hpsv2/src/open_clip.py": "get_tokenizer = None\ndef create_model_and_transforms(*_, device, **__):",
    "ImageReward.py": "def load(*_, device, **__):",
    "vbench/__init__.py": "def VBench(device, *_):",
}


@pytest.mark.parametrize("name", ["hpsv2.1", "imagereward", "vbench"])
@pytest.mark.parametrize(
    ("device", "gpus", "words"),
    [("auto", "", "on cpu"), ("auto", "0", "on cuda"), ("cpu", "0", "on cpu"), ("cuda", "0", "on cuda")]
    + [("cuda", "", "'cuda' is not available to torch in this environment; usable: auto, cpu")],
)
def test_the_device_is_the_one_asked_for(stage, tmp_path, monkeypatch, name, device, gpus, words):
    """Mutations: what is there is taken, whatever was asked for; auto is always cuda."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    python = stage(EMPTY | {file: f"{code} raise SystemExit(f'on {{device}}')\n" for file, code in ON.items()})
    with pytest.raises(ChildProcessError, match=words):
        asked(name, python, tmp_path, VIDEOS, device=device)


@pytest.mark.parametrize("name", ["hpsv2.1", "imagereward", "vbench"])
@pytest.mark.parametrize("items", [VIDEOS, []], ids=["videos", "none"])
def test_without_its_package_the_remedy_is_told(stage, tmp_path, name, items):
    """A script's own name would hide that. Mutation: an adapter called like its package, which then imports itself."""
    modules = {"torch.py": NO_TORCH, "huggingface_hub.py": ""}
    with pytest.raises(ChildProcessError, match=r"No module named .*pip install") as caught:
        asked(name, stage(modules), tmp_path, items)
    assert SCORES[name].environment in str(caught.value)


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_no_adapter_is_called_like_a_package(score):
    assert score.adapter.is_file() and score.adapter.stem.startswith("score_")
