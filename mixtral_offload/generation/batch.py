"""Many sequences at once: ended ones leave the batch (pruning of arXiv:2211.10017), others take their places.

Sequences are padded on the left to one length; columns that are padding for all are cut off. Does not know
experts.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mixtral_offload.errors import OptionError
from mixtral_offload.generation.chat import context_length
from mixtral_offload.generation.templates import encode, turn_ends
from mixtral_offload.generation.turn_cache import uses_dynamic_cache
from mixtral_offload.models.positions import depend_on_length
from mixtral_offload.runtime.offload import OffloadedModel
from mixtral_offload.runtime.options import pass_tokens
from mixtral_offload.runtime.settings import (
    check_ids,
    check_sampling,
    choose,
    forward_errors,
    generator,
    model_ends,
    warn_once,
)

#: requests are admitted when this share of the batch's places is free: the pass over their prompts loads
#: nearly every expert, so that admitting them one by one would double the bytes (LOG.md)
ADMIT_AT = 1 / 4


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and its settings.

    Attributes:
        ids: The prompt's tokens, at least one.
        max_new_tokens: The longest answer.
        seed: Makes a sampled answer repeatable, whatever else is in the batch.
        ends: Tokens that end the answer, in addition to the model's own end tokens.
    """

    ids: list[int]
    max_new_tokens: int = 512
    seed: int | None = None
    ends: frozenset[int] = frozenset()

    @classmethod
    def chat(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        *,
        system_prompt: str | None = None,
        **options: Any,
    ) -> GenerationRequest:
        """Make the request of a user's message, in the tokenizer's chat format.

        Args:
            tokenizer: Its own end token, and its chat template's, end the answer.
            text: The message.
            system_prompt: Put first; None for none.
            options: The other fields.
        """
        options = {"ends": turn_ends(tokenizer), **options}
        return cls(encode(tokenizer, [{"role": "user", "content": text}], system_prompt), **options)


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        number: Index of the request among all.
        ids: The new tokens, including an end token.
        ended: One of `chat.ENDS`.
    """

    number: int
    ids: list[int]
    ended: str


@dataclass
class _Row:
    """A sequence in the batch, of at most `limit` new tokens."""

    number: int
    request: GenerationRequest
    limit: int
    generator: torch.Generator
    new: list[int] = field(default_factory=list)

    @property
    def most_tokens(self) -> int:
        """Tokens of its KV cache at most."""
        return len(self.request.ids) + self.limit


def generate_batch(
    model: OffloadedModel,
    requests: Iterable[GenerationRequest],
    *,
    batch_size: int = 32,
    temperature: float = 0.0,
    top_p: float = 0.95,
) -> Iterator[Answer]:
    """Answer requests, many in one batch, and yield each answer as it ends.

    Each sequence gets the tokens that it would get alone, up to ties in the last bits of a logit; sampled
    tokens come from its own generator. `runtime/settings.py` has the rules for sampling and for end tokens.

    Args:
        model: From `from_pretrained`.
        requests: Taken one by one as places in the batch become free.
        batch_size: Sequences at once. Fewer, with a warning, where the plan's KV cache holds fewer: it has
            `context_length` x `batch_size` tokens, see `OffloadOptions`. One at a time where the layers keep
            more than keys and values (recurrent states, indexes), which cannot be joined.
        temperature: 0 is greedy.
        top_p: Sample among the likeliest tokens that have this probability together.

    Raises:
        OptionError: A request cannot be answered; raised when its turn comes.
        GenerationError: The model failed.
    """
    if batch_size < 1:
        raise OptionError("impossible batch_size", expected="1 or more", found=batch_size)
    check_sampling(1, temperature, top_p, None)
    warn_once(model)
    batch = Batch(model, temperature, top_p)
    queue: deque[_Row] = deque()
    if batch_size > 1 and not batch.can_join:
        reason = f"what {model.config.model_type} keeps of a sequence depends on more than its own tokens"
        warnings.warn(f"{reason}: sequences are computed one at a time (batch_size=1)", stacklevel=2)
        batch_size = 1
    numbered = enumerate(requests)
    while True:
        places = batch_size - len(batch.rows)
        if not batch.rows or places >= batch_size * ADMIT_AT:
            queue.extend(batch.row(*item) for item in islice(numbered, max(places - len(queue), 0)))
            if not batch.rows and not queue:
                return
            while newcomers := batch.choose(queue, batch_size):
                batch.admit(newcomers)
                yield from batch.remove_ended()
        if batch.rows:
            batch.step()
            yield from batch.remove_ended()


class Batch:
    """The sequences that are computed together, and their KV cache `[rows, heads, columns, head size]`.

    Attributes:
        can_join: Whether rows can be added to, and removed from, this model's KV cache.
        _mask: Which columns of the KV cache are no padding, int64 `[rows, columns]`.
        _newest: Each row's last token, int64 `[rows]`, which is not in the KV cache yet.
    """

    def __init__(self, model: OffloadedModel, temperature: float, top_p: float) -> None:
        self.rows: list[_Row] = []
        self._model, self._temperature, self._top_p = model, temperature, top_p
        options = model.offload.options
        self._context = context_length(model.config, options)
        self._room = self._context * options.batch_size  # tokens of the plan's KV cache
        self._pass_tokens = pass_tokens(self._context, options.batch_size)
        self._ends = model_ends(model)
        self.can_join = _can_join(model)
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)
        self._newest = torch.zeros(0, dtype=torch.long, device=model.device)
        self._past: DynamicCache | None = None
        self._has_warned = False

    def row(self, number: int, request: GenerationRequest) -> _Row:
        """Check a request, and prepare it to be admitted."""
        room = self._context - len(request.ids)
        if not request.ids or room < 1 or request.max_new_tokens < 1:
            expected = f"a prompt of 1 to {self._context - 1} tokens, and 1 new token or more"
            found = f"{len(request.ids)} tokens, {request.max_new_tokens} new ones"
            raise OptionError(f"request {number} cannot be answered", expected=expected, found=found)
        try:
            check_ids(self._model, request.ids)
            check_sampling(request.max_new_tokens, 0, 1, request.seed)
        except OptionError as error:
            raise OptionError(f"request {number} cannot be answered: {error}") from error
        return _Row(number, request, min(request.max_new_tokens, room), generator(request.seed))

    def choose(self, queue: deque[_Row], batch_size: int) -> list[_Row]:
        """Take from the queue what one pass can admit: within the places, the KV cache, a pass's tokens."""
        chosen: list[_Row] = []
        widest = max((row.most_tokens for row in self.rows), default=0)
        while queue and len(self.rows) + len(chosen) < batch_size:
            widest = max(widest, queue[0].most_tokens)
            longest = max(len(row.request.ids) for row in (*chosen, queue[0]))
            n_rows, n_new = len(self.rows) + len(chosen) + 1, len(chosen) + 1
            if n_rows > 1 and n_rows * widest > self._room:
                self._warn(n_rows - 1, batch_size)
                break
            if n_new > 1 and n_new * longest > self._pass_tokens:
                break
            chosen.append(queue.popleft())
        return chosen

    def _warn(self, n_rows: int, batch_size: int) -> None:
        if not self._has_warned:
            held = (
                f"the plan's KV cache of {self._room} tokens holds {n_rows} of {batch_size} sequences at once"
            )
            hint = (
                f"from_pretrained(..., batch_size={batch_size}), or fewer max_new_tokens, make room for more"
            )
            warnings.warn(f"{held}; {hint}", stacklevel=4)
        self._has_warned = True

    @torch.inference_mode()
    def admit(self, newcomers: list[_Row]) -> None:
        """Compute the prompts of `newcomers` in one pass, and join them to the batch."""
        prompts = [row.request.ids for row in newcomers]
        width = max(map(len, prompts))
        padding, device = [width - len(prompt) for prompt in prompts], self._model.device
        ids = torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts)], device=device)
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding], device=device)
        # None: the model makes its own kind of cache
        newest, past = self._forward(newcomers, ids, mask, DynamicCache() if self.can_join else None)
        if self._past is not None:
            past, mask = _joined(self._past, past), _cat_right_aligned(self._mask, mask, dim=1)
            newest = torch.cat((self._newest, newest))
        self.rows = self.rows + newcomers
        self._past, self._mask, self._newest = past, mask, newest

    @torch.inference_mode()
    def step(self) -> None:
        """Compute one more token for each row."""
        self._mask = F.pad(self._mask, (0, 1), value=1)
        self._newest, self._past = self._forward(self.rows, self._newest[:, None], self._mask, self._past)

    def _forward(
        self, rows: list[_Row], ids: Tensor, mask: Tensor, past: DynamicCache | None
    ) -> tuple[Tensor, DynamicCache]:
        """Compute the rows' next tokens, int64 `[rows]`, after `ids [rows, T]`; and the KV cache."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with forward_errors(self._model), self._passes():
            output = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            )
            generators, name = [row.generator for row in rows], partial(_token_name, rows)
            newest = choose(output.logits[:, -1], generators, self._temperature, self._top_p, name)
        for row, token in zip(rows, newest.tolist()):
            row.new.append(token)
        return newest.to(ids.device), output.past_key_values

    def _passes(self) -> AbstractContextManager[None]:
        """Skip the experts of padding, whose results are not read."""
        return self._model.offload.passes.without_padding() if self.can_join else nullcontext()

    @torch.inference_mode()
    def remove_ended(self) -> list[Answer]:
        """Remove the rows that have ended, and return their answers."""
        answers, stay = [], []
        for at, row in enumerate(self.rows):
            if row.new[-1] in self._ends or row.new[-1] in row.request.ends:
                answers.append(Answer(row.number, row.new, "complete"))
            elif len(row.new) == row.limit:
                ended = "max_new_tokens" if row.limit == row.request.max_new_tokens else "context"
                answers.append(Answer(row.number, row.new, ended))
            else:
                stay.append(at)
        if answers:
            self._keep(stay)
        return answers

    def _keep(self, stay: list[int]) -> None:
        self.rows = [self.rows[at] for at in stay]
        if not stay:
            self._past = None
            return
        index = torch.tensor(stay, device=self._mask.device)
        self._newest, mask = self._newest[index], self._mask[index]
        padding = mask.shape[1] - max(len(row.request.ids) + len(row.new) - 1 for row in self.rows)
        self._mask = mask[:, padding:]
        assert self._past is not None
        for layer in _layers(self._past):
            keys, values = _kept(layer)
            layer.keys, layer.values = keys[index, :, padding:], values[index, :, padding:]


def _can_join(model: PreTrainedModel) -> bool:
    """Whether the KV cache holds each token's keys and values only, and they depend on no other sequence."""
    if not uses_dynamic_cache(model) or depend_on_length(model):
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _token_name(rows: list[_Row], at: int) -> str:
    return f"new token {len(rows[at].new) + 1} of request {rows[at].number}"


def _joined(a: DynamicCache, b: DynamicCache) -> DynamicCache:
    """Append b's rows to a, in place; return a."""
    for of_a, of_b in zip(_layers(a), _layers(b)):
        (keys, values), (new_keys, new_values) = _kept(of_a), _kept(of_b)
        of_a.keys = _cat_right_aligned(keys, new_keys, dim=2)
        of_a.values = _cat_right_aligned(values, new_values, dim=2)
    return a


def _layers(past: DynamicCache) -> list[DynamicLayer]:
    """The KV cache's layers, all of this kind: see `_can_join`."""
    return [layer for layer in past.layers if isinstance(layer, DynamicLayer)]


def _kept(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer after its first pass."""
    assert layer.keys is not None and layer.values is not None
    return layer.keys, layer.values


def _cat_right_aligned(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Append b's rows to a's; the shorter one gets zeros in front in `dim`."""
    width, behind = max(a.shape[dim], b.shape[dim]), (0, 0) * (a.ndim - 1 - dim)
    return torch.cat([F.pad(of, (*behind, width - of.shape[dim], 0)) for of in (a, b)])
