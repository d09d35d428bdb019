"""The benchmark of the operators: what it measures is what it says, and what it keeps."""

import json

import pytest
import torch
from torch.testing import assert_close

from eval import bench_ops, bench_score_difference
from eval.bench_case import COPY, Case, measure, row


def broken():
    raise RuntimeError("no compiler\nat all")


def test_contenders_take_turns_with_a_copy_and_a_skip_is_told():
    calls = []
    contenders = {name: lambda name=name: lambda: calls.append(name) for name in "ab"}
    case = Case("op", "toy", (2, 3), 64, "cpu", {**contenders, "c": lambda: broken})
    timings = {timing.contender: timing for timing in measure(case, 0.01)}
    assert timings["c"].skipped == "no compiler" and timings["a"].n == timings["b"].n == timings[COPY].n > 0
    longest = max(map(len, "".join(calls).split("b")))
    assert longest < 12  # one to prepare, one to warm, eight timed
    told = row(case, timings["a"], timings[COPY])
    assert told["of_copy"] == pytest.approx(timings[COPY].best / timings["a"].best, rel=1e-2, abs=1e-3)
    assert row(case, timings["c"], timings[COPY])["skipped"] == "no compiler"


def test_every_contender_computes_the_same_gradient(monkeypatch):
    """Mutation: a contender with another sign, scale or conversion: it would be timed for something else."""
    monkeypatch.setattr(bench_score_difference, "SHAPES", {"toy": (3, 2, 5, 4)})
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setenv("FEWSTEP_KERNELS", "auto")
    for case in bench_score_difference.cases("cpu"):
        found = {name: prepare()() for name, prepare in case.contenders.items()}
        grads = [made if isinstance(made, torch.Tensor) else made[0] for made in found.values()]
        for grad in grads[1:]:
            assert_close(grad, grads[0], rtol=1e-4, atol=1e-7)


def test_rows_replace_the_same_operators_last_ones(tmp_path):
    path = tmp_path / "rows.jsonl"
    bench_ops.keep(path, [{"operator": "a", "n": 1}, {"operator": "b", "n": 1}])
    bench_ops.keep(path, [{"operator": "a", "n": 2}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"operator": "b", "n": 1},
        {"operator": "a", "n": 2},
    ]


def test_an_operator_that_is_not_known_is_refused_with_those_that_are(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_ops", "matmul"])
    with pytest.raises(SystemExit):
        bench_ops.main()
    assert "allowed: adaln, attention_jvp, distribution_matching, gated_residual" in capsys.readouterr().err
