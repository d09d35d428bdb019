"""Real samples: which ones a step sees."""

import torch

from fewstep.teachers.base import Reals
from fewstep.training.reals import RealData
from fewstep.types import Condition


def encode(prompts):
    """A prompt's condition is its length."""
    return Condition({"length": torch.tensor([[float(len(p))] for p in prompts])}, {"length": torch.zeros(1, 1)})


def data(count: int = 7, seed: int = 0) -> RealData:
    """Sample i is the number i under a caption of length i mod 3."""
    latents = torch.arange(count).half()[:, None].expand(count, 2)
    return RealData(Reals(latents, tuple("x" * (i % 3) for i in range(count))), encode, seed)


def test_every_sample_keeps_its_own_caption():
    """Fails if captions are drawn by another index than latents."""
    real = data().batch(range(40))
    assert real.x0.dtype == torch.float32
    assert torch.equal(real.x0[:, 0] % 3, real.cond.tensors["length"][:, 0])


def test_an_epoch_holds_each_sample_once_in_an_order_of_its_own():
    epochs = [data().batch(range(7 * e, 7 * e + 7)).x0[:, 0].tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != data(seed=1).batch(range(7)).x0[:, 0].tolist()


def test_the_digest_knows_latents_and_captions():
    latents, captions = torch.zeros(2, 2), ("a", "b")
    digests = {
        RealData(Reals(x, c), encode, 0).digest
        for x, c in ((latents, captions), (latents + 1, captions), (latents, ("a", "c")))
    }
    assert len(digests) == 3
