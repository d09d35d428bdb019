"""Names to factories: the decorators that add an objective or a teacher, and the loading of plugin files."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


def nearest(name: str, known: list[str]) -> str:
    """A hint that names the closest known spelling, or an empty string."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


class Registry(Generic[T]):
    """Factories by name. `what` is the word for one entry in messages ("teacher", "method")."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: file the decorated factory under `name`.

        Defining it again, as a notebook's cell that is run twice does, replaces it.  Raises ValueError if the name is
        taken by another.
        """

        def add(entry: T) -> T:
            known = self._spelling(name)
            if known is not None and not _redefines(entry, self._entries[known]):
                raise ValueError(f"a {self.what} named {name!r} is registered already; choose another name")
            self._entries[known or name] = entry
            return entry

        return add

    def _spelling(self, name: str) -> str | None:
        """The known name that this is; `-` and `_` are the same."""
        return next((known for known in self._entries if known.replace("_", "-") == name.replace("_", "-")), None)

    def get(self, name: str) -> T:
        """The factory of `name`; `-` and `_` are the same.  Raises LookupError that names the known ones."""
        known = self._spelling(name)
        if known is not None:
            return self._entries[known]
        names = self.names()
        raise LookupError(
            f"no {self.what} named {name!r}.{nearest(name, names)} Known: {', '.join(names)}. "
            f"Register one of your own with --plugin FILE."
        )

    def names(self) -> list[str]:
        """Registered names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return self._spelling(name) is not None


def _redefines(new: object, old: object) -> bool:
    """Whether both are the same definition's, by module and qualified name; things that have none: the same object."""
    names = [[getattr(entry, name, None) for name in ("__module__", "__qualname__")] for entry in (new, old)]
    return new is old or (names[0] == names[1] and None not in names[0])


def load_plugin(path: str | Path) -> None:
    """Import one Python file for its registrations.  The file runs as code: only load what you trust.

    Raises FileNotFoundError if it is not there and ValueError if it is no Python; whatever else the file raises is
    raised on, with its traceback.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no plugin file at {path}; --plugin takes the path of a Python file")
    name = f"fewstep_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file; --plugin takes a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, UnicodeDecodeError) as error:
        del sys.modules[name]
        line = f" (line {error.lineno})" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ValueError(f"the plugin {path} is not valid Python{line}: {error}") from error
