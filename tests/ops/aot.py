"""Triton kernels compiled ahead of time, without a GPU: what a configuration takes of an architecture."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ARCHITECTURES = (80, 90, 100)
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a block may take."""


TABLE = Path(__file__).resolve().parents[2] / "fewstep_cuda" / "triton" / "RESOURCES.md"


class Resources(NamedTuple):
    """Registers of a thread, bytes that it spills, bytes of shared memory of a block."""

    registers: int
    spilled: int
    shared: int


def resources(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    architecture: int,
    divisible: Collection[str] = (),
    **options: int,
) -> Resources:
    """Compile a @triton.jit function for an architecture (80, 90, 100).

    signature: type of every argument ("*bf16", "fp32", "i32"; "constexpr" for those in `constants`).  Pointers are told
    to be aligned to 16 bytes.  divisible: integers that are told to be multiples of 16, as a launch tells of those that
    are; without it strides allow no wide loads, and other code is compiled.  options: num_warps, num_stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import __file__ as nvidia
    from triton.compiler import ASTSource

    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in divisible
    }
    source = ASTSource(fn=kernel, signature=dict(signature), constexprs=dict(constants), attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(nvidia).parent / "bin" / "cuobjdump"
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], made.metadata.shared)


def check(name: str, inputs: str, found: Mapping[int, Resources]) -> None:
    """Fail for a spill or too much shared memory, and where the table of RESOURCES.md says otherwise.

    name, inputs: the first two cells of the kernel's row.  found: by architecture.  Counts are the compiler's: another
    Triton than the table's is held to the limits alone.
    """
    import triton

    for architecture, taken in found.items():
        assert not taken.spilled, f"{name} {inputs} spills {taken.spilled} bytes on sm_{architecture}"
        assert taken.shared <= SHARED[architecture], f"{name} {inputs}: {taken.shared} bytes shared, sm_{architecture}"
    text = TABLE.read_text(encoding="utf-8")
    cells = [name, inputs, *(f"{found[a].registers} / {found[a].shared}" for a in ARCHITECTURES)]
    row = f"| {' | '.join(cells)} |"
    if f"triton {triton.__version__}" in text:
        assert row in text.splitlines(), f"not in {TABLE.name}: {row}"
