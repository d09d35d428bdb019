"""How a training ends for the shell, and for the other processes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from fewstep.cli import distilling as cli
from fewstep.sampling import NotFinite
from fewstep.training.progress import Diverged, Interrupted


@pytest.mark.parametrize(
    ("error", "code", "left"),
    [
        (None, None, 1),
        (Interrupted(15, Path("saved")), 143, 1),
        (Diverged("no"), 1, 0),
        (NotFinite("no"), 1, 0),
    ],
)
def test_processes_leave_their_group_together_or_not_at_all(error, code, left):
    """Mutation: it is never left, and gloo aborts a process at its exit now and then."""
    calls = []

    def run():
        if error is not None:
            raise error

    trainer = SimpleNamespace(run=run, accelerator=SimpleNamespace(end_training=lambda: calls.append(1)))
    if code is None:
        cli._run(trainer)
    else:
        with pytest.raises(typer.Exit) as ended:
            cli._run(trainer)
        assert ended.value.exit_code == code
    assert len(calls) == left
