"""Baselines: without cache, predictions, sorting by expert, pruning or quantization; a throttled link.

Replaces parts of the live cache, prefetcher, forward pass and transformers' `generate`, and restores them.
Knows no prompts; of answers only that each baseline must give the same.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, StoppingCriteria

from mixtral_offload.core.misses import COPY
from mixtral_offload.errors import OffloadError, OptionError
from mixtral_offload.generation.batch import GenerationRequest, generate_batch
from mixtral_offload.models.family import check_routers
from mixtral_offload.runtime import forward
from mixtral_offload.runtime.build import from_pretrained
from mixtral_offload.runtime.cache import ExpertCache, OnCpu, Views
from mixtral_offload.runtime.convert import convert_checkpoint
from mixtral_offload.runtime.engines import make_engine
from mixtral_offload.runtime.offload import Offload, OffloadedModel
from mixtral_offload.runtime.prefetch import Prefetcher
from mixtral_offload.weights.hqq import Quantization


class Forgetful(ExpertCache):
    """A cache that keeps nothing from one pass of a layer to the next."""

    def rows_here(
        self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None = None
    ) -> None:
        """Nothing is here: all goes through `fetch`."""

    def fetch(
        self,
        layer: int,
        experts: Sequence[int],
        meanwhile: Callable[[], None] | None = None,
        on_cpu: OnCpu | None = None,
    ) -> Iterator[tuple[int, Views]]:
        """Forget the layer's experts, then fetch."""
        self.forget(layer)
        yield from super().fetch(layer, experts, meanwhile)


class Naive(Forgetful):
    """A cache that copies all stored experts of a layer before the first one runs, as accelerate does."""

    n_experts: int  # of a layer; set by `make_variants`

    def fetch(
        self,
        layer: int,
        experts: Sequence[int],
        meanwhile: Callable[[], None] | None = None,
        on_cpu: OnCpu | None = None,
    ) -> Iterator[tuple[int, Views]]:
        """Fetch all of the layer's experts, then yield those that are needed."""
        assert self.store is not None  # see `check_can_switch`
        stored = [expert for expert in range(self.n_experts) if (layer, expert) in self.store]
        everything = dict(super().fetch(layer, sorted({*stored, *experts}), meanwhile))
        for expert in experts:
            yield expert, everything[expert]


def make_variants(model: OffloadedModel, cache_size: int, n_staging: int) -> dict[str, ExpertCache]:
    """Make a cache for each row of table 2, over the model's own store, link and slots.

    Those that forget everything need no more than one layer's slots, which all layers share.
    """
    offload, n_experts = model.offload, model.offload.checkpoint.n_experts
    slots = _slots(offload, cache_size)
    fewest, most = (max(_slots(offload, n).values()) for n in (offload.checkpoint.top_k, n_experts))
    n_rows = max(sum(slots.values()) + n_staging, most)
    # allocates rows that are missing, once
    spare: ExpertCache = offload.cache.lend(_one_layer(offload, n_rows))
    naive = spare.lend(_one_layer(offload, most), Naive, shared=True)
    assert isinstance(naive, Naive)
    naive.n_experts = n_experts
    return {
        "full": spare.lend(slots, n_staging=n_staging),
        "without prefetch": spare.lend(slots),
        "without cache and prefetch": spare.lend(_one_layer(offload, fewest), Forgetful, shared=True),
        "naive": naive,
    }


def _slots(offload: Offload, cache_size: int) -> dict[int, int]:
    """layer -> slots, with which `cache_size` of its experts are on the device, residents included."""
    n_experts, top_k = offload.checkpoint.n_experts, offload.checkpoint.top_k
    resident = {layer: len(of) for layer, of in offload.plan.resident.items()}
    return {layer: min(max(cache_size - n, top_k), n_experts - n) for layer, n in resident.items()}


def _one_layer(offload: Offload, n_slots: int) -> dict[int, int]:
    """layer -> its part of a pool of `n_slots`."""
    first, *others = offload.checkpoint.layers
    return {first: n_slots, **dict.fromkeys(others, 0)}


def smallest_cache(model: OffloadedModel) -> ExpertCache:
    """Make a cache of top-k slots per layer, in the model's own memory."""
    return model.offload.cache.lend(_slots(model.offload, model.offload.checkpoint.top_k))


def check_can_switch(model: OffloadedModel, verb: str, nothing: str) -> None:
    """Refuse a model whose cache cannot be switched.

    Args:
        verb: What the caller does with the model, for the message.
        nothing: Why that is pointless with every expert on the device, for the message.

    Raises:
        OptionError: Every expert is on the device, the CPU computes misses, or the model is being recorded.
    """
    if model.offload.options.misses != COPY:
        raise OptionError(
            f"to {verb} a model, all its misses must be copied",
            found=f"misses={model.offload.options.misses!r}",
            hint='build it with misses="copy"',
        )
    if model.offload.plan.store is None:
        what = f"every expert of this model is on the device: {nothing}"
        hint = "build it with a smaller cache_size: from_pretrained(..., cache_size=2)"
        raise OptionError(what, hint=hint)
    if len(model.offload.observers):
        raise OptionError("this model is being recorded", hint=f"{verb} it outside of `record`")


@contextmanager
def switched(
    model: OffloadedModel, cache: ExpertCache, predict: dict[str, Any] | None = None
) -> Iterator[None]:
    """Use another cache, empty, until the block ends.

    Whatever happens, the model's own cache (empty, because its slots may be lent) and prefetcher come back.

    Args:
        predict: Arguments for the cache's `Prefetcher`; None for none.
    """
    offload = model.offload
    own = offload.cache, offload.prefetcher
    with offload.passes.lock:  # other threads' passes wait: they must not run with this cache
        offload.cache.drain()
        cache.stats.reset()
        try:
            with offload.prefetcher.paused() if offload.prefetcher else nullcontext():
                offload.cache, offload.prefetcher = cache, None
                if predict is not None:
                    check_routers(offload.layers)
                    layers, passes = offload.layers, offload.passes
                    offload.prefetcher = Prefetcher(model, layers, offload.prefetch, passes=passes, **predict)
                yield
        finally:
            if offload.prefetcher is not None and offload.prefetcher is not own[1]:
                offload.prefetcher.close()
            offload.cache, offload.prefetcher = own
            cache.drain()


@contextmanager
def throttled(model: OffloadedModel, ratio: float | None, layer_s: float | None = None) -> Iterator[None]:
    """Throttle the link until one expert's copy takes `ratio` times one layer's compute.

    Args:
        ratio: None: the link as it is.
        layer_s: One layer's compute in seconds. Default: measured here.

    Raises:
        OptionError: The ratio is not above 0.
    """
    cache, own = model.offload.cache, model.offload.cache.engine
    if ratio is None:
        yield
        return
    if not 0 < ratio < float("inf"):
        raise OptionError("impossible ratio", expected="more than 0, or None", found=ratio)
    n_bytes = cache.layout.n_bytes
    speed = n_bytes / (ratio * (layer_s or layer_seconds(model)))
    cache.drain()
    cache.engine = engine = make_engine(cache.device, False, n_bytes, speed)
    try:
        yield
    finally:
        cache.drain()
        engine.close()
        cache.engine = own


@torch.inference_mode()
def layer_seconds(model: OffloadedModel, n_passes: int = 12) -> float:
    """Measure one layer's compute for one token, in seconds.

    The same token is repeated, so that all its experts are on the device. This is the model's time for a
    token divided by its layers: attention, norms and the head are in it.
    """
    ids = torch.ones(1, 1, dtype=torch.long, device=model.device)
    times = [device_time(model)]
    with switched(model, smallest_cache(model)):
        for _ in range(n_passes):
            model(ids, use_cache=False)
            times.append(device_time(model))
    n_layers = len(model.offload.checkpoint.layers)
    return statistics.median(b - a for a, b in pairwise(times[2:])) / n_layers  # the first ones warm up


def copy_seconds(model: OffloadedModel, n_copies: int = 6) -> float:
    """Measure one expert's copy in seconds, from request to arrival, with nothing else on the link."""
    offload = model.offload
    cache = offload.cache.lend(_one_layer(offload, 1), Forgetful, shared=True)
    assert cache.store is not None  # see `check_can_switch`
    stored = [key for key in sorted(offload.checkpoint.experts) if key in cache.store]
    times = []
    with switched(model, cache):
        for layer, expert in stored[:n_copies]:
            begin = device_time(model)
            next(cache.fetch(layer, [expert]))
            times.append(device_time(model) - begin)
    return statistics.median(times)


def device_time(model: OffloadedModel) -> float:
    """Return `time.perf_counter()` once the device has finished its work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def check_same(variant: str, place: str, answer: list[int], expected: list[int]) -> None:
    """Refuse results of variants whose answers differ.

    Raises:
        OffloadError: With the first token that differs, after `place`.
    """
    if answer != expected:
        at = next((i for i, (a, b) in enumerate(zip(answer, expected)) if a != b), len(answer))
        raise OffloadError(
            f"an answer depends on {variant}",
            key=f"{place}, token {at}",
            expected=expected[at:][:1],
            found=answer[at:][:1],
            hint="the figures would mean nothing; please report this",
        )


@contextmanager
def no_end(model: OffloadedModel) -> Iterator[None]:
    """Ignore end tokens, so that each answer is as long as its request says."""
    configs: tuple[GenerationConfig | PreTrainedConfig, ...] = model.generation_config, model.config
    own = [config.eos_token_id for config in configs]
    for config in configs:
        config.eos_token_id = None
    try:
        yield
    finally:
        for config, ends in zip(configs, own):
            config.eos_token_id = ends


def continuous(
    model: OffloadedModel, requests: Sequence[GenerationRequest], batch_size: int
) -> list[list[int]]:
    """Run `generate_batch`; return the new tokens of each request, in the order of the requests."""
    found = {answer.number: answer.ids for answer in generate_batch(model, requests, batch_size=batch_size)}
    return [found[number] for number in range(len(requests))]


def in_groups(
    model: OffloadedModel, requests: Sequence[GenerationRequest], batch_size: int
) -> list[list[int]]:
    """Prune sequences that have ended, and admit none before all of their group have."""
    groups = [requests[first : first + batch_size] for first in range(0, len(requests), batch_size)]
    return [answer for group in groups for answer in continuous(model, group, batch_size)]


class RowLimits(StoppingCriteria):
    """Stopping criterion: go on until every row has ended.

    Args:
        lengths: int64 `[rows]`, the length at which each row ends.
    """

    def __init__(self, lengths: Tensor):
        self.lengths = lengths

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Return which rows have ended: bool `[rows]`."""
        return input_ids.shape[1] >= self.lengths


@torch.inference_mode()
def static_batches(
    model: OffloadedModel, requests: Sequence[GenerationRequest], batch_size: int
) -> list[list[int]]:
    """Generate with transformers on batches padded on the left, in the order given, as plain PyTorch does it.

    Tokens of a row after its end are computed and discarded. Padding uses no experts, as in `generate_batch`.

    Args:
        model: Also one without `offload`.
    """
    answers: list[list[int]] = []
    has_offload = hasattr(model, "offload")
    for first in range(0, len(requests), batch_size):
        some = requests[first : first + batch_size]
        width, limits = max(len(of.ids) for of in some), [of.max_new_tokens for of in some]
        ids, mask = (torch.tensor(rows, device=model.device) for rows in _left_padded(some, width))
        stop = [RowLimits(torch.tensor(limits, device=model.device) + width)]
        settings = {"max_new_tokens": max(limits), "do_sample": False, "pad_token_id": 0}
        with model.offload.passes.without_padding() if has_offload else nullcontext():
            found = model.generate(ids, attention_mask=mask, stopping_criteria=stop, **settings)
        answers += [row[:limit] for row, limit in zip(found[:, width:].tolist(), limits)]
    return answers


def _left_padded(
    requests: Sequence[GenerationRequest], width: int
) -> tuple[list[list[int]], list[list[int]]]:
    padding = [width - len(of.ids) for of in requests]
    ids = [[0] * n + of.ids for n, of in zip(padding, requests)]
    return ids, [[0] * n + [1] * (width - n) for n in padding]


@contextmanager
def unsorted() -> Iterator[None]:
    """Run each token's experts for it alone, token after token, in every model of this process."""
    own, forward.run_tokens = forward.run_tokens, _run_one_by_one
    try:
        yield
    finally:
        forward.run_tokens = own


def _run_one_by_one(
    offload: Offload, layer: int, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Stand in for `forward.run_tokens`; predictions are made once, as there."""
    n_tokens, top_k = top_k_index.shape
    chosen, meanwhile = forward.read_routing(offload, layer, top_k_index.reshape(-1), n_tokens)
    y, began_s = x.new_empty(n_tokens * top_k, x.shape[-1]), time.perf_counter()
    with offload.cache.lock:
        for token in range(n_tokens):
            places = {expert: token * top_k + i for i, expert in enumerate(chosen[token * top_k :][:top_k])}
            for expert, views in offload.cache.fetch(layer, sorted(places), meanwhile):
                y[places[expert]] = offload.computation.run(x[token : token + 1], views)[0]
            meanwhile = None
        forward.tell_routed(offload, layer, top_k_index, top_k_weights, began_s)
    return y.view(n_tokens, top_k, -1)


@contextmanager
def unquantized(model: OffloadedModel) -> Iterator[OffloadedModel]:
    """Load the same model with its experts at 16 bits and the same number of slots, from a temporary folder.

    The weights are the same numbers: `dequantize` works in fp16.
    """
    options = model.offload.options
    same: dict[str, Any] = {field.name: getattr(options, field.name) for field in fields(options)}
    with tempfile.TemporaryDirectory() as folder:
        target = convert_checkpoint(model.offload.checkpoint.folder, Path(folder) / "16bit", Quantization(16))
        found = from_pretrained(target, **same | {"store": model.offload.plan.store or "auto"})
        try:
            yield found
        finally:
            found.offload.close()
