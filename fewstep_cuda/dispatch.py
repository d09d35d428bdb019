"""Which implementation of an operator runs: the caller's argument, else FEWSTEP_KERNELS, else the reference."""

import os

REFERENCE = "reference"
_STATUS = {
    REFERENCE: "ok",
    "cpu": "not in this version",
    "triton": "not in this version",
    "cuda": "not in this version",
}


def backends() -> dict[str, str]:
    """Name of each backend -> "ok", or why it cannot run here."""
    return dict(_STATUS)


def choose(backend: str | None = None) -> str:
    """The backend to run. One asked for by name, in the call or in FEWSTEP_KERNELS, runs or raises: no fallback."""
    source = "backend" if backend is not None else "FEWSTEP_KERNELS"
    name = backend if backend is not None else os.environ.get("FEWSTEP_KERNELS") or REFERENCE
    status = _STATUS.get(name)
    if status is None:
        raise ValueError(f"{source}={name!r}: no such backend; known: {', '.join(_STATUS)}")
    if status != "ok":
        usable = ", ".join(known for known, state in _STATUS.items() if state == "ok")
        raise ValueError(f"{source}={name!r} cannot run: {status}; usable here: {usable}")
    return name
