"""Where else a run's figures go: the services that accelerate has trackers of."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from fewstep.files import write_text

Board = Literal["wandb", "trackio"]
BOARDS: tuple[Board, ...] = get_args(Board)
PROJECT = "fewstep"
ID = "board.id"


def open_board(name: Board, out: Path, settings: Mapping[str, Any]) -> Any:
    """A tracker of accelerate's, begun under the run's folder name in the project `fewstep`; the same when resumed.

    settings: told to it as the run's configuration.  Keys and hosts are the service's own affair (WANDB_API_KEY,
    WANDB_MODE=offline).
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    path = out / ID
    if not path.is_file():
        write_text(path, secrets.token_hex(8) + "\n")
    number = path.read_text(encoding="utf-8").strip()
    known: dict[Board, dict[str, Any]] = {
        "wandb": {"name": out.name, "id": number, "resume": "allow", "dir": str(out)},
        "trackio": {"name": f"{out.name}-{number}", "resume": "allow"},
    }
    board = LOGGER_TYPE_TO_CLASS[name](PROJECT, **known[name])
    if hasattr(board, "start"):
        board.start()
    board.store_init_configuration(dict(settings))
    return board
