"""The CUDA sources, by nvcc for three architectures: none spills.  They are not run: that takes a device."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

import fewstep_cuda.cuda
from fewstep_cuda.cuda import build, score_difference
from fewstep_cuda.dispatch import KERNELS

FOLDER = Path(fewstep_cuda.cuda.__file__).parent
needs_nvcc = pytest.mark.skipif(
    not build.compiler(), reason="no nvcc (on PATH, in $CUDA_HOME or /usr/local/cuda): CUDA sources are not compiled"
)


@pytest.fixture(scope="module", params=sorted(path.name for path in FOLDER.glob("*.cu")))
def compiled(request, tmp_path_factory) -> tuple[Path, str]:
    """A library of each source, and what ptxas said of it."""
    path = tmp_path_factory.mktemp("cuda") / "kernels.so"
    command = [*build.command(80, 90, 100), "-Xptxas", "-v", "-Werror", "all-warnings"]
    done = subprocess.run(
        [*command, str(FOLDER / request.param), "-o", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return path, done.stderr + done.stdout


@needs_nvcc
def test_no_kernel_spills_on_any_architecture(compiled):
    told = compiled[1]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
    per_architecture = [len(re.findall(f"for '?sm_{number}'?", told)) for number in (80, 90, 100)]
    assert len(spills) == sum(per_architecture) and len(set(per_architecture)) == 1 and per_architecture[0]
    assert set(spills) == {("0", "0")}


@needs_nvcc
def test_library_has_every_function_that_is_called(compiled):
    """It loads without a device."""
    if "score_difference" in compiled[1]:
        library = ctypes.CDLL(str(compiled[0]))
        assert all(getattr(library, name) for name in score_difference.SIGNATURES)


def test_length_of_a_block_is_the_same_in_both_files():
    """Mutation: SPAN changed in one of them: partial sums written out of bounds."""
    text = (FOLDER / "score_difference.cu").read_text(encoding="utf-8")
    assert f"SPAN = {score_difference.SPAN};" in text


def test_pointers_and_numbers_of_each_call_match_the_source():
    """Mutation: an argument more on one side, which ctypes does not see."""
    text = (FOLDER / "score_difference.cu").read_text(encoding="utf-8")
    kinds = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "double": ctypes.c_double, "cudaStream_t": ctypes.c_void_p}
    for name, signature in score_difference.SIGNATURES.items():
        (declared,) = re.findall(rf"const char\* {name}\(([^)]*)\)", text)
        types = [argument.rsplit(maxsplit=1)[0].removeprefix("const ") for argument in declared.split(",")]
        found = [ctypes.c_void_p if kind.strip().endswith("*") else kinds[kind.strip()] for kind in types]
        assert tuple(found) == tuple(signature), name


def test_every_launcher_that_is_registered_exists():
    for operator, found in KERNELS.items():
        for where in found.values():
            module, _, function = where.partition(":")
            path = Path(FOLDER.parents[1], *module.split(".")).with_suffix(".py")
            text = path.read_text(encoding="utf-8")
            assert f"\ndef {function}(" in text or f"\n{function} = " in text, (operator, where)
