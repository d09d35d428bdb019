"""What methods with a GAN share: its judgement of noised samples, and the contest of real and generated ones."""

from __future__ import annotations

from torch import Tensor

from fewstep.models.denoiser import Denoiser
from fewstep.models.discriminator import Head, Pooled
from fewstep.objectives.terms import gan_critic
from fewstep.types import Batch, Condition, Real


def judged(network: Denoiser, head: Head | Pooled, x: Tensor, cond: Condition, t: Tensor, eps: Tensor) -> Tensor:
    """The logits [B, K] of clean samples x, re-noised by eps to t [B], from what `network` makes of them."""
    return head(network(network.schedule.add_noise(x, eps, t), t, cond, taps=head.taps).taps)


def contest(of_real: Tensor, of_fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The discriminator's loss, a scalar, and what to log of it.  of_real, of_fake: logits [B, K], real = positive."""
    loss = gan_critic(of_real, of_fake)
    means = {"gan/real": of_real.detach().mean(), "gan/fake": of_fake.detach().mean()}
    return loss, {"gan/critic": loss.detach(), **means}


def real_of(batch: Batch) -> Real:
    """The batch's samples of the data, under their own captions.  Raises ValueError if it has none."""
    if batch.real is None:
        raise ValueError("the GAN needs real latents in the batch; see `needs`")
    return batch.real
