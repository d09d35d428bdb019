"""Names, plugins, and the index that `fewstep list` reads."""

import json

import pytest

from fewstep.index import PATH, build_index
from fewstep.objectives.base import METHODS
from fewstep.registry import Registry, load_plugin, nearest
from fewstep.teachers.base import TEACHERS


@pytest.fixture
def registry() -> Registry:
    made: Registry = Registry("thing")
    made.register("one_two")("the entry")
    return made


def test_dash_and_underscore_are_the_same(registry):
    assert registry.get("one-two") == registry.get("one_two") == "the entry"
    assert "one-two" in registry and "one_three" not in registry


@pytest.mark.parametrize("name", ["one_two", "one-two"])
def test_taken_name_is_refused(registry, name):
    """Fails if names are compared as written: `one-two` would be filed and never found."""
    with pytest.raises(ValueError, match=f"a thing named '{name}' is registered already"):
        registry.register(name)("another")
    assert registry.names() == ["one_two"]


def test_same_entry_may_be_registered_again(registry):
    entry = registry.get("one_two")
    assert registry.register("one_two")(entry) is entry


CELL = """
def make():
    return {value}

class Method:
    value = {value}
"""


def run_cell(value: int) -> dict:
    names = {"__name__": "__main__"}
    exec(CELL.format(value=value), names)
    return names


@pytest.mark.parametrize("kind", ["make", "Method"])
@pytest.mark.parametrize("name", ["one_three", "one-three"])
def test_definition_that_is_run_again_replaces_the_old_one(registry, kind, name):
    """A notebook's cell.  Fails if entries are compared by identity, or another spelling is filed too."""
    registry.register("one_three")(run_cell(1)[kind])
    again = registry.register(name)(run_cell(2)[kind])
    assert registry.get("one_three") is registry.get("one-three") is again
    assert len(registry.names()) == 2


def test_other_definition_of_the_same_name_is_refused(registry):
    """From another module, or another function of the same; and the first stays."""
    first = registry.register("one_three")(run_cell(1)["make"])
    other = {"__name__": "elsewhere"}
    exec(CELL.format(value=2), other)
    for entry in (other["make"], run_cell(2)["Method"]):
        with pytest.raises(ValueError, match="is registered already"):
            registry.register("one_three")(entry)
    assert registry.get("one_three") is first


def test_unknown_name_is_answered_with_nearest_known_and_remedy(registry):
    with pytest.raises(
        LookupError, match=r"no thing named 'one_to'\. Did you mean 'one_two'\? Known: one_two\..*--plugin"
    ):
        registry.get("one_to")


def test_far_names_get_no_hint():
    assert nearest("xyz", ["dmd2"]) == ""


def test_plugin_registers_a_teacher_under_its_name(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import fewstep\n\n\n@fewstep.register_teacher('mine-of-test-registry')\n"
        "def mine():\n    return fewstep.teachers.gaussian()\n"
    )
    load_plugin(tmp_path / "mine.py")
    assert TEACHERS.get("mine-of-test-registry")().card.name == "gaussian"


def test_error_inside_a_plugin_is_raised_as_it_is(tmp_path):
    (tmp_path / "bad.py").write_text("raise ZeroDivisionError('mine')\n")
    with pytest.raises(ZeroDivisionError, match="mine"):
        load_plugin(tmp_path / "bad.py")


def test_plugin_that_is_no_python_is_named_with_its_line(tmp_path):
    (tmp_path / "bad.py").write_text("x = 1\n\ndef f(:\n")
    with pytest.raises(ValueError, match=r"bad\.py is not valid Python \(line 3\)"):
        load_plugin(tmp_path / "bad.py")


def test_index_file_is_what_the_registries_hold():
    """Fails if a method, teacher, field, default or comment was changed without `python -m fewstep.index`."""
    ours, stored = build_index(), json.loads(PATH.read_text(encoding="utf-8"))
    for what, registry in (("methods", METHODS), ("teachers", TEACHERS)):
        # without what other tests have registered in this process
        assert stored[what] == {
            k: v for k, v in ours[what].items() if registry.get(k).__module__.startswith("fewstep.")
        }
