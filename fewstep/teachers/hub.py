"""Pipelines on the hub: fetched at one commit, safetensors alone; and what can go wrong, in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
CONFIGS = ["*.json", "*.txt", "*.model"]
"""Of networks and tokenizers."""


def fetch_index(source: str, revision: str | None = None) -> dict[str, Any]:
    """A repository's model_index.json, a kilobyte that names its pipeline class.

    Raises ValueError that says why it cannot be had, and what to do.
    """
    from huggingface_hub import hf_hub_download

    with _told(source, revision):
        path = hf_hub_download(source, INDEX, revision=revision)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot load the pipeline {source!r}: its {INDEX} does not parse: {error}") from error


def fetch(source: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of its snapshot in the hub's cache; a broken download goes on where it stopped.

    variant: of the weights' files, as "fp16".  Raises ValueError as `fetch_index`.
    """
    from diffusers import DiffusionPipeline

    options = {name: value for name, value in {"revision": revision, "variant": variant}.items() if value is not None}
    with _told(source, revision):
        return Path(DiffusionPipeline.download(source, use_safetensors=True, **options))


def fetch_configs(source: str) -> Path:
    """The folder of a repository's configs and tokenizers, a few megabytes without any weight.

    source: ID, or ID@REVISION.  Raises ValueError as `fetch_index`.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    with _told(name, revision or None, weights=False):
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=CONFIGS))


@contextmanager
def _told(source: str, revision: str | None, *, weights: bool = True) -> Iterator[None]:
    """Whatever a download raises as a ValueError in words: the hub's HTTP library has errors of its own kind."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot load the pipeline {source!r}: {_reason(error, source, revision, weights)}") from error


def _reason(error: Exception, source: str, revision: str | None, weights: bool) -> str:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{source}"
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated: accept its licence at {page}, then `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}; see {page}/commits, or leave teacher.revision out"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no {page}, or it is private; check the name, or `hf auth login`"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"it is no diffusers pipeline, as {INDEX} is missing at {page}"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        at = "" if revision is None else f" --revision {revision}"
        only = "" if weights else "".join(f" --include '{pattern}'" for pattern in CONFIGS)
        then = "name FOLDER as the teacher, or with --set teacher.source=FOLDER"
        return (
            f"it is not in the cache ({constants.HF_HUB_CACHE}), and {why}; where there is a network, "
            f"`hf download {source}{at}{only} --local-dir FOLDER`, then "
            + (then if weights else "--set teacher.config=FOLDER")
        )
    if isinstance(error, errors.HFValidationError):
        return str(error)
    return f"{type(error).__name__}: {error}; if the connection broke, the same command goes on where it stopped"
