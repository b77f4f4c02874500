"""What many sequences at once are worth: tokens/s and bytes moved against the batch size, and what sorting, pruning and
quantization are each worth in a batch (2211.10017).

Knows prompts, turns and how to compare them. `experiments/baselines.py` makes the variants.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np

from mixtral_offload.analysis.recorder import record
from mixtral_offload.core.counters import CacheStats
from mixtral_offload.errors import OptionError
from mixtral_offload.experiments.baselines import (
    check_same,
    continuous,
    in_groups,
    layer_seconds,
    no_end,
    static_batches,
    throttled,
    unquantized,
    unsorted,
)
from mixtral_offload.experiments.bit_widths import held_out
from mixtral_offload.generation.batch import ADMIT_AT, GenerationRequest
from mixtral_offload.generation.templates import encode

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
#: new tokens of an answer are drawn from these
LENGTHS = (4, 8, 16, 32)
FULL = "all of them"
LEAVE_ONLY, STATIC = "ended leave, none admitted", "without pruning"
UNSORTED, UNQUANTIZED = "without sorting", "without quantization"


@dataclass(frozen=True)
class Throughput:
    """What took turns; `print` shows it as a table.

    tokens: generated in one turn. seconds: batch size or variant -> of each turn, prompts included. counters: likewise,
    sums of its `CacheStats` over all turns, each of which began with an empty cache.
    """

    tokens: int
    seconds: dict[int | str, list[float]]
    counters: dict[int | str, dict[str, float]]

    def tokens_per_s(self, key: int | str) -> float:
        """From the median of its turns."""
        return self.tokens / statistics.median(self.seconds[key])

    def bytes_per_token(self, key: int | str) -> float:
        """Moved for each token generated, prompts included."""
        return self.counters[key]["bytes_moved"] / self.tokens / len(self.seconds[key])

    def hit_rate(self, key: int | str) -> float:
        """Share of uses that found their expert on the device; a pass uses an expert once."""
        counters = self.counters[key]
        return counters["hits"] / (counters["hits"] + counters["misses"])

    def over(self, key: int | str, other: int | str) -> float:
        """Throughput as a multiple of another's: the median of turns that followed each other."""
        return statistics.median(b / a for a, b in zip(self.seconds[key], self.seconds[other]))

    def to_dict(self) -> dict:
        """All of it in JSON's types, and what follows from it."""
        derived = {
            name: {key: getattr(self, name)(key) for key in self.seconds}
            for name in ("tokens_per_s", "bytes_per_token", "hit_rate")
        }
        return vars(self) | derived

    def __str__(self) -> str:
        first = next(iter(self.seconds))
        lines = [f"{'':28}tokens/s  over {first!s:>11}  kB moved per token  hits"]
        for key in self.seconds:
            line = f"{key!s:28}{self.tokens_per_s(key):8.1f}  {self.over(key, first):16.2f}"
            lines.append(f"{line}  {self.bytes_per_token(key) / 1e3:18.1f}  {self.hit_rate(key):4.0%}")
        return "\n".join(lines)


def workload(
    tokenizer, n_requests: int, prompts: Sequence[str] | None = None, lengths: Sequence[int] = LENGTHS, seed: int = 0
) -> list[GenerationRequest]:  # fmt: skip
    """Requests with prompts of mixed length and answers of lengths drawn evenly, the same for the same seed.

    prompts: texts, taken again from the first where there are too few; default: the shipped model's held-out conversations,
    cut before an answer.
    """
    rng = random.Random(seed)
    talks = _held_out(rng) if prompts is None else [[_said(text)] for text in prompts]
    if not talks:
        raise OptionError("no prompts", expected="one or more texts")
    requests = []
    for number in range(n_requests):
        talk = talks[number % len(talks)]
        requests.append(GenerationRequest(encode(tokenizer, talk), rng.choice(lengths)))
    return requests


def _said(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _held_out(rng: random.Random) -> list[list[dict[str, str]]]:
    """Conversations of one to three questions, each of the held-out ones cut into such pieces; shuffled."""
    talks = []
    for messages in held_out():
        while messages:
            n = 2 * rng.randint(1, 3)
            talks.append(messages[: n - 1] if len(messages) >= n else messages[:1])
            messages = messages[n:]
    rng.shuffle(talks)
    return talks


Answers = list[list[int]]


def measure_batches(
    model, requests: Sequence[GenerationRequest], batch_sizes: Sequence[int] = BATCH_SIZES, repeats: int = 1
) -> Throughput:
    """`generate_batch` with each batch size, taking turns over the same requests; end-of-sequence is switched off.

    The model should have been built with the largest of them as its `batch_size`. Raises OffloadError if an answer depends
    on the batch size.
    """
    runs = {n: (model, partial(continuous, batch_size=n)) for n in batch_sizes}
    return take_turns(runs, requests, repeats)


def ablate_batch(
    model,
    requests: Sequence[GenerationRequest],
    batch_size: int = 32,
    repeats: int = 1,
    ratio: float | None = None,
    layer_s: float | None = None,
) -> Throughput:
    """Each of the paper's optimizations taken away alone, beside all of them: sorting, pruning, quantization.

    Rows that have ended are computed on without pruning, as in transformers' own `generate`; in one row more they leave,
    but none is admitted. Without quantization the same weights have 16 bits, and as many slots. ratio: slow the link down
    until one quantized expert's copy takes so many times one layer's compute (layer_s, or measured here); None: as it is.
    Raises OffloadError if an answer depends on the variant.
    """
    with ExitStack() as stack:
        sixteen = stack.enter_context(unquantized(model))
        if ratio is not None:
            layer_s = layer_s or layer_seconds(model)
            wider = sixteen.offload.layout.n_bytes / model.offload.layout.n_bytes
            stack.enter_context(throttled(model, ratio, layer_s))
            stack.enter_context(throttled(sixteen, ratio * wider, layer_s))  # as many bytes per second
        ways = {FULL: continuous, LEAVE_ONLY: in_groups, STATIC: static_batches, UNSORTED: _unsorted}
        runs = {name: (model, partial(way, batch_size=batch_size)) for name, way in ways.items()}
        runs[UNQUANTIZED] = sixteen, partial(continuous, batch_size=batch_size)
        return take_turns(runs, requests, repeats)


def _unsorted(model, requests: Sequence[GenerationRequest], batch_size: int) -> Answers:
    with unsorted():
        return continuous(model, requests, batch_size)


def take_turns(
    runs: dict[int | str, tuple[object, Callable[[object, Sequence[GenerationRequest]], Answers]]],
    requests: Sequence[GenerationRequest],
    repeats: int,
) -> Throughput:
    """Each of `runs`, a model and how it answers, in turn with all requests, again and again.

    Each turn begins with an empty cache. Raises OffloadError where the answers are not those of the first turn.
    """
    seconds, counters, expected = {key: [] for key in runs}, {key: CacheStats() for key in runs}, None
    for _ in range(repeats):
        for key, (model, answer) in runs.items():
            model.offload.cache.drain()
            model.offload.stats.reset()
            with no_end(model):
                began_s = time.perf_counter()
                answers = answer(model, requests)
                seconds[key].append(time.perf_counter() - began_s)
            counters[key] += model.offload.stats
            expected = expected or answers
            for number, (answer, wanted) in enumerate(zip(answers, expected, strict=True)):
                check_same(f"the batch: {key}", f"request {number}", answer, wanted)
    n_tokens = sum(map(len, expected))
    return Throughput(n_tokens, seconds, {key: vars(of) for key, of in counters.items()})


def measure_usage(model, requests: Sequence[GenerationRequest], batch_size: int = 32) -> np.ndarray:
    """How often one generated token needs each expert: float64 [layers, experts], rows sum to the top-k."""
    with no_end(model), record(model) as recording:
        continuous(model, requests, batch_size)
    trace = recording.trace
    return trace.usage(np.arange(trace.n_tokens)) / trace.n_tokens


def expected_bytes(
    usage: np.ndarray,
    cache_size: int,
    expert_bytes: int,
    requests: Sequence[GenerationRequest],
    batch_size: int,
) -> float:
    """Bytes per generated token if tokens chose their experts independently, with these frequencies, and every place of
    the batch were always taken.

    A pass of n tokens needs an expert of frequency p with probability q = 1 - (1 - p)^n; LRU keeps those used in the last t
    passes, where t follows from the number of slots (Che's approximation), or, if a pass needs more than that, some of its own. Sequences stick to their experts, so that
    small batches move less than this.
    """
    prompt, new = (
        statistics.mean(map(of, requests)) for of in (lambda of: len(of.ids), lambda of: of.max_new_tokens)
    )
    admitted = max(1, round(batch_size * ADMIT_AT))
    decoding = sum(_misses(p, batch_size, cache_size) for p in usage) / batch_size * (new - 1) / new
    prompts = sum(_misses(p, admitted * prompt, cache_size) for p in usage) / (admitted * new)
    return expert_bytes * (decoding + prompts)


def _misses(p: np.ndarray, n_tokens: float, n_slots: int) -> float:
    """Of one layer in one pass; p: how often a token needs each expert."""
    if n_slots >= len(p):
        return 0.0
    unused = np.clip(1 - p, 1e-12, 1) ** n_tokens
    needed = 1 - unused
    if needed.sum() >= n_slots:  # any of a pass's experts may be the ones left in the slots
        return float((needed * (1 - needed * n_slots / needed.sum())).sum())
    low, high = 0.0, 1e9
    for _ in range(200):  # the t for which the experts held are as many as the slots
        t = (low + high) / 2
        low, high = (t, high) if (1 - unused**t).sum() < n_slots else (low, t)
    return float((needed * unused**low).sum())
