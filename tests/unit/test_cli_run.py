"""How a training ends for the shell, and for the other processes."""

from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import typer

from fewstep.cli import distilling as cli
from fewstep.sampling import NotFinite
from fewstep.training.progress import Diverged, Interrupted


@pytest.mark.parametrize(("error", "code"), [(None, 0), (Interrupted(15, Path("saved")), 143)])
def test_a_finished_or_interrupted_training_has_its_exit_code(error, code):
    assert cli._run(SimpleNamespace(run=Mock(side_effect=error))) == code


@pytest.mark.parametrize("error", [Diverged("no"), NotFinite("no")])
def test_a_training_that_cannot_go_on_ends_this_process_alone(error):
    """The others may not know of it, and would be waited for."""
    with pytest.raises(typer.Exit) as ended:
        cli._run(SimpleNamespace(run=Mock(side_effect=error)))
    assert ended.value.exit_code == 1


@pytest.mark.parametrize("code", [0, 143])
def test_several_processes_leave_their_group_and_skip_the_finalisation(code, monkeypatch):
    """Mutations: the group is never left; Python finalises, and gloo aborts a process now and then."""
    ended, left = Mock(), Mock()
    monkeypatch.setattr("os._exit", ended)
    with pytest.raises(typer.Exit) if code else nullcontext():
        cli._end(code, SimpleNamespace(end_training=left, num_processes=1))
    ended.assert_not_called()
    with suppress(typer.Exit):
        cli._end(code, SimpleNamespace(end_training=left, num_processes=2))
    ended.assert_called_once_with(code)
    assert left.call_count == 2
