"""Standard output and standard error on which nothing from outside can act on the terminal.

Answers, file names and values of configurations may hold escape sequences. On a terminal they are shown, not obeyed.
Answers that go into a file or a pipe stay as they are; standard error is for people, so it is always made safe.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from mixtral_offload.system.safe_text import visible


class SafeStream:
    """A text stream that writes control characters as visible escapes; everything else is the stream's own.

    Args:
        stream: where the text goes.
        keep_return: keep a carriage return that begins a text, as progress bars write it.
    """

    def __init__(self, stream: TextIO, keep_return: bool = False):
        self._stream, self._keep_return = stream, keep_return

    def write(self, text: str) -> int:
        begin = "\r" if self._keep_return and text.startswith("\r") else ""
        self._stream.write(begin + visible(text[len(begin) :]))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def safe_output() -> Iterator[None]:
    """Make sys.stdout, where it is a terminal, and sys.stderr safe; within another `safe_output`, changes nothing.

    After an unexpected error they stay so: the interpreter prints the traceback later.
    """
    before = sys.stdout, sys.stderr
    if not isinstance(sys.stdout, SafeStream) and sys.stdout is not None and sys.stdout.isatty():
        sys.stdout = SafeStream(sys.stdout)
    if not isinstance(sys.stderr, SafeStream) and sys.stderr is not None:
        sys.stderr = SafeStream(sys.stderr, keep_return=True)
    try:
        yield
    except Exception:
        raise
    except BaseException:
        sys.stdout, sys.stderr = before
        raise
    else:
        sys.stdout, sys.stderr = before
