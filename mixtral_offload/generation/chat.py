"""A conversation with a model: text in, streamed text out.

Knows transformers' `generate`, messages and the KV cache. Knows nothing of terminals or widgets.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.cache_utils import DynamicLayer

from mixtral_offload.core.counters import CacheStats, Counters
from mixtral_offload.errors import OptionError
from mixtral_offload.generation.templates import encode, tokenizer_errors, turn_ends, whole
from mixtral_offload.models.positions import depend_on_length
from mixtral_offload.runtime.settings import (
    check_ids,
    check_sampling,
    choose,
    forward_errors,
    generator,
    model_ends,
    warn_once,
    with_own_settings,
)

#: why an answer ended: by itself, by `stop`, at the longest answer allowed, or where the context was full
ENDS = ("complete", "stopped", "max_new_tokens", "context")


@dataclass
class TurnStats(Counters):
    """What one answer took.

    Attributes:
        n_prompt: Tokens of the prompt.
        n_tokens: New tokens.
        first_token_s: Seconds from sending to the first token.
        decode_s: Seconds from there to the end.
        cache: What the expert cache did for it.
    """

    n_prompt: int = 0
    n_tokens: int = 0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    cache: CacheStats = field(default_factory=CacheStats)

    @property
    def tokens_per_s(self) -> float:
        """Of the whole answer, prompt included."""
        return self.n_tokens / max(self.first_token_s + self.decode_s, 1e-9)

    def __str__(self) -> str:
        hits, moved = self.cache.hits_as_text, f"{self.cache.bytes_moved / 1e6:.1f} MB moved"
        return f"{self.n_tokens} tokens, {self.tokens_per_s:.1f} tokens/s, {hits}, {moved}"


def context_length(config, options) -> int:
    """Tokens that a model can look back on, and that these `OffloadOptions` leave room for."""
    return min(config.max_position_embeddings, options.context_length)


class ChatSession:
    """Keeps a conversation; each answer is streamed.

    max_new_tokens: per answer. temperature: 0 is greedy. seed: makes sampled answers repeatable; they come from a generator
    of the session's own, as those of `generate_batch` do, so that the same seed gives the same first answer there, and
    PyTorch's global generator is neither read nor changed. All of them, and the system prompt, may be changed at any time:
    an answer under way goes on as it began. What else decides an answer, and what ends one: see `runtime/settings.py`.
    `messages` is the conversation so far, as transformers' chat templates take it. Assigned during an answer, it ends that
    answer, whose turn is not kept; change the list itself only between answers. `last` counts while an answer comes; `ended`
    says why it came to its end: one of ENDS.
    One answer comes at a time. It is under way from its first piece until it was read to its end, its iterator was closed or
    dropped, or `stop` was called. A forked child goes on with the conversation as it was before an answer under way.
    The KV cache of earlier turns is used again, unless the model's tensors or hooks have changed since. What changes none of
    them cannot be seen: after an adapter was switched on or off, or a tensor was changed in place through its `data`, begin a
    new session with these `messages`.
    """

    def __init__(
        self, model, tokenizer, *, system_prompt: str | None = None, max_new_tokens: int = 512,
        temperature: float = 0.0, top_p: float = 0.95, seed: int | None = None,
    ):  # fmt: skip
        check_sampling(max_new_tokens, temperature, top_p, seed)
        self.model, self.tokenizer = model, tokenizer
        self.system_prompt, self.max_new_tokens = system_prompt, max_new_tokens
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self._messages: list[dict[str, str]] = []
        self.last, self.total, self.ended = TurnStats(), TurnStats(), None
        self._current: _Answer | None = None
        # a dropped iterator may be collected, and settled, while its own thread holds it
        self._lock = threading.RLock()
        self._generating = threading.Lock()
        self._sampling: tuple[torch.Generator, torch.Tensor] | None = None  # in use, and its state before
        self._past, self._past_ids, self._past_of = None, [], None
        _sessions.add(self)
        warn_once(model)

    def after_fork(self) -> None:
        """In a forked child, where no answer is generated: as before the answer that was under way.

        Threads of the parent may have held the locks, and that of a generator, which is made anew.
        """
        self._lock, self._generating = threading.RLock(), threading.Lock()
        answer, self._current = self._current, None
        if answer is not None:
            answer.error = OptionError(
                "this answer is generated in the parent process: it does not come in a forked child",
                hint="send the message again",
            )
            answer.ended, (self.last, self.ended) = None, answer.before
            self._past, self._past_ids = None, []  # perhaps half written
        if self._sampling is not None and self._sampling[0] is self._generator:
            self._generator = generator(0)
            self._generator.set_state(self._sampling[1])
        self._sampling = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far. Assigned, it ends an answer under way, whose turn is not kept."""
        return self._messages

    @messages.setter
    def messages(self, messages: list[dict[str, str]]) -> None:
        if not isinstance(messages, list) or not all(_is_message(of) for of in messages):
            raise OptionError(
                "not a conversation", expected='a list like [{"role": "user", "content": "Hello"}]', found=repr(messages)[:80]
            )  # fmt: skip
        with self._lock:
            self._drop()
            self._messages = messages

    def _drop(self) -> None:
        """End the answer under way, and keep nothing of it."""
        if self._current is not None:
            self._current.stopped, self._current = True, None

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
        """End the answer under way after its current token; another may begin at once. Safe from any thread."""
        answer = self._current
        if answer is not None:
            answer.stopped = True

    def clear(self) -> None:
        """Forget the conversation. An answer under way ends, and its turn is forgotten too. Safe from any thread."""
        with self._lock:
            self.messages, self.last, self.ended = [], TurnStats(), None
            self._past, self._past_ids = None, []

    @property
    def context_used(self) -> int:
        """Tokens of the conversation so far."""
        return self.last.n_prompt + self.last.n_tokens

    def send(self, text: str) -> Iterator[str]:
        """Stream the answer to `text` in pieces. What was streamed is kept in `messages`, also after `stop`.

        If generating fails, the conversation is as before and the error is raised here. Raises OptionError, with the first
        piece, while another answer is under way; when the conversation has outgrown the model's context; and for settings
        that cannot be sampled with.
        """
        question = _said_by_user(text)
        return self._answer(lambda: [*self.messages, question])

    def regenerate(self) -> Iterator[str]:
        """Stream another answer to the last message, in place of the last one. Raises as `send`."""
        return self._answer(lambda: self.messages[: self.last_question + 1])

    def edit(self, text: str) -> Iterator[str]:
        """Say `text` in place of the last message, and stream the answer. Raises as `send`."""
        question = _said_by_user(text)
        return self._answer(lambda: [*self.messages[: self.last_question], question])

    @property
    def last_question(self) -> int:
        """The number of the last message that the user sent; raises OptionError before there is one."""
        for number in reversed(range(len(self.messages))):
            if self.messages[number]["role"] == "user":
                return number
        raise OptionError("there is no message yet", hint="send one first")

    def _answer(self, conversation: Callable[[], list[dict[str, str]]]) -> Iterator[str]:
        """conversation: makes the messages up to the question, when the answer begins."""
        answer = _Answer()
        try:
            self._begin(answer, conversation)
            ids = self._prompt(answer.messages)
            answer.config = self._config(len(ids))
            streamer = _Streamer(self.tokenizer, self.ends)
            answer.worker = _Worker(target=self._generate, args=(ids, streamer, answer), name="generate")
            with self._lock:
                if self._current is answer:
                    self.last = answer.stats = TurnStats(n_prompt=len(ids))
                    self.ended = None
                    answer.worker.start()
            while self._current is answer and (piece := next(streamer, None)) is not None:
                with self._lock:
                    if self._current is not answer:
                        break
                    answer.pieces.append(piece)
                yield piece
        finally:
            self._settle(answer)  # also when the reader went away: leave no generation running
        if answer.error is not None:
            raise answer.error

    def _begin(self, answer: _Answer, conversation: Callable[[], list[dict[str, str]]]) -> None:
        """Make this the answer under way; one that was stopped and not read to its end is settled first."""
        while True:
            with self._lock:
                other = self._current
                if other is None:
                    sampling = self.max_new_tokens, self.temperature, self.top_p
                    check_sampling(*sampling, self.seed)
                    answer.max_new_tokens, answer.temperature, answer.top_p = sampling
                    answer.generator, answer.before = self._generator, (self.last, self.ended)
                    answer.messages = conversation()
                    self._current = answer
                    return
            if not other.stopped:
                raise OptionError("an answer is still coming", hint="read it to its end, or call stop()")
            self._settle(other)

    def _settle(self, answer: _Answer) -> None:
        """End an answer, and keep what was streamed of it, unless it has failed or was dropped. Once for each."""
        answer.stopped = True
        if answer.worker is not None and self._must_not_wait:
            answer.is_left = True
            if answer.worker.is_alive():
                return
        try:
            if answer.worker is not None:
                _join(answer.worker)
        finally:
            with self._lock:
                self._keep(answer)

    @property
    def _must_not_wait(self) -> bool:
        """Whether this thread holds what a worker needs to end. Python collects a dropped iterator in any thread, anywhere."""
        is_worker, passes = isinstance(threading.current_thread(), _Worker), self.model.offload.passes
        return is_worker or passes.current is not None or self._lock._is_owned()

    def _keep(self, answer: _Answer) -> None:
        if answer.ended is not None and not answer.is_counted:
            answer.is_counted, self.total = True, self.total + answer.stats
        if self._current is not answer:
            return
        if answer.ended is None:
            self.last, self.ended = answer.before
        else:
            reply = {"role": "assistant", "content": "".join(answer.pieces).strip()}
            self._messages, self.ended = [*answer.messages, reply], answer.ended
        self._current = None

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

    def _generate(self, ids: list[int], streamer: _Streamer, answer: _Answer) -> None:
        """On the worker thread, so that Ctrl-C never lands inside the model."""
        with self._generating:  # a dropped answer may not have ended yet
            if self._current is answer:
                self._sampling = answer.generator, answer.generator.get_state()
                self._generate_alone(ids, streamer, answer)
                self._sampling = None
            else:
                streamer.text_queue.put(streamer.stop_signal)
        if answer.is_left:
            with self._lock:
                self._keep(answer)

    def _generate_alone(self, ids: list[int], streamer: _Streamer, answer: _Answer) -> None:
        count, n_prompt = self._counter(answer.stats, len(ids)), len(ids)
        sampled, temperature, top_p = [answer.generator], answer.temperature, answer.top_p

        def chosen(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            """All logits but the chosen token's at -inf, so that `generate` takes it."""
            number = ids.shape[1] - n_prompt + 1
            token = choose(logits, sampled, temperature, top_p, lambda row: f"new token {number}")
            token = token.to(logits.device)[:, None]
            return torch.full_like(logits, -torch.inf).scatter_(1, token, 0.0)

        def stopped(ids, scores, **kwargs) -> torch.Tensor:
            count(ids.shape[1])
            return torch.full((ids.shape[0],), answer.stopped, device=ids.device)

        try:
            with self._lock:
                past = self._reuse(ids)
                self._past, self._past_ids = None, []  # it changes from here on: nobody else may take it
            inputs = torch.tensor([ids], device=self.model.device)
            with forward_errors(self.model):
                output = with_own_settings(self.model).generate(
                    inputs, attention_mask=torch.ones_like(inputs), past_key_values=past, streamer=streamer,
                    generation_config=answer.config, logits_processor=LogitsProcessorList([chosen]),
                    stopping_criteria=StoppingCriteriaList([stopped]),
                )  # fmt: skip
            said = output[0].tolist()
            with self._lock:
                if self._current is answer and past is not None:
                    self._past, self._past_ids = past, said[: past.get_seq_length()]
                    self._past_of = _state(self.model)
            answer.ended = _why(said, n_prompt, answer)
        except BaseException as error:
            answer.error = error
            streamer.text_queue.put(streamer.stop_signal)  # not `end`, which decodes first and may fail again

    def _counter(self, last: TurnStats, n_prompt: int):
        """A function that brings `last` up to date: called with the length so far, after each token."""
        passes, begin = self.model.offload.passes, time.perf_counter()
        before = passes.counted  # this thread's share: others may use the model at the same time

        def count(length: int) -> None:
            seconds = time.perf_counter() - begin
            last.n_tokens = length - n_prompt
            last.first_token_s = last.first_token_s or seconds
            last.decode_s = seconds - last.first_token_s
            last.cache = passes.counted - before

        return count

    def _reuse(self, ids: list[int]) -> DynamicCache | None:
        """The last turn's KV cache, cut back to what this prompt shares with it. None for a model that makes its own kind."""
        if not self.model._supports_default_dynamic_cache():
            return None
        shared = 0
        limit = min(len(ids) - 1, len(self._past_ids))  # at least one token must be computed
        while shared < limit and ids[shared] == self._past_ids[shared]:
            shared += 1
        # the model was trained or changed since the last turn, or the kept keys are of another length
        if self._past_of != _state(self.model) or depend_on_length(self.model):
            shared = 0
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


class _Worker(threading.Thread):
    """Generates one answer."""


@dataclass(eq=False)
class _Answer:
    """One answer: the session's settings and conversation as it began, and what has come of it.

    Attributes:
        before: The session's `last` and `ended`, for an answer that fails.
        pieces: What was streamed.
        stopped: It ends after its current token.
        ended: One of ENDS; None until it was generated.
        is_counted: It is in the session's `total`.
        is_left: Its reader has gone, and its own worker settles it.
    """

    messages: list[dict[str, str]] = field(default_factory=list)
    before: tuple[TurnStats, str | None] = field(default_factory=lambda: (TurnStats(), None))
    max_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator | None = None
    config: GenerationConfig | None = None
    worker: _Worker | None = None
    stats: TurnStats = field(default_factory=TurnStats)
    pieces: list[str] = field(default_factory=list)
    stopped: bool = False
    ended: str | None = None
    error: BaseException | None = None
    is_counted: bool = False
    is_left: bool = False


_sessions: weakref.WeakSet[ChatSession] = weakref.WeakSet()


def _after_fork() -> None:
    for session in _sessions:
        session.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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


def _state(model) -> tuple:
    """Differs after a change of the model: torch counts changes of each tensor, except those through its `data`."""
    tensors = (*model.parameters(), *model.buffers())
    # each registration has a number of its own
    hooks = tuple(key for of in model.modules() for key in (*of._forward_hooks, *of._forward_pre_hooks))
    counts = tuple((of.data_ptr(), _changes(of), of.dtype) for of in tensors)
    return id(model), hooks, _optimizer_steps[0], counts


def _changes(tensor: torch.Tensor) -> object:
    """How often it was changed in place; what never equals itself where torch does not count (`inference_mode`)."""
    return object() if tensor.is_inference() else tensor._version


_optimizer_steps = [0]  # of all optimizers: fused ones change tensors without counting


def _count_step(*_) -> None:
    _optimizer_steps[0] += 1


register_optimizer_step_post_hook(_count_step)


def _why(ids: list[int], n_prompt: int, answer: _Answer) -> str:
    """Why it ended; ids: prompt and answer."""
    limit = answer.config.max_new_tokens
    if ids[-1] in (answer.config.eos_token_id or ()):
        return "complete"
    if len(ids) < n_prompt + limit and answer.stopped:
        return "stopped"
    return "max_new_tokens" if limit == answer.max_new_tokens else "context"


def _can_be_cut(past: DynamicCache) -> bool:
    """Whether every layer keeps all of its keys and values: a sliding window or a recurrent state does not."""
    return all(type(layer) is DynamicLayer for layer in past.layers)


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def _said_by_user(text: str) -> dict[str, str]:
    if not isinstance(text, str):
        raise OptionError("not a message", expected="text", found=repr(text)[:80])
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
