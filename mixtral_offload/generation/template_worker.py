"""Render chat templates in a process of its own, which `template_process.py` starts, and kills at a bound.

Imports the standard library and jinja2 only, to start quickly. `main` has the protocol.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment, Template, nodes
    from jinja2.parser import Parser

RENDER_S = 5.0  # for one rendering
SHOWN = 300  # characters of a template's own error message


def environment() -> Environment:
    """Make the same jinja2 environment as transformers (`chat_template_utils.py`); tests compare the two."""
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks an assistant's text: rendered as if it were absent."""

        tags = {"generation"}  # noqa: RUF012  # jinja2's own way

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_words"), [], [], body).set_lineno(line)

        def _words(self, caller: Callable[[], str]) -> str:
            return caller()

    def raise_exception(message: object) -> None:
        raise Refused(message)

    def tojson(
        x: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    found.filters["tojson"] = tojson
    found.globals["raise_exception"] = raise_exception
    found.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
    return found


class Refused(Exception):
    """A template called `raise_exception`."""


@functools.lru_cache(8)
def compiled(template: str) -> Template:
    """Compile a template; the last 8 are kept."""
    return environment().from_string(template)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Render one request; returns {"text"} or {"error", "kind"}."""
    try:
        text = compiled(request["template"]).render(request["variables"])
    except Refused as error:
        return {"kind": "refused", "error": str(error)[:SHOWN]}
    except MemoryError:
        return {"kind": "memory", "error": "it needs too much memory"}
    except Exception as error:  # a template's errors are of every kind
        return {"kind": "broken", "error": f"{type(error).__name__}: {str(error)[:SHOWN]}"}
    if len(text) > request["most_characters"]:
        return {"kind": "memory", "error": f"it makes {len(text):,} characters of this conversation"}
    return {"text": text}


def bound_memory(n_bytes: int) -> None:
    """Limit this process's memory where the system can; `template_process.py` watches it too."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass


def main() -> None:
    """Answer requests until the input ends: JSON, one object on each line.

    In: first {"path": [...], "memory_bytes": n}, then {"template", "variables", "most_characters"}.
    Out: first {"ready": true}, then {"text"} or {"error", "kind"}, with kind "refused" (the template called
    `raise_exception`), "broken" or "memory".
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    source, target = sys.stdin.buffer, sys.stdout.buffer

    def reply(message: dict[str, Any]) -> None:
        target.write(json.dumps(message).encode() + b"\n")
        target.flush()

    first = json.loads(source.readline())
    sys.path[:] = first["path"]
    environment()  # its imports, before memory is bounded
    bound_memory(first["memory_bytes"])
    reply({"ready": True})
    for line in source:
        if hasattr(signal, "setitimer"):  # ends this process even if the other one is gone
            signal.setitimer(signal.ITIMER_REAL, 2 * RENDER_S)
        try:
            message = answer(json.loads(line))
        except MemoryError:
            message = {"kind": "memory", "error": "it needs too much memory"}
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        reply(message)


if __name__ == "__main__":
    main()
