"""Wan 2.1 and 2.2: transformers over the latents of a whole video [arXiv:2503.20314] on rectified flow.

2.2 of 14 billion has two, for noisy videos and for less noisy ones, which share the times between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fewstep.diffusion import RectifiedFlow
from fewstep.models.denoiser import Backbone, Denoiser, blocks_of, late
from fewstep.models.experts import Experts
from fewstep.teachers.base import FewSteps, Teacher, TeacherCard
from fewstep.teachers.codecs import PipelineEncoder, returning
from fewstep.teachers.flow import check_levels, curved, curved_scheduler, times
from fewstep.teachers.pipelines import FAMILIES
from fewstep.types import Condition

TOKENS = 512
"""Of UMT5's text: the pipeline's default, to which it pads every prompt with zeros."""
SHOWN = 5
"""Frames of a filmstrip at the most."""
Expert = Literal["high", "low"]
"""Of Wan 2.2's two networks, that for the noisier times and that for the others, in their order."""


class Wan(Backbone):
    """WanTransformer3DModel.  Latents [B, C, T, H, W].  Condition: "text" [B, 512, D], UMT5's hidden states."""

    @property
    def taps(self) -> tuple[str, ...]:
        """The `late` blocks."""
        return late(blocks_of(self.module, "blocks"))

    def feature(self, output: Any, x: Tensor) -> Tensor:
        """A block's tokens at their places, [B, D, T, h, w]."""
        config: Any = self.module.config
        places = [side // patch for side, patch in zip(x.shape[2:], config.patch_size, strict=True)]
        return output.transpose(1, 2).unflatten(2, places)

    @property
    def time_embedding(self) -> str:
        """Before the projection to shifts, scales and gates."""
        return "condition_embedder.time_embedder"

    def conditions(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """{"text": (512, D)}, however many the tokenizer allows."""
        return {"text": (TOKENS, self.module.config.text_dim)}  # type: ignore[union-attr]

    @property
    def dtype(self) -> torch.dtype:
        """That of its layers: the first parameter is a table that diffusers loads in float32 always."""
        return self.module.patch_embedding.weight.dtype  # type: ignore[union-attr, return-value]

    def network_time(self, t: Tensor) -> Tensor:
        """0..1000, the level after the scheduler's shift."""
        return t.float() * 1000.0

    def forward(self, x: Tensor, network_time: Tensor, cond: Condition) -> Tensor:
        """Raw flow prediction, [B, C, T, H, W]."""
        text = cond.tensors["text"].to(x.dtype)
        return self.module(hidden_states=x, timestep=network_time, encoder_hidden_states=text, return_dict=False)[0]


class FilmCodec:
    """AutoencoderKLWan: latents of a video to its filmstrip, up to five evenly spaced frames side by side.

    That picture is what people, previews and metrics see of a video of `frames`.  The VAE clamps by itself, also in
    `render`.
    """

    def __init__(self, vae: Any, frames: int) -> None:
        self._vae = vae.requires_grad_(False)
        self._frames = frames

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Latents [B, C, T, H, W] -> filmstrips [B, 3, H', n W'] in [-1, 1], decoded one at a time."""
        with returning(self._vae):
            return torch.cat([self.render(video) for video in x.split(1)])

    def render(self, x: Tensor) -> Tensor:
        """`decode` with a gradient for x, all at once."""
        vae = self._vae.to(x.device)
        mean, std = self._moments(x)
        return filmstrip(vae.decode((x * std + mean).to(vae.dtype), return_dict=False)[0])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> mean latents [B, C, 1, H', W'] float32, of videos of one frame.

        Raises ValueError if videos have more.
        """
        if self._frames > 1:
            raise ValueError(
                f"a picture is no video of {self._frames} frames and cannot be encoded; leave out what needs it "
                "(--data, method.black_filter), or distil stills, by --set teacher.frames=1"
            )
        with returning(self._vae):
            vae = self._vae.to(images.device)
            stills = images[:, :, None].to(vae.dtype).split(1)
            latents = torch.cat([vae.encode(still).latent_dist.mode() for still in stills]).float()
        mean, std = self._moments(latents)
        return (latents - mean) / std

    def image_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(3, H, n W) in pixels of latents (C, T, H', W')."""
        scale = self._vae.config.scale_factor_spatial
        return 3, shape[2] * scale, min(SHOWN, self._frames) * shape[3] * scale

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the VAE's latents, [1, C, 1, 1, 1] each."""
        config = self._vae.config
        return tuple(x.new_tensor(each).view(1, -1, 1, 1, 1) for each in (config.latents_mean, config.latents_std))  # type: ignore[return-value]


def filmstrip(video: Tensor) -> Tensor:
    """[B, C, F, H, W] -> [B, C, H, n W]: the first, the last and up to three frames between them."""
    shown = torch.linspace(0, video.shape[2] - 1, min(SHOWN, video.shape[2])).round().long().tolist()
    return torch.cat([video[:, :, frame] for frame in shown], -1)


@FAMILIES.register("WanPipeline")
def wan(
    pipe: Any, source: str, *, height: int = 480, width: int = 832, frames: int = 81, expert: Expert | None = None
) -> Teacher:
    """Wan 2.1 and 2.2, text to video.  height, width: pixels.  frames: 4k + 1; 1 for stills.

    expert: of the two networks of 2.2, that from which student and fake score start, by default "low", whose times are
    more; both together are the teacher, and the student is one network for all times.
    Sampled by Euler's method at its scheduler's own levels; UniPC, its usual scheduler, is of higher order and tells
    the network whole timesteps.
    Raises ValueError for other sizes, schedulers without flow's levels, and a network that is told times for tokens.
    """
    _check(pipe)
    config, denoiser, student = pipe.transformer.config, _denoiser(pipe), None
    if isinstance(denoiser, Experts):
        student = partial(denoiser.expert, _expert(expert))
    elif expert is not None:
        raise ValueError(f"{source!r} has one network, so expert={expert!r} has no effect; leave it out")
    shape = _shape(pipe, height, width, frames)

    def encode(prompt: str) -> dict[str, Tensor]:
        text, _ = pipe.encode_prompt(prompt, None, False, max_sequence_length=TOKENS, device=pipe.text_encoder.device)
        return {"text": text}

    def set_up(pipe: Any, levels: Tensor, _told: Tensor, stochastic: bool) -> dict[str, Any]:
        # Its call takes no levels: they must follow from the scheduler's settings.
        pipe.scheduler = curved_scheduler(levels, stochastic)
        pipe.register_modules(transformer_2=None)  # a student is one network
        pipe.register_to_config(boundary_ratio=None)
        size = {"height": height, "width": width, "num_frames": frames}
        return {"num_inference_steps": len(levels), "guidance_scale": 1.0, **size}

    return Teacher(
        denoiser=denoiser,
        student=student,
        encode=PipelineEncoder(encode),
        codec=FilmCodec(pipe.vae, frames),
        shape=(config.in_channels, *shape),
        card=TeacherCard(source, source),
        prompts=(),
        grid=lambda steps: times(pipe.scheduler, None, steps),
        guidance=5.0,
        few_steps=FewSteps("transformer", set_up, seeded=False, tells=_tells, gives="frames"),
    )


def _tells(told: Tensor) -> Tensor:
    return 1000 * curved(told / 1000)


def _shape(pipe: Any, height: int, width: int, frames: int) -> tuple[int, int, int]:
    """(T, H, W) of latents."""
    scale, every = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
    step = math.lcm(16, *(scale * patch for patch in pipe.transformer.config.patch_size[1:]))  # 16: the pipeline's own
    for name, value in (("height", height), ("width", width)):
        if value < step or value % step:
            near = max(step, round(value / step) * step)
            raise ValueError(f"{name} {value} is not a multiple of this network's {step} pixels; take {near}")
    if frames < 1 or (frames - 1) % every:
        near = 1 + max(0, round((frames - 1) / every)) * every
        raise ValueError(f"frames {frames} is not a multiple of {every} and one more; take {near}")
    return 1 + (frames - 1) // every, height // scale, width // scale


def _denoiser(pipe: Any) -> Denoiser:
    """The network; of two, the first above and at the pipeline's boundary, the second below."""
    networks = [network for network in (pipe.transformer, pipe.transformer_2) if network is not None]
    denoisers = [Denoiser(Wan(network), RectifiedFlow(), "flow") for network in networks]
    if len(denoisers) == 1:
        return denoisers[0]
    # Experts has a bound's own time below it: the bound is the next smaller number of the times' precision.
    bound = torch.nextafter(torch.tensor(pipe.config.boundary_ratio), torch.tensor(0.0))
    return Experts(denoisers, [float(bound)])


def _expert(name: Expert | None) -> int:
    if name is not None and name not in get_args(Expert):
        raise ValueError(f"teacher.expert={name!r}: allowed are {', '.join(get_args(Expert))}")
    return get_args(Expert).index(name or "low")


def _check(pipe: Any) -> None:
    if pipe.config.expand_timesteps:
        raise ValueError(
            "this is Wan 2.2 of 5 billion, whose network is told a time for each token; take Wan 2.1, or 2.2 of 14"
        )
    if pipe.transformer is None or (pipe.transformer_2 is None) != (pipe.config.boundary_ratio is None):
        raise ValueError(
            "two networks need the time at which they change over, and one has none: this pipeline's index must name "
            "transformer, and transformer_2 and boundary_ratio both or neither"
        )
    check_levels(pipe.scheduler)
