"""Cases whose bytes can be counted by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fewstep.planning.device import Fused
from fewstep.planning.ledger import CATEGORIES, Ledger, Peak

B, D, H = 8, 16, 32


def meta(*shape: int, **more) -> torch.Tensor:
    return torch.empty(*shape, device="meta", **more)


def linear() -> nn.Linear:
    return nn.Linear(D, H, bias=False, device="meta")


def test_linear_layer_with_its_optimiser():
    """Weight, gradient, two moments; at the loss's backward its output and the gradient of that; 3 matmuls a weight."""
    net, ledger, parts = linear(), Ledger(), {}
    ledger.claim(net.parameters(), "weights")
    net.weight.register_post_accumulate_grad_hook(lambda p: ledger.claim([p.grad], "gradients"))
    x, optimizer = meta(B, D), torch.optim.AdamW(net.parameters())
    with ledger:
        with ledger.part(parts, "backward"):
            y = net(x)
            y.backward(torch.ones_like(y))
        assert ledger.live["gradients"] == 4 * D * H
        del y
        ledger.making = "optimiser"
        optimizer.step()
    assert parts["backward"].bytes["weights"] == 4 * D * H
    # y, dy and, while it is new, the weight's gradient
    assert parts["backward"].total == 4 * (D * H + 2 * B * H + D * H)
    assert parts["backward"].flops == 2 * 2 * B * D * H  # x needs no gradient
    assert ledger.live["optimiser"] == 2 * 4 * D * H
    assert ledger.live["activations"] == 0


def test_foreach_keeps_temporaries_of_all_weights_at_once():
    """AdamW on a GPU takes the root of all second moments before it divides by the first of them.

    One weight after the other, there are that root, the same scaled, and the last weight's.
    """
    peaks = {}
    for foreach in (False, True):
        weights = [nn.Parameter(meta(D, H)) for _ in range(4)]
        optimizer, ledger, parts = torch.optim.AdamW(weights, foreach=foreach), Ledger(), {}
        for p in weights:
            p.grad = torch.zeros_like(p)
        ledger.claim(weights, "weights")
        with ledger:
            optimizer.step()
            with ledger.part(parts, "second"):
                optimizer.step()
        peaks[foreach] = parts["second"].total - 3 * 4 * 4 * D * H
    assert peaks == {False: 3 * 4 * D * H, True: 4 * 4 * D * H}


def test_views_and_ops_in_place_are_not_counted_twice():
    ledger = Ledger()
    with ledger:
        x = meta(B, D)
        views = x[2:], x.view(-1), x.t(), x.detach()
        x.add_(1).mul_(x)
        torch.add(x, x, out=x)
        assert ledger.live["activations"] == 4 * B * D
        del x
        assert ledger.live["activations"] == 4 * B * D  # a view holds it
        del views
    assert ledger.live["activations"] == 0


def test_what_is_freed_within_leaves_the_peak():
    ledger, parts = Ledger(), {}
    with ledger:
        with ledger.part(parts, "first"):
            meta(B, D)
            meta(B, D)
        with ledger.part(parts, "second"):
            meta(B)
    assert (parts["first"].total, parts["second"].total) == (4 * B * D, 4 * B)


def test_checkpointed_block_keeps_its_input_alone():
    """3 layers of tanh: without, each output is kept; with, none within the block until it is computed again."""
    kept = {}
    for recompute in (False, True):
        layers = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(D, D, device="meta"), nn.Tanh())])
        ledger, parts = Ledger(), {}
        ledger.claim(layers.parameters(), "weights")
        with ledger:
            with ledger.part(parts, "forward"):
                x = meta(B, D, requires_grad=True)
                y = checkpoint(layers, x, use_reentrant=False) if recompute else layers(x)
            kept[recompute] = ledger.live["activations"]
            with ledger.part(parts, "backward"):
                y.sum().backward()
        forward, backward = parts["forward"].flops, parts["backward"].flops
        assert forward == 3 * 2 * B * D * D
        assert backward == (2 + recompute) * forward
    assert kept == {False: 4 * B * D * 4, True: 4 * B * D * 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_takes_its_output_and_a_number_a_row_and_head(dtype):
    """Not N^2: at 4096 tokens one head's scores are 64 MiB in float32; the backward makes three gradients."""
    N, heads, d = 4096, 2, 8
    leaves = [meta(1, N, heads, d, dtype=dtype, requires_grad=True) for _ in range(3)]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    size, ledger, parts = q.nbytes, Ledger(), {}
    with ledger, Fused()():
        with ledger.part(parts, "forward"):
            out = F.scaled_dot_product_attention(q, k, v)
        assert out.shape == (1, heads, N, d) and out.dtype == dtype
        assert parts["forward"].total == pytest.approx(size + 4 * heads * N, abs=64)  # and the state of its dropout
        with ledger.part(parts, "backward"):
            out.backward(torch.empty_like(out))
    assert parts["forward"].flops == 2 * 2 * heads * N * N * d
    assert parts["backward"].flops == 5 * 2 * heads * N * N * d  # it computes the scores again
    assert parts["backward"].total == pytest.approx(size + 4 * heads * N + size + 3 * size, abs=64)


def test_autocast_keeps_its_copies_of_weights_until_the_forward_ends():
    """Also of checkpointed layers: 4 weights in bfloat16, and each layer's input; a backward keeps none."""
    layers = [nn.Linear(D, D, bias=False, device="meta") for _ in range(4)]
    ledger, fused, before = Ledger(), Fused(), 0
    ledger.claim([layer.weight for layer in layers], "weights")
    with ledger, fused():
        x = y = meta(B, D, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            for layer in layers:
                y = checkpoint(layer, y, use_reentrant=False)
        before = ledger.live["activations"]
        fused.forget()
        assert before - ledger.live["activations"] == 4 * 2 * D * D + 2 * B * D  # x is a leaf, too
        assert ledger.live["activations"] == 4 * B * D + 4 * 2 * B * D
        y.float().sum().backward()
        assert not fused._casts and layers[0].weight.grad is not None and layers[0].weight.grad.dtype == torch.float32
    assert x.grad is not None


def test_truth_of_a_tensor_is_true_and_its_number_an_error():
    with Ledger():
        assert bool(meta(3).isfinite().all())
        with pytest.raises(ValueError, match="branches on a number"):
            float(meta(3).sum())


def test_op_without_a_kernel_is_named():
    with Ledger(), pytest.raises(ValueError, match=r"aten\._unique2.* cannot be planned"):
        meta(3).unique()


def test_peak_is_a_moment_not_a_sum_of_maxima():
    ledger, parts = Ledger(), {}
    with ledger, ledger.part(parts, "all"):
        x = meta(100)
        del x
        ledger.making = "optimiser"
        meta(10)
    assert parts["all"] == Peak(dict.fromkeys(CATEGORIES, 0) | {"activations": 400}, 0, 400)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
def test_gradients_of_a_convolution_cost_twice_its_forward(kind, groups):
    """Also in groups.  Fails with torch's formula, which counts the weights' gradient once for each group."""
    with torch.device("meta"):
        layer = kind(8, 8, 3, padding=1, groups=groups, bias=False)
    flops = []
    for turn in (lambda x: layer(x), lambda x: layer(x).sum().backward()):
        parts = {}
        x = torch.empty(2, 8, 5, 5, device="meta", requires_grad=True)
        ledger = Ledger()
        with ledger, ledger.part(parts, "all"):
            turn(x)
        flops.append(parts["all"].flops)
    assert flops[0] == 2 * 2 * 8 * 25 * 9 * 8 // groups and flops[1] == 3 * flops[0]
