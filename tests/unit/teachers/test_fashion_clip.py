"""Claims about the stages `clip` and `references`: what is trained, what is stored, what its card says."""

import gzip
import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import CLIPTextModel

from fewstep.metrics.clip_score import load_clip_scorer, read_clip
from fewstep.metrics.features import dequantise, file_sha256
from fewstep.teachers.fashion_build.__main__ import DEFAULT_OUT, STAGES
from fewstep.teachers.fashion_build.clip import Trained, build_clip, new_clip
from fewstep.teachers.fashion_build.references import first_of_each_class

TEXT = DEFAULT_OUT / "fashion-dit" / "text_encoder"
needs_text = pytest.mark.skipif(not TEXT.is_dir(), reason="the text encoder is not built yet")


def write_data(folder, count: int = 20) -> None:
    """Both splits with `count` random pictures of cyclic classes."""
    for split in ("train", "t10k"):
        images = torch.randint(256, (count, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape)
            path = folder / f"{split}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(head + bytes(values.flatten().tolist())))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The stage run for a few steps on random pictures: folder of the data, of the weights and of the work."""
    data, out, work = (tmp_path_factory.mktemp(name) for name in ("data", "out", "work"))
    write_data(data)
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(DEFAULT_OUT / "fashion-dit" / part, out / "fashion-dit" / part)
    build_clip(data, out, work, minutes=0.005)
    return data, out, work


def test_stages_are_offered():
    assert {"clip", "references"} <= set(STAGES)
    assert list(STAGES).index("text") < list(STAGES).index("clip")
    assert list(STAGES).index("classifier") < list(STAGES).index("references")


@needs_text
def test_text_tower_is_frozen_and_not_among_the_trained():
    """A text tower that moved would no longer be the teacher's."""
    text = CLIPTextModel.from_pretrained(TEXT, dtype=torch.float32)
    clip = new_clip(text)
    trained = {id(p) for p in Trained(clip).parameters()}
    assert all(p.requires_grad for p in Trained(clip).parameters())
    assert not any(p.requires_grad or id(p) in trained for p in clip.text_model.parameters())
    for name, value in text.state_dict().items():
        assert torch.equal(clip.text_model.state_dict()[name], value), name
    vision = sum(p.numel() for p in clip.vision_model.parameters())
    assert 400_000 < vision < 600_000


@needs_text
def test_trained_parts_score_as_the_whole_model_does():
    """Loss and stored model must mean the same: temperature times cosine, as CLIPModel.forward has it."""
    torch.manual_seed(0)
    clip = new_clip(CLIPTextModel.from_pretrained(TEXT, dtype=torch.float32)).eval()
    images = torch.rand(3, 1, 32, 32) * 2 - 1
    tokens = torch.randint(500, (5, 16))
    tokens[:, -1] = clip.config.text_config.eos_token_id
    with torch.no_grad():
        pooled = clip.text_model(input_ids=tokens).pooler_output
        scores = Trained(clip)(images, pooled)
        assert_close(scores, clip(input_ids=tokens, pixel_values=images).logits_per_image, atol=1e-4, rtol=1e-4)


@needs_text
def test_text_tower_is_stored_bit_for_bit(built):
    _, out, _ = built
    ours = load_file(out / "fashion-clip" / "model.safetensors")
    theirs = load_file(TEXT / "model.safetensors")
    assert all(value.dtype == torch.float16 for value in ours.values())
    for name, value in theirs.items():
        assert torch.equal(ours[f"text_model.{name.removeprefix('text_model.')}"], value), name


@needs_text
def test_stored_model_is_the_averaged_one_of_the_restart_point(built):
    """fp16 of the EMA weights, not of the last step's. Mutation: `clip` itself is saved."""
    _, out, work = built
    averaged = {n: v for n, v in load_file(work / "clip.safetensors").items() if n.startswith("ema/")}
    stored = load_file(out / "fashion-clip" / "model.safetensors")
    assert averaged
    for name, value in averaged.items():
        assert torch.equal(stored[name.removeprefix("ema/")], value.half()), name


@needs_text
def test_processor_gives_the_pictures_that_were_trained_on(built):
    """Bytes to [-1, 1] exactly as `dequantise`, without resizing."""
    _, out, _ = built
    raw = torch.arange(1024).reshape(1, 1, 32, 32).remainder(256).to(torch.uint8)
    scorer = read_clip(out / "fashion-clip")
    pixels = scorer.processor(list(raw.numpy()), return_tensors="pt", input_data_format="channels_first")
    assert_close(pixels["pixel_values"], dequantise(raw), atol=1e-6, rtol=0)


@needs_text
def test_card_belongs_to_the_weights_and_a_bad_model_is_refused(built):
    """A few steps on noise give about 10 %, which must not become a measure."""
    _, out, _ = built
    card = json.loads((out / "fashion-clip" / "card.json").read_text())
    assert card["sha256"] == file_sha256(out / "fashion-clip" / "model.safetensors")
    assert card["zero_shot_accuracy"] < 0.85 and card["n_test_images"] == 20
    with pytest.raises(ValueError, match=r"below 0\.85"):
        load_clip_scorer(out / "fashion-clip")


@needs_text
def test_a_finished_stage_is_skipped(built):
    data, out, work = built
    before = (out / "fashion-clip" / "model.safetensors").stat().st_mtime_ns
    build_clip(data, out, work, minutes=5.0)
    assert (out / "fashion-clip" / "model.safetensors").stat().st_mtime_ns == before


def test_reals_are_the_first_of_each_class_in_the_order_of_the_file():
    labels = torch.tensor([3, *range(10), *range(9, -1, -1), 3, 3])
    index = first_of_each_class(labels, 2)
    assert torch.bincount(labels[index]).tolist() == [2] * 10
    assert index.tolist() == sorted(index.tolist())
    assert index[0] == 0 and 21 not in index.tolist()  # of the 3s, the first two
    with pytest.raises(ValueError, match=r"classes \[0, 1"):
        first_of_each_class(labels, 3)
