"""Read, check and encode the lines of a job's input; does not know models, answers or the journal."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mixtral_offload.errors import ConversationError, JobError, OptionError
from mixtral_offload.generation.templates import encode
from mixtral_offload.runtime.settings import check_sampling

KEYS = ("prompt", "messages", "system", "max_tokens", "seed", "id")
EXPECTED = "prompt or messages, and if wanted system, max_tokens, seed, id"
ROLES = ("system", "user", "assistant")
SHOWN = 20  # bad lines that are listed


@dataclass(frozen=True)
class Line:
    """One request.

    Attributes:
        number: Counted from 1, as in editors.
        messages: The conversation, as chat templates take it.
        system: The line's own system prompt.
        max_tokens: The longest answer; None for the job's.
        seed: The line's own seed.
        kept: Copied to the answer: {"id": ...} or {}.
        ids: The prompt's tokens; empty until `encode_lines`.
    """

    number: int
    messages: list[dict[str, str]]
    system: str | None
    max_tokens: int | None
    seed: int | None
    kept: dict[str, Any]
    ids: array[int] = field(default_factory=lambda: array("i"))


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be answered, and why."""

    number: int
    error: str


class _Bad(ValueError):
    """Raised with what is wrong with a line."""


def read_lines(path: Path, raw: bool = False) -> tuple[str, list[Line | BadLine]]:
    """Read and check a job's input.

    Args:
        path: A file of JSON lines.
        raw: Whether prompts are continued as they are, without a chat template.

    Returns:
        The file's sha256, and its lines except blank ones, not encoded yet.

    Raises:
        JobError: The file cannot be read or has no lines.
    """
    if path.exists() and not path.is_file():
        raise JobError("the input is not a file", path=path, hint="a job needs a file, to resume from")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise JobError("cannot read the input", path=path, found=error.strerror or error) from error
    # not splitlines: JSON may hold other line ends
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    found = [_read(number, line, raw) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        expected = 'lines like {"prompt": "..."}'
        raise JobError("no lines in the input", path=path, expected=expected, found="nothing")
    return hashlib.sha256(content).hexdigest(), found


def encode_lines(
    lines: list[Line | BadLine],
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    system: str | None = None,
    vocabulary: int | None = None,
) -> list[Line | BadLine]:
    """Encode the lines; one that cannot be encoded, or is too long, becomes a `BadLine`.

    Args:
        lines: From `read_lines`.
        tokenizer: The model's.
        context_length: Tokens of prompt and answer together.
        system: System prompt of lines without one of their own.
        vocabulary: The model's number of tokens; None for no check.

    Raises:
        TemplateError: The chat template cannot render any line.
    """
    return [
        line if isinstance(line, BadLine) else _encode(line, tokenizer, context_length, system, vocabulary)
        for line in lines
    ]


def list_bad(bad: list[BadLine]) -> str:
    """List what is wrong with the first SHOWN bad lines, and the number of the others."""
    told = [f"line {line.number}: {line.error}" for line in bad[:SHOWN]]
    return "\n".join([*told, f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else told)


def _encode(
    line: Line,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    system: str | None,
    vocabulary: int | None,
) -> Line | BadLine:
    own = line.messages[0]["role"] == "system" or line.system is not None
    try:
        ids = encode(tokenizer, line.messages, line.system if own else system)
    except ConversationError as error:
        return BadLine(line.number, "; ".join(part.strip() for part in str(error).splitlines()))
    if not ids:
        return BadLine(line.number, "the prompt is empty: it has no tokens")
    if len(ids) >= context_length:
        expected = f"expected less than {context_length} tokens, the model's context; found {len(ids)}"
        return BadLine(line.number, f"the prompt is too long: {expected}")
    if vocabulary and not 0 <= min(ids) <= max(ids) < vocabulary:
        found = f"ids from {min(ids)} to {max(ids)}, of a vocabulary of {vocabulary}"
        return BadLine(line.number, f"the tokenizer does not belong to this model: {found}")
    return replace(line, ids=array("i", ids))


def _read(number: int, line: bytes, raw: bool) -> Line | BadLine:
    try:
        return _line(number, _parse(line), raw)
    except _Bad as error:
        return BadLine(number, str(error))


def _parse(line: bytes) -> object:
    """Parse strict JSON: no repeated keys, no numbers that JSON cannot write."""
    try:
        return json.loads(
            line.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_number, parse_float=_number
        )
    except UnicodeDecodeError as error:
        raise _Bad(f"not UTF-8: {error.reason} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise _Bad(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise _Bad("not readable as JSON: nested too deeply") from None
    except _Bad:
        raise
    except ValueError as error:  # Python's limit on a number's digits
        raise _Bad(f"not readable as JSON: {error}") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    read = dict(pairs)
    if len(read) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Bad(f"key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return read


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise _Bad(f"not JSON: {text} is not a number that it can hold")
    return value


def _line(number: int, value: object, raw: bool) -> Line:
    if not isinstance(value, dict):
        raise _Bad(f'expected an object like {{"prompt": "..."}}, found {_show(value)}')
    for key in value:
        if key not in KEYS:
            raise _Bad(f"unknown key {key!r}; expected {EXPECTED}")
    if ("prompt" in value) == ("messages" in value):
        raise _Bad(f"expected either prompt or messages, found {'both' if 'prompt' in value else 'neither'}")
    if raw and (extra := [key for key in ("messages", "system") if key in value]):
        raise _Bad(f"{extra[0]} has no place in a --raw job; expected prompt")
    messages = _messages(value["messages"]) if "messages" in value else [_prompt(value["prompt"])]
    system = value.get("system")
    if "system" in value and not isinstance(system, str):
        raise _Bad(f"system: expected a string, found {_show(system)}")
    if "system" in value and messages[0]["role"] == "system":
        raise _Bad("two system prompts: one as system, one in messages")
    for key, setting in (("max_tokens", "max_new_tokens"), ("seed", "seed")):
        if key in value:
            _check_number(key, setting, value[key])
    kept = {"id": value["id"]} if "id" in value else {}
    return Line(number, messages, system, value.get("max_tokens"), value.get("seed"), kept)


def _prompt(text: object) -> dict[str, str]:
    if not isinstance(text, str):
        raise _Bad(f"prompt: expected a string, found {_show(text)}")
    if not text.strip():
        raise _Bad("the prompt is empty")
    return {"role": "user", "content": text}


def _messages(messages: object) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise _Bad(f"messages: expected a list of {{role, content}}, found {_show(messages)}")
    for place, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            found = f"keys {', '.join(message) or 'none'}" if isinstance(message, dict) else _show(message)
            raise _Bad(f"message {place}: expected an object of role and content, found {found}")
        if message["role"] not in ROLES:
            raise _Bad(f"message {place}, role: expected {', '.join(ROLES)}, found {_show(message['role'])}")
        if not isinstance(message["content"], str):
            raise _Bad(f"message {place}, content: expected a string, found {_show(message['content'])}")
    if messages[-1]["role"] != "user":
        raise _Bad(f"the last message: expected the user's, found the {messages[-1]['role']}'s")
    if not messages[-1]["content"].strip():
        raise _Bad("the prompt is empty: the last message has no text")
    return messages


def _check_number(key: str, setting: str, value: object) -> None:
    if type(value) is not int:
        raise _Bad(f"{key}: expected a whole number, found {_show(value)}")
    good: dict[str, Any] = {"max_new_tokens": 1, "temperature": 0.0, "top_p": 1.0, "seed": None}
    try:
        check_sampling(**{**good, setting: value})
    except OptionError:
        expected = "1 or more" if key == "max_tokens" else "a whole number of 64 bits"
        raise _Bad(f"{key}: expected {expected}, found {value}") from None


def _show(value: object) -> str:
    """Write a value as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
