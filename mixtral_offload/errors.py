"""The errors that users see: what is wrong, where, what was expected, what was found, what to do next.

Every message is made safe: no control characters, no secrets, at most MESSAGE_LIMIT characters.
"""

from __future__ import annotations

from typing import Any

from mixtral_offload.system.redaction import redact
from mixtral_offload.system.safe_text import as_text, shorten, visible

LINE_LIMIT = 300  # characters of one line of a value
VALUE_LIMIT = 1000  # characters of a whole value, where the message has room
MESSAGE_LIMIT = 2000
SEARCH_LIMIT = 1_000_000  # text beyond is never shown, so it is not searched for secrets


class OffloadError(Exception):
    """Base class of all errors of this package.

    Values may come from anywhere: they are redacted, made visible and shortened.

    Args:
        what: What is wrong, in one sentence.
        path: The file or folder.
        key: The place in it.
        expected: What would have been right.
        found: What is there.
        hint: What to do next.
    """

    def __init__(
        self,
        what: object,
        *,
        path: object = None,
        key: object = None,
        expected: object = None,
        found: object = None,
        hint: object = None,
    ) -> None:
        values = {"file": path, "key": key, "expected": expected, "found": found, "next step": hint}
        values = {name: value for name, value in values.items() if value is not None}
        message = _message(what, values, VALUE_LIMIT)
        super().__init__(message if len(message) <= MESSAGE_LIMIT else _message(what, values, LINE_LIMIT))

    def __reduce__(self) -> tuple[Any, ...]:  # the type that Exception declares
        return _restored, (type(self), self.args, self.__dict__)


class CheckpointError(OffloadError, ValueError):
    """Report a checkpoint that is missing, damaged, or of another layout."""


class DownloadError(OffloadError, OSError):
    """Report a download that could not start or is incomplete."""


class CapacityError(OffloadError, ValueError):
    """Report a device or a RAM budget that is too small."""


class OptionError(OffloadError, ValueError):
    """Report an option that does not exist or has an impossible value."""


class JobError(OffloadError):
    """Report a job's input, output or journal that is unusable or belongs to another job."""


class TemplateError(OffloadError, ValueError):
    """Report a chat template that cannot be used."""


class ConversationError(TemplateError):
    """Report a conversation that the chat template or the tokenizer refuses."""


class GenerationError(OffloadError, RuntimeError):
    """Report a forward pass that failed, or whose logits are not finite."""


def describe(error: BaseException) -> str:
    """Format any exception as a safe message: this package's as it is, others as type and text."""
    if isinstance(error, OffloadError):
        return str(error)
    return _value(f"{type(error).__name__}: {as_text(error)}", VALUE_LIMIT)


def _message(what: object, values: dict[str, object], limit: int) -> str:
    lines = [_value(what, limit)]
    for name, value in values.items():
        lines.append(f"  {name}: {_value(value, limit, one_line=name in ('file', 'key'))}")
    return "\n".join(lines)


def _value(value: object, limit: int, one_line: bool = False) -> str:
    """Make a value safe; indent its further lines, so that none looks like a line of the message."""
    text = visible(redact(shorten(as_text(value), SEARCH_LIMIT)), one_line)
    first, *rest = (shorten(line, LINE_LIMIT) for line in text.rstrip("\n").split("\n"))
    return shorten("\n".join([first, *(f"    {line.removeprefix('    ')}" for line in rest)]), limit)


def _restored(kind: type[OffloadError], args: tuple[object, ...], state: dict[str, object]) -> OffloadError:
    """Unpickle an error, whose message is complete already."""
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error
