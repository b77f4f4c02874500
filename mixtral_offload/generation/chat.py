"""A conversation with a model: text in, streamed text out.

Does not know terminals or widgets.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from mixtral_offload.core.counters import CacheStats, Counters
from mixtral_offload.core.options import OffloadOptions
from mixtral_offload.errors import OptionError
from mixtral_offload.generation.templates import Message, encode, tokenizer_errors, turn_ends, whole
from mixtral_offload.generation.turn_cache import TurnCache
from mixtral_offload.runtime.offload import OffloadedModel
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

#: why an answer ended: with an end token, by `stop`, at `max_new_tokens`, or at the end of the context
ENDS = ("complete", "stopped", "max_new_tokens", "context")


@dataclass
class TurnStats(Counters):
    """Counters of one answer.

    Attributes:
        n_prompt: Tokens of the prompt.
        n_tokens: New tokens.
        first_token_s: Seconds from sending to the first token.
        decode_s: Seconds from the first token to the end.
        cache: Counters of the expert cache.
    """

    n_prompt: int = 0
    n_tokens: int = 0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    cache: CacheStats = field(default_factory=CacheStats)

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second of the whole answer, prompt included."""
        return self.n_tokens / max(self.first_token_s + self.decode_s, 1e-9)

    def __str__(self) -> str:
        hits, moved = self.cache.hits_as_text, f"{self.cache.bytes_moved / 1e6:.1f} MB moved"
        return f"{self.n_tokens} tokens, {self.tokens_per_s:.1f} tokens/s, {hits}, {moved}"


def context_length(config: PreTrainedConfig, options: OffloadOptions) -> int:
    """Compute the longest context: as many tokens as both the model and the plan's KV cache can hold."""
    return min(config.max_position_embeddings, options.context_length)


class ChatSession:
    """Keeps a conversation with a model, and streams each answer.

    One answer comes at a time. It is under way from its first piece until it was read to its end, its
    iterator was closed or dropped, or `stop` was called. Settings may be changed at any time: an answer under
    way keeps those it began with. A forked child continues with the conversation before an answer under way.

    The KV cache of earlier turns is reused unless the model's tensors or hooks have changed. Switching an
    adapter on or off, or changing a tensor through its `data`, is not noticed: begin a new session with the
    same messages then. `runtime/settings.py` has the rules for sampling and for end tokens.

    Args:
        model: From `from_pretrained`.
        tokenizer: From `load_tokenizer`, or another one of transformers.
        system_prompt: Put before every conversation; None for none.
        max_new_tokens: The longest answer.
        temperature: 0 is greedy.
        top_p: Sample among the likeliest tokens that have this probability together.
        seed: Makes sampled answers repeatable, from a generator of this session: PyTorch's global generator
            is not used, and the first answer equals that of `generate_batch` with this seed.

    Attributes:
        messages: The conversation so far, as chat templates take it. Assigning it ends an answer under way,
            whose turn is not kept; change the list in place only between answers.
        last: Counters of the last answer; they advance while it comes.
        total: Counters of all answers.
        ended: Why the last answer ended: one of ENDS.

    Raises:
        OptionError: A setting cannot be sampled with.
    """

    def __init__(
        self,
        model: OffloadedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_prompt: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        seed: int | None = None,
    ) -> None:
        check_sampling(max_new_tokens, temperature, top_p, seed)
        self.model, self.tokenizer = model, tokenizer
        self.system_prompt, self.max_new_tokens = system_prompt, max_new_tokens
        self.temperature, self.top_p = temperature, top_p
        self._seed, self._generator = seed, generator(seed)
        self._messages: list[Message] = []
        self.last, self.total = TurnStats(), TurnStats()
        self.ended: str | None = None
        self._current: _Answer | None = None
        # reentrant: a dropped iterator may be collected, and settled, while its own thread holds the lock
        self.lock = threading.RLock()
        self._generating = threading.Lock()
        self._sampling: tuple[torch.Generator, torch.Tensor] | None = None  # in use, and its state before
        self.turn_cache = TurnCache()
        _sessions.add(self)
        warn_once(model)

    def after_fork(self) -> None:
        """Reset a forked child to the conversation before the answer under way, which the parent generates.

        Threads of the parent may have held the locks, the generator's own included: they are replaced.
        """
        self.lock, self._generating = threading.RLock(), threading.Lock()
        answer, self._current = self._current, None
        if answer is not None:
            answer.error = OptionError(
                "this answer is generated in the parent process: it does not come in a forked child",
                hint="send the message again",
            )
            answer.ended, (self.last, self.ended) = None, answer.before
            self.turn_cache.clear()  # it may be half written
        if self._sampling is not None and self._sampling[0] is self._generator:
            self._generator = generator(0)
            self._generator.set_state(self._sampling[1])
        self._sampling = None

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, see the class."""
        return self._messages

    @messages.setter
    def messages(self, messages: list[Message]) -> None:
        if not isinstance(messages, list) or not all(_is_message(of) for of in messages):
            expected = 'a list like [{"role": "user", "content": "Hello"}]'
            raise OptionError("not a conversation", expected=expected, found=repr(messages)[:80])
        with self.lock:
            self._drop()
            self._messages = messages

    def _drop(self) -> None:
        """End the answer under way without keeping its turn."""
        if self._current is not None:
            self._current.stopped, self._current = True, None

    @property
    def seed(self) -> int | None:
        """Seed of sampled answers; assigning it restarts the generator."""
        return self._seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        self._seed, self._generator = seed, generator(seed)

    @property
    def context_length(self) -> int:
        """Tokens of the longest conversation, see `context_length`."""
        return context_length(self.model.config, self.model.offload.options)

    def stop(self) -> None:
        """End the answer under way after its current token; thread-safe. Another may begin at once."""
        answer = self._current
        if answer is not None:
            answer.stopped = True

    def clear(self) -> None:
        """Drop the conversation, with the turn of an answer under way, which ends; thread-safe."""
        with self.lock:
            self.messages, self.last, self.ended = [], TurnStats(), None
            self.turn_cache.clear()

    @property
    def context_used(self) -> int:
        """Tokens of the conversation so far, the last answer included."""
        return self.last.n_prompt + self.last.n_tokens

    def send(self, text: str) -> Iterator[str]:
        """Stream the answer to `text` in pieces, and keep what was streamed in `messages`, also after `stop`.

        Errors leave the conversation as it was before.

        Raises:
            OptionError: `text` is no string; or, with the first piece: another answer is under way, the
                conversation is longer than the context, or a setting cannot be sampled with.
            ConversationError: The chat template or the tokenizer refuses the conversation.
            GenerationError: The model failed.
        """
        question = _said_by_user(text)
        return self._answer(lambda: [*self.messages, question])

    def regenerate(self) -> Iterator[str]:
        """Replace the last answer: stream another one to the last message. Raises the errors of `send`."""
        return self._answer(lambda: self.messages[: self.last_question + 1])

    def edit(self, text: str) -> Iterator[str]:
        """Replace the last message by `text`, and stream the answer. Raises the errors of `send`."""
        question = _said_by_user(text)
        return self._answer(lambda: [*self.messages[: self.last_question], question])

    @property
    def last_question(self) -> int:
        """Index of the user's last message; raises OptionError before there is one."""
        for number in reversed(range(len(self.messages))):
            if self.messages[number]["role"] == "user":
                return number
        raise OptionError("there is no message yet", hint="send one first")

    def _answer(self, conversation: Callable[[], list[Message]]) -> Iterator[str]:
        """Stream an answer; `conversation` makes the messages up to the question, when the answer begins."""
        answer = _Answer()
        try:
            self._begin(answer, conversation)
            ids = self._prompt(answer.messages)
            answer.config = self._config(len(ids))
            streamer = _Streamer(self.tokenizer, self.ends)
            answer.worker = _Worker(target=self._generate, args=(ids, streamer, answer), name="generate")
            with self.lock:
                if self._current is answer:
                    self.last = answer.stats = TurnStats(n_prompt=len(ids))
                    self.ended = None
                    answer.worker.start()
            while self._current is answer and (piece := next(streamer, None)) is not None:
                with self.lock:
                    if self._current is not answer:
                        break
                    answer.pieces.append(piece)
                yield piece
        finally:
            self._settle(answer)  # also when the iterator is closed: no generation goes on
        if answer.error is not None:
            raise answer.error

    def _begin(self, answer: _Answer, conversation: Callable[[], list[Message]]) -> None:
        """Make this the answer under way; first settle one that was stopped and not read to its end."""
        while True:
            with self.lock:
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
        """End an answer, and keep what was streamed of it unless it failed or was dropped; idempotent."""
        answer.stopped = True
        if answer.worker is not None and self._must_not_wait:
            answer.is_left = True
            if answer.worker.is_alive():
                return
        try:
            if answer.worker is not None:
                _join(answer.worker)
        finally:
            with self.lock:
                self._keep(answer)

    @property
    def _must_not_wait(self) -> bool:
        """Whether this thread holds what a worker needs to end: any thread may collect an iterator."""
        is_worker, passes = isinstance(threading.current_thread(), _Worker), self.model.offload.passes
        owned = self.lock._is_owned()  # type: ignore[attr-defined]  # missing in typeshed
        return is_worker or passes.current is not None or owned

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
        """Token ids that end an answer: the model's and the chat template's."""
        return model_ends(self.model) | turn_ends(self.tokenizer)

    def _prompt(self, messages: list[Message]) -> list[int]:
        """Encode a conversation; raises OptionError where it is longer than the context."""
        ids = encode(self.tokenizer, messages, self.system_prompt)
        if not ids:
            raise OptionError("the prompt is empty: it has no tokens", hint="send a message with text")
        if len(ids) >= self.context_length:
            raise OptionError(
                "the conversation is longer than the model's context",
                expected=f"less than {self.context_length} tokens",
                found=f"{len(ids)} tokens",
                hint="clear the conversation (/clear) or send a shorter message",
            )
        check_ids(self.model, ids)
        return ids

    def _generate(self, ids: list[int], streamer: _Streamer, answer: _Answer) -> None:
        """Runs on the worker thread, so that Ctrl-C never interrupts the model."""
        with self._generating:  # a dropped answer may still be running
            if self._current is answer:
                self._sampling = answer.generator, answer.generator.get_state()
                self._generate_alone(ids, streamer, answer)
                self._sampling = None
            else:
                streamer.text_queue.put(streamer.stop_signal)
        if answer.is_left:
            with self.lock:
                self._keep(answer)

    def _generate_alone(self, ids: list[int], streamer: _Streamer, answer: _Answer) -> None:
        count, n_prompt = self._counter(answer.stats, len(ids)), len(ids)
        sampled, temperature, top_p = [answer.generator], answer.temperature, answer.top_p

        def chosen(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            """Set all logits to -inf but the chosen token's, so that `generate` takes it."""
            number = ids.shape[1] - n_prompt + 1
            token = choose(logits, sampled, temperature, top_p, lambda row: f"new token {number}")
            token = token.to(logits.device)[:, None]
            return torch.full_like(logits, -torch.inf).scatter_(1, token, 0.0)

        def stopped(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            count(ids.shape[1])
            return torch.full((ids.shape[0],), answer.stopped, device=ids.device)

        try:
            with self.lock:
                past = self.turn_cache.reuse(self.model, ids)
                self.turn_cache.clear()  # its content changes from here on
            inputs = torch.tensor([ids], device=self.model.device)
            model = with_own_settings(self.model)
            with forward_errors(self.model):
                output = model.generate(  # type: ignore[operator]  # see `uses_dynamic_cache`
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    past_key_values=past,
                    streamer=streamer,
                    generation_config=answer.config,
                    logits_processor=LogitsProcessorList([chosen]),
                    stopping_criteria=StoppingCriteriaList([stopped]),
                )
            said = output[0].tolist()
            with self.lock:
                if self._current is answer and past is not None:
                    self.turn_cache.keep(self.model, past, said)
            answer.ended = _why(said, n_prompt, answer)
        except BaseException as error:
            answer.error = error
            streamer.text_queue.put(streamer.stop_signal)  # not `end`, which decodes first and may fail again

    def _counter(self, last: TurnStats, n_prompt: int) -> Callable[[int], None]:
        """Make a function that updates `last`; it is called after each token with the length so far."""
        passes, begin = self.model.offload.passes, time.perf_counter()
        before = passes.counted  # of this thread: others may use the model at the same time

        def count(length: int) -> None:
            seconds = time.perf_counter() - begin
            last.n_tokens = length - n_prompt
            last.first_token_s = last.first_token_s or seconds
            last.decode_s = seconds - last.first_token_s
            last.cache = passes.counted - before

        return count

    def _config(self, n_prompt: int) -> GenerationConfig:
        """Tell `generate` the length and the end tokens; `settings.choose` chooses tokens."""
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
    """One answer: the session's settings and conversation when it began, and its state since.

    Attributes:
        before: The session's `last` and `ended`, for an answer that fails.
        pieces: What was streamed.
        stopped: It is to end after its current token.
        ended: One of ENDS; None until it was generated.
        is_counted: The session's `total` includes it.
        is_left: Its worker settles it, since its reader cannot wait.
    """

    messages: list[Message] = field(default_factory=list)
    before: tuple[TurnStats, str | None] = field(default_factory=lambda: (TurnStats(), None))
    max_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator = field(default_factory=torch.Generator)
    config: GenerationConfig = field(default_factory=GenerationConfig)
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
    """Streams an answer's text without the token that ends it, also where that is no special token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> None:
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


def _why(ids: list[int], n_prompt: int, answer: _Answer) -> str:
    """Name why an answer ended, one of ENDS; `ids` are prompt and answer."""
    limit = answer.config.max_new_tokens
    if ids[-1] in (answer.config.eos_token_id or ()):
        return "complete"
    if len(ids) < n_prompt + limit and answer.stopped:
        return "stopped"
    return "max_new_tokens" if limit == answer.max_new_tokens else "context"


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def _said_by_user(text: str) -> Message:
    if not isinstance(text, str):
        raise OptionError("not a message", expected="text", found=repr(text)[:80])
    return {"role": "user", "content": whole(text)}


def _join(thread: threading.Thread) -> None:
    """Join even if interrupted, then re-raise: an exit while torch runs in another thread aborts."""
    interrupt: KeyboardInterrupt | None = None
    while thread.is_alive():
        try:
            thread.join()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
