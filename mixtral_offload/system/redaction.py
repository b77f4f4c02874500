"""Keep secrets out of messages and logs: tokens that were used, and text that looks like a secret."""

from __future__ import annotations

import logging
import os
import re

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
SHORTEST = 6  # characters of a secret; replacing shorter ones would damage ordinary words
SIGNED = (
    "X-Amz-Signature|X-Amz-Credential|X-Amz-Security-Token|"
    "Signature|Key-Pair-Id|Policy|access_token|token|sig"
)
HEADERS = "(?:proxy-)?authorization|(?:set-)?cookie|x-xet-access-token"
_PATTERNS = (
    (re.compile(r"hf_[A-Za-z0-9]{16,}"), "hf_***"),
    (re.compile(r"(?i)\bBearer +[^\s'\",)]+"), "Bearer ***"),
    # a header as a pair, in Python or JSON: (b'set-cookie', b'secret')
    (re.compile(rf"(?i)({HEADERS})(['\"] *[,:] *b?)(['\"]).*?\3"), r"\1\2\3***\3"),
    (re.compile(rf"(?i)\b({HEADERS})(: *|=)((?:Bearer|Basic) +)?[^\s'\"]+"), r"\1\2***"),
    (re.compile(r"(\w://)[^\s/@'\"]+@"), r"\1***@"),
    (re.compile(rf"(?i)([?&;](?:{SIGNED})=)[^&\s'\"]+"), r"\1***"),
)
_secrets: frozenset[str] = frozenset()  # immutable, since downloads log from several threads


def remember_secret(secret: str) -> None:
    """Make `redact` remove this text from now on, also its parts between white space."""
    global _secrets
    _secrets |= {part for part in (secret.strip(), *secret.split()) if len(part) >= SHORTEST}


def redact(text: str) -> str:
    """Mask secrets: those remembered, those in the environment, and text that looks like a secret."""
    for name in VARIABLES:
        if name in os.environ:
            remember_secret(os.environ[name])
    for secret in sorted(_secrets, key=len, reverse=True):
        if secret in text:
            text = text.replace(secret, "hf_***")
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text


def redact_chain(error: BaseException) -> None:
    """Redact an exception and its causes in place; a cause that still shows a secret is removed."""
    pending: list[BaseException] = [error]
    seen: set[int] = set()
    while pending:
        error = pending.pop()
        seen.add(id(error))
        _redact_one(error)
        for name in ("__cause__", "__context__"):
            linked = getattr(error, name)
            if linked is None or id(linked) in seen:
                continue
            if _redact_one(linked):
                pending.append(linked)
            else:
                setattr(error, name, None)


def _redact_one(error: BaseException) -> bool:
    """Redact one exception; return whether its text is free of secrets now."""
    clean = tuple(_redacted(value) for value in error.args)
    if clean != error.args:
        error.args = clean
    named = ("strerror", "filename", "filename2") if isinstance(error, OSError) else ()
    for name in (*named, *vars(error)):
        value = getattr(error, name)
        if isinstance(value, (str, bytes, list)) and _redacted(value) != value:
            setattr(error, name, _redacted(value))
    shown = f"{error} {error!r}"
    return redact(shown) == shown


def _redacted(value: object) -> object:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list):  # an exception's notes
        return [redact(note) if isinstance(note, str) else note for note in value]
    if isinstance(value, bytes):
        text = value.decode("latin-1")
        return value if redact(text) == text else redact(text).encode("latin-1")
    return value


class RedactingFilter(logging.Filter):
    """Redact the records of the loggers that it is added to."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact a record, and let it pass."""
        text = record.getMessage()
        if (clean := redact(text)) != text:
            record.msg, record.args = clean, None
        if record.exc_info and record.exc_info[1] is not None:
            redact_chain(record.exc_info[1])
        return True


_FILTER = RedactingFilter()


def redact_logs(*names: str) -> None:
    """Redact the records of these loggers and of all existing loggers below them."""
    below = tuple(f"{name}." for name in names)
    for name in (*names, *(name for name in logging.root.manager.loggerDict if name.startswith(below))):
        logging.getLogger(name).addFilter(_FILTER)  # adding it again has no effect
