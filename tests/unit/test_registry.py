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
