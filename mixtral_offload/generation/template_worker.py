"""Renders chat templates in a process of its own: started by `generation/templates.py`, which kills it when a bound is passed.

Imports the standard library and jinja2 only, so that it starts in about 0.1 s. A template is a program that came with a
checkpoint: here it can neither hold the model's process up nor fill its memory.

Protocol: JSON, one object on each line. In: first {"path": [...], "memory_bytes": n}, then {"template", "variables",
"most_characters"}. Out: first {"ready": true}, then {"text"} or {"error", "kind"}; kind: "refused" (the template's own
`raise_exception`), "broken", or "memory".
"""

from __future__ import annotations

import functools
import json
import signal
import sys

RENDER_S = 5.0  # what one rendering may take
SHOWN = 300  # characters of a template's own error message


def environment():
    """The same as transformers' (`chat_template_utils.py`); `tests/generation/test_templates.py` compares the two."""
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks an assistant's words: rendered as if it were not there."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_words"), [], [], body).set_lineno(line)

        def _words(self, caller):
            return caller()

    def raise_exception(message):
        raise Refused(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(x, ensure_ascii=ensure_ascii, **options)

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    found.filters["tojson"] = tojson
    found.globals["raise_exception"] = raise_exception
    found.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
    return found


class Refused(Exception):
    """What a template says through `raise_exception`."""


@functools.lru_cache(8)
def compiled(template: str):
    return environment().from_string(template)


def answer(request: dict) -> dict:
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
    """Where the system can; `generation/templates.py` watches the process too."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    source, target = sys.stdin.buffer, sys.stdout.buffer

    def say(reply: dict) -> None:
        target.write(json.dumps(reply).encode() + b"\n")
        target.flush()

    first = json.loads(source.readline())
    sys.path[:] = first["path"]
    environment()  # its imports, before memory is bounded
    bound_memory(first["memory_bytes"])
    say({"ready": True})
    for line in source:
        if hasattr(signal, "setitimer"):  # should the other process be gone, this one ends all the same
            signal.setitimer(signal.ITIMER_REAL, 2 * RENDER_S)
        try:
            reply = answer(json.loads(line))
        except MemoryError:
            reply = {"kind": "memory", "error": "it needs too much memory"}
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        say(reply)


if __name__ == "__main__":
    main()
