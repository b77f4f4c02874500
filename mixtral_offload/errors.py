"""The errors users see: what is wrong, where, what was expected, what was found, what to do next.

Every message passes here: no control characters, no secrets, and no more than MESSAGE_LIMIT characters, whatever the
values hold. Knows nothing about models or files.
"""

from __future__ import annotations

from mixtral_offload.system.redaction import redact
from mixtral_offload.system.safe_text import as_text, shorten, visible

LINE_LIMIT = 300  # characters of one line of a value
VALUE_LIMIT = 1000  # of a value of several lines, where the whole message has room
MESSAGE_LIMIT = 2000
LOOKED_AT = 1_000_000  # nothing beyond can be shown, so that nothing beyond is searched for secrets


class OffloadError(Exception):
    """Base class of all errors of this package.

    Args:
        what: what is wrong, in one sentence.
        path: the file or folder.
        key: the place in it.
        expected: what would have been right.
        found: what is there.
        hint: what to do next.

    Values may come from anywhere: they are redacted, made visible and shortened here.
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
    ):
        values = {"file": path, "key": key, "expected": expected, "found": found, "next step": hint}
        values = {name: value for name, value in values.items() if value is not None}
        message = _message(what, values, VALUE_LIMIT)
        super().__init__(message if len(message) <= MESSAGE_LIMIT else _message(what, values, LINE_LIMIT))

    def __reduce__(self):
        return _restored, (type(self), self.args, self.__dict__)


class CheckpointError(OffloadError, ValueError):
    """A checkpoint that is missing, damaged, or of another layout."""


class DownloadError(OffloadError, OSError):
    """A download that could not start or did not arrive whole."""


class CapacityError(OffloadError, ValueError):
    """A cache or device that cannot hold what was asked of it."""


class OptionError(OffloadError, ValueError):
    """An option that does not exist or has an impossible value."""


class JobError(OffloadError):
    """A job's input, output or journal that cannot be used, or does not belong to it."""


class TemplateError(OffloadError, ValueError):
    """A chat template that cannot be used."""


class ConversationError(TemplateError):
    """A conversation that its chat template or tokenizer refuses."""


class GenerationError(OffloadError, RuntimeError):
    """A forward pass that failed, or whose logits are not numbers."""


def describe(error: BaseException) -> str:
    """One error as a message: ours as it is, any other as its kind and text, made safe as ours are."""
    if isinstance(error, OffloadError):
        return str(error)
    return _value(f"{type(error).__name__}: {as_text(error)}", VALUE_LIMIT)


def _message(what: object, values: dict[str, object], limit: int) -> str:
    lines = [_value(what, limit)]
    for name, value in values.items():
        lines.append(f"  {name}: {_value(value, limit, one_line=name in ('file', 'key'))}")
    return "\n".join(lines)


def _value(value: object, limit: int, one_line: bool = False) -> str:
    """Lines after the first are indented further than our own, so that no value can pass for one of them."""
    text = visible(redact(shorten(as_text(value), LOOKED_AT)), one_line)
    first, *rest = (shorten(line, LINE_LIMIT) for line in text.rstrip("\n").split("\n"))
    return shorten("\n".join([first, *(f"    {line.removeprefix('    ')}" for line in rest)]), limit)


def _restored(kind: type[OffloadError], args: tuple, state: dict) -> OffloadError:
    """From a pickle: the message is made already."""
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error
