"""Derivatives along a path through diffusers' networks, which know nothing of them."""

import pytest
import torch
from torch.testing import assert_close

from fewstep.diffusion import check_jvp, directional_derivative
from tests.tiny_networks import FAMILIES, made


def path(x):
    generator = torch.Generator().manual_seed(1)
    t = torch.tensor([0.3, 0.7])
    return (x, t), (torch.randn(x.shape, generator=generator), torch.ones_like(t))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tangent_is_that_of_dual_numbers_and_of_differences(family):
    """By state and time apart, too: a sound derivative by one would hide a lost one by the other."""
    _, f, x = made(family)
    primals, tangents = path(x)
    plain = f(*primals)
    for moves in (tangents, (tangents[0], None), (None, tangents[1])):
        value, slope = directional_derivative(f, primals, moves)
        assert_close(value, plain.detach(), rtol=1e-4, atol=1e-5)
        wanted = directional_derivative(f, primals, moves, mode="dual").tangent
        assert wanted.any() and (slope - wanted).norm() < 1e-5 * wanted.norm()
    check_jvp(f, primals, tangents, names=("x", "t"))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_plain_networks_with_and_without_checkpointing(family):
    """One evaluation gives the value that trains and its tangent, recomputed activations or not.

    Mutation: attention of the value by the operator, which saves what a recomputation, without tangents, does not.
    """
    network, f, x = made(family)
    primals, tangents = path(x)
    plain, f = f, lambda x, t: (torch.manual_seed(2), plain(x, t))[1]  # DiT drops labels at random
    network.train()

    def gradients(value):
        names, weights = zip(*network.named_parameters())
        found = torch.autograd.grad(value.square().mean(), weights, allow_unused=True)
        return {name: grad for name, grad in zip(names, found) if grad is not None}

    wanted = gradients(f(*primals))
    slope = directional_derivative(f, primals, tangents).tangent
    for checkpointing in (False, True):
        if checkpointing:
            network.enable_gradient_checkpointing()
        value, again = directional_derivative(f, primals, tangents, graph=True)
        assert not again.requires_grad
        assert_close(again, slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()))
        found = gradients(value)
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-6 + 1e-4 * float(wanted[name].abs().max()))
