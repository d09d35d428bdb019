"""Prompts to conditions by the pipeline's own encoder."""

import gc
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from weakref import ref

import pytest
import torch
from diffusers import AutoencoderKL

from fewstep.teachers import codecs
from fewstep.teachers.codecs import PipelineEncoder, TextEncoders, VAECodec
from fewstep.teachers.pipelines import load_teacher

PROMPTS = ["a photo of a bag", "an ankle boot, black and white"]


def test_embedding_does_not_depend_on_batch_neighbours(folder, tmp_path):
    """Fails if a batch is encoded in one call: the pipeline pads to its longest prompt, then again to 16 in front,
    which are the same side with the embedded teacher's tokenizer but not with others."""
    copy = Path(shutil.copytree(folder, tmp_path / "right"))
    config = copy / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"padding_side": "right"}))
    teacher = load_teacher(str(copy))
    together = teacher.encode([*PROMPTS, "coat", ""])
    for i, prompt in enumerate([*PROMPTS, "coat", ""]):
        assert torch.equal(together.tensors["text"][i : i + 1], teacher.encode([prompt]).tensors["text"])


def test_empty_prompt_is_the_unconditional_branch(teacher):
    found = teacher.encode(PROMPTS)
    assert torch.equal(found.null["text"], teacher.encode([""]).tensors["text"])
    assert not torch.equal(found.tensors["text"][0], found.null["text"][0])


def rows(*lengths):
    """An encoder whose prompt "n" is n rows of n + 1; the empty prompt is two rows of ones."""
    encoder = PipelineEncoder(lambda prompt: {"text": torch.full((1, int(prompt or 2), 3), int(prompt or 0) + 1.0)})
    return encoder([str(n) for n in lengths])


def test_shorter_prompts_are_padded_and_their_length_is_told():
    found = rows(4, 2, 5)
    assert found.tensors["length"].tolist() == [4, 2, 5] and found.null["length"].tolist() == [2]
    assert found.tensors["text"].shape == (3, 5, 3) and found.null["text"].shape == (1, 5, 3)
    assert [int((row != 0).all(1).sum()) for row in found.tensors["text"]] == [4, 2, 5]


def test_unconditional_rows_are_as_long_as_the_empty_prompt():
    """Fails if `length` of the null is left out: its padding would be taken for text."""
    found = rows(4, 5).unconditional()
    assert found.tensors["length"].tolist() == [2, 2]
    assert torch.equal(found.tensors["text"][:, :2], torch.ones(2, 2, 3))


@pytest.mark.parametrize(("lengths", "told"), [((2, 2), False), ((4, 4), True)])
def test_length_is_left_out_where_all_are_equal(lengths, told):
    """The empty prompt counts: guidance runs on it."""
    assert ("length" in rows(*lengths).tensors) is told


def test_pictures_are_rendered_with_a_gradient_and_not_clamped(teacher):
    """`decode` is `render`, clamped.  Fails if either is the other's graph or clamp."""
    latents = (30 * torch.randn(2, *teacher.shape)).requires_grad_()
    shown = teacher.codec.render(latents)
    assert shown.abs().max() > 1
    assert torch.equal(teacher.codec.decode(latents), shown.detach().clamp(-1, 1))
    shown.sum().backward()
    assert latents.grad is not None and latents.grad.abs().max() > 0


def test_features_are_every_stages_maps(teacher):
    images = (torch.rand(2, 1, 16, 16) * 2 - 1).requires_grad_()
    maps = teacher.codec.features(images)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 8), (2, 8, 4, 4), (2, 8, 4, 4)]
    maps[-1].sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0


class Moved(torch.nn.Module):
    """A network that notes where it was sent, on a machine with one device."""

    def __init__(self):
        super().__init__()
        self.device, self.been = "cpu", []
        self.config = SimpleNamespace(block_out_channels=(1,), in_channels=1, scaling_factor=1.0)
        self.dtype = torch.float32

    def to(self, device):
        self.device = device
        self.been.append(str(device))
        return self

    def decode(self, x, return_dict):
        assert str(self.device) == str(x.device)
        return (x,)

    def encode(self, x):
        assert str(self.device) == str(x.device)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: x))


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_vae_comes_back_from_where_its_input_is(what):
    """Fails if it stays, where training needs the room; and if a gradient through `render` lost its weights."""
    vae = Moved()
    getattr(VAECodec(vae), what)(torch.zeros(2, 1, 4, 4, device="meta"))
    assert vae.been[0] == "meta" and vae.device == "cpu"
    VAECodec(vae).render(torch.zeros(2, 1, 4, 4, device="meta"))
    assert str(vae.device) == "meta"


def test_pictures_are_encoded_some_at_a_time(teacher, monkeypatch):
    images = torch.rand(5, 1, 16, 16) * 2 - 1
    whole = teacher.codec.encode(images)
    monkeypatch.setattr(codecs, "PIXELS", 2 * 16 * 16)
    torch.testing.assert_close(teacher.codec.encode(images), whole, atol=1e-5, rtol=1e-5)


def test_text_encoders_are_on_a_device_while_they_encode():
    parts = {"text_encoder": Moved(), "text_encoder_2": Moved(), "unet": Moved(), "text_encoder_3": None}
    encoders = TextEncoders(SimpleNamespace(components=parts, **parts), load=lambda **_: None)
    with pytest.raises(KeyError), encoders.on("meta"):
        raise KeyError  # they come back all the same
    assert [part.been for part in parts.values() if part] == [["meta", "cpu"], ["meta", "cpu"], []]


def test_released_text_encoders_are_gone_and_come_back_for_a_new_prompt(folder, teacher):
    """Fails if anything holds them, if a kept prompt needs them, or if they come back with other weights."""
    loaded = load_teacher(str(folder))
    (old,) = map(ref, loaded.encoders.modules())
    guided = loaded.against("shoes")
    guided.release(keep=PROMPTS)
    gc.collect()
    assert old() is None
    assert len(guided.encode(PROMPTS).null["text"]) == 1 and not loaded.encoders.modules()
    assert torch.equal(loaded.encode(["coat"]).tensors["text"], teacher.encode(["coat"]).tensors["text"])
    assert len(loaded.encoders.modules()) == 1


def test_the_prompts_used_last_are_remembered(monkeypatch):
    """Fails if all are forgotten at once: those that are kept by a release would be among them."""
    asked = []

    def encode(prompt):
        asked.append(prompt)
        return {"text": torch.zeros(1, 2, 4)}

    monkeypatch.setattr(codecs, "KNOWN", 3 * 2 * 4 * 4)
    encoder = PipelineEncoder(encode)
    for prompt in "abcab":
        encoder([prompt])
    assert asked == ["a", "", "b", "c", "a", "b"]  # three are known: at "c" "a" goes, and the empty one never


def test_tiling_decodes_a_large_picture_in_parts(folder):
    """Fails if the option is dropped: then the decoder sees the whole picture.  A small one has one part."""
    whole, tiled = load_teacher(str(folder)), load_teacher(str(folder), tiling=True)
    assert tiled.options == {"tiling": True}
    seen, x = [], torch.randn(1, *whole.shape)
    large = torch.randn(1, whole.shape[0], *(2 * side for side in whole.shape[1:]))
    for part in vae_of(tiled).decoder, vae_of(whole).decoder:
        part.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[2:])))
    assert torch.equal(whole.codec.decode(x), tiled.codec.decode(x))
    seen.clear()
    assert tiled.codec.decode(large).shape == whole.codec.decode(large).shape
    *parts, last = seen
    assert last == large.shape[2:] and len(parts) > 1
    assert max(parts) == whole.shape[1:]


def test_tiling_is_refused_where_the_vae_has_none(folder, monkeypatch):
    def none(self):
        raise NotImplementedError  # as diffusers' mixin where a VAE has no `use_tiling`

    monkeypatch.setattr(AutoencoderKL, "enable_tiling", none)
    with pytest.raises(ValueError, match="AutoencoderKL, has no tiles; leave it out"):
        load_teacher(str(folder), tiling=True)


def vae_of(teacher):
    return teacher.codec._vae
