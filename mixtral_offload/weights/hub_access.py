"""Tokens for the hub: stripped, checked before use, and never shown.

A token that cannot be sent is refused here: the libraries that would send it print it when they fail.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from mixtral_offload.errors import DownloadError
from mixtral_offload.system.redaction import VARIABLES, redact_logs, remember_secret

HINT = "set HF_TOKEN to a token that may read it, or pass token="
#: loggers of what sends requests; those of a lower layer are made when a library is imported, so all are
#: named
LOGGERS = (
    *("mixtral_offload", "huggingface_hub", "filelock", "httpx", "httpx2"),
    *(
        f"{library}{part}"
        for library in ("httpcore", "httpcore2")
        for part in ("", ".connection", ".http11", ".http2", ".proxy", ".socks")
    ),
)


def hub_token(token: str | bool | None) -> str | bool | None:
    """Check the token that a request will use; from now on no message and no log shows it.

    Args:
        token: A token; True or None for the one that huggingface_hub finds; False for none.

    Returns:
        The token for huggingface_hub, without white space around it, or `token` as it is.

    Raises:
        DownloadError: If the token cannot be part of a request. The message does not contain it.
    """
    redact_logs(*LOGGERS)
    if isinstance(token, str) and token.strip():
        _check(token, "the token that was passed")
        return token.strip()
    if token is False or (token is not True and constants.HF_HUB_DISABLE_IMPLICIT_TOKEN):
        return token
    for where, text in _stored():
        _check(text, where)
    found = None
    with contextlib.suppress(Exception):  # fails again, and is explained, when the request is made
        found = huggingface_hub.get_token()
    if found:
        _check(found, "the stored token")
    return token if token is True else None


def _stored() -> list[tuple[str, str]]:
    """(where, text) of the token that huggingface_hub would find first, as it was written."""
    for name in VARIABLES:
        if os.environ.get(name, "").strip():
            return [(f"the token in {name}", os.environ[name])]
    try:
        text = Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [("the token in the token file", text)] if text.strip() else []


def _check(token: str, where: str) -> None:
    remember_secret(token)
    if not re.fullmatch(r"[\x21-\x7e]+", token.strip()):
        what = f"{where} cannot be sent"
        found = "a space, a line break, a control character or a character outside ASCII inside it"
        raise DownloadError(what, expected="one word of ASCII characters", found=found, hint=HINT)
