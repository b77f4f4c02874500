"""Make escape sequences in output visible, so that answers and file names cannot act on the terminal.

Standard error is always made safe, standard output only on a terminal: files and pipes get the text as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from mixtral_offload.system.safe_text import visible


class SafeStream:
    """Wrap a text stream: write control characters as visible escapes, and pass everything else on.

    Args:
        stream: The stream to write to.
        keep_return: Keep a carriage return at the beginning of a text, as progress bars write it.
    """

    def __init__(self, stream: TextIO, keep_return: bool = False) -> None:
        self._stream, self._keep_return = stream, keep_return

    def write(self, text: str) -> int:
        """Write text with visible escapes; return its length, as text streams do."""
        begin = "\r" if self._keep_return and text.startswith("\r") else ""
        self._stream.write(begin + visible(text[len(begin) :]))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines with visible escapes."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def safe_output() -> Iterator[None]:
    """Make sys.stderr, and sys.stdout on a terminal, safe; within another `safe_output`, do nothing.

    After an unexpected error they stay safe, because the interpreter prints the traceback later.
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
