"""The GAN head: what it reads, what it answers."""

import pytest
import torch

from fewstep.models.discriminator import Head, Pooled
from tests.unit.models.test_adapters import TEACHERS, inputs

SHAPES = {
    "map": (16, 8, 8),
    "small": (12, 3, 3),
    "wide": (8, 16, 4),
    "tokens": (16, 32),
    "row": (7, 32),
    "points": (24,),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_any_feature_gives_one_logit_per_sample(kind: str):
    """Fails if tokens are read as channels, or if a map smaller than 4x4 is refused."""
    head = Head({kind: SHAPES[kind]})
    assert head({kind: torch.randn(5, *SHAPES[kind])}).shape == (5, 1)


def test_logits_of_a_sample_do_not_depend_on_its_neighbours():
    """Fails with batch norm: the generator could be judged by its company."""
    head, x = Head(SHAPES), {k: torch.randn(5, *shape) for k, shape in SHAPES.items()}
    torch.testing.assert_close(head(x)[2:3], head({k: v[2:3] for k, v in x.items()}))


def test_tokens_lie_on_their_square_map():
    """Row-major, as patches are.  Fails with the transposed map."""
    tokens = torch.randn(2, 16, 8)
    head = Head({"x": (16, 8)})
    as_map = Head({"x": (8, 4, 4)})
    as_map.load_state_dict(head.state_dict())
    torch.testing.assert_close(head({"x": tokens}), as_map({"x": tokens.transpose(1, 2).reshape(2, 8, 4, 4)}))


@pytest.mark.parametrize("channels", [8, 32, 128, 768])
def test_a_1x1_map_survives_its_norm(channels: int):
    """Fails with 32 groups on 32 channels: each group is one value, which a norm maps to zero for every sample."""
    head = Head({"x": (channels, 4, 4)})
    assert head({"x": torch.randn(6, channels, 4, 4)}).std() > 1e-3


@pytest.mark.parametrize("name", TEACHERS)
def test_a_probe_finds_the_features_and_seeds_the_weights(name: str):
    denoiser = TEACHERS[name]()
    taps = denoiser.backbone.taps
    x, t, cond = inputs(1)
    heads = [Head.probe(denoiser, (4, 4, 4), cond, taps, seed) for seed in (3, 3, 4)]
    same, other = (
        all(torch.equal(a, b) for a, b in zip(heads[0].parameters(), head.parameters())) for head in heads[1:]
    )
    assert same and not other
    assert heads[0](denoiser(x, t, cond, taps=taps).taps).shape == (1, len(taps))


def test_half_precision_features_are_judged_in_float32():
    head = Head({"x": (8, 4, 4)})
    with torch.autocast("cpu", torch.bfloat16):
        assert head({"x": torch.randn(2, 8, 4, 4).bfloat16()}).dtype == torch.float32


def test_a_wide_feature_is_narrowed_at_once(monkeypatch):
    """Fails if a head is as wide as a large transformer: its weights would outnumber the transformer's."""
    monkeypatch.setattr("fewstep.models.discriminator.WIDEST", 32)
    head = Head({"tokens": (64, 128)})
    widths = [tuple(m.weight.shape[:2]) for m in head.modules() if isinstance(m, torch.nn.Conv2d)]
    assert widths == [(32, 128), (32, 32), (1, 32)]
    assert head({"tokens": torch.randn(3, 64, 128)}).shape == (3, 1)


def test_pooled_logits_are_means_over_channels_at_every_place():
    """The same of a map and of its tokens; one of a plain feature.  Fails with a mean over places."""
    maps = torch.randn(5, 8, 4, 4)
    features = {"map": maps, "tokens": maps.flatten(2).transpose(1, 2), "plain": maps[:, :, 0, 0]}
    logits = Pooled(tuple(features))(features)
    assert logits.shape == (5, 16 + 16 + 1)
    torch.testing.assert_close(logits[:, :16], maps.sum(1).flatten(1) / 8)
    torch.testing.assert_close(logits[:, 16:32], logits[:, :16])
    torch.testing.assert_close(logits[:, 32], logits[:, 0])


def test_pooled_half_precision_is_summed_in_float32():
    """Fails if the mean is taken first: 8 bits of it would be left."""
    x = torch.randn(4, 64, 3, 3).bfloat16()
    made = Pooled(("x",))({"x": x})
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, x.float().sum(1).flatten(1) / 64)


def test_frames_of_a_video_are_judged_apart():
    """As many stills, [B, T] logits of a head and places frame by frame.  Fails if frames and samples are mixed up."""
    video = torch.randn(3, 16, 2, 8, 8)
    head = Head({"x": (16, 2, 8, 8)})
    logits, pooled = head({"x": video}), Pooled(("x",))({"x": video})
    assert logits.shape == (3, 2)
    for frame in range(2):
        still = {"x": video[:, :, frame]}
        torch.testing.assert_close(logits[:, frame], head(still)[:, 0])
        torch.testing.assert_close(pooled[:, frame * 64 : (frame + 1) * 64], Pooled(("x",))(still))
