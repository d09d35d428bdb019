"""Pipelines on the hub: fetched at one commit, safetensors alone; and what can go wrong, in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

INDEX = "model_index.json"


def fetch_index(source: str, revision: str | None = None) -> dict[str, Any]:
    """A repository's model_index.json, a kilobyte that names its pipeline class.

    Raises ValueError that says why it cannot be had, and what to do.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        path = hf_hub_download(source, INDEX, revision=revision)
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(f"cannot load the pipeline {source!r}: {_reason(error, source, revision)}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot load the pipeline {source!r}: its {INDEX} does not parse: {error}") from error


def fetch(source: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of its snapshot in the hub's cache; a broken download goes on where it stopped.

    variant: of the weights' files, as "fp16".  Raises ValueError as `fetch_index`.
    """
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError

    options = {name: value for name, value in {"revision": revision, "variant": variant}.items() if value is not None}
    try:
        return Path(DiffusionPipeline.download(source, use_safetensors=True, **options))
    except (OSError, HfHubHTTPError) as error:
        raise ValueError(f"cannot load the pipeline {source!r}: {_reason(error, source, revision)}") from error


def _reason(error: Exception, source: str, revision: str | None) -> str:
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
        return (
            f"it is not in the cache ({constants.HF_HUB_CACHE}), and {why}; where there is a network, "
            f"`hf download {source}{at} --local-dir FOLDER`, then name FOLDER as the teacher, or with "
            "--set teacher.source=FOLDER"
        )
    return str(error)
