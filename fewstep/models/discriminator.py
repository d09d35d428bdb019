"""Discriminators: logits from features that a score network makes of noised samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.models.denoiser import Denoiser, Player
from fewstep.types import Condition

WIDEST = 1280
"""Channels of the heads in the paper's UNets; at the 4096 of a transformer, a 4x4 convolution holds 2.7e8 weights."""


class Head(Player):
    """A small classifier for each tapped feature; real is positive     [DMD2, arXiv:2405.14867, section 4.3]

    Maps [B, C, h, w]: 4x4 convolutions of stride 2 down to 4x4, one over what is left, then one number.  Tokens
    [B, N, D] are taken as a square map, or as a row if N is no square; features [B, D] as a map of one; the frames of
    [B, C, T, h, w] are judged apart, each by what the network saw of all.  Group norm and SiLU after each
    convolution, as in the paper; the widths are the features' own up to WIDEST, to which the first convolution brings
    wider ones.  Always computes in float32.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """shapes: tap name -> one sample's feature shape, without B."""
        super().__init__()
        self.taps = tuple(shapes)
        self.classifiers = nn.ModuleList(
            _classifier(_as_map(torch.zeros(1, *shape)).shape) for shape in shapes.values()
        )

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits, [B, number of taps] float32, or one a frame.  features: tap name -> the feature of B samples."""
        batch = len(features[self.taps[0]])
        maps = [_as_map(features[name]) for name in self.taps]
        kind = "cpu" if maps[0].is_meta else maps[0].device.type  # whose switch a plan uses, see planning.device
        with torch.autocast(kind, enabled=False):
            logits = [net(x.to(_dtype(net))) for net, x in zip(self.classifiers, maps, strict=True)]
        return torch.cat([logit.reshape(batch, -1) for logit in logits], 1)

    @classmethod
    def probe(cls, denoiser: Denoiser, shape: Sequence[int], cond: Condition, taps: Sequence[str], seed: int) -> Head:
        """A head for the taps of `denoiser`, whose feature shapes are found by one forward.

        shape: one sample's.  cond: a condition with B = 1.  seed: of its initial weights, the same on every process.
        """
        parameter = next(denoiser.parameters(), torch.zeros(()))
        x, t = torch.zeros(1, *shape, device=parameter.device), torch.ones(1, device=parameter.device)
        with torch.no_grad():
            found = denoiser(x, t, cond.to(parameter.device), taps=taps).taps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls({name: found[name].shape[1:] for name in taps})


@dataclass(frozen=True)
class Pooled:
    """The features' own judgement: their mean over channels is a logit at every place     [SiDA, arXiv:2410.14919]

    Nothing in it trains; the network whose features those are does.  The paper's are a UNet's bottleneck.
    """

    taps: tuple[str, ...]

    def __call__(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits, [B, places of all taps] float32 or better.  features: tap name -> the feature of B samples."""
        batch, maps = len(features[self.taps[0]]), [_as_map(features[name]) for name in self.taps]
        means = [x.to(torch.promote_types(x.dtype, torch.float32)).mean(1) for x in maps]
        return torch.cat([x.reshape(batch, -1) for x in means], 1)


def taps_of(network: Denoiser, cond: Condition, taps: Sequence[str] = ()) -> tuple[str, ...]:
    """The named modules, else those that the network's family names: what a GAN reads.

    Raises ValueError if there are none, and for a condition for which their outputs are of no one batch.
    """
    if "length" in cond.tensors and not network.backbone.one_call:
        raise ValueError(
            "a GAN cannot read this network's features for prompts of different padded lengths, which take one "
            "call each; give prompts of one padded length, or --set method.gan_weight=0"
        )
    names = tuple(taps) or network.backbone.taps
    if not names:
        raise ValueError(
            f"{type(network.backbone.module).__name__} has no default features for a GAN; name modules with "
            "--set method.gan_taps=[...]"
        )
    return names


def _as_map(feature: Tensor) -> Tensor:
    """[B, C, h, w] of maps, tokens [B, N, C] or plain features [B, C]; [B T, C, h, w] of a video's [B, C, T, h, w]."""
    if feature.ndim == 4:
        return feature
    if feature.ndim == 5:
        return feature.transpose(1, 2).flatten(0, 1)
    if feature.ndim == 2:
        return feature[:, :, None, None]
    side = round(feature.shape[1] ** 0.5)
    tokens = feature.transpose(1, 2)
    return tokens.unflatten(2, (side, side) if side * side == feature.shape[1] else (1, -1))


def _classifier(shape: Sequence[int]) -> nn.Sequential:
    """[B, C, h, w] -> [B, 1, 1, 1]."""
    _, given, height, width = shape
    channels = min(given, WIDEST)
    layers: list[nn.Module] = []
    while min(height, width) > 4:
        layers += [nn.Conv2d(given, channels, 4, 2, 1), _norm(channels), nn.SiLU()]
        given, height, width = channels, height // 2, width // 2
    layers += [nn.Conv2d(given, channels, (height, width)), _norm(channels), nn.SiLU(), nn.Conv2d(channels, 1, 1)]
    return nn.Sequential(*layers)


def _norm(channels: int) -> nn.GroupNorm:
    """Up to 32 groups, as the paper, of at least 16 channels: on a 1x1 map a group of one would always give zero."""
    return nn.GroupNorm(max(g for g in range(1, 33) if g == 1 or (channels % g == 0 and channels // g >= 16)), channels)


def _dtype(net: nn.Module) -> torch.dtype:
    return next(net.parameters()).dtype
