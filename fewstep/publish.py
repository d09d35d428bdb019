"""An exported folder to the hub, as a repository of its own; what can go wrong is told in words, without the token."""

from __future__ import annotations

from pathlib import Path


def check_push(repository: str) -> None:
    """What is known before anything is made.  Raises ValueError for a name or surroundings that cannot be used."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"--push-to-hub {repository!r} is no name of a repository: {error}") from error
    if repository.count("/") != 1:
        raise ValueError(f"--push-to-hub {repository!r} must be OWNER/NAME, with your name or an organisation's")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"cannot push to {repository!r}: HF_HUB_OFFLINE is set; unset it, or leave --push-to-hub out")
    if get_token() is None:
        raise ValueError(
            f"cannot push to {repository!r}: no token; `hf auth login`, or set HF_TOKEN to one that may write"
        )


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Make the repository and upload the folder.  Returns its address.

    Raises ValueError as `check_push`, if there is such a repository, or if the hub refuses: the folder is left.
    """
    from huggingface_hub import HfApi

    check_push(repository)
    api = HfApi()
    try:
        url = str(api.create_repo(repository, private=private))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by fewstep")
    except Exception as error:  # the hub's HTTP library has errors of its own kind
        raise ValueError(
            f"cannot push to {repository!r}: {_reason(error, repository)}. The folder is written; push it later with "
            f"`hf upload {repository} {folder}`"
        ) from error
    return url


def _reason(error: Exception, repository: str) -> str:
    from huggingface_hub import constants, errors, get_token

    response = error.response if isinstance(error, errors.HfHubHTTPError) else None
    status = None if response is None else response.status_code
    if status == 401:
        return "the token is not accepted; `hf auth login` again, or set HF_TOKEN to another"
    if status == 403:
        return f"the token may not write to {repository.partition('/')[0]!r}; take one that may, or another owner"
    if status == 409:
        return f"{constants.ENDPOINT}/{repository} exists, and none is overwritten; choose another name"
    said = f"{type(error).__name__}: {error}".replace(get_token() or "\0", "***")
    return f"{constants.ENDPOINT} cannot be reached ({said})" if status is None else said
