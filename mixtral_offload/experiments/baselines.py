"""A model with parts of its offloading taken away for a while: cache, guesses, or a link of full speed.

Knows the live cache and the guesses from inside, and puts everything back. Knows nothing of prompts or of results.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice, pairwise

import torch

from mixtral_offload.errors import OptionError
from mixtral_offload.models.family import check_routers
from mixtral_offload.runtime.cache import ExpertCache
from mixtral_offload.runtime.engines import make_engine
from mixtral_offload.runtime.prefetch import Prefetcher


class Forgetful(ExpertCache):
    """Keeps nothing from one pass of a layer to the next: what a token needs is copied each time."""

    def fetch(self, layer, experts, meanwhile=None):
        self.forget(layer)
        yield from super().fetch(layer, experts, meanwhile)


class Naive(Forgetful):
    """As accelerate offloads a layer: all of its experts that roam are copied before the first one runs."""

    n_experts: int  # of a layer; `make_variants` says how many

    def fetch(self, layer, experts, meanwhile=None):
        roaming = [expert for expert in range(self.n_experts) if (layer, expert) in self.store]
        everything = dict(super().fetch(layer, sorted({*roaming, *experts}), meanwhile))
        for expert in experts:
            yield expert, everything[expert]


def make_variants(model, cache_size: int, n_staging: int) -> dict[str, ExpertCache]:
    """Row of table 2 -> its cache, over the model's own store, link and slots.

    Those that forget everything need no more than one layer's slots, which all layers share.
    """
    offload, n_experts = model.offload, model.offload.checkpoint.n_experts
    slots = slots_for(offload, cache_size)
    fewest, most = (max(slots_for(offload, n).values()) for n in (offload.checkpoint.top_k, n_experts))
    one_layer = partial(_one_layer, offload)
    spare = offload.cache.lend(
        one_layer(max(sum(slots.values()) + n_staging, most))
    )  # allocates what is missing, once
    found = {
        "full": spare.lend(slots, n_staging=n_staging),
        "without prefetch": spare.lend(slots),
        "without cache and prefetch": spare.lend(one_layer(fewest), Forgetful, shared=True),
        "naive": spare.lend(one_layer(most), Naive, shared=True),
    }
    found["naive"].n_experts = n_experts
    return found


def slots_for(offload, cache_size: int) -> dict[int, int]:
    """layer -> slots, so that with the residents so many of its experts are on the device (as in `make_plan`)."""
    n_experts, top_k = offload.checkpoint.n_experts, offload.checkpoint.top_k
    resident = {layer: len(of) for layer, of in offload.plan.resident.items()}
    return {layer: min(max(cache_size - n, top_k), n_experts - n) for layer, n in resident.items()}


def _one_layer(offload, n_slots: int) -> dict[int, int]:
    """layer -> slots of a pool of so many in all."""
    first, *others = offload.checkpoint.layers
    return {first: n_slots, **dict.fromkeys(others, 0)}


@contextmanager
def switched(model, cache: ExpertCache, guesses: dict | None = None) -> Iterator[None]:
    """The model with this cache, empty; guesses: arguments for its `Prefetcher`, None for none. Whatever happens, the
    model's own cache (empty, because its slots may be lent) and prefetcher are back at the end."""
    offload = model.offload
    own = offload.cache, offload.prefetcher
    with offload.passes.lock:  # other threads' passes wait: they would run on a cache that is not theirs
        offload.cache.drain()
        cache.stats.reset()
        try:
            with offload.prefetcher.paused() if offload.prefetcher else nullcontext():
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
            cache.drain()


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
    cache.drain()
    cache.engine = make_engine(model.offload.options.device, False, n_bytes, speed)
    try:
        yield
    finally:
        cache.drain()
        cache.engine.close()
        cache.engine = own


@torch.inference_mode()
def layer_seconds(model, n_passes: int = 12) -> float:
    """One layer's compute for one token, in seconds: the same token again and again finds all its experts on the device.

    The model's time for a token over its layers, so that attention, norms and the head are in it.
    """
    offload, ids = model.offload, torch.ones(1, 1, dtype=torch.long, device=model.device)
    slots = slots_for(offload, offload.checkpoint.top_k)
    cache = offload.cache.lend(slots)
    times = [device_time(model)]
    with switched(model, cache):
        for _ in range(n_passes):
            model(ids, use_cache=False)
            times.append(device_time(model))
    return statistics.median(b - a for a, b in pairwise(times[2:])) / len(slots)  # the first ones warm up


def copy_seconds(model, n_copies: int = 6) -> float:
    """One expert's copy in seconds, from asking for it to having it, with nothing else on the link."""
    offload = model.offload
    cache = offload.cache.lend(_one_layer(offload, 1), Forgetful, shared=True)
    roaming, times = (key for key in sorted(offload.checkpoint.experts) if key in cache.store), []
    with switched(model, cache):
        for layer, expert in islice(roaming, n_copies):
            begin = device_time(model)
            next(cache.fetch(layer, [expert]))
            times.append(device_time(model) - begin)
    return statistics.median(times)


def device_time(model) -> float:
    """time.perf_counter() when the device has done all it was asked to."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
