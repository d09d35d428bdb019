"""Checkpoints of other layouts as safetensors and a config.

    python -m fewstep.convert edm PICKLE OUT --unpickle

EDM's [arXiv:2206.00364] and EDM2's [arXiv:2312.02696] networks are pickles that hold their own source code, which their
loader runs.  Here none is run: only tensors and plain values are read, and every other name in the pickle stands for an
inert object that keeps what it is given.  Reading is a process of its own all the same, and is asked for by name.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

SOURCE = "torch_utils.persistence._reconstruct_persistent_obj"
"""What makes EDM's objects: given {"class_name", "module_src", "state"}, it runs the source and fills in the state."""


class Inert:
    """Any object of a pickle that is no tensor and no plain value: its name, what it was made of, its state."""

    name = ""

    def __new__(cls, *args: Any, **_named: Any) -> Inert:
        made = super().__new__(cls)
        made.args, made.state, made.items = args, {}, []
        return made

    def __init__(self, *args: Any, **named: Any) -> None:
        """Nothing: `__new__` keeps what there is."""

    args: tuple[Any, ...]
    state: dict[str, Any]
    items: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {"state": state}

    def __setitem__(self, key: Any, value: Any) -> None:
        self.state[str(key)] = value

    def append(self, value: Any) -> None:
        """Of lists that are no plain ones."""
        self.items.append(value)

    def fields(self) -> dict[str, Any]:
        """The object's own variables; of a persistent one, those that its maker is given."""
        return _dict(_dict(self.args[0]).get("state")) if self.name == SOURCE else self.state

    def class_name(self) -> str:
        """Without its module."""
        return str(_dict(self.args[0]).get("class_name")) if self.name == SOURCE else self.name.rpartition(".")[2]


def _dict(value: Any) -> dict[str, Any]:
    """Of a dictionary of any kind; empty of anything else."""
    return value.state if isinstance(value, Inert) else value if isinstance(value, dict) else {}


def _storage(data: bytes) -> Any:
    """torch's own would unpickle anything in it."""
    return torch.load(io.BytesIO(data), weights_only=True)


KNOWN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
    "torch.storage._load_from_bytes": _storage,
}
"""All that is called; every other name is `Inert`."""


class Reader(pickle.Unpickler):
    """Imports nothing that the pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        """One of KNOWN, or a class of its own of inert objects."""
        full = f"{module}.{name}"
        return KNOWN.get(full) or type(name.rpartition(".")[2], (Inert,), {"name": full})

    def persistent_load(self, pid: Any) -> Any:
        """EDM has none."""
        raise pickle.UnpicklingError(f"it refers to {pid!r} outside itself")


def read_edm(file: Path, which: str = "ema") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, config) of a network of an EDM or EDM2 pickle.

    which: its entry.  config: the network's class and arguments, {"class", "arguments"}.
    Raises ValueError for a file that is no such pickle.
    """
    try:
        with file.open("rb") as stream:
            found = Reader(stream).load()
    except (pickle.UnpicklingError, EOFError, RuntimeError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f"{file} is no pickle of EDM, or it is damaged: {error}") from error
    network = _dict(found).get(which)
    if not isinstance(network, Inert):
        held = ", ".join(map(str, _dict(found))) or type(found).__name__
        raise ValueError(f"{file} holds no network {which!r}; it holds {held}")
    tensors = dict(_tensors(network))
    if not tensors:
        raise ValueError(f"{file} holds no weights of {which!r}, whose class is {network.class_name()}")
    arguments = {name: _plain(value) for name, value in _dict(network.fields().get("_init_kwargs")).items()}
    return tensors, {"class": network.class_name(), "arguments": arguments}


def _tensors(module: Inert, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """As a module's state_dict, without buffers that are not saved."""
    fields = module.fields()
    unsaved = fields.get("_non_persistent_buffers_set") or ()
    unsaved = tuple(unsaved.args[0] if isinstance(unsaved, Inert) else unsaved)
    for kind in ("_parameters", "_buffers"):
        for name, value in _dict(fields.get(kind)).items():
            if isinstance(value, Tensor) and not (kind == "_buffers" and name in unsaved):
                yield prefix + name, value.detach().clone().contiguous()
    for name, inner in _dict(fields.get("_modules")).items():
        if isinstance(inner, Inert):
            yield from _tensors(inner, f"{prefix}{name}.")


def _plain(value: Any) -> Any:
    """What JSON can hold; a name for anything else."""
    if isinstance(value, dict) or _dict(value):
        return {str(name): _plain(inner) for name, inner in _dict(value).items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else f"<{type(value).__name__}>"


def convert_edm(file: Path, to: Path) -> None:
    """Write the averaged network of a pickle as model.safetensors and config.json in a folder that does not exist yet.

    Raises ValueError as `read_edm`, and if the folder exists.
    """
    if to.exists():
        raise ValueError(f"{to} exists; choose a folder that does not exist yet")
    tensors, config = read_edm(file)
    writing = to.parent / f".writing-{to.name}"
    writing.mkdir(parents=True)
    save_file(tensors, writing / "model.safetensors", metadata={"format": "pt"})
    (writing / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    os.replace(writing, to)


def main(given: list[str] | None = None) -> int:
    """0, or 1 with the reason."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.convert", description="A checkpoint as safetensors.")
    parser.add_argument("layout", choices=["edm"])
    parser.add_argument("file", type=Path, metavar="PICKLE")
    parser.add_argument("to", type=Path, metavar="OUT", help="a folder that does not exist yet")
    parser.add_argument("--unpickle", action="store_true", help="read a pickle, which you have from whom you trust")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if not options.unpickle:
        print(
            f"error: {options.file} is a pickle, from which other programs run code; here none is run: give --unpickle",
            file=sys.stderr,
        )
        return 1
    if options.here:
        try:
            convert_edm(options.file, options.to)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0
    print(f"reading a pickle, {options.file}, in a process of its own; only tensors and plain values", file=sys.stderr)
    again = ["edm", str(options.file), str(options.to), "--unpickle", "--here"]
    return subprocess.run([sys.executable, "-m", "fewstep.convert", *again], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
