"""Conversations as token ids: chat templates, rendered within a bound on time and memory.

Knows tokenizers, templates and the process that renders them (`generation/template_worker.py`). Knows nothing of models.

A chat template is a program of the checkpoint's makers. jinja2's sandbox keeps it from the system, but not from looping
for ever or from filling the memory, so it runs in a process of its own: 5 s, 512 MB, and a bounded text. The process is
started for the first rendering (about 0.1 s) and kept; after that a rendering takes well under a millisecond.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import psutil
from transformers import PreTrainedTokenizerBase

from mixtral_offload.errors import ConversationError, OffloadError, OptionError, TemplateError
from mixtral_offload.generation.template_worker import RENDER_S

START_S = 60.0  # for the process to start, on a machine however busy
MEMORY_BYTES = 512 << 20  # of that process
CHARACTERS, GROWTH = (
    1_000_000,
    8,
)  # a text may have so many characters, and so many more for each one of the messages
SHOWN = 300  # characters of another library's message
#: what a conversation is asked with to find out how a turn ends
#: a message's reasoning, by the names that are in use (transformers, utils/chat_template_utils.py)
REASONING = ("reasoning_content", "thinking", "reasoning")
QUESTION, CONTENT = "Hi", "mixtral offload content"
OTHER_TOKENIZER = "name another tokenizer (--tokenizer FOLDER_OR_REPO), or mend its chat template"


def encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    system_prompt: str | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Put a conversation as the tokenizer's chat template does.

    Args:
        tokenizer: A transformers tokenizer.
        messages: The conversation, as {"role", "content"}; content is text, or a list of parts such as
            {"type": "text", "text": "..."}. Keys of value None are left out, as in transformers.
        system_prompt: A system message to put first; None or "" for none.
        add_generation_prompt: Whether the assistant's turn comes next.

    Returns:
        The token ids.

    Raises:
        ConversationError: The template refuses this conversation or fails on it, or the tokenizer fails on its text.
        OptionError: No message; one that is none, or whose content is neither text nor a list of parts; or one that JSON
            cannot express.
        TemplateError: There is no template, or it passes a bound on time, memory or text.
    """
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages = [_cleaned(message) for message in (*system, *messages)]
    if not messages:
        raise OptionError("no messages", expected="a conversation of one message or more")
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return _own_way(tokenizer, messages, add_generation_prompt)
    return _tokenize(tokenizer, whole(render(tokenizer, messages, add_generation_prompt)))


def whole(text: str) -> str:
    """With halves of characters joined or replaced, which no tokenizer takes: a shell or a JSON file may hand them over."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _cleaned(message: dict) -> dict:
    """The message as transformers hands it to a template: without the keys of value None, and with its reasoning under
    every name that templates read. A template would print any other object in silence, such as a tuple, as Python does."""
    if not isinstance(message, dict):
        raise OptionError(
            "not a message", expected='a dict like {"role": "user", "content": "..."}', found=repr(message)[:SHOWN]
        )  # fmt: skip
    content = message.get("content")
    is_parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
    if not (content is None or isinstance(content, str) or is_parts):
        raise OptionError(
            "not a message's content", expected='text, or a list of parts like {"type": "text", "text": "..."}',
            found=repr(content)[:SHOWN],
        )  # fmt: skip
    message = {key: _whole_text(value) for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _whole_text(value):
    """The same with whole text. Raises OptionError for what JSON, which takes it to the template, would change."""
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, list):
        return [_whole_text(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _whole_text(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float):
        return value
    raise OptionError(
        "a message that JSON cannot express", expected="text, numbers, lists, and dicts whose keys are text",
        found=repr(value)[:SHOWN],
    )  # fmt: skip


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """The text that the tokenizer's chat template makes of a conversation. Raises TemplateError, see `encode`."""
    reply = _reply(tokenizer, messages, add_generation_prompt)
    if "text" in reply:
        return reply["text"]
    may_be_system = reply["kind"] in ("refused", "broken") and [m["role"] for m in messages[:1]] == ["system"]
    if may_be_system and "text" in _reply(tokenizer, messages[1:], add_generation_prompt):
        raise ConversationError(
            "the chat template takes no system prompt", path=_source(tokenizer), found=reply["error"],
            hint="leave the system prompt away, or write its text into the first message",
        )  # fmt: skip
    if reply["kind"] == "refused":
        raise ConversationError(
            "the chat template refuses this conversation", path=_source(tokenizer), found=reply["error"],
            hint="change the conversation as it asks; templates commonly want turns of user and assistant",
        )  # fmt: skip
    if reply["kind"] == "broken":
        raise ConversationError(
            "the chat template cannot be rendered", path=_source(tokenizer), found=reply["error"], hint=OTHER_TOKENIZER
        )  # fmt: skip
    raise TemplateError(
        "the chat template takes too much to render", path=_source(tokenizer), found=reply["error"],
        expected=f"at most {RENDER_S:g} s and {MEMORY_BYTES >> 20} MiB", hint=OTHER_TOKENIZER,
    )  # fmt: skip


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template, or its default one of several. Raises TemplateError where that is none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        named = template
        template = named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
        if template is None:
            raise TemplateError(
                "several chat templates, and none is the default", path=_source(tokenizer), expected='one named "default"',
                found=", ".join(sorted(map(repr, named)))[:SHOWN] or "none",
                hint="choose one: tokenizer.chat_template = tokenizer.chat_template[NAME]; or keep only one in the tokenizer's files",
            )  # fmt: skip
    if not isinstance(template, str):
        raise TemplateError(
            "the tokenizer has no chat template", path=_source(tokenizer), expected="a jinja template",
            found=type(template).__name__, hint="set tokenizer.chat_template, or continue plain text with --raw",
        )  # fmt: skip
    return template


_turn_ends: WeakKeyDictionary = WeakKeyDictionary()


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an assistant's turn for this tokenizer: its own end token, and the one that its chat template
    puts behind an assistant's words (like <|im_end|>, where the end token is </s>).

    The template's is found by rendering a short conversation: the first token behind the assistant's words, if that is one
    of the tokenizer's added tokens. Where nothing follows the last turn, the token that begins the user's next one counts.
    """
    eos = getattr(tokenizer, "eos_token_id", None)
    found = frozenset() if not isinstance(eos, int) else frozenset((eos,))
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str | dict):
        return found
    kept = _turn_ends.get(tokenizer)
    if kept is None or kept[0] != (template, eos):
        kept = _turn_ends[tokenizer] = (template, eos), _template_ends(tokenizer)
    return found | kept[1]


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: frozenset[int]) -> str:
    """The text of an answer, without the token that ended it. Raises TemplateError where the tokenizer fails on it."""
    ids = list(ids[:-1] if len(ids) and ids[-1] in ends else ids)
    with tokenizer_errors(tokenizer):
        return tokenizer.decode(ids, skip_special_tokens=True)


@contextmanager
def tokenizer_errors(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """What a tokenizer raises inside becomes a ConversationError; the original is its cause."""
    try:
        yield
    except OffloadError:
        raise
    except Exception as error:  # tokenizers raise many kinds
        raise ConversationError(
            "the tokenizer fails", path=_source(tokenizer), found=f"{type(error).__name__}: {str(error)[:SHOWN]}",
            hint="name another tokenizer: --tokenizer FOLDER_OR_REPO",
        ) from error  # fmt: skip


def _template_ends(tokenizer) -> frozenset[int]:
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return frozenset()
    try:
        template_of(tokenizer)
    except TemplateError:  # `encode` says so
        return frozenset()
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": CONTENT}]
    for messages in (turns, [*turns, {"role": "user", "content": QUESTION}]):
        reply = _reply(tokenizer, messages, False)
        behind = (
            reply.get("text", "").rpartition(CONTENT)[2].lstrip() if CONTENT in reply.get("text", "") else ""
        )
        if behind:
            # the longest: <|end|> may begin like <|end|>x
            token = max(
                (text for text in added if text.strip() and behind.startswith(text)), key=len, default=None
            )
            return frozenset() if token is None else frozenset((added[token],))
    return frozenset()


def _reply(tokenizer, messages, add_generation_prompt: bool) -> dict:
    n_characters = len(json.dumps(messages, ensure_ascii=False))
    special = {
        name: [*map(str, value)] if isinstance(value, list) else str(value)
        for name, value in tokenizer.special_tokens_map.items()
    }
    variables = {**special, "messages": list(messages), "add_generation_prompt": add_generation_prompt}
    variables |= {"tools": None, "documents": None}
    request = {"template": template_of(tokenizer), "variables": variables}
    return _ask({**request, "most_characters": CHARACTERS + GROWTH * n_characters})


def _own_way(tokenizer, messages, add_generation_prompt: bool) -> list[int]:
    """Of tokenizers that put conversations in a way of their own: there is no template to render."""
    options = {"add_generation_prompt": add_generation_prompt, "return_dict": True}
    with tokenizer_errors(tokenizer):
        return list(tokenizer.apply_chat_template(messages, **options)["input_ids"])


def _tokenize(tokenizer, text: str) -> list[int]:
    with tokenizer_errors(tokenizer):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _source(tokenizer) -> str | None:
    return getattr(tokenizer, "name_or_path", None) or None


class _Renderer:
    """The process that renders, and what is read from it."""

    def __init__(self):
        self.pid = os.getpid()
        flags = getattr(subprocess, "CREATE_NO_WINDOW", 0) | getattr(
            subprocess, "CREATE_NEW_PROCESS_GROUP", 0
        )
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("template_worker.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True, creationflags=flags,
        )  # fmt: skip
        self._replies: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._read, name="template-replies", daemon=True).start()
        self._send({"path": [path for path in sys.path if path], "memory_bytes": MEMORY_BYTES})
        if "ready" not in (first := self._receive(START_S)):
            raise TemplateError("cannot start the process that renders chat templates", found=first["error"])

    def ask(self, request: dict) -> dict:
        self._send(request)
        return self._receive(RENDER_S)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None and self.pid == os.getpid()

    def close(self) -> None:
        if self.pid != os.getpid():  # a forked child's copy: the process is its parent's
            return
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _send(self, request: dict) -> None:
        with contextlib.suppress(OSError):  # it has died: `_receive` says so
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def _receive(self, most_s: float) -> dict:
        """The next reply. Where the process passes a bound it is killed, and the reply says so."""
        deadline = time.monotonic() + most_s
        while True:
            try:
                reply = self._replies.get(timeout=0.02)
            except queue.Empty:
                pass
            else:
                if reply is not None:
                    return reply
                self.close()
                return {"kind": "memory", "error": "the process that renders it has died"}
            if time.monotonic() > deadline:
                self.close()
                return {"kind": "time", "error": f"it is not done after {most_s:g} s"}
            if self._used_bytes() > MEMORY_BYTES:
                self.close()
                return {"kind": "memory", "error": f"it needs more than {MEMORY_BYTES >> 20} MiB"}

    def _used_bytes(self) -> int:
        try:
            return psutil.Process(self._process.pid).memory_info().rss
        except psutil.Error:
            return 0

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._process.stdout as replies:
            for line in replies:
                self._replies.put(json.loads(line))
        self._replies.put(None)


_renderer: _Renderer | None = None
_lock = threading.Lock()


def _ask(request: dict) -> dict:
    global _renderer
    with _lock:
        try:
            if _renderer is None or not _renderer.is_alive:
                _close()
                _renderer = _Renderer()
            return _renderer.ask(request)
        except OSError as error:
            raise TemplateError(
                "cannot start the process that renders chat templates", path=sys.executable, found=error,
                hint="make room: another process, and about 50 MB of memory",
            ) from error  # fmt: skip
        except BaseException:  # an interrupt: the next reply would be of this request
            _close()
            raise


def _close() -> None:
    global _renderer
    if _renderer is not None:
        renderer, _renderer = _renderer, None
        renderer.close()


def _after_fork() -> None:
    """In a forked child: its parent keeps the process, and may have held the lock."""
    global _renderer, _lock
    _renderer, _lock = None, threading.Lock()


atexit.register(_close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
