from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fewstep.training.data import PromptData
from fewstep.training.prompts import read_prompts
from fewstep.types import Condition

PROMPTS = ("a", "b", "c", "d", "e")


def encode(prompts: Sequence[str]) -> Condition:
    """The prompt's letter as a number."""
    return Condition({"text": torch.tensor([[float(ord(p))] for p in prompts])}, {"text": torch.zeros(1, 1)})


def data(seed: int = 0, prompts: Sequence[str] = PROMPTS) -> PromptData:
    return PromptData(prompts, encode, (2, 3), seed)


def drawn(source: PromptData, ids: Sequence[int]) -> list[str]:
    return [chr(int(value)) for value in source.batch(ids).cond.tensors["text"][:, 0]]


def test_each_prompt_comes_once_an_epoch():
    """Fails with independent draws (a prompt is then missing from an epoch with probability 0.33)."""
    source = data()
    for epoch in range(4):
        assert sorted(drawn(source, range(5 * epoch, 5 * epoch + 5))) == list(PROMPTS)


def test_epochs_and_seeds_differ_in_order():
    """Fails with one permutation for all epochs."""
    orders = {tuple(drawn(data(seed), range(5 * epoch, 5 * epoch + 5))) for seed in range(3) for epoch in range(4)}
    assert len(orders) > 6


def test_prompts_depend_on_the_global_index_alone():
    """Any split into ranks and micro-batches, in any order and by a new object, sees the same prompts."""
    whole = drawn(data(), range(24))
    split = data()
    parts = {start: drawn(split, range(start, start + 3)) for start in (21, 0, 12, 3, 18, 6, 15, 9)}
    assert [prompt for start in sorted(parts) for prompt in parts[start]] == whole


def test_uneven_batches_keep_prompts_balanced():
    """24 samples of 5 prompts: each 4 or 5 times."""
    assert set(Counter(drawn(data(), range(24))).values()) == {4, 5}


def test_batch_carries_shape_ids_and_the_empty_prompt():
    batch = data().batch((7, 3))
    assert (batch.shape, batch.sample_ids, len(batch)) == ((2, 3), (7, 3), 2)
    assert torch.equal(batch.cond.unconditional().tensors["text"], torch.zeros(2, 1))


def test_non_finite_embedding_is_refused():
    """One NaN would turn up as a diverged run, hours later.  Fails without the check."""

    def broken(prompts: Sequence[str]) -> Condition:
        made = encode(prompts)
        made.tensors["text"][2, 0] = float("nan")
        return made

    with pytest.raises(ValueError, match=r"non-finite values in \['text'\]"):
        PromptData(PROMPTS, broken, (2, 3), 0)


def test_integer_conditions_are_accepted():
    """isfinite is not for class labels."""
    made = PromptData(PROMPTS, lambda p: Condition({"class": torch.arange(len(p))}), (2,), 0)
    assert made.batch((0, 1)).cond.tensors["class"].dtype == torch.int64


def test_progress_is_told_while_many_prompts_are_encoded():
    """And they are what one call makes of them, whose rows may be padded to the longest of all."""
    told, prompts = [], [chr(ord("a") + i) for i in range(20)]
    made = PromptData(prompts, encode, (2, 3), 0, told.append)
    assert told == [16, 4]
    assert drawn(made, range(20)) == drawn(data(prompts=prompts), range(20))


def test_digest_tells_prompts_apart():
    """Order and line ends count.  Fails with a digest of the joined text without separators."""
    digests = [data(prompts=p).digest for p in (("a", "b"), ("b", "a"), ("a", "b", "c"))]
    assert len(set(digests)) == 3 and data().digest == data(seed=1).digest
    assert PromptData(("ab", "c"), lambda p: Condition(), (2,), 0).digest != (
        PromptData(("a", "bc"), lambda p: Condition(), (2,), 0).digest
    )


def test_prompt_file_is_one_prompt_a_line(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("a boot\n\n  un café \r\nlast", encoding="utf-8")
    assert read_prompts(path) == ("a boot", "un café", "last")


@pytest.mark.parametrize("text", ["", "\n \n\t\n"])
def test_prompt_file_without_prompts_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(path)


def test_prompt_file_that_is_no_utf8_is_refused(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.txt is not UTF-8 text .* at byte 3"):
        read_prompts(path)


def test_missing_prompt_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no prompt file at"):
        read_prompts(tmp_path / "none.txt")
