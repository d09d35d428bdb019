"""Bugs of norms, what follows them, and their tangents."""

from __future__ import annotations

from tests.bugs.mutant import Mutant

CONTRACT, LAUNCHER = "fewstep_cuda/norm_jvp.py", "fewstep_cuda/cpu/norm_jvp.py"
CPU, TRITON = "fewstep_cuda/cpu/norm_jvp.cpp", "fewstep_cuda/triton/norm_jvp.py"
TESTS = "tests/ops/test_norm_jvp.py"
INTERPRETED = "tests/ops/test_interpreter.py::test_kernels_in_the_interpreter[test_norm_jvp.py]"
COMPOSED = "test_value_and_tangent_are_the_compositions"
ALONE = "test_each_tangent_alone_and_none_of_them"
BACKWARD = "test_backward_through_value_and_tangent"
BOTH_MODES = "test_both_modes_and_their_products_in_float64"


def _mutant(name: str, bug: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(f"norm-{name}", "norms", bug, file, old, new, tuple(f"{TESTS}::{test}" for test in tests))


def _triton(name: str, bug: str, old: str, new: str) -> Mutant:
    return Mutant(f"norm-triton-{name}", "norms", bug, TRITON, old, new, (INTERPRETED,))


MUTANTS = (
    _mutant(
        "mean",
        "the mean's tangent is left out",
        CONTRACT,
        "u = u - self.mean(u) if self.centred else u",
        "u = u + 0",
        COMPOSED,
        BACKWARD,
    ),
    _mutant(
        "eps",
        "eps is added to the root",
        CONTRACT,
        "(self.mean(x.square()) + self.eps).rsqrt()",
        "1 / (self.mean(x.square()).sqrt() + self.eps)",
        "test_tiny_and_huge_inputs",
        "test_a_row_without_variance",
    ),
    _mutant(
        "groups",
        "every channel is a group of its own",
        CONTRACT,
        "Norm(kernel, True, eps, axes=2, silu=silu)",
        "Norm(kernel, True, eps, axes=1, silu=silu)",
        COMPOSED,
        BACKWARD,
    ),
    _mutant(
        "rope",
        "heads turn the other way",
        CONTRACT,
        "torch.stack((-v, u), -1)",
        "torch.stack((v, -u), -1)",
        COMPOSED,
        BACKWARD,
    ),
    _mutant(
        "scale",
        "the scale's tangent does not move what is normalised",
        CONTRACT,
        "* a + xhat * ta + tc\n    if form.silu",
        "* a + tc\n    if form.silu",
        COMPOSED,
        ALONE,
    ),
    _mutant(
        "bias",
        "the scale's tangent does not move the bias",
        CONTRACT,
        "tc = ta * bias if tc is None else ta * bias + tc",
        "tc = tc",
        COMPOSED,
        ALONE,
    ),
    _mutant(
        "constant",
        "a tangent that is left out is its primal",
        CONTRACT,
        "torch.zeros_like(p) if t is None else t.to(p.dtype)",
        "p if t is None else t.to(p.dtype)",
        ALONE,
    ),
    _mutant(
        "weights",
        "weights are folded in without their derivative",
        CONTRACT,
        "a * weight.to(**plain)",
        "a * weight.detach().to(**plain)",
        "test_parameters_may_carry_tangents",
    ),
    _mutant(
        "gradient",
        "the gradient by x through r's tangent is left out",
        CONTRACT,
        " + self.mean(w * xhat) * txhat",
        "",
        BACKWARD,
        BOTH_MODES,
    ),
    Mutant(
        "norm-recorded",
        "norms",
        "the fast route of tangents is taken where a graph is recorded",
        CONTRACT,
        "if not (torch.is_grad_enabled() and",
        "if not (False and",
        (
            f"{TESTS}::{BOTH_MODES}",
            f"{TESTS}::test_the_tangent_is_not_zero",
            "tests/ops/test_networks.py::test_gradients_of_value_beside_a_tangent",
        ),
    ),
    _mutant(
        "compiled",
        "torch.compile traces the Function and drops its jvp",
        CONTRACT,
        "    return disable(function)",
        "    return function if disable else function",
        "test_compiled_calls_have_the_right_tangent",
    ),
    _mutant(
        "half",
        "moments are in the inputs' dtype",
        CONTRACT,
        "form.normalised(_wide(x))",
        "form.normalised(x)",
        "test_half_precision_is_computed_in_float32",
    ),
    _mutant(
        "positions",
        "the tangent of positions is lost without a word",
        CONTRACT,
        "forward_ad.unpack_dual(table).tangent is not None or table.requires_grad",
        "table.requires_grad",
        "test_positions_with_a_derivative_are_refused",
    ),
    _mutant(
        "request",
        "the backend that was asked for is not",
        CONTRACT,
        'dispatch.kernel("gated_residual", [x, y], backend)',
        'dispatch.kernel("gated_residual", [x, y])',
        "test_what_does_not_fit_is_named",
    ),
    _mutant(
        "strides",
        "the launcher hands on the pointer of what is not contiguous",
        LAUNCHER,
        "return [None if t is None else t.contiguous() for t in tensors]",
        "return list(tensors)",
        "test_strides_change_nothing",
    ),
    _mutant(
        "tangents-strides",
        "the tangent is read with its primal's strides",
        LAUNCHER,
        "for t in (x, x if tx is None else tx, y)]",
        "for t in (x, x, y)]",
        "test_strides_change_nothing",
        "test_heads_as_attention_has_them",
    ),
    _mutant(
        "cpu-k",
        "k has r, not its square",
        CPU,
        "found.k = float(r2 * (",
        "found.k = float(found.r * (",
        COMPOSED,
    ),
    _mutant(
        "cpu-covariance",
        "the covariance is about the means that were guessed",
        CPU,
        "left[3] - left[0] * left[1]",
        "left[3]",
        COMPOSED,
    ),
    _mutant(
        "cpu-one-pass",
        "a mean guessed far off is not mended",
        CPU,
        "if (turn == 2) break;",
        "if (turn == 0) break;",
        "test_first_entries_that_say_nothing_of_the_rest",
    ),
    _mutant(
        "cpu-sample",
        "a row's scale and shift are another sample's",
        CPU,
        "b = row / length, at = row * size;",
        "b = row % batch, at = row * size;",
        COMPOSED,
    ),
    _mutant(
        "cpu-exponential",
        "the exponential leaves float's range",
        CPU,
        "    x = x > 88.0f ? 88.0f : x;\n",
        "",
        "test_silu_far_from_zero",
    ),
    _mutant(
        "cpu-stream",
        "a line that passes the caches holds an entry twice",
        CPU,
        "_mm_loadu_ps(tile + i + 8)",
        "_mm_loadu_ps(tile + i)",
        "test_outputs_that_pass_the_caches",
    ),
    _triton(
        "beyond",
        "entries beyond the row count in the variance",
        "x = tl.where(held, x - tl.sum(x) / size, 0.0)",
        "x = x - tl.sum(x) / size",
    ),
    _triton(
        "pair",
        "the tangent's pair is read at the primal's place",
        "TX + from_tx + (j * td)",
        "TX + from_x + (j * td)",
    ),
    _triton(
        "eps",
        "eps is added to a head's root",
        "r = 1 / tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True) / size + eps)",
        "r = 1 / (tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True) / size) + eps)",
    ),
    _triton(
        "gate",
        "a block has the gate of its first entry's sample",
        "b, c = i // (length * size), i % size",
        "b, c = tl.program_id(0).to(tl.int64) * BLOCK // (length * size), i % size",
    ),
)
