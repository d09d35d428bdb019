import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fewstep.diffusion import RectifiedFlow
from fewstep.models.denoiser import Backbone, Denoiser
from fewstep.models.ema import EMA


class Net(nn.Module):
    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), value, dtype=dtype))
        self.register_buffer("count", torch.tensor(0))


class Plain(Backbone):
    def network_time(self, t):
        return t

    def forward(self, x, network_time, cond):
        return x * self.module.weight


def denoiser(value: float = 0.0, dtype: torch.dtype = torch.float32) -> Denoiser:
    return Denoiser(Plain(Net(value, dtype)), RectifiedFlow(), "x0")


def set_to(source: Denoiser, value: float) -> None:
    with torch.no_grad():
        source.backbone.module.weight.fill_(value)


def test_warm_up_follows_its_formula():
    """Decay min(d, (1 + n) / (10 + n)) after n updates: 0.1, 2/11, 0.25, then d.  Fails if n starts at 1."""
    source = denoiser(0.0)
    ema, expected = EMA(source, 0.25), 0.0
    for value, decay in zip((1.0, -2.0, 3.0, 0.5, 7.0), (0.1, 2 / 11, 0.25, 0.25, 0.25)):
        set_to(source, value)
        ema.update(source)
        expected = decay * expected + (1 - decay) * value
        assert_close(ema.denoiser.backbone.module.weight, torch.full((3,), expected), rtol=1e-6, atol=0)
    assert ema.updates == 5


def test_decay_zero_is_the_source_and_no_copy():
    """Fails with a twin that follows: a large student would be held twice for nothing."""
    source = denoiser(0.0)
    ema = EMA(source, 0.0)
    set_to(source, 12345.678)
    ema.update(source)
    assert ema.denoiser is source and ema.updates == 1
    assert all(p.requires_grad for p in source.parameters())


def test_bf16_source_is_averaged_in_fp32():
    """From 1 towards 1.0078 (bf16's next number) by 1e-3 of the way each time: 100 updates go 9.5% of it.

    Fails with an average kept in bf16: each update is below half its last bit, and it never leaves 1.
    """
    source = denoiser(1.0, torch.bfloat16)
    ema = EMA(source, 0.999)
    ema.updates = 10**6  # past the warm-up
    set_to(source, 1.0 + 2**-7)
    for _ in range(100):
        ema.update(source)
    mean = ema.denoiser.backbone.module.weight
    assert mean.dtype == torch.float32 and source.backbone.module.weight.dtype == torch.bfloat16
    assert_close((mean - 1) * 2**7, torch.full((3,), 1 - 0.999**100), rtol=1e-3, atol=0)  # fp32: 1e-7 / 2^-7 / 0.1


def test_buffers_are_copied():
    """An averaged integer would be wrong.  Fails without the second loop of `update`."""
    source = denoiser()
    ema = EMA(source, 0.9)
    source.backbone.module.count.fill_(7)
    ema.update(source)
    assert ema.denoiser.backbone.module.count == 7


def test_average_shares_nothing_with_its_source_and_does_not_train():
    source = denoiser(1.0)
    ema = EMA(source, 0.9)
    set_to(source, 5.0)
    assert ema.denoiser.backbone.module.weight.eq(1.0).all()
    assert not ema.denoiser.training and source.training
    assert not any(p.requires_grad for p in ema.denoiser.parameters())


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_decay_outside_its_range_is_refused(decay: float):
    with pytest.raises(ValueError, match="EMA decay"):
        EMA(denoiser(), decay)
