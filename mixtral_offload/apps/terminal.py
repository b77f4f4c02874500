"""A conversation in plain text: what `mixtral-offload chat` runs, and a notebook without widgets.

Knows `input` and `print`. What an answer is, `ChatSession` knows.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Iterator

from mixtral_offload.errors import describe
from mixtral_offload.generation.chat import ChatSession
from mixtral_offload.system.safe_output import safe_output

HELP = (
    "Write a message. Ctrl-C stops an answer; /again answers anew; /clear forgets all; /exit or Ctrl-D ends."
)
#: pasted lines come within so many seconds of each other
PASTE_S = 0.03


@safe_output()
def chat_loop(session: ChatSession, prompt: str = "\nyou> ") -> None:
    """Read messages and stream answers until the input ends; then print what it took.

    Answers go to standard output; everything else goes to standard error.
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
    """What a user writes, message by message. A message is a line; lines that were pasted together are one message."""

    def __init__(self, prompt: str):
        self._prompt = prompt
        self._next: list[str | None] = []  # read already, but no part of the message before

    def read(self) -> str | None:
        """The next message, or None at the end of input. Ctrl-C at the prompt ends the conversation too."""
        lines = [self._next.pop() if self._next else _line(self._prompt)]
        while lines[-1] is not None and not lines[-1].startswith("/") and _has_more():
            line = _line("")
            if line is None or line.startswith("/"):
                self._next.append(line)
                break
            lines.append(line)
        return None if lines[0] is None else "\n".join(lines)


def _line(prompt: str) -> str | None:
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        return None


def _has_more() -> bool:
    """Whether a terminal has another line already: nobody types one in so short a time."""
    try:
        return sys.stdin.isatty() and bool(select.select([sys.stdin], [], [], PASTE_S)[0])
    except (OSError, ValueError):  # a system that cannot look ahead
        return False


def stream(session: ChatSession, ask, *arguments) -> None:
    """Print an answer as it comes, and what the reader should know of its end."""
    try:
        print_pieces(ask(*arguments))
        for line in notices(session):
            print(f"[{line}]", file=sys.stderr)
    except BrokenPipeError:
        raise
    except Exception as error:  # the conversation goes on
        print(f"error: {describe(error)}", file=sys.stderr)


def print_pieces(answer: Iterator[str]) -> None:
    """Ctrl-C stops the answer."""
    try:
        for piece in answer:
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        answer.close()
        print(" [stopped]")


def notices(session: ChatSession) -> list[str]:
    """How the last answer ended, if not by itself, and whether the context is nearly full."""
    ends = {
        "max_new_tokens": f"cut at {session.last.n_tokens} tokens, the longest answer allowed",
        "context": "cut: the context is full; clear the conversation",
    }
    lines = [ends[session.ended]] if session.ended in ends else []
    length = session.context_length
    left = length - session.context_used
    if left < length // 4 and session.ended != "context":
        lines.append(f"{left} of {length} tokens of context are left; clearing the conversation frees them")
    return lines
