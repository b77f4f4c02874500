"""Resolve the name of a model: the shipped model, a folder, or a hub repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mixtral_offload.errors import CheckpointError, OptionError
from mixtral_offload.weights.hub import download

DEMO_NAME = "demo"
DEMO = Path(__file__).parents[1] / "demo" / "4bit"


def resolve(path_or_repo_id: str | os.PathLike | None = None, **hub: Any) -> Path:
    """Return the folder of a model; download it if it is in a repository.

    Args:
        path_or_repo_id: As in `local_folder`.
        hub: Arguments of `hub.download`.

    Raises:
        OffloadError: As `local_folder` and `hub.download` raise it.
    """
    return local_folder(path_or_repo_id) or download(str(path_or_repo_id), **hub)


def local_folder(path_or_repo_id: str | os.PathLike | None) -> Path | None:
    """Find the folder that a model's name means, without a download.

    Args:
        path_or_repo_id: A folder, a hub repository, or "demo" or None for the shipped model (write ./demo for
            a folder of that name).

    Returns:
        The folder; None if the name can only be a repository.

    Raises:
        CheckpointError: For any other path.
        OptionError: For what is no name.
    """
    if path_or_repo_id is None or path_or_repo_id == DEMO_NAME:
        return DEMO
    if not isinstance(path_or_repo_id, (str, os.PathLike)):
        raise OptionError(
            "not the name of a model",
            expected="a folder, or a hub repository as owner/name",
            found=repr(path_or_repo_id)[:80],
        )
    text = os.fspath(path_or_repo_id)
    path = Path(os.path.expanduser(text))
    if text and os.path.isdir(path):  # Path's own raises if a name is too long or not accessible
        return path
    exists = bool(text) and os.path.exists(path)
    is_path = not isinstance(path_or_repo_id, str) or text.startswith((".", "~")) or path.is_absolute()
    if not (is_path or exists or text.count("/") > 1 or "\\" in text):
        return None
    what, hint = f"{text} is not a folder", "check the spelling and the working directory"
    expected = "a folder with a model's files, or a repository such as owner/name"
    found = "a file" if exists else "nothing there"
    raise CheckpointError(what, path=path.absolute(), expected=expected, found=found, hint=hint)
