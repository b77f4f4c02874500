"""A conversation in plain text: what `mixtral-offload chat` runs, and a notebook without widgets.

Knows `input` and `print`. What an answer is, `ChatSession` knows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from .chat import ChatSession
from .errors import describe
from .safe_output import safe_output

HELP = (
    "Write a message. Ctrl-C stops an answer; /again answers anew; /clear forgets all; /exit or Ctrl-D ends."
)


@safe_output()
def chat_loop(session: ChatSession, prompt: str = "\nyou> ") -> None:
    """Read messages and stream answers until the input ends; then print what it took.

    Answers go to standard output; everything else goes to standard error.
    """
    print(HELP, file=sys.stderr)
    while (text := read_line(prompt)) not in (None, "/exit"):
        if text == "/clear":
            session.clear()
        elif text == "/again":
            stream(session, session.regenerate)
        elif text.strip():
            stream(session, session.send, text)
    print(f"\n{session.total}", file=sys.stderr)


def read_line(prompt: str) -> str | None:
    """One line, or None at the end of input. Ctrl-C at the prompt ends the conversation too."""
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        return None


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
        "max_new_tokens": f"cut at {session.max_new_tokens} tokens, the longest answer allowed",
        "context": "cut: the context is full; clear the conversation",
    }
    lines = [ends[session.ended]] if session.ended in ends else []
    length = session.context_length
    left = length - session.context_used
    if left < length // 4 and session.ended != "context":
        lines.append(f"{left} of {length} tokens of context are left; clearing the conversation frees them")
    return lines
