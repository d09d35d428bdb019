from collections import Counter
from collections.abc import Sequence

import torch

from fewstep.training.data import PromptData
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


def test_integer_conditions_are_accepted():
    """isfinite is not for class labels."""
    made = PromptData(PROMPTS, lambda p: Condition({"class": torch.arange(len(p))}), (2,), 0)
    assert made.batch((0, 1)).cond.tensors["class"].dtype == torch.int64


def test_digest_tells_prompts_apart():
    """Order and line ends count.  Fails with a digest of the joined text without separators."""
    digests = [data(prompts=p).digest for p in (("a", "b"), ("b", "a"), ("a", "b", "c"))]
    assert len(set(digests)) == 3 and data().digest == data(seed=1).digest
    assert PromptData(("ab", "c"), lambda p: Condition(), (2,), 0).digest != (
        PromptData(("a", "bc"), lambda p: Condition(), (2,), 0).digest
    )
