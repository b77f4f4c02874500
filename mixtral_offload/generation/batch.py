"""Many sequences at once: those that have ended leave the batch (2211.10017's pruning), others take their places.

Knows transformers' forward pass and its KV cache. Knows nothing of experts: what a pass needs of them, it loads once for
the whole batch (`runtime/forward.py`), and that is what makes a batch pay.

Sequences are padded on the left to one length. Padding costs attention and KV cache, but no experts; columns that are
padding for all are cut off when a long sequence leaves.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mixtral_offload.errors import OptionError
from mixtral_offload.generation.chat import context_length
from mixtral_offload.generation.templates import encode, turn_ends
from mixtral_offload.models.positions import depend_on_length
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

#: others are admitted as soon as this share of the batch's places is free: their prompts take a pass of their own, which
#: loads about every expert, so that one at a time would double the bytes (LOG.md)
ADMIT_AT = 1 / 4


@dataclass(frozen=True)
class GenerationRequest:
    """ids: the prompt's tokens, at least one. seed: of a sampled answer, which depends on nothing else then. ends: tokens
    that end the answer beside the model's own end tokens; `GenerationRequest.chat` fills in the tokenizer's and the template's."""

    ids: list[int]
    max_new_tokens: int = 512
    seed: int | None = None
    ends: frozenset[int] = frozenset()

    @classmethod
    def chat(cls, tokenizer, text: str, *, system_prompt: str | None = None, **options) -> GenerationRequest:
        """A user's message, put as a chat puts it. options: the other fields."""
        options = {"ends": turn_ends(tokenizer), **options}
        return cls(encode(tokenizer, [{"role": "user", "content": text}], system_prompt), **options)


@dataclass(frozen=True)
class Answer:
    """number: the request's place among all, from 0. ids: the new tokens, with the one that ended them. ended: one of
    `chat.ENDS`."""

    number: int
    ids: list[int]
    ended: str


@dataclass
class _Row:
    """A sequence in the batch. limit: new tokens it may have."""

    number: int
    request: GenerationRequest
    limit: int
    generator: torch.Generator
    new: list[int] = field(default_factory=list)

    @property
    def most_tokens(self) -> int:
        """What its row of the KV cache may grow to."""
        return len(self.request.ids) + self.limit


def generate_batch(
    model,
    requests: Iterable[GenerationRequest],
    *,
    batch_size: int = 32,
    temperature: float = 0.0,
    top_p: float = 0.95,
) -> Iterator[Answer]:
    """Answers in the order in which they end; requests are taken only as places become free.

    A sequence's tokens are those that it would get alone: greedy ones up to ties in the last bits of a logit, sampled ones
    likewise, from a generator of its own: what decides an answer, and what ends one, is the same as for a chat (see
    `runtime/settings.py`). batch_size: sequences at once, fewer where the KV cache that the plan has left
    room for (`context_length` x `batch_size` tokens, see `OffloadOptions`) holds no more, with a warning. So it is, one at a
    time, where the model's layers keep more than keys and values (recurrent states, indexes), which cannot be joined.
    Raises OptionError for a request that cannot be answered, when its turn comes; GenerationError where the model fails.
    """
    if batch_size < 1:
        raise OptionError("impossible batch_size", expected="1 or more", found=batch_size)
    check_sampling(1, temperature, top_p, None)
    warn_once(model)
    batch, queue = _Batch(model, temperature, top_p), deque()
    if batch_size > 1 and not batch.can_join:
        warnings.warn(f"what {model.config.model_type} keeps of a sequence depends on more than its own tokens: sequences are computed "
                      "one at a time (batch_size=1)", stacklevel=2)  # fmt: skip
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


class _Batch:
    """The sequences that are computed together, their KV cache `[rows, heads, columns, head size]` and what of it is real.

    mask: int64 [rows, columns]. newest: each row's last token, int64 [rows], which is not in the KV cache yet. can_join:
    whether rows can be added to, and taken from, this model's KV cache.
    """

    def __init__(self, model, temperature: float, top_p: float):
        self.rows: list[_Row] = []
        self._model, self._temperature, self._top_p = model, temperature, top_p
        options = model.offload.options
        self._context = context_length(model.config, options)
        self._room = self._context * options.batch_size  # tokens that the plan has left memory for
        self._pass_tokens = pass_tokens(self._context, options.batch_size)
        self._ends = model_ends(model)
        self.can_join = _can_join(model)
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)
        self._past = self._newest = None
        self._has_warned = False

    def row(self, number: int, request: GenerationRequest) -> _Row:
        """A request, ready to be admitted."""
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
        """Take from the queue what one pass may admit: as the places and the KV cache allow, and the memory for one prompt."""
        chosen, widest = [], max((row.most_tokens for row in self.rows), default=0)
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
            hint = (
                f"from_pretrained(..., batch_size={batch_size}), or fewer max_new_tokens, make room for more"
            )
            warnings.warn(f"the plan's KV cache of {self._room} tokens holds {n_rows} of {batch_size} sequences at once; {hint}",
                          stacklevel=4)  # fmt: skip
        self._has_warned = True

    @torch.inference_mode()
    def admit(self, newcomers: list[_Row]) -> None:
        """Compute their prompts, in one pass, and let them join."""
        prompts = [row.request.ids for row in newcomers]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ids, mask = ids.to(self._model.device), mask.to(self._model.device)
        # None: the model makes its own kind
        newest, past = self._forward(newcomers, ids, mask, DynamicCache() if self.can_join else None)
        if self.rows:
            past, mask = _joined(self._past, past), _cat_right_aligned(self._mask, mask, dim=1)
            newest = torch.cat((self._newest, newest))
        self.rows = self.rows + newcomers
        self._past, self._mask, self._newest = past, mask, newest

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for each."""
        self._mask = F.pad(self._mask, (0, 1), value=1)
        self._newest, self._past = self._forward(self.rows, self._newest[:, None], self._mask, self._past)

    def _forward(
        self, rows: list[_Row], ids: Tensor, mask: Tensor, past: DynamicCache | None
    ) -> tuple[Tensor, DynamicCache]:
        """The rows' next tokens, int64 [rows], after `ids [rows, T]`; and the KV cache."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with forward_errors(self._model), self._passes():
            output = self._model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True, logits_to_keep=1
            )  # fmt: skip
            generators = [row.generator for row in rows]
            newest = choose(
                output.logits[:, -1], generators, self._temperature, self._top_p, partial(_token_name, rows)
            )
        for row, token in zip(rows, newest.tolist()):
            row.new.append(token)
        return newest.to(ids.device), output.past_key_values

    def _passes(self) -> AbstractContextManager:
        """Padding needs no experts where nobody reads what comes of it: this KV cache is never handed out."""
        return self._model.offload.passes.without_padding() if self.can_join else nullcontext()

    @torch.inference_mode()
    def remove_ended(self) -> list[Answer]:
        """The answers that are complete; their rows are gone."""
        answers, stay = [], []
        for at, row in enumerate(self.rows):
            if row.new[-1] in self._ends or row.new[-1] in row.request.ends:
                answers.append(Answer(row.number, row.new, "complete"))
            elif len(row.new) == row.limit:
                is_asked = row.limit == row.request.max_new_tokens
                answers.append(Answer(row.number, row.new, "max_new_tokens" if is_asked else "context"))
            else:
                stay.append(at)
        if answers:
            self._keep(stay)
        return answers

    def _keep(self, stay: list[int]) -> None:
        self.rows = [self.rows[at] for at in stay]
        if not stay:
            self._past = self._newest = None
            return
        index = torch.tensor(stay, device=self._mask.device)
        self._newest, mask = self._newest[index], self._mask[index]
        padding = mask.shape[1] - max(len(row.request.ids) + len(row.new) - 1 for row in self.rows)
        self._mask = mask[:, padding:]
        for layer in self._past.layers:
            layer.keys, layer.values = layer.keys[index, :, padding:], layer.values[index, :, padding:]


def _can_join(model) -> bool:
    """Whether this model keeps keys and values of each token, and nothing else, and they depend on no other sequence."""
    if not model._supports_default_dynamic_cache() or depend_on_length(model):
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _token_name(rows: list[_Row], at: int) -> str:
    return f"new token {len(rows[at].new) + 1} of request {rows[at].number}"


def _joined(a: DynamicCache, b: DynamicCache) -> DynamicCache:
    """b's sequences below a's; a is no more of use."""
    for of_a, of_b in zip(a.layers, b.layers):
        of_a.keys = _cat_right_aligned(of_a.keys, of_b.keys, dim=2)
        of_a.values = _cat_right_aligned(of_a.values, of_b.values, dim=2)
    return a


def _cat_right_aligned(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """`b` below `a`, after zeros in front have made them equally long in `dim`."""
    width, behind = max(a.shape[dim], b.shape[dim]), (0, 0) * (a.ndim - 1 - dim)
    return torch.cat([F.pad(of, (*behind, width - of.shape[dim], 0)) for of in (a, b)])
