"""Claims about the CLIP score; a random CLIP of a few thousand weights, transformers' own forward pass as oracle."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from fewstep.measuring import Request
from fewstep.metrics import clip_score as module
from fewstep.metrics.clip_score import FASHION_CLIP, ClipScorer, agreement, clip_score, load_clip_scorer
from fewstep.metrics.features import dequantise, file_sha256
from fewstep.teachers.fashion_build.captions import build_tokenizer

needs_clip = pytest.mark.skipif(not (FASHION_CLIP / "card.json").is_file(), reason="the CLIP is not built yet")
LENGTH = 9


def save_clip(folder, channels: int, side: int = 8, eos: int | None = None):
    """A random CLIP with the captions' tokenizer (cut to 9 tokens) and a processor for pictures of another size."""
    tokenizer = build_tokenizer()
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": side, "patch_size": 4, "num_channels": channels}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=size | text, vision_config=size | vision, projection_dim=6)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.4] * channels,
        image_std=[0.3] * channels,
        do_convert_rgb=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    return load_clip_scorer(save_clip(tmp_path_factory.mktemp("grey"), 1))


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    return load_clip_scorer(save_clip(tmp_path_factory.mktemp("colour"), 3))


def pictures(n: int, channels: int) -> torch.Tensor:
    return torch.rand(n, channels, 12, 10, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_score_is_the_mean_cosine_of_own_pairs(grey, colour):
    """CLIPModel's own logits over its temperature, on the diagonal only. Mutation: mean over all pairs."""
    prompts = ["a bag", "a coat", "a bag", "a photo of a shirt", "dress"]
    for scorer, channels in ((grey, 1), (colour, 3)):
        images = pictures(5, channels)
        logits = forward(scorer, images, prompts)
        assert clip_score(scorer, images, prompts) == pytest.approx(100 * float(logits.diagonal().mean()), rel=1e-4)
        assert len({round(float(value), 6) for value in logits.flatten()}) > 10


def forward(scorer, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Cosines [B, B] by CLIPModel.forward on what the processor and the tokenizer give."""
    raw = ((images * 127.5 + 128).clip(0, 255)).to(torch.uint8)
    pixels = scorer.processor(list(raw.numpy()), return_tensors="pt", input_data_format="channels_first")
    tokens = scorer.tokenizer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = scorer.model(input_ids=tokens.input_ids, pixel_values=pixels["pixel_values"])
    return output.logits_per_image / scorer.model.logit_scale.exp()


def test_score_is_not_clamped(grey, monkeypatch):
    """With the picture embeddings turned round the score changes its sign and nothing else."""
    images, prompts = pictures(4, 1), ["a bag", "a coat", "a shirt", "a dress"]
    before = clip_score(grey, images, prompts)
    weight = grey.model.visual_projection.weight
    monkeypatch.setattr(weight, "data", -weight.data)
    assert clip_score(grey, images, prompts) == pytest.approx(-before, rel=1e-6)
    assert min(before, -before) < 0


def test_long_texts_keep_their_end_token_and_differ(grey):
    """Cut ids lose the end token and pool at the start: two long captions would get one embedding."""
    start = "a black and white photo of"
    one, two, cut = grey.embed_texts([f"{start} a {'coat ' * 9}", f"{start} two {'coat ' * 9}", f"{start} a coat"])
    assert not torch.allclose(one, two)
    assert_close(one, cut)  # seven words fit between the two special tokens


def test_scores_do_not_depend_on_batches_or_neighbours(grey):
    """Padding to the longest of a batch would shift a left-padded text."""
    images = pictures(5, 1)
    prompts = ["bag", "a photo of a coat", "a black and white photo of a dress", "bag", "a shirt"]
    together = grey.cosines(images, prompts)
    apart = torch.cat([grey.cosines(images[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    assert_close(together, apart, atol=1e-6, rtol=0)
    assert_close(grey.cosines(images, prompts, batch_size=2), together, atol=1e-6, rtol=0)
    assert together.shape == (5,) and together.dtype == torch.float64


def test_pictures_are_those_of_a_file(grey):
    """Floats and the bytes they are stored as have equal embeddings."""
    raw = torch.randint(256, (3, 1, 12, 10), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(grey.embed_images(raw), grey.embed_images(dequantise(raw)))


def test_grey_pictures_are_repeated_only_for_a_colour_tower(grey, colour):
    """One channel to three equal ones; three channels for a grey tower are refused, not averaged."""
    images = pictures(3, 1)
    assert_close(colour.embed_images(images), colour.embed_images(images.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match=r"\[B, 1, H, W\]"):
        grey.embed_images(pictures(3, 3))


def test_pictures_that_are_not_finite_are_refused(grey):
    with pytest.raises(ValueError, match="not finite"):
        grey.embed_images(torch.full((2, 1, 12, 10), torch.inf))


def test_pictures_and_prompts_must_go_together(grey):
    with pytest.raises(ValueError, match="2 images do not go with 1 prompts"):
        clip_score(grey, pictures(2, 1), ["a bag"])
    with pytest.raises(ValueError, match="at least one"):
        clip_score(grey, pictures(0, 1), [])


def test_a_tokenizer_without_end_token_is_refused(grey):
    """The text tower would pool at position 0 of every text."""

    class Cut:
        eos_token, eos_token_id = grey.tokenizer.eos_token, grey.tokenizer.eos_token_id

        def __call__(self, texts, **options):
            tokens = grey.tokenizer(texts, **options)
            tokens["input_ids"] = tokens.input_ids[:, :-1]
            return tokens

    with pytest.raises(ValueError, match="no end token"):
        replace(grey, tokenizer=Cut()).embed_texts(["a bag"])


@pytest.mark.parametrize(
    "change, message",
    [({"zero_shot_accuracy": 0.84}, r"0\.84, below 0\.85"), ({"sha256": "0" * 64}, "other weights"), ({}, None)],
)
def test_a_card_of_a_bad_model_or_of_another_is_refused(tmp_path, change, message):
    """nan would pass `accuracy < 0.85`, so the check is `not accuracy >= 0.85`."""
    save_clip(tmp_path, 1)
    card = {"zero_shot_accuracy": 0.85, "sha256": file_sha256(tmp_path / "model.safetensors")} | change
    (tmp_path / "card.json").write_text(json.dumps(card))
    if message is None:
        assert load_clip_scorer(tmp_path).protocol["clip_zero_shot_accuracy"] == 0.85
        return
    with pytest.raises(ValueError, match=message):
        load_clip_scorer(tmp_path)


def test_missing_weights_name_the_stage(tmp_path):
    with pytest.raises(FileNotFoundError, match="--stage clip"):
        load_clip_scorer(tmp_path)


def test_packaged_model_needs_its_card(tmp_path, monkeypatch):
    """A foreign model comes without a card, ours must not."""
    save_clip(tmp_path, 1)
    assert load_clip_scorer(tmp_path).protocol["clip_zero_shot_accuracy"] is None
    monkeypatch.setattr(module, "FASHION_CLIP", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"card\.json"):
        load_clip_scorer(tmp_path)


@needs_clip
def test_packaged_text_tower_is_the_teachers(monkeypatch):
    """Bit for bit the text encoder of fashion-dit: captions mean the same to teacher and score."""
    from safetensors.torch import load_file

    theirs = load_file(FASHION_CLIP.parent / "fashion-dit" / "text_encoder" / "model.safetensors")
    ours = load_file(FASHION_CLIP / "model.safetensors")
    assert theirs
    for name, value in theirs.items():
        assert torch.equal(ours[f"text_model.{name.removeprefix('text_model.')}"], value), name


@needs_clip
def test_packaged_model_is_accepted():
    """Its card lies above the bar and belongs to its weights."""
    scorer = load_clip_scorer()
    assert scorer.protocol["clip_zero_shot_accuracy"] >= 0.85
    assert scorer.protocol["clip_normalisation"] == {"mean": [0.5], "std": [0.5]}


@pytest.mark.parametrize("side", [8, 12])
def test_it_sees_with_a_gradient_what_it_scores(grey, side):
    """Pictures of bytes: the same but for rounding where nothing is resized, much the same where PIL and torch do it.

    Fails for another normalisation, and for a graph that ends on the way."""
    torch.manual_seed(1)
    smooth = torch.nn.functional.interpolate(torch.rand(4, 1, 4, 4), (side, side), mode="bicubic")
    images = dequantise((smooth * 255).clip(0, 255).to(torch.uint8)).requires_grad_()
    texts = ["a bag", "a coat", "a bag", "a dress"]
    cosines = agreement(grey)(images, texts)
    exact = grey.cosines(images.detach(), texts).float()
    assert_close(cosines, exact, atol=1e-5 if side == 8 else 5e-3, rtol=0)
    cosines.sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and images.grad.flatten(1).any(1).all()


def test_a_shorter_edge_is_resized_and_the_middle_kept(grey):
    """A wide picture's middle square is all that counts."""
    torch.manual_seed(2)
    wide = torch.rand(1, 1, 8, 16) * 2 - 1
    assert_close(grey.see(wide), grey.see(wide[..., 4:12]))


def test_a_prompt_is_read_once(grey, monkeypatch):
    read, asked = agreement(grey), []
    monkeypatch.setattr(
        module.ClipScorer, "embed_texts", lambda self, texts: asked.extend(texts) or torch.ones(len(texts), 6)
    )
    for _ in range(2):
        read(torch.zeros(3, 1, 8, 8), ["a bag", "a coat", "a bag"])
    assert asked == ["a bag", "a coat"]


def test_a_measurements_clip_is_on_its_device(tmp_path, monkeypatch):
    """Mutation: a CLIPModel stays on the CPU, whatever --device says; meta stands for a GPU."""
    monkeypatch.setattr("fewstep.measuring.request.device_of", torch.device)
    scorer = Request("edm-fid50k", clip=save_clip(tmp_path, 1), device="meta").scorer()
    assert isinstance(scorer, ClipScorer) and scorer.model.device.type == "meta"
