"""What the documents name exists: links, options of the command line, settings, functions, tests, files."""

import ast
import importlib
import re
import shlex
from dataclasses import fields
from functools import cache, reduce
from pathlib import Path

import pytest
import typer
import yaml

import fewstep
from fewstep.cli import app
from fewstep.config import METHODS, TrainConfig
from tests.cli.test_readme import DOCUMENTS, named
from tests.documents import FENCED, PAGES, README, ROOT

METHOD_PAGES = [path for path in PAGES if path.parent.name == "methods" and path.stem != "index"]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
CALL = re.compile(r"(?:^|[;&|(]|[ \t])(?:fewstep|-m fewstep\.cli)[ \t]+([a-z]+)([^\n`;|]*)", re.M)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(text: str) -> str:
    """Without blocks of code and comments."""
    return re.sub(r"<!--.*?-->", "", FENCED.sub("", text), flags=re.S)


def spans(text: str) -> list[str]:
    """The `code` in its sentences."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def options_of(command: str) -> set[str]:
    params = COMMANDS[command].params
    return {name for p in params for name in (*p.opts, *p.secondary_opts)} | {"--help"}


def code_of(text: str) -> str:
    """A page's blocks and spans of code, each on lines of its own."""
    return "\n".join([*(m["code"] for m in FENCED.finditer(text)), *spans(text)])


def wrong_calls(text: str) -> list[str]:
    """What `fewstep COMMAND --option` in a page's code asks for that there is not."""
    wrong = []
    for command, rest in CALL.findall(code_of(text).replace("\\\n", " ")):
        if command not in COMMANDS:
            wrong.append(command)
            continue
        given = [word.split("=")[0] for word in shlex.split(rest, comments=True) if re.match(r"--?[a-z]", word)]
        wrong += [f"{command} {word}" for word in given if word not in options_of(command)]
    return wrong


@cache
def named_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def resolved(name: str) -> bool:
    """Whether this dotted name is a module's, or of something in it."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        try:
            reduce(getattr, parts[cut:], found)
        except AttributeError:
            return False
        return True
    return False


def wrong_names(text: str) -> list[str]:
    """Functions, tests and files in `code` that do not exist."""
    wrong = []
    for span in spans(text):
        path, _, test = span.partition("::")
        if re.fullmatch(r"fewstep(_cuda)?(\.\w+)+", span):
            wrong += [] if resolved(span) else [span]
        elif re.fullmatch(r"(tests|fewstep|fewstep_cuda|configs|eval|docs|notebooks)/[\w./*]+", path):
            exists = any(ROOT.glob(path))
            wrong += [] if exists and (not test or test in named_in(ROOT / path)) else [span]
    return wrong


def default_of(name: str, method: str | None) -> object:
    """Of the setting method.NAME or train.NAME.  Raises AttributeError if there is none."""
    section, *rest = name.split(".")
    start = TrainConfig() if section == "train" else METHODS.get(method)()
    assert rest and rest[0] in {f.name for f in fields(start)}, f"{name} is no setting"
    return reduce(getattr, rest, start)


def has_setting(name: str, method: str | None) -> bool:
    methods = [method] if method or name.startswith("train.") else METHODS.names()
    for one in methods:
        try:
            default_of(name, one)
            return True
        except (AssertionError, AttributeError):
            continue
    return False


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_links_lead_to_files(path):
    """Anchors are checked by mkdocs, and nothing is fetched."""
    places = [link.split("#")[0] for link in LINK.findall(prose(path.read_text())) if "://" not in link]
    assert [place for place in places if place and not (path.parent / place).exists()] == []


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_commands_and_options_exist(path):
    text = path.read_text()
    flags = {word for span in spans(text) for word in re.findall(r"^--[a-z][a-z0-9-]*", span)}
    known = set().union(*map(options_of, COMMANDS))
    assert wrong_calls(text) == [] and flags - known == set()


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_names_exist(path):
    assert wrong_names(path.read_text()) == []


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_settings_exist(path):
    """Those of a method's page are that method's."""
    method = path.stem if path in METHOD_PAGES else None
    text = path.read_text()
    named_ones = {
        m for span in [*spans(text), text] for m in re.findall(r"(?<![\w./])(?:method|train)(?:\.\w+)+", span)
    }
    wrong = {name for name in named_ones if name != "method.name" and not has_setting(name, method)}
    wrong -= {f"method.{field}" for field in re.findall(r"^    (\w+): \w+ = ", code_of(text), re.M)}  # a plugin's own
    assert wrong == set()


@pytest.mark.parametrize("path", named(METHOD_PAGES))
def test_defaults_in_a_table_of_settings_are_the_codes(path):
    rows = re.findall(r"^\| `((?:method|train)\.[\w.]+)` \| ([^|]+) \|", path.read_text(), re.M)
    assert rows
    for name, cell in rows:
        told, default = yaml.safe_load(cell), default_of(name, path.stem)
        assert (float(told) if isinstance(default, float) else told) == default, name


def test_every_method_has_a_page():
    """The examples of other tests register methods of their own."""
    ours = {name for name in METHODS.names() if METHODS.get(name).__module__.startswith("fewstep.")}
    assert {path.stem for path in METHOD_PAGES} == ours


@pytest.mark.parametrize("path", named(METHOD_PAGES))
def test_a_methods_page_has_all_parts(path):
    heads = re.findall(r"^## (.+)$", path.read_text(), re.M)
    parts = ["The equation", "When", "Settings that matter", "What goes wrong", "What is proved", "Not the paper's"]
    assert heads == parts and "::test_" in path.read_text()


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs" / "api.md").read_text()
    told = set(re.findall(r"^::: ([\w.]+)", text, re.M)) | set(re.findall(r"`@fewstep\.(\w+)", text))
    missing = [name for name, place in fewstep._WHERE.items() if not {f"{place}.{name}", name} & told] + [
        name for name in fewstep._MODULES if not any(item.startswith(f"fewstep.{name}.") for item in told)
    ]
    assert missing == []
    assert [name for name in told if "." in name and not resolved(name)] == []


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    assert [path for path in PAGES if f"- {path.relative_to(ROOT / 'docs')}\n" not in menu] == []


@cache
def sayings() -> tuple[str, ...]:
    """Every string of the program; f-strings by their parts."""
    trees = [ast.parse(path.read_text()) for path in sorted((ROOT / "fewstep").rglob("*.py"))]
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return tuple(node.value for node in nodes if isinstance(node.value, str))


def test_messages_in_troubleshooting_are_the_programs():
    """Mutation: a message that was reworded."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    told = [" ".join(words.split()) for words in re.findall(r"says\s+`([^`]+)`", text)]
    assert len(told) >= 15 and text.count("\n### ") >= 15
    assert [words for words in told if not any(words in saying for saying in sayings())] == []


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    """Mutation: theme.font, or a repo_url, whose stars would be asked for."""
    pytest.importorskip("material", reason="`make docs` installs mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        fetched = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', page.read_text())
        assert fetched == [], page


def test_what_does_not_exist_is_found():
    """Mutation: a check that looks at nothing."""
    text = "`fewstep distill --iteration 2`, `fewstep destil`, `fewstep.api.distil`, `tests/documents.py::test_x`"
    assert wrong_calls(text) == ["distill --iteration", "destil"]
    assert wrong_names(text) == ["fewstep.api.distil", "tests/documents.py::test_x"]
    assert not has_setting("method.guidnce", None) and not has_setting("method.phases", "dmd2")
    assert README in DOCUMENTS
