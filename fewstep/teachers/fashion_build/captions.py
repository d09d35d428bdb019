"""The captions of the ten classes and the tokenizer that knows their words."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any, cast

from transformers import CLIPTokenizer

MAX_TOKENS = 16
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

# In the order of Fashion-MNIST's labels: with its article, bare.
CLASS_NAMES = (
    ("a t-shirt", "t-shirt"),
    ("a pair of trousers", "trousers"),
    ("a pullover", "pullover"),
    ("a dress", "dress"),
    ("a coat", "coat"),
    ("a sandal", "sandal"),
    ("a shirt", "shirt"),
    ("a sneaker", "sneaker"),
    ("a bag", "bag"),
    ("an ankle boot", "ankle boot"),
)

# {a} is the name with its article. The first one is used wherever a single prompt per class is wanted.
TEMPLATES = (
    "a photo of {a}",
    "{a}",
    "{bare}",
    "{a}, black and white",
    "{bare}, black and white",
    "a picture of {a}",
    "a small photo of {a}",
    "a black and white photo of {a}",
    "a grey picture of {a}",
    "{a} on a black background",
)


def captions_of(label: int) -> tuple[str, ...]:
    """All captions of one class, label in 0..9, in the order of TEMPLATES."""
    article, bare = CLASS_NAMES[label]
    return tuple(template.format(a=article, bare=bare) for template in TEMPLATES)


def all_captions() -> list[str]:
    """The captions of all classes, class by class: caption k of class c is at c * len(TEMPLATES) + k."""
    return [caption for label in range(len(CLASS_NAMES)) for caption in captions_of(label)]


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins of the bytes used by byte-level BPE [GPT-2 `bytes_to_unicode`], in byte order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = iter(range(256))
    return [chr(byte) if byte in kept else chr(256 + next(moved)) for byte in range(256)]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first (ties by spelling), until every word is one token ending in </w>."""
    spelt = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in spelt for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelt = [_merge(word, best) for word in spelt]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of a pair, from the left."""
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of about 600 entries: 256 bytes, the same ending a word, one token per caption word, 2 specials.

    It pads on the left with the start token up to 16 tokens. CogView4Pipeline pads a batch to its longest prompt on the
    tokenizer's side and then on the left to 16: with left padding on both, a prompt's encoding does not depend on its
    neighbours. The end token occurs once, at the end, where the text encoder pools.
    """
    words = [word for caption in all_captions() for word in caption.replace(",", " ").replace("-", " ").split()]
    merges: Any = cast(Any, learn_merges(words))  # annotated as list[str] there, but pairs are what is read
    symbols = byte_symbols()
    entries = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges), BOS, EOS]
    return CLIPTokenizer(
        vocab={entry: index for index, entry in enumerate(dict.fromkeys(entries))},
        merges=merges,
        unk_token=EOS,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=BOS,
        padding_side="left",
        model_max_length=MAX_TOKENS,
    )


def caption_labels() -> dict[str, int]:
    """Caption -> class, of all captions."""
    return {caption: label for label in range(len(CLASS_NAMES)) for caption in captions_of(label)}


def balanced_prompts(count: int, start: int = 0) -> tuple[list[str], list[int]]:
    """Prompts and class labels of samples start .. start + count - 1: class i mod 10, template (i // 10) mod 10."""
    indices = range(start, start + count)
    labels = [index % len(CLASS_NAMES) for index in indices]
    prompts = [captions_of(label)[index // 10 % len(TEMPLATES)] for index, label in zip(indices, labels, strict=True)]
    return prompts, labels
