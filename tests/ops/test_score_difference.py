"""The operator against autograd, closed forms and invariants; T5 and T6 of the catalogue of DMD tests."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

from fewstep_cuda import backends, score_difference


@pytest.fixture
def triple(draw):
    """x, real_x0, fake_x0 in float64."""
    x, real, _ = draw(seed=0, dtype=torch.float64)
    fake, _, _ = draw(seed=1, dtype=torch.float64)
    return x, real, fake


def oracle(x, real, fake, floor=1e-5):
    """Sample by sample, in Python: g and n."""
    n = torch.stack([(a - b).abs().mean().clamp_min(floor) for a, b in zip(x, real)])
    return torch.stack([(f - r) / m for f, r, m in zip(fake, real, n)]), n


def test_grad_is_autograd_of_the_surrogate(triple):
    """T5. Mutation: grad = g / B instead of g / numel(x)."""
    x, real, fake = triple
    g, n = oracle(x, real, fake)
    leaf = x.clone().requires_grad_()
    loss = 0.5 * torch.nn.functional.mse_loss(leaf, (leaf - g).detach())
    loss.backward()
    grad, weight, value = score_difference(leaf, real, fake)
    assert_close(grad, leaf.grad, rtol=1e-12, atol=0)
    assert_close(weight, 1 / n, rtol=1e-12, atol=0)
    assert_close(value, loss.detach(), rtol=1e-12, atol=0)


def test_no_output_carries_a_graph(triple):
    """Mutation: without no_grad the loss would also train the real and fake scores."""
    outputs = score_difference(*(tensor.clone().requires_grad_() for tensor in triple))
    assert not any(tensor.requires_grad for tensor in outputs)


def test_grad_does_not_depend_on_the_common_scale(triple):
    """T6. Mutation: no division by n."""
    grad, _, value = score_difference(*triple)
    scaled = score_difference(*(7.0 * tensor for tensor in triple))
    assert_close(scaled.grad, grad, rtol=1e-12, atol=0)
    assert_close(scaled.value, value, rtol=1e-12, atol=0)


def test_a_sample_does_not_feel_its_neighbours(triple):
    """T6. Mutation: n as one mean over the whole batch."""
    x, real, fake = triple
    grad = score_difference(x, real, fake).grad
    x = x.clone()
    x[2] += 10
    other = score_difference(x, real, fake).grad
    assert torch.equal(other[:2], grad[:2])
    assert not torch.allclose(other[2], grad[2])


def test_bfloat16_is_widened_before_subtracting(draw):
    """Against float64 on the same inputs, to fp32 rounding. Mutation: a subtraction in bf16 (error up to 4e-3).

    Unrelated inputs, because the difference of two bf16 numbers within a factor of 2 is exact and would hide it.
    """
    x, real, _ = draw(seed=0, dtype=torch.bfloat16)
    fake, _, _ = draw(seed=1, dtype=torch.bfloat16)
    grad, weight, value = score_difference(x, real, fake)
    expected = score_difference(x.double(), real.double(), fake.double())
    assert grad.dtype == weight.dtype == value.dtype == torch.float32
    assert_close(grad.double(), expected.grad, rtol=1e-6, atol=0)
    assert_close(weight.double(), expected.weight, rtol=1e-6, atol=0)
    assert_close(value.double(), expected.value, rtol=1e-6, atol=0)


def test_mixed_dtypes_take_the_widest(triple):
    x, real, fake = triple
    grad = score_difference(x.bfloat16(), real, fake.half()).grad
    assert torch.equal(grad, score_difference(x.bfloat16().double(), real, fake.half().double()).grad)


def test_floor_holds_when_x_equals_real(triple):
    """Mutation: no floor (inf), or nan_to_num (0 / 0 becomes 0, c / 0 becomes 3e38)."""
    _, real, fake = triple
    grad, weight, _ = score_difference(real, real, fake, floor=1e-3)
    assert_close(weight, torch.full_like(weight, 1e3))
    assert_close(grad, 1e3 * (fake - real) / real.numel())


def test_zero_when_fake_equals_real(triple):
    x, real, _ = triple
    grad, _, value = score_difference(x, real, real.clone())
    assert not grad.any() and value == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_non_finite_input_reaches_grad_and_value(triple, bad, which):
    """The trainer counts and skips it. Mutations: nan_to_num on n or g; gap / n where x, and so n, is infinite."""
    triple = [tensor.clone() for tensor in triple]
    triple[which][1, 0, 0, 0] = bad
    grad, _, value = score_difference(*triple)
    assert not grad[1].isfinite().all() and not value.isfinite()
    assert grad[[0, 2]].isfinite().all()


def test_non_contiguous_inputs_give_the_same_values(triple):
    expected = score_difference(*triple)
    strided = score_difference(*(tensor.transpose(1, 3).contiguous().transpose(1, 3) for tensor in triple))
    assert_close(strided.grad, expected.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_tangents_are_refused_as_dual_numbers(triple, which):
    """Mutation: no check; the tangent would be that of a constant, silently."""
    with forward_ad.dual_level():
        inputs = list(triple)
        inputs[which] = forward_ad.make_dual(inputs[which], torch.ones_like(inputs[which]))
        with pytest.raises(RuntimeError, match="tangent"):
            score_difference(*inputs)


def test_tangents_are_refused_under_func_jvp(triple):
    x, real, fake = triple
    with pytest.raises(RuntimeError, match="tangent"):
        torch.func.jvp(lambda y: score_difference(y, real, fake).grad, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize(
    ("x", "real", "fake", "message"),
    [
        ((3, 2), (3, 2), (2, 3), r"fake_x0 \[2, 3\]"),
        ((3, 2), (1, 2), (3, 2), r"real_x0 \[1, 2\]"),
        ((3,), (3,), (3,), r"x \[3\]"),
        ((0, 2), (0, 2), (0, 2), "non-empty"),
    ],
)
def test_wrong_shapes_are_named(x, real, fake, message):
    with pytest.raises(ValueError, match=message):
        score_difference(torch.ones(x), torch.ones(real), torch.ones(fake))


def test_integers_and_a_zero_floor_are_refused(triple):
    with pytest.raises(ValueError, match=r"x torch\.int64"):
        score_difference(triple[0].long(), triple[1], triple[2])
    with pytest.raises(ValueError, match="floor"):
        score_difference(*triple, floor=0.0)


def test_a_backend_asked_for_by_name_runs_or_raises(triple, monkeypatch):
    """Mutation: falling back to the reference."""
    assert backends()["reference"] == "ok"
    expected = score_difference(*triple).grad
    assert torch.equal(score_difference(*triple, backend="reference").grad, expected)
    with pytest.raises(ValueError, match="triton"):
        score_difference(*triple, backend="triton")
    with pytest.raises(ValueError, match="known: auto, reference"):
        score_difference(*triple, backend="tritn")
    monkeypatch.setenv("FEWSTEP_KERNELS", "cuda")
    with pytest.raises(ValueError, match="FEWSTEP_KERNELS='cuda'"):
        score_difference(*triple)
    assert torch.equal(score_difference(*triple, backend="reference").grad, expected)


def test_a_misspelt_environment_is_found_before_a_teacher_is_loaded(monkeypatch, tmp_path):
    """Mutation: found by the first loss, after the weights were read, with a traceback."""
    from fewstep.api import distill

    monkeypatch.setenv("FEWSTEP_KERNELS", "tritn")
    with pytest.raises(ValueError, match=r"FEWSTEP_KERNELS='tritn': no such backend; known: auto"):
        distill("fashion-dit", "dmd2", iterations=1, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
