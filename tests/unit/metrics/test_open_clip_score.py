"""DMD2's CLIP score on a random open_clip model of a few thousand weights in the published format; `make oracles`."""

import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close

from fewstep.measuring import Request, measure
from fewstep.metrics import inception, open_clip_score
from fewstep.metrics.features import file_sha256
from fewstep.metrics.open_clip_score import CONFIG, WEIGHTS, check_open_clip, read_open_clip
from fewstep.metrics.protocols import DMD2_CLIP, PROTOCOLS, clip_view

SIDE, START, END = 32, 49406, 49407
PREFIX = [320, 1125, 29340]
"""CLIP's numbers of "a", "photo" and "depicts"."""
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIDE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed: make oracles")
    made = tmp_path_factory.mktemp("open_clip")
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**MODEL).state_dict(), made / WEIGHTS)
    pixels = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    (made / CONFIG).write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": pixels}))
    return made


@pytest.fixture(scope="module")
def scorer(folder):
    return read_open_clip(folder)


def pictures(n: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(256, (n, 3, height, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_the_prefix_stands_between_start_and_text(scorer):
    """Mutations: none, behind the text, or before the start."""
    (row,) = scorer.tokens(["a photo of a cat"])
    assert row.tolist() == [START, *PREFIX, 320, 1125, 539, 320, 2368, END] + [0] * 67


def test_long_texts_keep_their_end_and_differ(scorer):
    """Where the row is cut without its end, the tower pools at the start: all long texts are one."""
    texts = [f"{'cat ' * 60}{word} {'dog ' * 40}" for word in ("red", "blue")]
    rows = scorer.tokens(texts)
    assert rows.shape == (2, 77) and rows[:, -1].tolist() == [END, END]
    assert rows[0, :5].tolist() == [START, *PREFIX, 2368]
    one, two = scorer.model.encode_text(rows)
    assert float((one - two).abs().max()) > 1e-3
    full = "cat " * 72  # what just fits, and one word more
    assert torch.equal(*scorer.tokens([full, full + "dog"]))


def test_cosines_are_those_of_the_model_by_hand(scorer):
    """encode_image and encode_text of open_clip, on tokens and pixels made here.

    Mutations: all pairs, a factor, negative cosines cut off, no normalisation of pixels.
    """
    images = pictures(3, SIDE, SIDE)  # of the model's size, so that nothing is resized
    tokens = torch.zeros(3, 77, dtype=torch.long)
    for row, own in zip(tokens, ([2368], [1929, 1929], [736, 2368])):
        row[: len(own) + 5] = torch.tensor([START, *PREFIX, *own, END])
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    with torch.no_grad():
        seen = scorer.model.encode_image((images / 255 - mean) / std)
        read = scorer.model.encode_text(tokens)
    expected = torch.nn.functional.cosine_similarity(seen, read).double()
    found = scorer.cosines(images, ["cat", "dog dog", "red cat"])
    assert_close(found, expected, atol=1e-6, rtol=0)
    assert float(expected.min()) < 0 < float(expected.max())
    assert found.dtype == torch.float64 and scorer.factor == 1


def test_pictures_and_prompts_must_go_together(scorer):
    with pytest.raises(ValueError, match="2 images do not go with 1 prompts"):
        scorer.cosines(pictures(2, SIDE, SIDE), ["cat"])


def test_only_weights_of_the_given_hash_have_the_models_name(folder, scorer, monkeypatch):
    """Mutation: any folder's score is called ViT-g-14's."""
    monkeypatch.setattr(open_clip_score, "_is_named", lambda config: True)
    assert scorer.figure == "CLIP[open_clip-unverified]" and not scorer.protocol["clip_verified"]
    digest = file_sha256(folder / WEIGHTS)
    assert scorer.protocol["clip_sha256"] == digest
    assert read_open_clip(folder, sha256=digest).figure == "CLIP-ViT-g-14"
    with pytest.raises(ValueError, match=f"SHA-256 {digest}, which should begin with 00000000"):
        read_open_clip(folder, sha256="0" * 8)


def test_what_is_no_hash_verifies_nothing(folder, monkeypatch):
    """An unset variable gives "", with which every hash begins.  Mutation: `begins` takes any text."""
    monkeypatch.setattr(open_clip_score, "_is_named", lambda config: True)
    digest = file_sha256(folder / WEIGHTS)
    for text in ("", digest[:7], digest + "0", digest.upper()):
        with pytest.raises(ValueError, match="is no SHA-256: give the 64 hexadecimal digits"):
            read_open_clip(folder, sha256=text)
    assert read_open_clip(folder, sha256=digest[:8]).protocol["clip_verified"]


def test_another_model_does_not_have_the_name_by_its_hash(folder):
    """Mutation: the hash of any weights, which the user gives, makes them ViT-g-14's."""
    with pytest.raises(ValueError, match=r"describes another model than ViT-g-14.*leave the hash out"):
        read_open_clip(folder, sha256=file_sha256(folder / WEIGHTS))


@pytest.mark.parametrize(
    ("part", "name", "value"), [("", "embed_dim", 512), ("vision_cfg", "layers", 32), ("text_cfg", "heads", 8)]
)
def test_the_towers_are_those_of_open_clips_own_model(tmp_path, part, name, value):
    """open_clip's settings of ViT-g-14 pass; each with one other number does not."""
    settings = pytest.importorskip("open_clip", reason="make oracles").get_model_config("ViT-g-14")
    (tmp_path / WEIGHTS).touch()
    (tmp_path / CONFIG).write_text(json.dumps({"model_cfg": settings}))
    check_open_clip(tmp_path, "0" * 64)
    (settings[part] if part else settings)[name] = value
    (tmp_path / CONFIG).write_text(json.dumps({"model_cfg": settings}))
    with pytest.raises(ValueError, match="another model"):
        check_open_clip(tmp_path, "0" * 64)


def test_missing_files_and_a_missing_package_are_named(tmp_path, monkeypatch):
    """Weights of another format would be unpickled."""
    with pytest.raises(FileNotFoundError, match=f"no {CONFIG} in .*ViT-g-14"):
        check_open_clip(tmp_path)
    (tmp_path / CONFIG).touch()
    (tmp_path / "open_clip_pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=f"no {WEIGHTS} in"):
        check_open_clip(tmp_path)
    (tmp_path / WEIGHTS).touch()
    monkeypatch.setattr("fewstep.metrics.open_clip_score.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fewstep\[eval\]'"):
        check_open_clip(tmp_path)


def test_a_hash_of_nothing_is_refused(tmp_path):
    request = Request("edm-fid50k", clip=tmp_path, clip_sha256="00", device="cpu")
    with pytest.raises(ValueError, match="--clip-sha256 goes with --clip FOLDER and dmd2-coco30k or dmd2-sdxl"):
        measure(tmp_path, request)


def test_what_is_no_hash_is_refused_before_weights_are_read(tmp_path):
    """Mutation: only what reads the weights looks at it."""
    for given in (Request("dmd2-coco30k", clip=tmp_path, clip_sha256=""), Request("edm-fid50k", sha256="")):
        with pytest.raises(ValueError, match="'' is no SHA-256"):
            measure(tmp_path, given)


class Corners(torch.nn.Module):
    """Inception's stand-in: two corners of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(6, 4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([pixels[:, :, 0, 0], pixels[:, :, -1, -1]], 1)


@pytest.mark.parametrize("name", sorted(DMD2_CLIP))
def test_the_protocols_show_it_the_middle_square_at_256(name, folder, scorer, tmp_path, monkeypatch):
    """By PIL from the pictures themselves.  Mutation: SDXL's pictures come by way of the 512 that Inception sees."""
    monkeypatch.setattr(inception, "Inception", Corners)
    torch.save(Corners().state_dict(), tmp_path / inception.FILE)
    prompts, rows = [f"cat {i}" for i in range(8)], []
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    for place, seed in (("images", 0), ("reals", 1)):
        (tmp_path / place).mkdir()
        for i, pixels in enumerate(numpy.random.default_rng(seed).integers(0, 256, (8, 530, 601, 3), numpy.uint8)):
            Image.fromarray(pixels).save(tmp_path / place / f"{i}.png", compress_level=0)
            square = Image.fromarray(pixels[:, 36:566])
            rows += [numpy.array(square.resize((256, 256), Image.Resampling.LANCZOS))] if place == "images" else []
    request = Request(
        name,
        reference=tmp_path / "reals",
        weights=tmp_path / inception.FILE,
        unverified=True,
        clip=folder,
        prompts=tmp_path / "prompts.txt",
        device="cpu",
    )
    (record,) = measure(tmp_path / "images", request)
    shown = torch.from_numpy(numpy.stack(rows)).permute(0, 3, 1, 2)
    expected = float(scorer.cosines(shown, prompts).mean())
    assert record["figures"]["CLIP[open_clip-unverified]@8"] == pytest.approx(expected, abs=1e-7)
    assert record["clip"] == scorer.protocol and "clip_score@8" not in record["figures"]
    assert clip_view(PROTOCOLS[name]) == replace(PROTOCOLS[name], size=256)
