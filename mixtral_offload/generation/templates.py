"""Conversations as token ids: chat templates, rendered within bounds on time and memory. Does not know
models.

A template is foreign code, which jinja2's sandbox does not keep from endless loops: `template_worker.py` runs
it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from mixtral_offload.errors import ConversationError, OffloadError, OptionError, TemplateError
from mixtral_offload.generation.template_process import MEMORY_BYTES, Reply, ask
from mixtral_offload.generation.template_worker import RENDER_S

#: a message as transformers takes it: "role", "content" (text, or a list of parts), and what templates know
#: besides
Message = dict[str, Any]
#: the longest text of a template: CHARACTERS, and GROWTH more for each character of the messages
CHARACTERS, GROWTH = 1_000_000, 8
SHOWN = 300  # characters of another library's message
#: names of a message's reasoning (transformers, utils/chat_template_utils.py)
REASONING = ("reasoning_content", "thinking", "reasoning")
#: a short conversation, rendered to find out how a turn ends
QUESTION, CONTENT = "Hi", "mixtral offload content"
OTHER_TOKENIZER = "name another tokenizer (--tokenizer FOLDER_OR_REPO), or fix its chat template"


def encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    system_prompt: str | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Encode a conversation with the tokenizer's chat template.

    Args:
        tokenizer: A transformers tokenizer.
        messages: The conversation, as {"role", "content"}; content is text, or a list of parts such as
            {"type": "text", "text": "..."}. As in transformers, keys of value None are left out.
        system_prompt: A system message to put first; None or "" for none.
        add_generation_prompt: Whether the assistant's turn comes next.

    Returns:
        The token ids.

    Raises:
        ConversationError: The template refuses this conversation or fails on it, or the tokenizer fails on
            its text.
        OptionError: There is no message, or one is invalid or cannot be expressed in JSON.
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
    """Join or replace surrogates, which no tokenizer accepts; they come from shells and JSON files."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _cleaned(message: Message) -> Message:
    """Check a message, drop keys of value None, and give its reasoning every name that templates read.

    Templates print objects of any type, as Python does, so only text and lists of parts are accepted.
    """
    if not isinstance(message, dict):
        expected = 'a dict like {"role": "user", "content": "..."}'
        raise OptionError("not a message", expected=expected, found=repr(message)[:SHOWN])
    content = message.get("content")
    is_parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
    if not (content is None or isinstance(content, str) or is_parts):
        expected = 'text, or a list of parts like {"type": "text", "text": "..."}'
        raise OptionError("not a message's content", expected=expected, found=repr(content)[:SHOWN])
    message = {key: _whole_text(value) for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _whole_text(value: object) -> object:
    """Apply `whole` to all text; raise OptionError for values that JSON would change."""
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, list):
        return [_whole_text(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _whole_text(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float):
        return value
    raise OptionError(
        "a message that JSON cannot express",
        expected="text, numbers, lists, and dicts whose keys are text",
        found=repr(value)[:SHOWN],
    )


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = True
) -> str:
    """Render a conversation with the tokenizer's chat template; raises TemplateError, see `encode`."""
    reply = _reply(tokenizer, messages, add_generation_prompt)
    if "text" in reply:
        return reply["text"]
    source, found = _source(tokenizer), reply["error"]
    has_system = bool(messages) and messages[0].get("role") == "system"
    may_be_system = has_system and reply["kind"] in ("refused", "broken")
    if may_be_system and "text" in _reply(tokenizer, messages[1:], add_generation_prompt):
        what = "the chat template takes no system prompt"
        hint = "leave out the system prompt, or put its text into the first message"
        raise ConversationError(what, path=source, found=found, hint=hint)
    if reply["kind"] == "refused":
        what = "the chat template refuses this conversation"
        hint = "change the conversation accordingly; most templates expect turns of user and assistant"
        raise ConversationError(what, path=source, found=found, hint=hint)
    if reply["kind"] == "broken":
        what = "the chat template cannot be rendered"
        raise ConversationError(what, path=source, found=found, hint=OTHER_TOKENIZER)
    raise TemplateError(
        "the chat template takes too much to render",
        path=source,
        found=found,
        expected=f"at most {RENDER_S:g} s and {MEMORY_BYTES >> 20} MiB",
        hint=OTHER_TOKENIZER,
    )


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's template, of several the default one; raises TemplateError without one."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        named = template
        template = named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
        if template is None:
            raise TemplateError(
                "several chat templates, and none is the default",
                path=_source(tokenizer),
                expected='one named "default"',
                found=", ".join(sorted(map(repr, named)))[:SHOWN] or "none",
                hint="choose one: tokenizer.chat_template = tokenizer.chat_template[NAME]; "
                "or keep only one in the tokenizer's files",
            )
    if not isinstance(template, str):
        raise TemplateError(
            "the tokenizer has no chat template",
            path=_source(tokenizer),
            expected="a jinja template",
            found=type(template).__name__,
            hint="set tokenizer.chat_template, or continue plain text with --raw",
        )
    return template


#: tokenizer -> (its template and end token, the tokens that end a turn)
_turn_ends: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, frozenset[int]]] = WeakKeyDictionary()


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Find the tokens that end an assistant's turn: the tokenizer's end token, and its chat template's.

    The template's, such as <|im_end|> where the end token is </s>, is found by rendering a short
    conversation: it is the first token after the assistant's text, if that is one of the tokenizer's added
    tokens. Where nothing follows the last turn, the token that begins the user's next turn counts.
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
    """Decode an answer without the token that ended it; raises ConversationError if that fails."""
    ids = list(ids[:-1] if len(ids) and ids[-1] in ends else ids)
    with tokenizer_errors(tokenizer):
        return str(tokenizer.decode(ids, skip_special_tokens=True))


@contextmanager
def tokenizer_errors(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Turn a tokenizer's exceptions into ConversationError, with the original as cause."""
    try:
        yield
    except OffloadError:
        raise
    except Exception as error:  # tokenizers raise many kinds
        raise ConversationError(
            "the tokenizer fails",
            path=_source(tokenizer),
            found=f"{type(error).__name__}: {str(error)[:SHOWN]}",
            hint="name another tokenizer: --tokenizer FOLDER_OR_REPO",
        ) from error


def _template_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The template's part of `turn_ends`."""
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return frozenset()
    try:
        template_of(tokenizer)
    except TemplateError:  # `encode` reports it
        return frozenset()
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": CONTENT}]
    for messages in (turns, [*turns, {"role": "user", "content": QUESTION}]):
        _, found, behind = _reply(tokenizer, messages, False).get("text", "").rpartition(CONTENT)
        if found and (behind := behind.lstrip()):
            fitting = (text for text in added if text.strip() and behind.startswith(text))
            token = max(fitting, key=len, default=None)  # the longest: <|end|> may begin <|end|>x
            return frozenset() if token is None else frozenset((added[token],))
    return frozenset()


def _reply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool
) -> Reply:
    """Have the template rendered with the variables that transformers gives it."""
    n_characters = len(json.dumps(messages, ensure_ascii=False))
    special = {
        name: [*map(str, value)] if isinstance(value, list) else str(value)
        for name, value in tokenizer.special_tokens_map.items()
    }
    conversation = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
    variables = {**special, **conversation, "tools": None, "documents": None}
    most = CHARACTERS + GROWTH * n_characters
    return ask({"template": template_of(tokenizer), "variables": variables, "most_characters": most})


def _own_way(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool
) -> list[int]:
    """Encode with a tokenizer that has code of its own for conversations, and no template to render."""
    with tokenizer_errors(tokenizer):
        encoded: Any = tokenizer.apply_chat_template(  # a dict, with return_dict
            messages, add_generation_prompt=add_generation_prompt, return_dict=True
        )
        return list(encoded["input_ids"])


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    with tokenizer_errors(tokenizer):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _source(tokenizer: PreTrainedTokenizerBase) -> str | None:
    return getattr(tokenizer, "name_or_path", None) or None
