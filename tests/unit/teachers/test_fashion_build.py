"""Claims about the build of the embedded teacher; no data set needed, and no weights except in the last tests."""

import gzip
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.testing import assert_close
from transformers import CLIPTokenizer

from fewstep.metrics.features import FashionClassifier, dequantise, extract, quantise
from fewstep.teachers.fashion_build import captions, loop, vae
from fewstep.teachers.fashion_build.__main__ import DEFAULT_OUT
from fewstep.teachers.fashion_build.card import FEW, MANY, pending
from fewstep.teachers.fashion_build.classifier import REFERENCE_TRACE, fix_gauge
from fewstep.teachers.fashion_build.data import load_pictures, read_idx
from fewstep.teachers.fashion_build.dit import draw_captions, flow_matching_loss
from fewstep.teachers.fashion_build.pipeline import (
    encode_captions,
    euler_sample,
    load_pipeline,
    pipeline_sigmas,
    sample_noise,
)
from fewstep.teachers.fashion_build.text import contrastive_loss

FOLDER = DEFAULT_OUT / "fashion-dit"
needs_weights = pytest.mark.skipif(not (FOLDER / "model_index.json").is_file(), reason="the weights are not built yet")


def idx_bytes(values: torch.Tensor) -> bytes:
    """An idx file of unsigned bytes in memory."""
    return struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape) + bytes(values.flatten().tolist())


def write_split(folder, count: int, split: str = "t10k") -> torch.Tensor:
    """A split of `count` random pictures in a folder; returns its [N, 28, 28] images."""
    images = torch.randint(256, (count, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
    (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx_bytes(torch.arange(count).to(torch.uint8)))
    return images


def test_pictures_are_the_files_content_with_a_black_border(tmp_path):
    """28x28 lands in the middle of 32x32, from gzipped and plain files alike."""
    images = write_split(tmp_path, 3)
    pictures = load_pictures("t10k", tmp_path)
    assert pictures.images.shape == (3, 1, 32, 32)
    assert torch.equal(pictures.images[:, 0, 2:30, 2:30], images)
    assert int(pictures.images.sum()) == int(images.sum())
    assert pictures.labels.tolist() == [0, 1, 2]


def test_missing_data_names_the_debian_package_and_the_option(tmp_path):
    """The remedy must stand in the message."""
    with pytest.raises(FileNotFoundError, match=r"dataset-fashion-mnist.*--data"):
        load_pictures("train", tmp_path)


@pytest.mark.parametrize("raw, message", [(b"PNG!1234", "not an idx file"), (None, "cut off")])
def test_a_damaged_idx_file_is_refused(tmp_path, raw, message):
    """Neither another format nor a short file may be read as pictures."""
    path = tmp_path / "file"
    path.write_bytes(raw or idx_bytes(torch.zeros(2, 28, 28, dtype=torch.uint8))[:-1])
    with pytest.raises(ValueError, match=message):
        read_idx(path)


def test_bytes_survive_the_way_through_floats():
    """quantise(dequantise(b)) = b for all 256 bytes, so measured pictures are those of a file."""
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantise(dequantise(levels)), levels)


def test_features_are_those_of_the_quantised_picture():
    """A float picture and the bytes it is stored as have equal features, whatever the batch size."""
    torch.manual_seed(0)
    model = FashionClassifier().eval().requires_grad_(False)
    images = torch.rand(5, 1, 32, 32) * 2.4 - 1.2
    features, logits = extract(model, images)
    again, _ = extract(model, quantise(images), batch_size=2)
    assert features.shape == (5, 128) and logits.shape == (5, 10)
    assert_close(again, features, atol=1e-5, rtol=1e-5)
    assert float((model(images)[0] - features).abs().max()) > 1e-4


def test_scale_of_the_features_is_fixed_without_changing_the_classifier():
    """Features times c, logits unchanged: the ReLU between them is homogeneous."""
    torch.manual_seed(0)
    model = FashionClassifier().eval().requires_grad_(False)
    images = torch.rand(4, 1, 32, 32) * 2 - 1
    features, logits = extract(model, images)
    fix_gauge(model, trace=4 * REFERENCE_TRACE)
    scaled, unchanged = extract(model, images)
    assert_close(scaled, features / 2)
    assert_close(unchanged, logits)


def test_every_caption_word_is_one_token_and_fits():
    """The learnt merges cover the captions: start, one token per word or punctuation mark, end, at most 16."""
    tokenizer = captions.build_tokenizer()
    for caption in captions.all_captions():
        ids = tokenizer(caption).input_ids
        words = caption.replace(",", " ,").replace("-", " - ").split()
        assert tokenizer.convert_ids_to_tokens(ids)[1:-1] == [word + "</w>" for word in words]
        assert len(ids) <= captions.MAX_TOKENS


def test_tokenizer_encodes_any_text_without_unknown_tokens():
    """Bytes back up the vocabulary: the end token (also the unknown one) occurs once, at the end."""
    tokenizer = captions.build_tokenizer()
    ids = tokenizer("Größe 42 ✓").input_ids
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id


def test_saved_tokenizer_is_the_same(tmp_path):
    """Ids, padding side, length and specials survive save and reload."""
    tokenizer = captions.build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    texts = [*captions.all_captions(), "", "something else"]
    assert again(texts, padding="max_length").input_ids == tokenizer(texts, padding="max_length").input_ids
    assert (again.padding_side, again.model_max_length, again.pad_token_id) == ("left", 16, tokenizer.pad_token_id)


def test_prompts_are_balanced_and_do_not_depend_on_chunks():
    """100 prompts are every caption once; starting later gives the rest of the same list."""
    prompts, labels = captions.balanced_prompts(100)
    assert sorted(prompts) == sorted(captions.all_captions())
    assert all(prompt in captions.captions_of(label) for prompt, label in zip(prompts, labels, strict=True))
    assert captions.balanced_prompts(30, 70)[0] == prompts[70:]


def test_contrastive_loss_is_lowest_for_equal_scores_within_a_class():
    """With all pairs of a class positive, the optimum spreads the mass evenly: log 2 for two positives per row."""
    positive = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    scores = torch.where(positive, 50.0, -50.0)
    assert_close(contrastive_loss(scores, positive), torch.tensor(2.0).log())


def test_folded_vae_has_normalised_latents_and_the_same_pictures():
    """z' = (z - mean) / std in the encoder, undone in the decoder; log variances fall by 2 log std."""
    torch.manual_seed(0)
    network = vae.new_vae(3).eval().requires_grad_(False)
    images = torch.randint(256, (4, 1, 32, 32)).to(torch.uint8)
    before = network.encode(dequantise(images)).latent_dist
    pictures = vae.decode(network, before.mean)
    mean, std = before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3))
    vae.fold_statistics(network, mean, std)
    after = network.encode(dequantise(images)).latent_dist
    assert_close(after.mean.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert_close(after.mean.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)
    assert_close(after.std * std[:, None, None], before.std, atol=1e-5, rtol=1e-4)
    assert_close(vae.decode(network, after.mean), pictures, atol=1e-5, rtol=0)


def test_dropped_captions_are_the_last_row():
    """About a tenth of 20,000 draws is the empty prompt (row 100); the others stay within their class."""
    labels = torch.arange(10).repeat(2000)
    rows = draw_captions(labels, torch.Generator().manual_seed(0))
    kept = rows < 100
    assert abs(float((~kept).float().mean()) - 0.1) < 0.01
    assert torch.equal(rows[kept] // 10, labels[kept])


def test_flow_matching_loss_is_zero_for_the_true_velocity():
    """The target is eps - x0 at x_t = (1 - t) x0 + t eps, with t * 1000 as network time; batch = width on purpose."""
    x0, eps = torch.randn(2, 8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, 1, 8)

    def oracle(x_t, text, timestep, *sizes, return_dict):
        assert_close(timestep, 1000 * t)
        assert_close(x_t[3], (1 - t[3]) * x0[3] + t[3] * eps[3])
        return (eps - x0,)

    assert float(flow_matching_loss(oracle, x0, torch.zeros(8, 16, 4), eps, t)) == 0


def test_noise_belongs_to_the_sample_and_not_to_the_chunk():
    """Sample i has the noise of seed + i, wherever its chunk starts."""
    assert torch.equal(sample_noise(2, 4, seed=5, start=3), sample_noise(5, 4, seed=5)[3:])


def test_a_stopped_training_ends_where_an_unbroken_one_does(tmp_path):
    """Killed in its fourth step and started again, a training gives bit-equal averaged weights."""
    plan = loop.Plan(name="stage", minutes=1, steps=6, peak_lr=0.1, save_every=0.0)

    def run(folder, kill_at=None):
        calls = []

        def loss_of(model, generator):
            calls.append(1)
            if len(calls) == kill_at:
                raise KeyboardInterrupt
            wanted = torch.randn(model.weight.shape, generator=generator)
            return (model.weight - wanted).square().mean() + model.bias.sum() ** 2

        torch.manual_seed(0)
        return loop.train(plan, torch.nn.Linear(3, 2), loss_of, folder)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", kill_at=4)
    again = run(tmp_path / "broken")
    assert torch.equal(whole.weight, again.weight) and torch.equal(whole.bias, again.bias)


def test_sharded_gradient_is_the_mean_over_the_shards():
    """Three shards draw differently, their gradients are averaged, and running them in threads changes nothing."""
    model = torch.nn.Linear(3, 2)

    def loss_of(net, generator):
        return (net.weight * torch.randn(2, 3, generator=generator)).sum()

    plan = loop.Plan(name="stage", minutes=1, peak_lr=0.1, seed=7, shards=3)
    with ThreadPoolExecutor(2) as pool:
        loop.step_gradient(plan, model, loss_of, 5, pool)
    seeds = [(7 * 1_000_003 + 5) * 64 + shard for shard in range(3)]
    expected = torch.stack([torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).mean(0)
    assert model.weight.grad is not None
    assert_close(model.weight.grad, expected)
    assert model.bias.grad is None


def test_cells_are_measured_in_order_of_value():
    """First 50 steps at three guidances, then many samples at the best of them, then the other step counts."""
    rows = []
    order = []
    while (cell := pending(rows)) is not None:
        order.append((cell.steps, cell.cfg, cell.n))
        rows.append({"steps": cell.steps, "cfg": cell.cfg, "n": cell.n, "fmd": abs(cell.cfg - 1.9)})
    assert order[:5] == [(50, 1.5, FEW), (50, 2.0, FEW), (50, 1.0, FEW), (50, 2.0, MANY), (1, 1.5, FEW)]
    assert len(order) == 5 * 5 + 5


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_grid_is_the_pipelines_own(steps):
    """From 1 to 1/1000 in whole timesteps, then 0; a single step goes from 1 to 0."""
    sigmas = pipeline_sigmas(steps)
    assert len(sigmas) == steps + 1 and float(sigmas[0]) == 1 and float(sigmas[-1]) == 0
    assert bool((sigmas.diff() < 0).all())


@needs_weights
@pytest.mark.parametrize("steps, guidance", [(1, 1.0), (3, 2.0)])
def test_plain_sampler_equals_the_pipeline(steps, guidance):
    """Same prompts, generators and steps: latents within 1e-4 of CogView4Pipeline's, so the card's figures are its."""
    pipeline = load_pipeline(FOLDER)
    prompts = ["a photo of a dress", "bag, black and white"]
    noise = sample_noise(2, pipeline.transformer.config.in_channels, seed=7)
    text, empty = encode_captions(pipeline, prompts), encode_captions(pipeline, [""])
    ours = euler_sample(pipeline.transformer, noise, text, empty, num_steps=steps, guidance=guidance)
    theirs = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator("cpu").manual_seed(7 + index) for index in range(2)],
        output_type="latent",
    ).images
    assert_close(ours, theirs, atol=1e-4, rtol=0)


@needs_weights
def test_an_encoding_does_not_depend_on_its_neighbours():
    """Right padding would shift a short caption when a longer one is in the batch."""
    pipeline = load_pipeline(FOLDER)
    alone = encode_captions(pipeline, ["bag"])
    together = encode_captions(pipeline, ["bag", "a black and white photo of a pair of trousers"])
    assert alone.shape[1] == captions.MAX_TOKENS
    assert_close(together[:1], alone, atol=1e-6, rtol=0)
