"""What the shipped tiles of the Triton kernels take of sm_80, sm_90 and sm_100, compiled without a device.

python -m tests.ops.test_aot_attention_jvp      writes fewstep_cuda/triton/attention_resources.json again
"""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here: its kernels are not compiled")
from tests.ops.aot import ARCHITECTURES, SHARED, resources

TABLE = Path(__file__).parents[2] / "fewstep_cuda" / "triton" / "attention_resources.json"
WIDE = {"LSE", "MU", "FIRST", "REST"}
"""Pointers to float32 whatever the inputs are."""
NAMES = [
    f"{kernel} {precision} {size}{more}"
    for kernel in ("forward", "rows", "keys")
    for precision in ("half", "float32")
    for size in (16, 32, 64, 128, 256)
    for more in ("", " masked")
    if not more or (precision == "half" and size in (64, 128))
]
"""All tangents and gradients there, no mask; masked: a bool mask, and causal."""


def compiled(name, architecture):
    """{"tile", "registers", "spilled", "shared"} of a kernel of `NAMES`; half precision as bfloat16."""
    from fewstep_cuda.triton import attention_jvp as kernels

    kind, precision, size, *masked = name.split()
    tile, size = kernels.TILES[kind][precision][int(size)], int(size)
    kernel = {"forward": kernels.forward_kernel, "rows": kernels.rows_kernel, "keys": kernels.keys_kernel}[kind]
    constants = dict.fromkeys(("D", "DV", "BD", "BDV"), size) | {"BM": tile.rows, "BN": tile.keys}
    constants |= dict.fromkeys(("HAS_TQ", "HAS_TK", "HAS_TV", "HAS_GO", "HAS_GT"), True)
    constants |= {"MASKED": int(bool(masked)), "CAUSAL": bool(masked)}
    constants["PRECISION"] = "ieee" if precision == "float32" else "tf32"
    element = "fp32" if precision == "float32" else "bf16"

    def kind_of(argument):
        if argument in constants:
            return "constexpr"
        if argument.isupper():
            return "*" + {"MASK": "u8"}.get(argument, "fp32" if argument in WIDE else element)
        return "fp32" if argument == "scale" else "i32"

    signature = {argument: kind_of(argument) for argument in kernel.arg_names}
    strides = [x for x in signature if "_" in x and x.islower() and not x.startswith("mask")]
    constants = {argument: value for argument, value in constants.items() if argument in signature}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return {"tile": list(tile)} | resources(kernel, signature, constants, architecture, strides, **options)._asdict()


def recorded():
    return json.loads(TABLE.read_text(encoding="utf-8"))


def test_the_table_is_of_the_shipped_tiles():
    """Mutation: a tile changed without compiling it."""
    from fewstep_cuda.triton.attention_jvp import TILES

    table = recorded()
    assert sorted(table["compiled"]) == sorted(f"{name} sm_{a}" for name in NAMES for a in ARCHITECTURES)
    for name, found in table["compiled"].items():
        kind, precision, size, *_ = name.split()
        assert found["tile"] == list(TILES[kind][precision][int(size)]), name


def test_only_what_is_waived_spills():
    """And what is waived does, so that no reason outlives its need."""
    table = recorded()
    spilling = {name.rpartition(" ")[0] for name, found in table["compiled"].items() if found["spilled"]}
    assert spilling == set(table["waived"]) and all(table["waived"].values())
    for name, found in table["compiled"].items():
        assert found["shared"] <= SHARED[int(name.rpartition("_")[2])], name


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_ahead_of_time(name):
    """No more spills or shared memory than recorded; with the Triton that is recorded, all as recorded."""
    import triton

    table = recorded()
    for architecture in ARCHITECTURES:
        found, known = compiled(name, architecture), table["compiled"][f"{name} sm_{architecture}"]
        if triton.__version__ == table["triton"]:
            assert found == known
        assert found["shared"] <= SHARED[architecture]
        assert not found["spilled"] or name in table["waived"]


def write():
    import triton

    found = {f"{name} sm_{a}": compiled(name, a) for name in NAMES for a in ARCHITECTURES}
    waived = recorded()["waived"] if TABLE.is_file() else {}
    spilling = {name.rpartition(" ")[0] for name, value in found.items() if value["spilled"]}
    table = {
        "about": "python -m tests.ops.test_aot_attention_jvp; compiled, not run; bytes of a thread and of a block",
        "triton": triton.__version__,
        "waived": {name: waived.get(name, "") for name in sorted(spilling)},
    }
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in found.items())
    head = json.dumps(table, indent=2)[:-2]
    TABLE.write_text(f'{head},\n  "compiled": {{\n{rows}\n  }}\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    write()
