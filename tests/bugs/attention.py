"""Bugs of attention with its tangent."""

from __future__ import annotations

from tests.bugs.mutant import Mutant

CONTRACT, CHUNKED = "fewstep_cuda/attention_jvp.py", "fewstep_cuda/attention_chunked.py"
CPU, TRITON = "fewstep_cuda/cpu/attention_jvp.cpp", "fewstep_cuda/triton/attention_jvp.py"
TESTS = "tests/ops/test_attention_jvp.py"


def _mutant(name: str, bug: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(f"attention-{name}", "attention", bug, file, old, new, tuple(f"{TESTS}::{test}" for test in tests))


MUTANTS = (
    _mutant(
        "zero-tangent",
        "the Function's jvp gives zeros",
        CONTRACT,
        "        return to, None\n",
        "        return torch.zeros_like(to), None\n",
        "test_dual_numbers",
        "test_function_transforms_nest",
    ),
    _mutant(
        "twice",
        "the jvp computes the value again",
        CONTRACT,
        "        if to is None:\n            _, to",
        "        if True:\n            _, to",
        "test_value_and_tangent_come_from_one_pass",
    ),
    _mutant(
        "gradients-tangent",
        "the gradient's tangent misses its part through go",
        CONTRACT,
        "*dual, tgo, go, ctx.options)[:3]",
        "*dual, None, go, ctx.options)[:3]",
        "test_derivatives_by_finite_differences",
        "test_function_transforms_nest",
    ),
    _mutant(
        "autocast",
        "autocast is not heeded",
        CONTRACT,
        "    q, k, v = _autocast(q, k, v)\n",
        "",
        "test_autocast_is_sdpas",
    ),
    _mutant(
        "row-sum",
        "sum_d gt to is left out of gS",
        CONTRACT,
        "inner + x * n - (gt * to).sum(-1, keepdim=True)",
        "inner + x * n",
        "test_gradients_through_both_outputs",
    ),
    _mutant(
        "blocks-causal",
        "every block of rows starts at row 0",
        CHUNKED,
        "torch.arange(rows.start, rows.start + view.shape[3]",
        "torch.arange(0, view.shape[3]",
        "test_blocks_are_several",
    ),
    _mutant(
        "blocks-keys",
        "a block's gradient by keys replaces the others'",
        CHUNKED,
        "gk[batch] += gs.mT @ sq",
        "gk[batch] = gs.mT @ sq",
        "test_blocks_are_several",
    ),
    _mutant(
        "cpu-mean",
        "mu moves and G does not",
        CPU,
        "(load(tg) - step[r] * load(to)) * scale[r]",
        "load(tg) * scale[r]",
        "test_value_and_tangent",
        "test_masks",
    ),
    _mutant(
        "cpu-causal",
        "a query attends to the key after it",
        CPU,
        "i < key + j - first &&",
        "i < key + j - 1 - first &&",
        "test_masks",
    ),
    _mutant(
        "cpu-empty",
        "a row without keys is 0 / 0",
        CPU,
        "inverse = l == 0 ? 0 : 1 / l",
        "inverse = 1 / l",
        "test_rows_without_keys_are_zero",
    ),
    _mutant(
        "cpu-tail",
        "the last rows of a block are left out",
        CPU,
        "    if (left >= R) {\n      sums<R, C, B, Y>(p + i, hi, v, v_row, tv, tv_row, keys, here), i += R;\n    }",
        "    if (left < 2) break;\n"
        "    if (left >= R) {\n      sums<R, C, B, Y>(p + i, hi, v, v_row, tv, tv_row, keys, here), i += R;\n    }",
        "test_value_and_tangent",
    ),
    Mutant(
        "attention-triton-group",
        "attention",
        "keys get gradients of the first head of their group only",
        TRITON,
        "for one in range(0, share):",
        "for one in range(0, 1):",
        ("tests/ops/test_interpreter.py::test_kernels_in_the_interpreter",),
    ),
)
