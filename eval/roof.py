"""What the operators could take on an H100 at best: computed from bytes and products, on no device.

    python -m eval.roof

Bytes are those that must cross the memory at least, each input read and each output written once; FLOPs those of
matrix products (attention) or of the arithmetic of one element (the others, of which the memory decides).  Roofs: 3.35
TB/s, and 989 TFLOP/s of dense bf16 products (NVIDIA H100 SXM data sheet).  A kernel that reads twice takes longer.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

BANDWIDTH, PRODUCTS = 3.35e12, 989e12
BF16, FP32 = 2, 4


class Roof(NamedTuple):
    """An operator at a shape: bytes and FLOPs."""

    operator: str
    what: str
    moved: float
    flops: float

    @property
    def memory_us(self) -> float:
        """Microseconds that the bytes take."""
        return 1e6 * self.moved / BANDWIDTH

    @property
    def products_us(self) -> float:
        """Microseconds that the products take."""
        return 1e6 * self.flops / PRODUCTS


def attention_jvp(what: str, heads: int, length: int, keys: int, size: int, *, constant: bool = False) -> Roof:
    """12 N M D FLOPs a head, six products; four with constant keys and values.  Inputs, tangents, two outputs."""
    queries, others = heads * length * size, heads * keys * size
    moved = BF16 * (4 * queries + (2 if constant else 4) * others)
    return Roof("attention_jvp", what, moved, (8 if constant else 12) * heads * length * keys * size)


def elementwise(operator: str, what: str, shape: tuple[int, ...], tensors: int, flops: int, width: int) -> Roof:
    """tensors: that are read or written, of this shape; flops: of an element."""
    return Roof(operator, what, tensors * width * prod(shape), flops * prod(shape))


ROOFS = (
    elementwise("score_difference_from_raw", "SDXL [4, 4, 128, 128], fp32", (4, 4, 128, 128), 6, 14, FP32),
    elementwise("score_difference_from_raw", "Wan [1, 16, 21, 60, 104], fp32", (1, 16, 21, 60, 104), 6, 14, FP32),
    elementwise("tangent_normalise", "Wan [1, 16, 21, 60, 104], fp32", (1, 16, 21, 60, 104), 2, 4, FP32),
    attention_jvp("SDXL, 64 x 64 tokens, 10 heads of 64", 10, 4096, 4096, 64),
    attention_jvp("SDXL, to 77 tokens of text", 10, 4096, 77, 64, constant=True),
    attention_jvp("Wan 1.3B at 480p, 32,760 tokens, 12 heads of 128", 12, 32_760, 32_760, 128),
    elementwise("adaln_jvp", "[2, 1024, 1152], bf16", (2, 1024, 1152), 4, 24, BF16),
    elementwise("qk_norm_rope_jvp", "Wan 1.3B, [1, 12, 32760, 128], bf16", (1, 12, 32_760, 128), 4, 24, BF16),
    elementwise("group_norm_silu_jvp", "SDXL [4, 320, 128, 128], bf16", (4, 320, 128, 128), 4, 30, BF16),
)


def table() -> str:
    """As markdown."""
    lines = ["| operator | at | MB | GFLOP | memory, us | products, us | bound by |", "|" + " --- |" * 7]
    for roof in ROOFS:
        bound = "products" if roof.products_us > roof.memory_us else "memory"
        figures = f"{roof.moved / 1e6:.3g} | {roof.flops / 1e9:.3g} | {roof.memory_us:.3g} | {roof.products_us:.3g}"
        lines.append(f"| `{roof.operator}` | {roof.what} | {figures} | {bound} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
