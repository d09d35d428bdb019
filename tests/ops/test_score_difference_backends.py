"""Every backend that runs on a CPU, and every operator of matching, against the float64 reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

import fewstep_cuda
from fewstep_cuda import dispatch
from fewstep_cuda.cpu import build
from fewstep_cuda.score_difference import split

ROOT = Path(__file__).resolve().parents[2]
WHY = build.failure("score_difference")
needs_cpu = pytest.mark.skipif(bool(WHY), reason=f"no C++ kernels here: {WHY}")
SHAPES = [(3, 2, 5, 3), (1, 1), (2, 70001), (1, 70001), (5, 7)]
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]
LEVELS = {"alpha": 0.8, "sigma": 0.6}


def plain(x, real, fake, other, more, **options):
    return fewstep_cuda.score_difference(x, real, fake, **options)


def raw(x, real, fake, other, more, kind="eps", **options):
    """Five tensors of networks, guided."""
    alpha, sigma = (torch.full((len(x),), level, dtype=torch.float64) for level in LEVELS.values())
    given = (x, real, fake, other, more, alpha, sigma)
    return fewstep_cuda.score_difference_from_raw(*given, guidance=4.5, kind=kind, **options)


def raw_unguided(x, real, fake, other, more, **options):
    levels = [torch.linspace(0.2, 0.9, len(x), dtype=torch.float64)] * 2
    return fewstep_cuda.score_difference_from_raw(x, real, fake, other, None, *levels, kind="flow", **options)


def two(x, real, fake, other, more, **options):
    return fewstep_cuda.score_difference_two(x, (real, fake), (other, more), strength=3.5, **options)


def identity(x, real, fake, other, more, **options):
    return fewstep_cuda.score_identity(x, real, fake, alpha=1.2, **options)


def tangent(x, real, fake, other, more, floor=None, **options):
    return fewstep_cuda.tangent_normalise(x, 0.1, norm="sum", **options)


def tangent_mean(x, real, fake, other, more, floor=None, **options):
    return fewstep_cuda.tangent_normalise(x, 0.1, norm="mean", **options)


OPERATORS = [plain, raw, raw_unguided, two, identity, tangent, tangent_mean]
MATCHING = OPERATORS[:-2]


def inputs(shape, seed=0, scale=1.0):
    """Five tensors, float32, unrelated, so that no difference is exact."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for _ in range(5)]


def exact(operator, given, **options):
    return operator(*(tensor.double() for tensor in given), backend="reference", **options)


def error(found, wanted):
    """Of one output: the greatest difference by the greatest value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_plain_float32(operator, backend, shape):
    """Of every output, against float64; the floor of the budget, 4 ulp, is for where plain torch is exact by luck.

    Mutations: the last, partial block of elements left out; power left out; n of the whole batch.
    """
    given = inputs(shape)
    wanted, torch32 = exact(operator, given), operator(*given, backend="reference")
    for mine, theirs, truth in zip(operator(*given, backend=backend), torch32, wanted):
        assert mine.shape == truth.shape and mine.dtype == torch.float32 and mine.is_contiguous()
        assert error(mine, truth) <= max(2 * error(theirs, truth), 4 * 2**-24)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
def test_every_kind_of_network_is_converted(kind, backend):
    """Mutation: x_t without its factor."""
    given = inputs((3, 2, 5, 3))
    for mine, truth in zip(raw(*given, kind=kind, backend=backend), exact(raw, given, kind=kind)):
        assert_close(mine.double(), truth, rtol=3e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_x_t_takes_no_part_where_networks_predict_x0(backend):
    """Mutation: p x_t computed with p = 0, which makes NaN of what is not finite."""
    x, x_t, *rest = inputs((2, 9))
    x_t[0, 3] = float("inf")
    assert all(output.isfinite().all() for output in raw(x, x_t, *rest, kind="x0", backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_strides_of_the_inputs_do_not_matter(operator, backend):
    """Mutation: a launcher that hands on data_ptr() of what is not contiguous."""
    given = inputs((3, 2, 5, 4))
    strided = [tensor.transpose(1, 3).contiguous().transpose(1, 3) for tensor in given]
    strided[2] = torch.stack([given[2], given[2]], -1)[..., 0]
    for mine, straight in zip(operator(*strided, backend=backend), operator(*given, backend=backend)):
        assert mine.is_contiguous() or backend == "reference"
        assert_close(mine, straight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", MATCHING)
@pytest.mark.parametrize("scale", [1e-4, 1e25])
def test_magnitudes_do_not_matter(operator, backend, scale):
    """g has no scale. Mutation: a sum of squares of what is not divided yet."""
    given = inputs((2, 70001), scale=min(scale, 1e15) if operator is identity else scale)
    options = {"floor": 1e-30}
    for mine, truth in zip(operator(*given, backend=backend, **options), exact(operator, given, **options)):
        assert error(mine, truth) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_not_finite_spoils_its_sample_and_the_value_alone(operator, which, bad, backend):
    """Finite and not finite in the same places as the reference, which is tested by itself.

    Mutations: std::max for the floor, which drops NaN; infinity as divisor, which makes a silent 0; nan_to_num.
    """
    given = inputs((3, 40))
    given[which][1, 17] = bad
    wanted = operator(*given, backend="reference")
    found = operator(*given, backend=backend)
    taken = which == 0 if operator in (tangent, tangent_mean) else which < {plain: 3, identity: 3}.get(operator, 5)
    unguided = operator is raw_unguided and which == 4
    assert all(output.isfinite().all() for output in found) == (not taken or unguided)
    for mine, truth in zip(found, wanted):
        assert torch.equal(mine.isfinite(), truth.isfinite())
        assert torch.equal(mine.isnan(), truth.isnan())
        if mine.shape == given[0].shape:
            assert mine[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", MATCHING)
def test_floor_is_the_least_normaliser(operator, backend):
    """Mutation: no floor."""
    x, *_ = inputs((3, 40))
    same = [x.clone() for _ in range(5)]
    weight = operator(*same, floor=1e3, backend=backend).weight
    assert_close(weight, torch.full_like(weight, 1e-3))


def test_a_tangent_of_zero_stays_zero():
    for backend in ("reference", "auto"):
        bounded, size = fewstep_cuda.tangent_normalise(torch.zeros(2, 3), 0.1, backend=backend)
        assert not bounded.any() and not size.any()


def test_gradients_of_the_identity_are_those_of_its_value():
    """Against autograd in float64, n a constant. Mutations: 1 - alpha for alpha; the sign of grad_fake."""
    x, real, fake = (tensor.double().requires_grad_() for tensor in inputs((3, 2, 5, 3))[:3])
    n = (x - real).abs().flatten(1).mean(1).detach()
    d = real - fake
    loss = ((d * ((real - x) - 1.2 * d)).flatten(1).mean(1) / n).mean()
    value, weight, *grads = fewstep_cuda.score_identity(x, real, fake, alpha=1.2)
    assert_close(value, loss.detach(), rtol=1e-12, atol=0)
    assert_close(weight, 1 / n, rtol=1e-12, atol=0)
    for mine, truth in zip(grads, torch.autograd.grad(loss, (x, real, fake))):
        assert_close(mine, truth, rtol=1e-9, atol=1e-15)


def test_two_terms_are_the_sum_of_each_alone():
    """Each by its own normaliser. Mutation: both by n of the first."""
    x, real, fake, cond, uncond = (tensor.double() for tensor in inputs((3, 2, 5, 3)))
    both = fewstep_cuda.score_difference_two(x, (real, fake), (cond, uncond), strength=3.5)
    dm, ca = fewstep_cuda.score_difference(x, real, fake), fewstep_cuda.score_difference(x, cond, uncond)
    assert_close(both.grad, dm.grad + 3.5 * ca.grad, rtol=1e-12, atol=1e-15)
    assert_close(both.weight, torch.stack([dm.weight, ca.weight]), rtol=1e-12, atol=0)
    assert_close(both.value, torch.stack([dm.value, 3.5**2 * ca.value]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("operator", OPERATORS)
def test_tangents_are_refused(operator):
    """Mutation: no check: the tangent would be that of a constant, silently."""
    given = inputs((3, 4))
    with forward_ad.dual_level():
        given[0] = forward_ad.make_dual(given[0], torch.ones_like(given[0]))
        with pytest.raises(RuntimeError, match="tangent"):
            operator(*given)


@pytest.mark.parametrize("numel", [1, 2, 3, 70001, 2**40 + 1])
def test_numel_splits_into_a_power_of_two_and_a_share(numel):
    share, power = split(numel)
    assert share / power == numel and 1 <= share < 2


def test_bad_settings_of_a_tangent_are_refused():
    with pytest.raises(ValueError, match="allowed: sum, mean"):
        fewstep_cuda.tangent_normalise(torch.ones(2, 3), norm="max")
    with pytest.raises(ValueError, match="c must be positive"):
        fewstep_cuda.tangent_normalise(torch.ones(2, 3), 0.0)


@needs_cpu
def test_gradients_of_the_greatest_inputs_keep_their_digits():
    """n numel is 3e40 here, where plain torch's sum in float32 is infinite.

    Mutation: 1 / (n numel) as one float32, which is off by 1e-5.
    """
    given = inputs((1, 70001), scale=4e35)
    assert error(plain(*given, backend="cpu").grad, exact(plain, given).grad) < 1e-6


@needs_cpu
@pytest.mark.parametrize("operator", OPERATORS)
def test_threads_do_not_change_a_bit(operator):
    """Mutation: a reduction over threads."""
    given = inputs((2, 70001))
    before = torch.get_num_threads()
    alone = operator(*given, backend="cpu")
    try:
        torch.set_num_threads(3)
        several = operator(*given, backend="cpu")
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, alone, several))


@needs_cpu
def test_auto_takes_the_kernel_for_float32_and_the_reference_for_float64(monkeypatch):
    """Mutations: the order of `auto` reversed; a kernel that is handed float64."""
    monkeypatch.delenv("FEWSTEP_KERNELS", raising=False)
    given = inputs((2, 9))
    chosen = dispatch.kernel("score_difference", given)
    assert chosen.__module__ == "fewstep_cuda.cpu.score_difference"
    assert dispatch.kernel("score_difference", [given[0].double()]).__module__ == "fewstep_cuda.score_difference"
    monkeypatch.setenv("FEWSTEP_KERNELS", "reference")
    assert dispatch.kernel("score_difference", given).__module__ == "fewstep_cuda.score_difference"
    assert dispatch.kernel("score_difference", given, "cpu") is chosen


@needs_cpu
@pytest.mark.parametrize("operator", OPERATORS)
def test_float64_is_refused_by_the_kernel_that_was_asked_for(operator, monkeypatch):
    """Mutation: falling back to the reference."""
    doubles = [tensor.double() for tensor in inputs((2, 9))]
    with pytest.raises(ValueError, match=r"backend='cpu' cannot run .*takes torch\.float32.*usable here: auto, refer"):
        operator(*doubles, backend="cpu")
    monkeypatch.setenv("FEWSTEP_KERNELS", "cpu")
    with pytest.raises(ValueError, match="FEWSTEP_KERNELS='cpu' cannot run"):
        operator(*doubles)


CALL = """
import sys, torch, fewstep_cuda
x = torch.arange(6.0).view(2, 3)
for _ in range(2):
    print(fewstep_cuda.score_difference(x, 0 * x, x, backend=sys.argv[1]).value.item())
    print(fewstep_cuda.tangent_normalise(x, 0.1, backend=sys.argv[1])[1].tolist())
"""


def process(folder, backend, **variables):
    """A fresh process that calls two operators twice, with a cache of its own."""
    environment = os.environ | {"FEWSTEP_CACHE": str(folder), "PYTHONPATH": str(ROOT)} | variables
    environment.pop("FEWSTEP_KERNELS", None)
    command = [sys.executable, "-c", CALL, backend]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


SLOW_COMPILER = """#!/bin/sh
case "$*" in *--version*) exec {cxx} --version;; esac
echo called >> {log}
for last; do :; done
: > "$last"  # it has its output open while it works
sleep 3
exec {cxx} "$@"
"""


@needs_cpu
def test_two_processes_at_once_make_one_library(tmp_path):
    """Mutations: no lock (the compiler is called twice); a library written in its final place (half of one loaded)."""
    compiler, log = tmp_path / "cxx", tmp_path / "log"
    compiler.write_text(SLOW_COMPILER.format(cxx=build.compiler(), log=log))
    compiler.chmod(0o755)
    both = [process(tmp_path, "cpu", CXX=str(compiler)) for _ in range(2)]
    outputs = [made.communicate(timeout=300) for made in both]
    assert [made.returncode for made in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] and not outputs[0][1]
    assert len(log.read_text().splitlines()) == 1
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 1
    assert not list((tmp_path / "kernels").glob(".*"))


@pytest.mark.parametrize("how", ["missing", "failing"])
def test_without_a_compiler_auto_says_it_once_and_a_request_raises(tmp_path, how):
    """Mutations: a warning at every call, or none; `cpu` falling back."""
    compiler = tmp_path / "cxx"
    if how == "failing":
        compiler.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
        compiler.chmod(0o755)
    automatic, asked = (process(tmp_path, backend, CXX=str(compiler)) for backend in ("auto", "cpu"))
    out, told = automatic.communicate(timeout=300)
    word = "no such luck" if how == "failing" else "no C++ compiler"
    assert automatic.returncode == 0 and len(out.splitlines()) == 4
    assert told.count(word) == 1 and told.count("operators run in plain torch") == 1
    _, told = asked.communicate(timeout=300)
    assert asked.returncode == 1 and word in told and "usable here: auto, reference" in told


@needs_cpu
def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    """Mutation: the OSError let through, which would end a training that can do without."""
    (tmp_path / "file").write_text("")
    automatic = process(tmp_path / "file", "auto")
    _, told = automatic.communicate(timeout=300)
    assert automatic.returncode == 0 and "$FEWSTEP_CACHE names another folder" in told
