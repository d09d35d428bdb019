"""A trio that can be worked out by hand: every network is an affine map, with the prompt added."""

import torch
from torch import nn

from fewstep.diffusion import RectifiedFlow
from fewstep.models.denoiser import Backbone, Denoiser
from fewstep.models.trio import Trio
from fewstep.rng import Rng
from fewstep.types import Batch, Condition, Loss


class Affine(Backbone):
    """x0 = w x + b + 0.1 prompt; remembers times and conditions."""

    def __init__(self, w: float, b: float) -> None:
        super().__init__(nn.Linear(1, 1).requires_grad_(False))
        self.w, self.b = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(b))
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def network_time(self, t):
        return t

    def forward(self, x, network_time, cond):
        prompt = cond.tensors["prompt"]
        self.seen.append((x.detach().clone(), network_time.clone(), prompt.clone()))
        return self.w * x + self.b + 0.1 * prompt[:, :, None, None]


def trio():
    made = [Denoiser(Affine(w, b), RectifiedFlow(), "x0") for w, b in ((0.5, 0.1), (0.3, 0.2), (0.4, -0.1))]
    return Trio(generator=made[0], real_score=made[1], fake_score=made[2])


def batch(size=6):
    prompt = torch.arange(size).float()[:, None] + 1
    return Batch(Condition({"prompt": prompt}, {"prompt": torch.zeros(1, 1)}), (1, 4, 3), tuple(range(size)))


def rng(turn="generator", size=6, iteration=0):
    return Rng(0, iteration, turn, tuple(range(size)))


def check_isolation(method, players, given, iteration=0) -> None:
    """Each turn's losses reach the weights of its own player and nobody else's."""
    networks = {"generator": players.generator, "critic": players.fake_score}
    losses = {"generator": method.generator_loss, "critic": method.critic_loss}
    for turn, network in networks.items():
        with players.turn(turn):
            made = losses[turn](players, given, rng(turn, iteration=iteration))
            for loss in [made] if isinstance(made, Loss) else made:
                loss.total.backward()
        moved = [
            p for p in (players.generator, players.real_score, players.fake_score) if p.backbone.w.grad is not None
        ]
        assert moved == [network]
        network.zero_grad()
