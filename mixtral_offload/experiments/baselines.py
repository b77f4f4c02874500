"""A model with parts of its offloading taken away for a while: cache, guesses, or a link of full speed.

Knows the live cache and the guesses from inside, and puts everything back. Knows nothing of prompts or of results.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice, pairwise

import torch

from mixtral_offload.errors import OptionError
from mixtral_offload.models.family import check_routers
from mixtral_offload.runtime.cache import ExpertCache, _allocate
from mixtral_offload.runtime.engines import make_engine
from mixtral_offload.runtime.prefetch import Prefetcher


class Forgetful(ExpertCache):
    """Keeps nothing from one pass of a layer to the next: what a token needs is copied each time."""

    def serve(self, layer, experts, meanwhile=None):
        self._pools[layer].held.clear()
        yield from super().serve(layer, experts, meanwhile)


class Naive(Forgetful):
    """As accelerate offloads a layer: all of its experts that roam are copied before the first one runs."""

    n_experts: int  # of a layer; `make_variants` says how many

    def serve(self, layer, experts, meanwhile=None):
        roaming = [expert for expert in range(self.n_experts) if (layer, expert) in self.store]
        everything = dict(super().serve(layer, sorted({*roaming, *experts}), meanwhile))
        for expert in experts:
            yield expert, everything[expert]


def make_variants(model, cache_size: int, n_staging: int) -> dict[str, ExpertCache]:
    """Row of table 2 -> its cache, over the model's own store, link and slots.

    Those that forget everything need no more than one layer's slots, which all layers share.
    """
    offload, n_experts = model.offload, model.offload.checkpoint.n_experts
    slots = _slots(offload, cache_size)
    fewest, most = (max(_slots(offload, n).values()) for n in (offload.checkpoint.top_k, n_experts))
    one_layer = partial(_one_layer, offload)
    rows = _rows(offload, max(sum(slots.values()) + n_staging, most))
    found = {
        "full": _borrow(ExpertCache, offload, rows, slots, n_staging=n_staging),
        "without prefetch": _borrow(ExpertCache, offload, rows, slots),
        "without cache and prefetch": _borrow(Forgetful, offload, rows, one_layer(fewest), shared=True),
        "naive": _borrow(Naive, offload, rows, one_layer(most), shared=True),
    }
    found["naive"].n_experts = n_experts
    return found


def _slots(offload, cache_size: int) -> dict[int, int]:
    """layer -> slots, so that with the residents so many of its experts are on the device (as in `make_plan`)."""
    n_experts, top_k = offload.checkpoint.n_experts, offload.checkpoint.top_k
    resident = {layer: len(of) for layer, of in offload.plan.resident.items()}
    return {layer: min(max(cache_size - n, top_k), n_experts - n) for layer, n in resident.items()}


def _one_layer(offload, n_slots: int) -> dict[int, int]:
    """layer -> slots of a pool of so many in all."""
    first, *others = offload.checkpoint.layers
    return {first: n_slots, **dict.fromkeys(others, 0)}


def _rows(offload, n_rows: int) -> list[torch.Tensor]:
    """Memory for so many experts on the device: the model's own slots, and more only if there are too few."""
    own = offload.cache
    more = _allocate(max(0, n_rows - len(own._rows)), own.layout.n_bytes, offload.options.device)
    return [*own._slab[: len(own._rows)], *more]


def _borrow(kind: type[ExpertCache], offload, rows, slots: dict[int, int], **options) -> ExpertCache:
    """A cache in these rows, with the model's own residents where they are."""
    own = offload.cache
    layers = {layer: (n, ()) for layer, n in slots.items()}
    cache = kind(own.layout, layers, own.store, own.engine, "meta", **options)  # no memory of its own
    n_rows = len(cache._rows)
    cache._slab = [*rows[:n_rows], *(own._slab[row] for row in own._resident.values())]
    cache._views = [own.layout.views(row) for row in cache._slab]
    cache._resident = {key: row for row, key in enumerate(own._resident, n_rows)}
    cache.clear()  # its pools must know the residents
    return cache


@contextmanager
def switched(model, cache: ExpertCache, guesses: dict | None = None) -> Iterator[None]:
    """The model with this cache, empty; guesses: arguments for its `Prefetcher`, None for none. Whatever happens, the
    model's own cache (empty, because its slots may be lent) and prefetcher are back at the end."""
    offload = model.offload
    own = offload.cache, offload.prefetcher
    with offload.passes.lock:  # other threads' passes wait: they would run on a cache that is not theirs
        _empty(offload.cache)
        cache.stats.reset()
        try:
            with _muted(offload.prefetcher):
                offload.cache, offload.prefetcher = cache, None
                if guesses is not None:
                    check_routers(offload.layers)
                    layers, passes = offload.layers, offload.passes
                    offload.prefetcher = Prefetcher(model, layers, offload.prefetch, passes=passes, **guesses)
                yield
        finally:
            if offload.prefetcher not in (None, own[1]):
                offload.prefetcher.close()
            offload.cache, offload.prefetcher = own
            _empty(cache)


def _empty(cache: ExpertCache) -> None:
    """Nothing in it that roams, and nothing on its way any more: its rows may serve another."""
    with cache.lock:
        cache.clear()
        for guess in cache._dropped:
            guess.copy.abandon()
        cache.settle()


@contextmanager
def _muted(prefetcher: Prefetcher | None) -> Iterator[None]:
    """Its hooks stay where they are and find no layer to guess for."""
    if prefetcher is None:
        yield
        return
    targets, prefetcher._targets = prefetcher._targets, [([], [])] * len(prefetcher._targets)
    try:
        yield
    finally:
        prefetcher._targets = targets


@contextmanager
def slow_link(model, ratio: float | None, layer_s: float | None = None) -> Iterator[None]:
    """The model's link slowed down until one expert's copy takes `ratio` times one layer's compute: layer_s, or measured here.

    None: as it is. Raises OptionError for a ratio that is not above 0.
    """
    cache, own = model.offload.cache, model.offload.cache.engine
    if ratio is None:
        yield
        return
    if isinstance(ratio, str) or not 0 < ratio < float("inf"):
        raise OptionError("impossible ratio", expected='more than 0, None or "auto"', found=ratio)
    n_bytes = cache.layout.n_bytes
    speed = n_bytes / (ratio * (layer_s or layer_seconds(model)))
    _empty(cache)
    cache.engine = make_engine(model.offload.options.device, False, n_bytes, speed)
    try:
        yield
    finally:
        _empty(cache)
        cache.engine.close()
        cache.engine = own


@torch.inference_mode()
def layer_seconds(model, n_passes: int = 12) -> float:
    """One layer's compute for one token, in seconds: the same token again and again finds all its experts on the device.

    The model's time for a token over its layers, so that attention, norms and the head are in it.
    """
    offload, ids = model.offload, torch.ones(1, 1, dtype=torch.long, device=model.device)
    slots = _slots(offload, offload.checkpoint.top_k)
    cache = _borrow(ExpertCache, offload, _rows(offload, sum(slots.values())), slots)
    times = [_now(model)]
    with switched(model, cache):
        for _ in range(n_passes):
            model(ids, use_cache=False)
            times.append(_now(model))
    return statistics.median(b - a for a, b in pairwise(times[2:])) / len(slots)  # the first ones warm up


def copy_seconds(model, n_copies: int = 6) -> float:
    """One expert's copy in seconds, from asking for it to having it, with nothing else on the link."""
    offload = model.offload
    cache = _borrow(Forgetful, offload, _rows(offload, 1), _one_layer(offload, 1), shared=True)
    roaming, times = (key for key in sorted(offload.checkpoint.experts) if key in cache.store), []
    with switched(model, cache):
        for layer, expert in islice(roaming, n_copies):
            begin = _now(model)
            next(cache.serve(layer, [expert]))
            times.append(_now(model) - begin)
    return statistics.median(times)


def _now(model) -> float:
    """time.perf_counter() when the device has done all it was asked to."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
