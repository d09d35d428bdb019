"""Triton's kernels of matching, compiled for three architectures: none spills, and what they take is on record."""

import pytest

from tests.ops.aot import ARCHITECTURES, check, resources

pytest.importorskip("triton", reason="Triton is not installed here: its kernels are not compiled")
pytestmark = pytest.mark.slow

PLAIN = {"x": "in", "real": "in", "fake": "in", "gap": "*fp32", "partial": "*fp32", "size": "i32"}
NETWORKS = {name: "in" for name in ("x", "x_t", "fake", "cond", "uncond")}
LEVELS = {"p": "*fp32", "q": "*fp32", "guidance": "fp32"}
OUT = {"gap": "*fp32", "partial": "*fp32", "size": "i32"}
APART = {"x": "in", "real": "in", "cond": "in", "partial": "*fp32", "size": "i32"}
SUMS = {"partial": "*fp32", "weight": "*fp32", "value": "*fp32", "size": "i32"}
SCALES = {name: "fp32" for name in ("floor", "share", "power")}
SCALE = {"grad": "*fp32"} | SUMS | SCALES | {"half": "fp32"}
TERMS = {name: "in" for name in ("real", "fake", "cond", "uncond")}
TWO = TERMS | {"grad": "*fp32"} | SUMS | {"strength": "fp32"} | SCALES | {"half": "fp32"}
GRADS = {name: "*fp32" for name in ("grad_x", "grad_real", "grad_fake")}
IDENTITY = {"x": "in", "real": "in", "fake": "in"} | GRADS | SUMS | {"alpha": "fp32", "rest": "fp32"} | SCALES
DIVIDE = {"g": "in", "out": "*fp32", "partial": "*fp32", "norm": "*fp32", "size": "i32", "count": "fp32", "c": "fp32"}
KERNELS = {
    "first_plain": (PLAIN, {}),
    "first_raw": (NETWORKS | LEVELS | OUT, {"GUIDED": True}),
    "apart": (APART, {"TWO": True}),
    "scale_two": (TWO, {"PARTS": 1024}),
    "scale_identity": (IDENTITY, {"PARTS": 1024}),
    "squares": ({"g": "in", "partial": "*fp32", "size": "i32"}, {}),
    "scale": (SCALE, {"PARTS": 1024}),
    "divide": (DIVIDE, {"PARTS": 1024}),
}
CASES = [(name, dtype) for name in KERNELS for dtype in (("fp32",) if name == "scale" else ("fp32", "bf16", "fp16"))]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_kernel_compiles_without_a_spill(name, dtype):
    from fewstep_cuda.triton import blocks
    from fewstep_cuda.triton import score_difference as kernels

    signature, constants = KERNELS[name]
    constants = {"BLOCK": blocks.BLOCK, **constants}
    types = {argument: f"*{dtype}" if kind == "in" else kind for argument, kind in signature.items()}
    types |= dict.fromkeys(constants, "constexpr")
    found = {
        architecture: resources(getattr(kernels, name), types, constants, architecture, num_warps=blocks.WARPS)
        for architecture in ARCHITECTURES
    }
    check(f"score_difference.{name}", dtype, found)
