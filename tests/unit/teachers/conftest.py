"""One tiny pipeline folder for the tests of this package."""

from pathlib import Path

import pytest

from fewstep.teachers.pipelines import load_teacher
from tests.tiny_pipeline import build


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A tiny CogView4 pipeline.  Tests must leave it as it is."""
    return build(tmp_path_factory.mktemp("pipeline") / "plain")


@pytest.fixture(scope="session")
def teacher(folder):
    return load_teacher(str(folder))
