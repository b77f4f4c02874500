"""Measure what a miss costs here: a copy of one expert, and its computation on the CPU, from the store.

Knows caches and engines. Knows nothing of models.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from mixtral_offload.core.misses import MissCosts
from mixtral_offload.models.checkpoint import ExpertId
from mixtral_offload.runtime.cache import ExpertCache
from mixtral_offload.runtime.engines import Copy
from mixtral_offload.runtime.store import RamStore
from mixtral_offload.weights.products import Run

#: other experts each time: one that has just been read would be in the processor's cache
REPEATS = 5
MANY_TOKENS = 9


@torch.inference_mode()
def measure_miss_costs(cache: ExpertCache, run: Run, stored: Sequence[ExpertId]) -> MissCosts:
    """Measure medians of a few runs.

    Args:
        cache: Empty, with a store in RAM.
        run: Computes one expert on the CPU.
        stored: Experts of the store.
    """
    store, hidden = cache.store, cache.layout.shapes["gate"][1]
    assert isinstance(store, RamStore)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(MANY_TOKENS, hidden, generator=random, dtype=torch.float32, device="cpu")
    keys = [stored[i % len(stored)] for i in range(3 * REPEATS)]
    with cache.lock:
        copy_s = _median(keys[:REPEATS], lambda key: _copy(cache, key))
    one_s = _median(keys[REPEATS : 2 * REPEATS], lambda key: run(x[:1], store.views(key)))
    many_s = _median(keys[2 * REPEATS :], lambda key: run(x, store.views(key)))
    return MissCosts(copy_s, one_s, max(0.0, many_s - one_s) / (MANY_TOKENS - 1))


def _copy(cache: ExpertCache, key: ExpertId) -> None:
    assert cache.store is not None and cache.engine is not None
    copy = Copy(cache.store.pieces(key), cache.memory[0])
    cache.engine.start(copy)
    copy.wait()
    if cache.device.type == "cuda":
        torch.cuda.synchronize(cache.device)


def _median(keys: Sequence[ExpertId], call: Callable[[ExpertId], object]) -> float:
    times = []
    for key in (keys[0], *keys):  # the first one warms up
        began_s = time.perf_counter()
        call(key)
        times.append(time.perf_counter() - began_s)
    return statistics.median(times[1:])
