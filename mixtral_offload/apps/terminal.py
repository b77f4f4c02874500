"""A conversation in plain text: `mixtral-offload chat`, and a notebook without widgets.

Reads with `input` and prints; answers come from `ChatSession`.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Callable, Generator, Iterator

from mixtral_offload.errors import describe
from mixtral_offload.generation.chat import ChatSession
from mixtral_offload.system.safe_output import safe_output

HELP = (
    "Write a message. Ctrl-C stops an answer; /again generates another; /clear forgets all; "
    "/exit or Ctrl-D ends."
)
#: longest time between two lines that were pasted together, in seconds
PASTE_S = 0.03


@safe_output()
def chat_loop(session: ChatSession, prompt: str = "\nyou> ") -> None:
    """Read messages and stream answers until the input ends; then print the session's totals.

    Answers go to standard output, everything else to standard error.
    """
    print(HELP, file=sys.stderr)
    messages = Messages(prompt)
    while (text := messages.read()) not in (None, "/exit"):
        if text == "/clear":
            session.clear()
        elif text == "/again":
            stream(session, session.regenerate)
        elif text.strip():
            stream(session, session.send, text)
    print(f"\n{session.total}", file=sys.stderr)


class Messages:
    """Read messages. A message is a line, or several lines that were pasted together."""

    def __init__(self, prompt: str):
        self._prompt = prompt
        self._next: list[str | None] = []  # read already, but not part of the message before

    def read(self) -> str | None:
        """Return the next message, or None at the end of the input or after Ctrl-C at the prompt."""
        line = self._next.pop() if self._next else _line(self._prompt)
        if line is None:
            return None
        lines = [line]
        while not line.startswith("/") and _has_more():
            line = _line("")
            if line is None or line.startswith("/"):
                self._next.append(line)
                break
            lines.append(line)
        return "\n".join(lines)


def _line(prompt: str) -> str | None:
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        return None


def _has_more() -> bool:
    """Tell whether the terminal has another line already, sooner than it could have been typed."""
    try:
        return sys.stdin.isatty() and bool(select.select([sys.stdin], [], [], PASTE_S)[0])
    except (OSError, ValueError):  # a system that cannot look ahead
        return False


def stream(session: ChatSession, ask: Callable[..., Iterator[str]], *arguments: str) -> None:
    """Print an answer as it comes, then notices about its end."""
    try:
        print_pieces(ask(*arguments))
        for line in notices(session):
            print(f"[{line}]", file=sys.stderr)
    except BrokenPipeError:
        raise
    except Exception as error:  # the conversation goes on
        print(f"error: {describe(error)}", file=sys.stderr)


def print_pieces(answer: Iterator[str]) -> None:
    """Print an answer piece by piece; Ctrl-C stops it."""
    try:
        for piece in answer:
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        if isinstance(answer, Generator):  # a session's answers are
            answer.close()
        print(" [stopped]")


def notices(session: ChatSession) -> list[str]:
    """Say how the last answer was cut, if it was, and whether the context is nearly full."""
    ends = {
        "max_new_tokens": f"cut at {session.last.n_tokens} tokens, the longest answer allowed",
        "context": "cut: the context is full; clear the conversation",
    }
    lines = [ends[session.ended]] if session.ended is not None and session.ended in ends else []
    length = session.context_length
    left = length - session.context_used
    if left < length // 4 and session.ended != "context":
        lines.append(f"{left} of {length} tokens of context are left; clearing the conversation frees them")
    return lines
