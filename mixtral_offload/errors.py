"""The errors users see: what is wrong, where, what was expected, what was found, what to do next.

Knows nothing about models or files.
"""


class OffloadError(Exception):
    """Anything this package refuses to do, said in one message."""

    def __init__(self, what, *, path=None, key=None, expected=None, found=None, hint=None):
        lines = [str(what)]
        for name, value in (
            ("file", path),
            ("key", key),
            ("expected", expected),
            ("found", found),
            ("next step", hint),
        ):
            if value is not None:
                lines.append(f"  {name}: {value}")
        super().__init__("\n".join(lines))


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
