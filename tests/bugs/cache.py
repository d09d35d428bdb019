"""Bugs of what is encoded once and streamed: orders, sources, the cache."""

from __future__ import annotations

from tests.bugs.mutant import Mutant

TESTS = "tests/unit/training"
ORDER, EMBEDDINGS = f"{TESTS}/test_order.py", f"{TESTS}/test_embeddings.py"

MUTANTS = (
    Mutant(
        "order-folded-back",
        "cache",
        "numbers beyond the end are folded back instead of walked on: some rows come twice an epoch, some never",
        "fewstep/training/order.py",
        "        if index < count:\n            return index",
        "        return index % count",
        (f"{ORDER}::test_the_feistel_order_is_a_permutation_of_any_number",),
    ),
    Mutant(
        "order-of-one-epoch",
        "cache",
        "a large set has the same order in every epoch",
        "fewstep/training/order.py",
        "permuted(index, self.count, key(self.seed, self.name, epoch))",
        "permuted(index, self.count, key(self.seed, self.name))",
        (f"{ORDER}::test_large_orders_differ_by_epoch_seed_and_name",),
    ),
    Mutant(
        "cache-length-of-the-set",
        "cache",
        "rows of a part without lengths are told the set's: the network reads their padding",
        "fewstep/training/embeddings.py",
        "torch.full((count,), length)",
        'torch.full((count,), self.shapes["text"][0])',
        (f"{EMBEDDINGS}::test_rows_from_disk_are_those_of_one_call",),
    ),
    Mutant(
        "cache-unchecked",
        "cache",
        "a row's checksum is read and not compared",
        "fewstep/training/cache.py",
        "if _checksum(found) != int(found.pop(CHECKSUM)):",
        "if found.pop(CHECKSUM) is None:",
        (f"{EMBEDDINGS}::test_a_byte_that_differs_is_found_when_its_row_is_read",),
    ),
    Mutant(
        "cache-of-any-encoder",
        "cache",
        "a cache is named by its prompts alone",
        "fewstep/training/embeddings.py",
        'card = {"encoder": self._card, "prompts": text_hash(prompts)}',
        'card = {"prompts": text_hash(prompts)}',
        (f"{EMBEDDINGS}::test_another_encoder_or_other_prompts_have_another_cache",),
    ),
    Mutant(
        "cache-foreign-shard",
        "cache",
        "a shard is taken for its name, whatever it carries",
        "fewstep/training/shards.py",
        "if self.mark is not None and opened.metadata() != dict(self.mark):",
        "if self.mark is not None and opened.metadata() is None:",
        (f"{EMBEDDINGS}::test_a_shard_of_another_cache_is_refused",),
    ),
    Mutant(
        "cache-pictures-from-the-start",
        "cache",
        "encoding that goes on begins with the first picture again",
        "fewstep/training/latents.py",
        "islice(pictures, rows.start - at)",
        "islice(pictures, 0)",
        (f"{TESTS}/test_latents.py::test_killed_encoding_goes_on_at_the_first_missing_shard",),
    ),
    Mutant(
        "prompts-joined-without-offsets",
        "cache",
        "a line feed within a text counts as one between two",
        "fewstep/training/prompts.py",
        'if any("\\n" in text for text in texts):',
        "if not texts:",
        (f"{TESTS}/test_prompts.py::test_hash_tells_line_feeds_within_texts_from_those_between",),
    ),
)
