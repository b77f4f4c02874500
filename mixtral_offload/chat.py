"""A conversation with a model: text in, streamed text out.

Knows transformers' `generate`, messages and the KV cache. Knows nothing of terminals or widgets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.cache_utils import DynamicLayer

from .errors import OptionError
from .settings import (
    check_ids,
    check_sampling,
    choose,
    forward_errors,
    generator,
    model_ends,
    warn_once,
    with_own_settings,
)
from .templates import encode, tokenizer_errors, turn_ends, whole

#: why an answer ended: by itself, by `stop`, at the longest answer allowed, or where the context was full
ENDS = ("complete", "stopped", "max_new_tokens", "context")


@dataclass
class TurnStats:
    """What one answer took. first_token_s: from sending to the first token; decode_s: from there to the end."""

    n_prompt: int = 0
    n_tokens: int = 0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    hits: int = 0
    misses: int = 0
    bytes_moved: int = 0

    def __add__(self, other: TurnStats) -> TurnStats:
        return TurnStats(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    @property
    def tokens_per_s(self) -> float:
        """Of the whole answer, prompt included."""
        return self.n_tokens / max(self.first_token_s + self.decode_s, 1e-9)

    def __str__(self) -> str:
        uses = self.hits + self.misses
        hit_rate = f"{self.hits / uses:.0%} of expert uses were hits" if uses else "no experts used"
        return f"{self.n_tokens} tokens, {self.tokens_per_s:.1f} tokens/s, {hit_rate}, {self.bytes_moved / 1e6:.1f} MB moved"


def context_length(config, options) -> int:
    """Tokens that a model can look back on, and that these `OffloadOptions` leave room for."""
    return min(config.max_position_embeddings, options.context_length)


class ChatSession:
    """Keeps a conversation; each answer is streamed.

    max_new_tokens: per answer. temperature: 0 is greedy. seed: makes sampled answers repeatable; they come from a generator
    of the session's own, as those of `generate_batch` do, so that the same seed gives the same first answer there, and
    PyTorch's global generator is neither read nor changed. All of them, and the system prompt, may be changed between
    answers. What else decides an answer, and what ends one: see `settings.py`.
    `messages` is the conversation so far, as transformers' chat templates take it. `last` counts while an answer comes;
    `ended` says why it came to its end: one of ENDS.
    """

    def __init__(
        self, model, tokenizer, *, system_prompt: str | None = None, max_new_tokens: int = 512,
        temperature: float = 0.0, top_p: float = 0.95, seed: int | None = None,
    ):  # fmt: skip
        check_sampling(max_new_tokens, temperature, top_p, seed)
        self.model, self.tokenizer = model, tokenizer
        self.system_prompt, self.max_new_tokens = system_prompt, max_new_tokens
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self.messages: list[dict[str, str]] = []
        self.last, self.total, self.ended = TurnStats(), TurnStats(), None
        self._stop, self._generating = threading.Event(), threading.Lock()
        self._past, self._past_ids = None, []
        warn_once(model)

    @property
    def seed(self) -> int | None:
        return self._seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        """Sampling begins anew from here."""
        self._seed = seed
        self._generator = generator(seed)

    @property
    def context_length(self) -> int:
        """Tokens that the model can look back on, and that its plan has left room for."""
        return context_length(self.model.config, self.model.offload.options)

    def stop(self) -> None:
        """End the answer under way after its current token. Safe from any thread."""
        self._stop.set()

    def clear(self) -> None:
        """Forget the conversation."""
        self.messages, self.last, self.ended = [], TurnStats(), None
        self._past, self._past_ids = None, []

    @property
    def context_used(self) -> int:
        """Tokens of the conversation so far."""
        return self.last.n_prompt + self.last.n_tokens

    def send(self, text: str) -> Iterator[str]:
        """Stream the answer to `text` in pieces. What was streamed is kept in `messages`, also after `stop`.

        If generating fails, the conversation is as before and the error is raised here. Raises OptionError when the
        conversation has outgrown the model's context, or for settings that cannot be sampled with.
        """
        return self._answer([*self.messages, _said_by_user(text)])

    def regenerate(self) -> Iterator[str]:
        """Stream another answer to the last message, in place of the last one. Raises as `send`."""
        return self._answer(self.messages[: self.last_question + 1])

    def edit(self, text: str) -> Iterator[str]:
        """Say `text` in place of the last message, and stream the answer. Raises as `send`."""
        return self._answer([*self.messages[: self.last_question], _said_by_user(text)])

    @property
    def last_question(self) -> int:
        """The number of the last message that the user sent; raises OptionError before there is one."""
        for number in reversed(range(len(self.messages))):
            if self.messages[number]["role"] == "user":
                return number
        raise OptionError("there is no message yet", hint="send one first")

    def _answer(self, messages: list[dict[str, str]]) -> Iterator[str]:
        check_sampling(self.max_new_tokens, self.temperature, self.top_p, self.seed)
        ids = self._prompt(messages)
        self._stop = stop = threading.Event()  # one for each answer: an old one stays stopped
        before, self.last, self.ended = self.last, TurnStats(n_prompt=len(ids)), None
        streamer = _Streamer(self.tokenizer, self.ends)
        result: dict = {}
        worker = threading.Thread(target=self._generate, args=(ids, streamer, result, stop), name="generate")
        pieces = []
        try:
            worker.start()
            for piece in streamer:
                pieces.append(piece)
                yield piece
        finally:
            stop.set()  # also when the reader went away: leave no generation running
            _join(worker)
            if "ids" in result:
                self.messages = [*messages, {"role": "assistant", "content": "".join(pieces).strip()}]
                self.total, self.ended = self.total + self.last, result["ended"]
            else:
                self.last = before
        if "error" in result:
            raise result["error"]

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return model_ends(self.model) | turn_ends(self.tokenizer)

    def _prompt(self, messages) -> list[int]:
        ids = self._encode(messages)
        if not ids:
            raise OptionError("the prompt is empty: it has no tokens", hint="send a message with text")
        if len(ids) >= self.context_length:
            raise OptionError(
                "the conversation is longer than the model's context", expected=f"less than {self.context_length} tokens",
                found=f"{len(ids)} tokens", hint="clear the conversation (/clear) or send a shorter message",
            )  # fmt: skip
        check_ids(self.model, ids)
        return ids

    def _encode(self, messages, add_generation_prompt: bool = True) -> list[int]:
        return encode(self.tokenizer, messages, self.system_prompt, add_generation_prompt)

    def _generate(self, ids: list[int], streamer, result: dict, stop: threading.Event) -> None:
        """On the worker thread, so that Ctrl-C never lands inside the model."""
        with self._generating:
            self._generate_alone(ids, streamer, result, stop)

    def _generate_alone(self, ids: list[int], streamer, result: dict, stop: threading.Event) -> None:
        count, n_prompt = self._counter(len(ids)), len(ids)
        sampled, temperature, top_p = [self._generator], self.temperature, self.top_p

        def chosen(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            """All logits but the chosen token's at -inf, so that `generate` takes it."""
            number = ids.shape[1] - n_prompt + 1
            token = choose(logits, sampled, temperature, top_p, lambda row: f"new token {number}")
            token = token.to(logits.device)[:, None]
            return torch.full_like(logits, -torch.inf).scatter_(1, token, 0.0)

        def stopped(ids, scores, **kwargs) -> torch.Tensor:
            count(ids.shape[1])
            return torch.full((ids.shape[0],), stop.is_set(), device=ids.device)

        try:
            past, config = self._reuse(ids), self._config(len(ids))
            inputs = torch.tensor([ids], device=self.model.device)
            with forward_errors(self.model):
                output = with_own_settings(self.model).generate(
                    inputs, attention_mask=torch.ones_like(inputs), past_key_values=past, streamer=streamer,
                    generation_config=config, logits_processor=LogitsProcessorList([chosen]),
                    stopping_criteria=StoppingCriteriaList([stopped]),
                )  # fmt: skip
            result["ids"] = output[0].tolist()
            result["ended"] = self._why(result["ids"], len(ids), config, stop)
            self._past, self._past_ids = past, result["ids"][: past.get_seq_length()]
        except BaseException as error:
            result["error"] = error
            self._past, self._past_ids = None, []
            streamer.text_queue.put(streamer.stop_signal)  # not `end`, which decodes first and may fail again

    def _counter(self, n_prompt: int):
        """A function that brings `last` up to date: called with the length so far, after each token."""
        last, passes, begin = self.last, self.model.offload.passes, time.perf_counter()
        before = passes.counted  # this thread's share: others may use the model at the same time

        def count(length: int) -> None:
            seconds = time.perf_counter() - begin
            last.n_tokens = length - n_prompt
            last.first_token_s = last.first_token_s or seconds
            last.decode_s = seconds - last.first_token_s
            last.hits, last.misses, last.bytes_moved = (a - b for a, b in zip(passes.counted, before))

        return count

    def _why(self, ids: list[int], n_prompt: int, config: GenerationConfig, stop: threading.Event) -> str:
        if ids[-1] in (config.eos_token_id or ()):
            return "complete"
        if len(ids) < n_prompt + config.max_new_tokens and stop.is_set():
            return "stopped"
        return "max_new_tokens" if config.max_new_tokens == self.max_new_tokens else "context"

    def _reuse(self, ids: list[int]) -> DynamicCache:
        """The last turn's KV cache, cut back to what this prompt shares with it."""
        shared = 0
        limit = min(len(ids) - 1, len(self._past_ids))  # at least one token must be computed
        while shared < limit and ids[shared] == self._past_ids[shared]:
            shared += 1
        if self._past is None or shared == 0 or not _can_be_cut(self._past):
            return DynamicCache(config=self.model.config)
        if surplus := self._past.get_seq_length() - shared:
            self._past.crop(-surplus)
        return self._past

    def _config(self, n_prompt: int) -> GenerationConfig:
        """What `generate` has to know: the length, and what ends an answer. Tokens are chosen by `settings.choose`."""
        room = min(self.max_new_tokens, self.context_length - n_prompt)
        ends = sorted(self.ends)
        return GenerationConfig(
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )


class _Streamer(TextIteratorStreamer):
    """The answer's text, without the token that ends it, also where the tokenizer does not call that one special."""

    def __init__(self, tokenizer, ends: frozenset[int]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ends, self._tokenizer = ends, tokenizer

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt and value.item() in self._ends:
            return
        with tokenizer_errors(self._tokenizer):
            super().put(value)

    def end(self) -> None:
        with tokenizer_errors(self._tokenizer):
            super().end()


def _can_be_cut(past: DynamicCache) -> bool:
    """Whether every layer keeps all of its keys and values: a sliding window or a recurrent state does not."""
    return all(type(layer) is DynamicLayer for layer in past.layers)


def _said_by_user(text: str) -> dict[str, str]:
    return {"role": "user", "content": whole(text)}


def _join(thread: threading.Thread) -> None:
    """Wait for its end, whatever interrupts: whoever left it running would exit while it is inside the model."""
    interrupt = None
    while thread.is_alive():
        try:
            thread.join()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
