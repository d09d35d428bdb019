"""Services that hear of a run's figures, each played by a tracker that writes down what it is told."""

from typing import ClassVar

import pytest
from accelerate import tracking as trackers

import fewstep
from fewstep.training.boards import BOARDS, open_board
from fewstep.training.options import TrainConfig


class Told:
    """A tracker of accelerate's that keeps what it hears."""

    made: ClassVar[list] = []

    def __init__(self, project, **options):
        self.project, self.options, self.rows, self.over = project, options, [], False
        Told.made.append(self)

    def start(self):
        self.begun = True

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None):
        self.rows.append((step, values))

    def finish(self):
        self.over = True


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(Told, "made", [])
    for name in BOARDS:
        monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, name, Told)
    monkeypatch.setattr("fewstep.training.checks.find_spec", lambda name: object())
    return Told.made


@pytest.mark.parametrize("name", BOARDS)
def test_board_of_a_resumed_run_is_the_same(tmp_path, told, name):
    """Fails if the number is drawn anew: a resumed run would be another one there."""
    first, again = (open_board(name, tmp_path, {"seed": 3}) for _ in range(2))
    assert first.project == "fewstep" and first.begun and first.settings == {"seed": 3}
    assert first.options == again.options and first.options["resume"] == "allow"
    (tmp_path / "other").mkdir()
    assert open_board(name, tmp_path / "other", {}).options != first.options


def test_a_run_tells_its_board_every_row(tmp_path, told):
    train = {"trackers": ["wandb"], "log_every": 2, "evaluate_every": 4, "device": "cpu"}
    teacher = fewstep.teachers.gaussian(fit_steps=2)
    run = fewstep.distill(teacher, "dmd2", iterations=4, batch_size=8, guidance=1.0, out=tmp_path / "run", train=train)
    (board,) = told
    assert board.over and [step for step, _ in board.rows] == [2, 4, 4]
    assert "dm" in board.rows[0][1] and board.settings["log_every"] == 2
    assert (run.out / "board.id").is_file()


def test_unknown_and_missing_services_are_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="trackers: 'mlflow' is not known; allowed: wandb, trackio"):
        TrainConfig(trackers=("mlflow",))  # type: ignore[arg-type]
    monkeypatch.setattr("fewstep.training.checks.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install trackio"):
        fewstep.distill("gaussian", "dmd2", guidance=1.0, out=tmp_path / "run", train={"trackers": ["trackio"]})
