"""What Triton's norms take of three architectures, compiled here without a GPU: no spills, and the recorded registers.

    python -m tests.ops.test_aot_norm_jvp

writes the record again, after a change that is meant or with another Triton.
"""

import json
from pathlib import Path

import pytest

from tests.ops import aot

RECORD = Path(__file__).parents[2] / "fewstep_cuda" / "triton" / "norm_resources.json"
DTYPES = ("fp32", "bf16", "fp16")


def variants():
    """name -> kernel, signature, constants, warps; the largest shapes that networks have."""
    from fewstep_cuda.triton import norm_jvp as kernels

    found = {}
    for dtype in DTYPES:
        x, wide = f"*{dtype}", "*fp32"
        outer = {"X": x, "A": wide, "C": wide, "TX": x, "TA": wide, "TC": wide}
        steps = dict.fromkeys(("a_step", "c_step", "ta_step", "tc_step"), "i32") | {"eps": "fp32"}
        for block in (2048, 8192):
            signature = outer | {"Y": x, "TY": x, "length": "i32", "size": "i32"} | steps
            constants = {"BLOCK": block, "CENTRED": True, "DUAL": True}
            found[f"adaln-{block}-{dtype}"] = (kernels.adaln_kernel, signature, constants, kernels.warps(block))
        names = [
            "rows",
            "heads",
            "length",
            "size",
            "xb",
            "xh",
            "xn",
            "xd",
            "tb",
            "th",
            "tn",
            "td",
            "yb",
            "yh",
            "yn",
            "yd",
        ]
        signature = outer | {"COS": wide, "SIN": wide, "Y": x, "TY": x} | dict.fromkeys(names, "i32") | {"eps": "fp32"}
        for block in (64, 128):
            for interleaved in (True, False):
                constants = {"ROWS": kernels.HEADS // block, "BLOCK": block, "CENTRED": False, "DUAL": True}
                constants |= {"TURN": True, "INTERLEAVED": interleaved}
                name = f"heads-{block}-{'interleaved' if interleaved else 'half'}-{dtype}"
                found[name] = (kernels.heads_kernel, signature, constants, 4)
        signature = outer | {"Y": x, "TY": x} | dict.fromkeys(("groups", "channels", "space"), "i32") | steps
        constants = {"BLOCK": kernels.CHUNK, "DUAL": True, "SILU": True}
        found[f"group-{dtype}"] = (kernels.group_kernel, signature, constants, 8)
        signature = {"X": x, "G": wide, "Y": x, "TX": x, "TG": wide, "TY": x, "OUT": x, "TOUT": x}
        signature |= dict.fromkeys(("total", "length", "size", "step", "tstep"), "i32")
        found[f"gated-{dtype}"] = (kernels.gated_kernel, signature, {"BLOCK": 1024, "DUAL": True}, 4)
    return found


def measured(name, architecture):
    kernel, signature, constants, warps = variants()[name]
    signature = signature | dict.fromkeys(constants, "constexpr")
    return aot.resources(kernel, signature, constants, architecture, num_warps=warps)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_nothing_spills_and_the_record_holds(architecture):
    """Registers within 8 of the record: Triton's minor versions move them. Mutation: all of a group in one program."""
    triton = pytest.importorskip("triton", reason="Triton is not installed here: its kernels are not compiled")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if record["triton"] != triton.__version__:
        pytest.skip(f"the record is of triton {record['triton']}, here is {triton.__version__}")
    assert set(record["kernels"]) == set(variants())
    for name, kept in record["kernels"].items():
        found = measured(name, architecture)
        assert found.spilled == 0, name
        assert found.shared <= aot.SHARED[architecture], name
        wanted = kept[f"sm_{architecture}"]
        assert abs(found.registers - wanted["registers"]) <= 8 and found.shared == wanted["shared"], name


def record():
    """Write what the kernels take."""
    import triton

    kernels = {
        name: {
            f"sm_{architecture}": dict(zip(("registers", "spilled", "shared"), measured(name, architecture)))
            for architecture in aot.ARCHITECTURES
        }
        for name in variants()
    }
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(taken)}" for name, taken in kernels.items())
    RECORD.write_text(f'{{\n  "triton": "{triton.__version__}",\n  "kernels": {{\n{rows}\n  }}\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    record()
