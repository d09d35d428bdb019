"""Claims about the contract: a whole answer is read as it was written, and whatever is wrong with one is said."""

import json
from pathlib import Path

import pytest

from fewstep.metrics.outside.contract import CONTRACT, Item, Request, read_answer

REQUEST = Request("sharpness", Path("folder"), [Item("a.png", "a cat"), Item("b/c.png", "a dog", 1, {"tag": "two"})])
WHOLE = {
    "contract": CONTRACT,
    "metric": "sharpness",
    "scores": {"a.png": 0.25, "b/c.png": {"edges": 3}},
    "figures": {"edges": 2.5},
    "weights": {"net.pt": "ab" * 32},
    "package": "sharp 1.2",
    "seconds": 2,
}


def changed(**changes) -> str:
    """The whole answer with other values; None takes one away."""
    return json.dumps({name: value for name, value in (WHOLE | changes).items() if value is not None})


def test_a_whole_answer_is_read_as_it_was_written():
    answer = read_answer(changed(), REQUEST)
    assert answer.scores == {"a.png": 0.25, "b/c.png": {"edges": 3.0}} and answer.figures == {"edges": 2.5}
    assert (answer.weights, answer.package, answer.seconds) == ({"net.pt": "ab" * 32}, "sharp 1.2", 2.0)


def test_what_need_not_be_known_may_be_left_out():
    answer = read_answer(changed(figures=None, weights=None, package=None), REQUEST)
    assert (answer.figures, answer.weights, answer.package) == ({}, {}, None)


def test_a_request_says_all_that_an_adapter_needs():
    """Files relative to a folder that is absolute: the child has no other way to find them."""
    told = json.loads(REQUEST.to_json())
    assert told["contract"] == CONTRACT and told["metric"] == "sharpness" and told["device"] == "auto"
    assert Path(told["folder"]).is_absolute() and told["options"] == {}
    assert told["items"][1] == {"file": "b/c.png", "prompt": "a dog", "index": 1, "extra": {"tag": "two"}}


BAD = {
    "empty": ("", "no JSON"),
    "text-before": ("loading the weights\n" + changed(), "begins 'loading the weights"),
    "text-after": (changed() + "\ndone", "no JSON (Extra data"),
    "list": ("[]", "answer is list"),
    "twice": ('{"contract": 1, "contract": 1}', "'contract' twice"),
    "file-twice": (changed().replace('"b/c.png"', '"a.png"'), "'a.png' twice"),
    "unknown-key": (changed(score=1), "unknown key 'score'; allowed: contract"),
    "no-scores": (changed(scores=None), "lacks scores"),
    "version": (changed(contract=CONTRACT + 1), "of contract 2, and this is contract 1"),
    "metric": (changed(metric="blur"), "of the metric 'blur', and 'sharpness' was asked for"),
    "missing-file": (changed(scores={"a.png": 1}), "1 of 2 files; 'b/c.png' is missing"),
    "unknown-file": (changed(scores=WHOLE["scores"] | {"z.png": 1}), "scored 'z.png', which it was not asked for"),
    "nan": (changed(scores={"a.png": float("nan"), "b/c.png": 1}), "the score of 'a.png' is nan"),
    "infinite": (changed(scores={"a.png": 1, "b/c.png": {"edges": float("inf")}}), "'b/c.png'.edges is inf"),
    "huge": (changed(scores={"a.png": 10**400, "b/c.png": 1}), "the score of 'a.png' is 1000"),
    "text": (changed(scores={"a.png": "1", "b/c.png": 1}), "the score of 'a.png' is '1'"),
    "true": (changed(scores={"a.png": True, "b/c.png": 1}), "the score of 'a.png' is True"),
    "figure": (changed(figures={"edges": float("nan")}), "figures.edges is nan"),
    "hash": (changed(weights={"net.pt": "abc"}), "'net.pt' have 'abc', and a SHA-256"),
    "package": (changed(package=3), "package is 3"),
    "seconds": (changed(seconds="2"), "seconds is '2'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_is_refused(case):
    """Mutations: any of the checks left out; NaN and 10^400, which Python's JSON reads; true, a number to Python."""
    text, words = BAD[case]
    with pytest.raises(ValueError) as caught:
        read_answer(text, REQUEST)
    assert words in str(caught.value)
