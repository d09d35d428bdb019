"""Contenders for the gradient of distribution matching: from three networks' answers, and through the loss."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from eval.bench_case import Call, Case, draw, kernels
from fewstep.objectives.terms import distribution_matching
from fewstep_cuda import score_difference_from_raw

SHAPES = {"SDXL": (4, 4, 128, 128), "Wan": (1, 16, 21, 60, 104)}
GUIDANCE, FLOOR = 5.0, 1e-5


def cases(device: str) -> list[Case]:
    """Both operators at latents of SDXL (batch of 4) and Wan (a video of 81 frames at 480p)."""
    made = (_from_raw, _through_the_loss)
    return [make(name, shape, device) for name, shape in SHAPES.items() for make in made]


def _from_raw(name: str, shape: tuple[int, ...], device: str) -> Case:
    x, x_t, fake, cond, uncond = draw(shape, 5, device)
    alpha = torch.linspace(0.2, 0.9, len(x), device=device)
    sigma = (1 - alpha.square()).sqrt()
    inputs = (x, x_t, fake, cond, uncond, alpha, sigma)

    def kernel(backend: str) -> Callable[[], Call]:
        return lambda: (
            lambda: score_difference_from_raw(*inputs, guidance=GUIDANCE, kind="eps", floor=FLOOR, backend=backend)
        )

    compiled = _compiled(_closed_form)
    contenders = {
        **{f"{backend} kernel": kernel(backend) for backend in kernels("score_difference_from_raw", device)},
        "eager closed form": lambda: lambda: _closed_form(*inputs),
        "torch.compile closed form": lambda: lambda: compiled(*inputs),
        "eager autograd": lambda: lambda: _gradient(_surrogate, *inputs),
    }
    return Case("score_difference_from_raw", name, shape, 6 * 4 * x.numel(), device, contenders)


def _through_the_loss(name: str, shape: tuple[int, ...], device: str) -> Case:
    """`terms.distribution_matching` and its backward, as a training step has it."""
    x, real, fake = draw(shape, 3, device)
    compiled = _compiled(_surrogate_of_estimates)

    def ours(backend: str) -> Callable[[], Call]:
        def call() -> Tensor:
            before = os.environ.get("FEWSTEP_KERNELS", "")
            os.environ["FEWSTEP_KERNELS"] = backend
            try:
                return _gradient(lambda *given: distribution_matching(*given, floor=FLOOR)[0], x, real, fake)
            finally:
                os.environ["FEWSTEP_KERNELS"] = before

        return lambda: call

    contenders = {
        **{f"loss and backward, {backend} kernel": ours(backend) for backend in kernels("score_difference", device)},
        "loss and backward, reference": ours("reference"),
        "loss and backward, eager autograd": lambda: lambda: _gradient(_surrogate_of_estimates, x, real, fake),
        "loss and backward, torch.compile": lambda: lambda: _gradient(compiled, x, real, fake),
    }
    return Case("distribution_matching", name, shape, 4 * 4 * x.numel(), device, contenders)


def _closed_form(
    x: Tensor, x_t: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a user writes who knows the gradient; networks predict eps."""
    real_x0, fake_x0 = _estimates(x_t, fake, cond, uncond, alpha, sigma)
    n = (x - real_x0).abs().flatten(1).mean(1).clamp_min(FLOOR)
    g = (fake_x0 - real_x0) / n.view(-1, *[1] * (x.ndim - 1))
    return g / g.numel(), 1 / n, 0.5 * g.square().mean()


def _surrogate(
    x: Tensor, x_t: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """The published form."""
    return _surrogate_of_estimates(x, *_estimates(x_t, fake, cond, uncond, alpha, sigma))


def _surrogate_of_estimates(x: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    with torch.no_grad():
        n = (x - real_x0).abs().flatten(1).mean(1).clamp_min(FLOOR)
        target = x - (fake_x0 - real_x0) / n.view(-1, *[1] * (x.ndim - 1))
    return 0.5 * mse_loss(x, target)


def _estimates(
    x_t: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    alpha, sigma = (c.view(-1, *[1] * (x_t.ndim - 1)) for c in (alpha, sigma))
    real = uncond + GUIDANCE * (cond - uncond)
    return (x_t - sigma * real) / alpha, (x_t - sigma * fake) / alpha


def _gradient(loss: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf, *rest), leaf)
    return grad


def _compiled(function: Callable[..., object]) -> Callable[..., Tensor]:
    return torch.compile(function, fullgraph=True, dynamic=False)  # type: ignore[return-value]
