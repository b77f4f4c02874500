"""Batches: speed and bytes moved against their size; what sorting, pruning and quantization are worth.

Figures of 2211.10017. Prompts, turns and comparisons; `experiments/baselines.py` makes the variants.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

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
from mixtral_offload.runtime.offload import OffloadedModel

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
#: the number of new tokens of an answer is drawn from these
LENGTHS = (4, 8, 16, 32)
FULL = "all of them"
LEAVE_ONLY, STATIC = "ended leave, none admitted", "without pruning"
UNSORTED, UNQUANTIZED = "without sorting", "without quantization"

Answers = list[list[int]]
Key = int | str  # a batch size or a variant
Run = tuple[OffloadedModel, Callable[[OffloadedModel, Sequence[GenerationRequest]], Answers]]


@dataclass(frozen=True)
class Throughput:
    """Result of runs that took turns; `str` of it is a table.

    Attributes:
        tokens: Generated in one turn.
        seconds: batch size or variant -> of each turn, prompts included.
        counters: batch size or variant -> sums of its `CacheStats` over all turns, each from an empty cache.
    """

    tokens: int
    seconds: Mapping[Key, list[float]]
    counters: Mapping[Key, dict[str, float]]

    def tokens_per_s(self, key: Key) -> float:
        """Return the speed in the median turn."""
        return self.tokens / statistics.median(self.seconds[key])

    def bytes_per_token(self, key: Key) -> float:
        """Return the bytes moved for each generated token, prompts included."""
        return self.counters[key]["bytes_moved"] / self.tokens / len(self.seconds[key])

    def hit_rate(self, key: Key) -> float:
        """Return hits divided by uses; a pass uses an expert once."""
        counters = self.counters[key]
        return counters["hits"] / (counters["hits"] + counters["misses"])

    def over(self, key: Key, other: Key) -> float:
        """Return throughput as a multiple of another's: the median over successive turns."""
        return statistics.median(b / a for a, b in zip(self.seconds[key], self.seconds[other]))

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, and what follows from it, in JSON's types."""
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
    tokenizer: PreTrainedTokenizerBase,
    n_requests: int,
    prompts: Sequence[str] | None = None,
    lengths: Sequence[int] = LENGTHS,
    seed: int = 0,
) -> list[GenerationRequest]:
    """Make requests with prompts of mixed length and answers of random lengths, the same for the same seed.

    Args:
        prompts: Texts, repeated where there are too few. Default: the shipped model's held-out conversations,
            cut before an answer.
        lengths: Of answers, all equally likely.
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
    """The held-out conversations, cut into pieces of one to three questions and shuffled."""
    talks = []
    for messages in held_out():
        while messages:
            n = 2 * rng.randint(1, 3)
            talks.append(messages[: n - 1] if len(messages) >= n else messages[:1])
            messages = messages[n:]
    rng.shuffle(talks)
    return talks


def measure_batches(
    model: OffloadedModel,
    requests: Sequence[GenerationRequest],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    repeats: int = 1,
) -> Throughput:
    """Measure `generate_batch` with each batch size, in turns over the same requests; end tokens are ignored.

    Args:
        model: Built with the largest of them as its `batch_size`.

    Raises:
        OffloadError: An answer depends on the batch size.
    """
    runs = {n: (model, partial(continuous, batch_size=n)) for n in batch_sizes}
    return take_turns(runs, requests, repeats)


def ablate_batch(
    model: OffloadedModel,
    requests: Sequence[GenerationRequest],
    batch_size: int = 32,
    repeats: int = 1,
    ratio: float | None = None,
    layer_s: float | None = None,
) -> Throughput:
    """Measure all of the paper's optimizations, and without one of them: sorting, pruning, quantization.

    Without pruning, rows that have ended are computed on, as in transformers' own `generate`; in one more
    variant they are pruned, but none is admitted. Without quantization the same weights have 16 bits, with
    the same number of slots.

    Args:
        ratio, layer_s: As for `throttled`, with a quantized expert's copy.

    Raises:
        OffloadError: An answer depends on the variant.
    """
    with ExitStack() as stack:
        sixteen = stack.enter_context(unquantized(model))
        if ratio is not None:
            layer_s = layer_s or layer_seconds(model)
            wider = sixteen.offload.layout.n_bytes / model.offload.layout.n_bytes
            stack.enter_context(throttled(model, ratio, layer_s))
            stack.enter_context(throttled(sixteen, ratio * wider, layer_s))  # the same bytes per second
        ways = {FULL: continuous, LEAVE_ONLY: in_groups, STATIC: static_batches, UNSORTED: _unsorted}
        runs: dict[str, Run] = {
            name: (model, partial(way, batch_size=batch_size)) for name, way in ways.items()
        }
        runs[UNQUANTIZED] = sixteen, partial(continuous, batch_size=batch_size)
        return take_turns(runs, requests, repeats)


def _unsorted(model: OffloadedModel, requests: Sequence[GenerationRequest], batch_size: int) -> Answers:
    with unsorted():
        return continuous(model, requests, batch_size)


def take_turns(runs: Mapping[Any, Run], requests: Sequence[GenerationRequest], repeats: int) -> Throughput:
    """Run all of `runs` in turn with all requests, repeatedly; each turn begins with an empty cache.

    Raises:
        OffloadError: The answers are not those of the first turn.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    counters, expected = {key: CacheStats() for key in runs}, Answers()
    for _ in range(repeats):
        for key, (model, run) in runs.items():
            model.offload.cache.drain()
            model.offload.stats.reset()
            with no_end(model):
                began_s = time.perf_counter()
                answers = run(model, requests)
                seconds[key].append(time.perf_counter() - began_s)
            counters[key] += model.offload.stats
            expected = expected or answers
            for number, (answer, wanted) in enumerate(zip(answers, expected, strict=True)):
                check_same(f"the batch: {key}", f"request {number}", answer, wanted)
    n_tokens = sum(map(len, expected))
    return Throughput(n_tokens, seconds, {key: vars(of) for key, of in counters.items()})


def measure_usage(
    model: OffloadedModel, requests: Sequence[GenerationRequest], batch_size: int = 32
) -> np.ndarray:
    """Measure how often a generated token needs each expert: float64 `[L, E]`, rows sum to the top-k."""
    with no_end(model), record(model) as recording:
        continuous(model, requests, batch_size)
    trace = recording.trace
    assert trace is not None  # the recording has ended
    return trace.usage(np.arange(trace.n_tokens)) / trace.n_tokens


def expected_bytes(
    usage: np.ndarray,
    cache_size: int,
    expert_bytes: int,
    requests: Sequence[GenerationRequest],
    batch_size: int,
) -> float:
    """Compute bytes per generated token for independent choices of experts in a batch that is always full.

    A pass of n tokens needs an expert of frequency p with probability q = 1 - (1 - p)^n. LRU keeps those used
    in the last t passes, where t follows from the number of slots (Che's approximation), or, if a pass needs
    more than that, some of its own. Sequences use their experts again, so that small batches move less than
    this.

    Args:
        usage: Of `measure_usage`, `[L, E]`.
        cache_size: Slots per layer.
    """
    prompt = statistics.mean(len(request.ids) for request in requests)
    new = statistics.mean(request.max_new_tokens for request in requests)
    admitted = max(1, round(batch_size * ADMIT_AT))
    decoding = sum(_misses(p, batch_size, cache_size) for p in usage) / batch_size * (new - 1) / new
    prompts = sum(_misses(p, admitted * prompt, cache_size) for p in usage) / (admitted * new)
    return expert_bytes * (decoding + prompts)


def _misses(p: np.ndarray, n_tokens: float, n_slots: int) -> float:
    """Misses of one layer in one pass; p: how often a token needs each expert."""
    if n_slots >= len(p):
        return 0.0
    unused = np.clip(1 - p, 1e-12, 1) ** n_tokens
    needed = 1 - unused
    if needed.sum() >= n_slots:  # any of a pass's experts may be the ones left in the slots
        return float((needed * (1 - needed * n_slots / needed.sum())).sum())
    low, high = 0.0, 1e9
    for _ in range(200):  # the t for which the expected number of cached experts is that of the slots
        t = (low + high) / 2
        low, high = (t, high) if (1 - unused**t).sum() < n_slots else (low, t)
    return float((needed * unused**low).sum())
