"""Kernels and trainings on a CUDA device: make test-all MARKS=gpu ARGS="-n 1 tests/ops/test_on_device.py"."""

import json

import pytest
import torch
from torch.testing import assert_close

import fewstep
import fewstep_cuda
from fewstep_cuda import attention, attention_jvp, dispatch
from tests.ops.test_attention_jvp import SHAPES, draw
from tests.ops.test_norm_jvp import OPERATORS as NORMS
from tests.ops.test_norm_jvp import Case
from tests.ops.test_score_difference_backends import OPERATORS, error, exact, inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels do not run here"),
]
DEVICE = "cuda"
ROUNDING = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PRECISE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Of operators that add up no product."""


def backends(operator: str) -> list[str]:
    """Those that run on a device."""
    return [name for name in dispatch.operators()[operator] if name in (dispatch.TRITON, dispatch.CUDA)]


MATCHING = {
    "plain": "score_difference",
    "raw": "score_difference_from_raw",
    "raw_unguided": "score_difference_from_raw",
    "two": "score_difference_two",
    "identity": "score_identity",
    "tangent": "tangent_normalise",
    "tangent_mean": "tangent_normalise",
}
CASES = [
    pytest.param(run, backend, id=f"{run.__name__}-{backend}")
    for run in OPERATORS
    for backend in backends(MATCHING[run.__name__])
]


@pytest.mark.parametrize("dtype", PRECISE, ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 5, 3), (1, 1), (2, 70001), (4, 4, 128, 128)], ids=str)
@pytest.mark.parametrize(("run", "backend"), CASES)
def test_matching_equals_the_reference(run, backend, shape, dtype):
    """Every output, and the same bits twice."""
    given = [tensor.to(DEVICE, dtype) for tensor in inputs(shape)]
    found, again, wanted = run(*given, backend=backend), run(*given, backend=backend), exact(run, given)
    for mine, same, truth in zip(found, again, wanted, strict=True):
        assert mine.device.type == DEVICE and torch.equal(mine, same)
        assert error(mine, truth) < PRECISE[dtype]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_attention_equals_the_reference(name, dtype):
    """Outputs, and all gradients through both of them."""
    made = []
    for backend, kind in (("triton", dtype), ("reference", torch.float64)):
        leaves = [x.to(DEVICE, dtype).to(kind).requires_grad_() for x in draw(SHAPES[name], torch.float32)]
        o, to = attention_jvp(*leaves, backend=backend)
        weights = torch.linspace(-1, 1, o.numel(), device=DEVICE, dtype=o.dtype).view(o.shape)
        gradients = torch.autograd.grad((o * weights).sum() + (to * weights.flip(0)).sum(), leaves)
        made.append([o.detach(), to.detach(), *gradients])
    for mine, truth in zip(*made, strict=True):
        assert mine.any() or float(truth.abs().max()) < 1e-9  # one key has weight 1, whatever q and k are
        assert float((mine.double() - truth).abs().max()) <= ROUNDING[dtype] * max(1.0, float(truth.abs().max()))


def test_attention_needs_no_memory_of_its_square():
    """4096 x 4096 numbers of 8 heads are half a gigabyte in float32."""
    tensors = [torch.randn(1, 8, 4096, 64, device=DEVICE) for _ in range(6)]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention_jvp(*tensors)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20


@pytest.mark.parametrize("dtype", PRECISE, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norms_equal_the_reference(name, dtype):
    """Values and tangents."""
    case = Case(name, dtype=dtype, backend="triton", device=DEVICE)
    for mine, truth in zip(case.openly(case.inputs, case.tangents), case.truth(), strict=True):
        assert mine is not None and mine.device.type == DEVICE and mine.any() and error(mine, truth) < PRECISE[dtype]


@pytest.mark.parametrize("operator", sorted(dispatch.operators()))
def test_a_device_gets_kernels_of_its_own(operator):
    """Mutation: `auto` that falls back to plain torch without a word."""
    x = torch.randn(2, 3, device=DEVICE)
    assert dispatch.kernel(operator, [x]).__module__.startswith(("fewstep_cuda.triton", "fewstep_cuda.cuda"))


def test_kernels_run_on_the_current_stream():
    """Mutation: the default stream: the kernel would read x before it is written."""
    x, real, fake = (torch.randn(4, 2**20, device=DEVICE) for _ in range(3))
    wanted = fewstep_cuda.score_difference(3 * x, real, fake).grad
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = 3 * x
        found = fewstep_cuda.score_difference(late, real, fake).grad
    stream.synchronize()
    assert_close(found, wanted)


def test_plain_attention_has_the_same_values():
    q, k, v, *tangents = (x.to(DEVICE) for x in draw(SHAPES["cross"], torch.float32))
    assert_close(attention(q, k, v), attention_jvp(q, k, v, *tangents)[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["dmd2", "sid", "decoupled_dmd", "tbcm"])
def test_a_training_takes_its_kernels(method, precision, run_folder):
    """Three iterations of the embedded transformer."""
    train = {"device": DEVICE, "precision": precision, "batch_size": 4}
    run = fewstep.distill("fashion-dit", method, iterations=3, out=run_folder, train=train)
    assert run.student.sample(2, seed=0).isfinite().all()


@pytest.mark.parametrize("option", ["offload_teacher", "compile", "gradient_checkpointing"])
def test_what_saves_memory_or_time_changes_no_loss(option, tmp_path):
    """Losses of the first iterations, beside those of a run without it; on the CPU the options are stand-ins'."""
    told = []
    for value in (False, True):
        train = {"device": DEVICE, "precision": "fp32", "batch_size": 4, "log_every": 1, option: value}
        fewstep.distill("fashion-dit", "dmd2", iterations=3, out=tmp_path / str(value), train=train)
        lines = (tmp_path / str(value) / "metrics.jsonl").read_text().splitlines()
        told.append([row["critic"] for row in map(json.loads, lines) if "critic" in row])
    assert len(told[0]) == 3
    assert told[1] == pytest.approx(told[0], rel=1e-3)


def test_half_precision_with_a_loss_scaler_trains(run_folder):
    train = {"device": DEVICE, "precision": "fp16", "batch_size": 4}
    run = fewstep.distill("fashion-dit", "dmd2", iterations=4, out=run_folder, train=train)
    assert run.progress.updates["generator"] > 0
