"""Between a pipeline and what people give and get: prompts to conditions, latents to images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fewstep.types import Condition

KNOWN = 2**28
"""Bytes of embeddings that an encoder remembers."""


class TextEncoders:
    """A pipeline's text encoders: on the CPU, on a device while many prompts are encoded, nowhere while none are.

    load: (the pipeline's other components by name) -> the pipeline with its text encoders read anew.
    """

    def __init__(self, pipe: Any, load: Callable[..., Any]) -> None:
        self._pipe, self._load = pipe, load
        found = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
        self._names = [name for name, part in found.items() if part is not None]
        self._device: torch.device | str = "cpu"

    def modules(self) -> list[nn.Module]:
        """Those that are in memory."""
        return [part for name in self._names if (part := getattr(self._pipe, name)) is not None]

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[None]:
        """Within it they are on this device."""
        self._move(device)
        try:
            yield
        finally:
            self._move("cpu")

    def release(self) -> None:
        """Free their memory, until `restore`."""
        for name in self._names:
            setattr(self._pipe, name, None)

    def restore(self) -> None:
        """Load what was released, if it was."""
        if len(self.modules()) == len(self._names):
            return
        others = {name: part for name, part in self._pipe.components.items() if name not in self._names}
        loaded = self._load(**others)
        for name in self._names:
            setattr(self._pipe, name, getattr(loaded, name))
        self._move(self._device)

    def _move(self, device: torch.device | str) -> None:
        self._device = device
        for module in self.modules():
            module.to(device)


class PipelineEncoder:
    """Prompts to what the pipeline tells its network of them, one prompt at a time; the last ones are remembered.

    encode: a prompt -> its tensors by name, [1, ...]; "text" are its tokens, [1, L, D].  One at a time because
    CogView4Pipeline pads to the longest prompt of the call: in a batch, a prompt's embedding would depend on its
    neighbours.
    zeros: guidance leads away from zeros in place of the empty prompt.
    negative: as `encode`, of what guidance leads away from, where the pipeline encodes that in another way.
    encoders: what `encode` runs, to be in memory for prompts that are not remembered.
    """

    encoders: TextEncoders | None = None

    def __init__(
        self,
        encode: Callable[[str], Mapping[str, Tensor]],
        *,
        zeros: bool = False,
        negative: Callable[[str], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._encode = encode
        self._negative = negative or encode
        self._zeros = zeros
        self._empty = ""
        self._known: dict[tuple[str, Any], dict[str, Tensor]] = {}

    def against(self, negative_prompt: str) -> PipelineEncoder:
        """The same encoder, with its memory, but for a negative prompt in the place of the empty one."""
        made = copy.copy(self)
        made._empty, made._zeros = negative_prompt, False
        return made

    @torch.no_grad()
    def _row(self, prompt: str, encode: Callable[[str], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        row = self._known.pop((prompt, encode), None)
        if row is None:
            if self.encoders is not None:
                self.encoders.restore()
            row = {name: value.detach().cpu() for name, value in encode(prompt).items()}
            size = sum(value.nbytes for value in row.values())
            while self._known and (len(self._known) + 1) * size > KNOWN:
                del self._known[next(iter(self._known))]
        self._known[prompt, encode] = row  # the last used is the last to go
        return row

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """B prompts -> {"text": [B, L, D], ...}, and {"length": [B] int64} if they, or the empty one, differ in theirs.

        Shorter rows are padded with zeros to the longest; the network must be given `length` tokens of them only.
        """
        rows, null = [self._row(p, self._encode) for p in prompts], self._row(self._empty, self._negative)
        null = {name: torch.zeros_like(value) for name, value in null.items()} if self._zeros else null
        lengths = {row["text"].shape[1] for row in [*rows, null]}
        longest = max(lengths)

        def stack(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
            made = {name: torch.cat([row[name] for row in rows]) for name in null if name != "text"}
            made["text"] = torch.cat([pad(row["text"], (0, 0, 0, longest - row["text"].shape[1])) for row in rows])
            if len(lengths) > 1:  # telling lengths apart costs the network call a synchronisation
                made["length"] = torch.tensor([row["text"].shape[1] for row in rows])
            return made

        return Condition(stack(rows), stack([null]))


PIXELS = 2**18
"""Pixels decoded at a time: one picture of 512x512, 256 of 32x32."""


class VAECodec:
    """AutoencoderKL latents to images as the pipeline decodes them: divided by the scaling factor, and shifted.

    The VAE goes where its input is, and back; only `render` and `features`, whose gradient needs it there, keep it.
    """

    def __init__(self, vae: Any) -> None:
        self._vae = vae.requires_grad_(False)

    @property
    def _shift(self) -> float:
        return getattr(self._vae.config, "shift_factor", None) or 0.0

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> images [B, 1 or 3, H', W'] in [-1, 1]."""
        _, height, width = self.image_shape(tuple(x.shape[1:]))
        # One float32 map of 256 channels is a kilobyte per pixel: some pictures at a time.
        parts = x.split(max(1, PIXELS // (height * width)))
        with returning(self._vae):
            return torch.cat([self.render(part).clamp(-1, 1) for part in parts])

    def render(self, x: Tensor) -> Tensor:
        """`decode` with a gradient for x, all at once, and not clamped: where it clamps, the gradient would end."""
        vae = self._vae.to(x.device)
        return vae.decode(x.to(vae.dtype) / vae.config.scaling_factor + self._shift, return_dict=False)[0]

    def features(self, images: Tensor) -> list[Tensor]:
        """What each stage of the encoder makes of images [B, C, H, W], with gradient: maps [B, C', H', W']."""
        vae = self._vae.to(images.device)
        maps = [vae.encoder.conv_in(images.to(vae.dtype))]
        for block in vae.encoder.down_blocks:
            maps.append(block(maps[-1]))
        return maps[1:]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] -> the mean latents [B, C', H', W'] float32."""
        parts = images.split(max(1, PIXELS // (images.shape[-2] * images.shape[-1])))
        with returning(self._vae):
            vae = self._vae.to(images.device)
            means = torch.cat([vae.encode(part.to(vae.dtype)).latent_dist.mode() for part in parts])
        return (means.float() - self._shift) * vae.config.scaling_factor

    def image_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(C, H, W) in pixels of latents (C', H', W')."""
        scale = 2 ** (len(self._vae.config.block_out_channels) - 1)
        return self._vae.config.in_channels, shape[1] * scale, shape[2] * scale


@contextmanager
def returning(vae: Any) -> Iterator[None]:
    """After it the VAE is where it was before."""
    home = vae.device
    try:
        yield
    finally:
        vae.to(home)
