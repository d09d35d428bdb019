"""The wheel, built from a copy of the tree and unpacked where nothing else is."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["fewstep", "fewstep_cuda", "configs", "eval", "tests"]
FILES = ["pyproject.toml", "setup.py", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder into which the wheel was installed with --no-deps."""
    tree, dist, target = (tmp_path_factory.mktemp(name) for name in ("tree", "dist", "site"))
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", *options, "--no-build-isolation", "--wheel-dir", str(dist), str(tree)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = dist.glob("fewstep-*-py3-none-any.whl")  # pure Python: no compiler was called
    assert wheel.stat().st_size < 25e6
    assert zipfile.ZipFile(wheel).testzip() is None
    subprocess.run([*pip, "install", *options, "--target", str(target), str(wheel)], check=True, capture_output=True)
    return target


def relative(folder: Path, pattern: str) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_holds_every_module(site):
    """Mutation: a folder without __init__.py."""
    for package in ("fewstep", "fewstep_cuda"):
        assert relative(site / package, "*.py") == relative(ROOT / package, "*.py")


@pytest.mark.parametrize("pattern", ["*.cpp", "*.h", "*.cu"])
def test_wheel_holds_the_sources_of_the_kernels(site, pattern):
    """They are compiled on first use. Mutation: a kind of file that is not package data."""
    sources = relative(ROOT / "fewstep_cuda", pattern)
    assert sources and relative(site / "fewstep_cuda", pattern) == sources


def test_wheel_holds_the_recipes(site):
    """Mutation: configs/ not mapped to fewstep/configs."""
    recipes = relative(ROOT / "configs", "*.yaml")
    assert recipes
    assert relative(site / "fewstep" / "configs", "*.yaml") == recipes


def test_wheel_holds_the_weights(site):
    """Mutation: the weights are not package data."""
    weights = Path("fewstep/teachers/weights")
    assert relative(ROOT / weights, "*")
    assert relative(site / weights, "*") == relative(ROOT / weights, "*")


def test_wheel_adds_two_packages_and_nothing_else(site):
    """A top-level `eval` or `tests` would shadow names in every environment."""
    top = {path.name for path in site.iterdir() if path.suffix != ".dist-info" and path.name != "bin"}
    assert top == {"fewstep", "fewstep_cuda"}


def test_installed_package_finds_its_recipes(site, tmp_path):
    """Run away from the repository, with the wheel alone on the path."""
    program = (
        "import pathlib, fewstep; folder = pathlib.Path(fewstep.__file__).parent / 'configs'; "
        f"print(folder.is_relative_to({str(site)!r}) and any(folder.glob('*.yaml')))"
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
