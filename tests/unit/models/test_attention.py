"""Which kernels attention takes: networks that are told, UNets that get processors, and those that know one kind."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.models import attention_dispatch, attention_processor
from torch.nn.functional import scaled_dot_product_attention

from fewstep.config import resolve
from fewstep.models.attention import choose_attention
from fewstep.training.checks import check_derivatives, check_surroundings
from fewstep.training.options import TrainConfig
from tests.tiny_networks import made


@pytest.fixture
def xformers(monkeypatch):
    """A stand-in for its one function, on [B, N, heads, D] or [B, N, D].  The shapes that it was called with."""
    seen = []

    def attention(q, k, v, attn_bias=None, op=None, scale=None, p=0.0):
        seen.append(q.shape)
        heads = q.ndim == 4
        q, k, v = (x.transpose(1, 2) if heads else x for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=scale)
        return out.transpose(1, 2) if heads else out

    package = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=attention))
    monkeypatch.setattr(attention_processor, "xformers", package)
    monkeypatch.setattr(attention_dispatch, "xops", package.ops, raising=False)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)
    return seen


@pytest.mark.parametrize("family", ["flux", "wan", "unet"])
def test_the_chosen_kernels_run_and_give_the_same(family, xformers):
    """Fails for a UNet that is only told: it does not listen.  The process's own default stays."""
    network, call, x = made(family)
    default = attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
    t = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        plain = call(x, t)
        choose_attention(network, "xformers")
        torch.testing.assert_close(call(x, t), plain, atol=1e-5, rtol=1e-5)
        count = len(xformers)
        assert count
        choose_attention(network, "sdpa")
        assert torch.equal(call(x, t), plain) and len(xformers) == count
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend()[0] == default


@pytest.mark.parametrize("name", ["sdpa", "xformers"])
def test_a_network_of_one_kind_is_refused(name, xformers):
    """Fails if CogView4 gets a UNet's processor, which knows no rotary positions."""
    with pytest.raises(ValueError, match=f"train.attention = '{name}': .*CogView4Transformer2DModel cannot be chosen"):
        choose_attention(made("cogview4")[0], name)
    with pytest.raises(ValueError, match="Linear cannot be chosen"):
        choose_attention(torch.nn.Linear(2, 2), name)


def test_xformers_is_refused_where_it_is_missing():
    with pytest.raises(ValueError, match=r"train\.attention = 'xformers' needs the package: pip install xformers"):
        check_surroundings(TrainConfig(attention="xformers"))


def test_xformers_is_refused_for_derivatives():
    given = {"teacher": {"name": "fashion-unet"}, "method": {"name": "scm"}, "train": {"attention": "xformers"}}
    with pytest.raises(ValueError, match="method 'scm' takes derivatives through attention"):
        check_derivatives(resolve(given=given))
