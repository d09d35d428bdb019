"""Docstrings as they were written: their lines and their symbols, where Markdown would join and read them."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class Verbatim(Extension):
    """Keeps line breaks, and takes *, _, [, < and | outside `code` for what they are."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the object's docstring."""
        if obj.docstring:
            text = re.sub(r"(`[^`]*`)|([\\*_\[\]<|])", lambda m: m[1] or "\\" + m[2], obj.docstring.value)
            obj.docstring.value = re.sub(r"(?<=[^\n])\n(?=[^\n])", "  \n", text)
