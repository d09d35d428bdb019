"""Who may import whom, read from the source; and what an import costs, in fresh processes."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("fewstep", "fewstep_cuda")
    for path in sorted((ROOT / package).rglob("*.py"))
}

# module prefix -> prefixes it must not import, not even inside a function
FORBIDDEN = {
    "fewstep_cuda": ["fewstep"],
    "fewstep.types": ["fewstep", "fewstep_cuda"],
    "fewstep.rng": ["fewstep", "fewstep_cuda"],
    "fewstep.registry": ["fewstep", "fewstep_cuda"],
    "fewstep.models": ["fewstep.objectives", "fewstep.teachers", "fewstep.training", "fewstep.config", "fewstep.cli"],
    "fewstep.teachers": ["fewstep.objectives", "fewstep.training", "fewstep.cli"],
    "fewstep.objectives": ["transformers", "fewstep.teachers", "fewstep.training", "fewstep.config", "fewstep.cli"],
    "fewstep.metrics": ["fewstep.objectives", "fewstep.training", "fewstep.cli"],
    "fewstep.training": ["fewstep.cli"],
    "fewstep.config": ["fewstep.cli"],
}
# module prefix -> all that it may import besides the standard library and itself
ALLOWED = {
    "fewstep_cuda": ["torch", "triton"],
    "fewstep.diffusion": ["torch", "fewstep_cuda", "fewstep.types", "fewstep.rng"],
}
# library -> the modules that may import it
RESERVED = {
    "diffusers": [
        "fewstep.models.attention",
        "fewstep.models.backbones",
        "fewstep.teachers",
        "fewstep.export",
        "fewstep.export_adapter",
        "fewstep.export_single",
    ],
    "accelerate": ["fewstep.training", "fewstep.cli"],
    "peft": ["fewstep.models.adapters"],
}
HEAVY = ["diffusers", "transformers", "accelerate", "peft", "omegaconf", "pydantic", "typer", "rich", "PIL", "yaml"]


def inside(module: str, prefixes: list[str]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def imports_of(module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of each import; relative ones are banned by the rules below, so they come as '.'."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from fewstep import rng` is an import of fewstep.rng
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "fewstep" else [node.module]
            )
            yield from ((node.lineno, "." if node.level else str(name)) for name in names)


def verdict(module: str, name: str) -> str | None:
    if name == ".":
        return "relative import"
    for prefix, banned in FORBIDDEN.items():
        if inside(module, [prefix]) and inside(name, banned):
            return f"{prefix} must not import {name}"
    for prefix, allowed in ALLOWED.items():
        standard = name.partition(".")[0] in sys.stdlib_module_names
        if inside(module, [prefix]) and not standard and not inside(name, [*allowed, prefix]):
            return f"{prefix} imports only {', '.join(allowed)}, not {name}"
    for library, owners in RESERVED.items():
        if inside(name, [library]) and not inside(module, owners):
            return f"{library} belongs to {', '.join(owners)}"
    return None


def test_rules_of_import_hold():
    broken = [
        f"{module}:{line}: {why}"
        for module in MODULES
        for line, name in imports_of(module)
        if (why := verdict(module, name))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("fewstep_cuda.dispatch", "fewstep.rng"),
        ("fewstep.diffusion.samplers", "numpy"),
        ("fewstep.diffusion.samplers", "fewstep.models.ema"),
        ("fewstep.models.trio", "accelerate"),
        ("fewstep.objectives.dmd2", "diffusers.models"),
        ("fewstep.objectives.dmd2", "fewstep.training"),
        ("fewstep.rng", "fewstep.types"),
        ("fewstep.models.denoiser", "."),
    ],
)
def test_rules_see_a_breach(module, name):
    assert verdict(module, name)


@pytest.mark.parametrize(
    ("module", "name"),
    [("fewstep.diffusion.samplers", "fewstep.diffusion.schedules"), ("fewstep.training.trainer", "accelerate")],
)
def test_rules_let_the_rest_pass(module, name):
    assert verdict(module, name) is None


def fresh(*arguments: str) -> str:
    """Standard output of a new interpreter, started in the repository."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_fewstep_is_light():
    """Less than 0.3 s beyond torch, best of 3; and no library but torch is needed. Mutation: `import diffusers`.

    Seconds of CPU time, here and below: what a user waits on an idle machine, whatever else runs on this one.
    """
    block = f"import sys, time, torch; sys.modules.update(dict.fromkeys({HEAVY}))"
    program = f"{block}; start = time.process_time(); import fewstep; print(time.process_time() - start)"
    seconds = [float(fresh("-c", program)) for _ in range(3)]
    assert min(seconds) < 0.3


def test_cli_imports_no_torch():
    loaded = fresh("-c", "import sys, fewstep.cli; print(*sys.modules)").split()
    assert not {"torch", "diffusers", "transformers", "accelerate"} & set(loaded)


def test_a_page_of_a_run_needs_no_torch():
    """It is read from JSON and pictures.  Mutation: what writes the file imported from the checkpoints' module."""
    loaded = fresh("-c", "import sys, fewstep.report.page, fewstep.report.serve; print(*sys.modules)").split()
    assert not {"torch", "diffusers", "transformers", "accelerate"} & set(loaded)


def test_cli_help_takes_less_than_a_second():
    """Best of 5."""
    seconds = []
    for _ in range(5):
        before = os.times()
        assert "distill" in fresh("-m", "fewstep.cli", "--help")
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))  # user and system time of finished children
    assert min(seconds) < 1.0
