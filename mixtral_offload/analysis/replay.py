"""Replays a trace under another cache: policies, sizes, one pool or many, and Belady's optimum as the bound.

Carries out the decisions of `core/residency.py`, as the live cache does, so that a replay under a run's own settings
counts exactly its hits, misses and bytes. Knows no models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mixtral_offload.analysis.replay_setup import BELADY, ordered_uses, pool_maker, resolve_settings
from mixtral_offload.analysis.timed_replay import TimedReplay, timed_replay
from mixtral_offload.core.costs import DeviceCosts
from mixtral_offload.core.residency import Do, Pool, Residency
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import OptionError


@dataclass(frozen=True)
class Replay:
    """Result of a replay.

    Attributes:
        hit: bool, for each use of the trace.
        settings: Slots, policy, whether there is one pool.
        timing: If it was given costs.
    """

    trace: RoutingTrace
    hit: np.ndarray
    settings: dict
    timing: TimedReplay | None = None

    @property
    def hits(self) -> int:
        return int(self.hit.sum())

    @property
    def misses(self) -> int:
        return len(self.hit) - self.hits

    @property
    def hit_rate(self) -> float:
        return self.hits / len(self.hit) if len(self.hit) else float("nan")

    @property
    def bytes_moved(self) -> int:
        """What the misses copy."""
        return self.misses * self.trace.expert_bytes

    def hit_rates(self) -> np.ndarray:
        """By layer: float64 [L]."""
        of_layer = self.trace.use_layer
        uses = np.bincount(of_layer, minlength=self.trace.n_layers)
        return np.bincount(of_layer, self.hit, minlength=self.trace.n_layers) / np.maximum(uses, 1)


def replay(
    trace: RoutingTrace, cache_size: int | Sequence[int] | None = None, policy: str | None = None,
    shared: bool | None = None, watch: Callable[[int, int, Pool], None] | None = None, *,
    costs: DeviceCosts | None = None, prefetch: int = 0, look_ahead: int = 1,
) -> Replay:  # fmt: skip
    """Replay a trace under these settings; what is None stays as it was in the run (residents too, if cache_size is None).

    Args:
        trace: From `record`, `RoutingTrace.load` or `analysis/synthetic.py`.
        cache_size: Slots of each layer, or one number for all.
        policy: "lru", "lfu", "lrfu" or "belady".
        shared: One pool for all layers, as large as the layers' slots together.
        watch: Called with (pass, layer, pool) before each.
        costs: Replay in time too (`timed_replay`). prefetch and look_ahead matter only then.
        prefetch: Experts to ask for in each of the next `look_ahead` layers, of those that the trace's predictions name.
        look_ahead: Layers.

    Raises:
        OptionError: For what no run could have.
    """
    slots, residents, policy, shared = resolve_settings(trace, cache_size, policy, shared)
    if prefetch and costs is None:
        raise OptionError("predictions change no hits, only times", found=f"prefetch={prefetch} without costs",
                          hint="replay(..., costs=DeviceCosts(...), prefetch=...)")  # fmt: skip
    keys, bounds, uses = ordered_uses(trace)
    hit = np.zeros(len(keys), bool)
    residency = Residency(pool_maker(trace, keys, slots, residents, policy, shared))
    starts = uses[bounds[:-1]]
    for number, layer, begin, end in zip(
        trace.use_pass[starts].tolist(), trace.use_layer[starts].tolist(), bounds, bounds[1:]
    ):
        pool, needed = residency.pools[layer], keys[begin:end]
        if watch is not None:
            watch(number, layer, pool)
        if pool.use_held(needed):  # nothing to decide: most passes of a large cache
            hit[begin:end] = True
            continue
        for action in residency.begin(layer, needed):
            if action.do is Do.USE and action.load is None:
                hit[begin + needed.index(action.key)] = True
    in_order = np.empty_like(hit)
    in_order[uses] = hit
    timing = None
    if costs is not None:
        timing = timed_replay(trace, costs, cache_size=cache_size, policy=policy, shared=shared, prefetch=prefetch,
                              look_ahead=look_ahead)  # fmt: skip
    return Replay(trace, in_order, {"slots": slots, "policy": policy, "shared_slots": shared}, timing)


def hit_rate_curves(
    trace: RoutingTrace, policies: Sequence[str] = ("lru", "lfu", "lrfu", BELADY), sizes: Sequence[int] | None = None,
    shared: bool = False,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Hit rate by layer for each policy and cache size: policy -> float64 [sizes, L]; sizes: default top-k to all."""
    sizes = range(trace.top_k, trace.n_experts + 1) if sizes is None else sizes
    return {name: np.stack([replay(trace, k, name, shared).hit_rates() for k in sizes]) for name in policies}


def best_allocation(trace: RoutingTrace, total: int, policy: str = "lru") -> list[int]:
    """Slots for each layer, `total` together, that give this trace the most hits (exact, by dynamic programming).

    Each layer gets from top-k to all experts; raises OptionError for a total outside of that.
    """
    sizes = list(range(trace.top_k, trace.n_experts + 1))
    least, most = trace.n_layers * sizes[0], trace.n_layers * sizes[-1]
    if not least <= total <= most:
        raise OptionError("impossible total of slots", expected=f"{least} to {most}", found=total)
    uses = np.bincount(trace.use_layer, minlength=trace.n_layers)
    hits = hit_rate_curves(trace, [policy], sizes)[policy] * uses  # [sizes, L]
    best, chosen = {0: 0.0}, []
    for layer in range(trace.n_layers):
        options: dict[int, tuple[float, int]] = {}
        for spent, value in best.items():
            for size, gained in zip(sizes, hits[:, layer]):
                options[spent + size] = max(options.get(spent + size, (-1.0, 0)), (value + gained, size))
        best = {spent: value for spent, (value, _) in options.items()}
        chosen.append(options)
    slots = []
    for options in reversed(chosen):
        slots.append(options[total][1])
        total -= slots[-1]
    return slots[::-1]


def cache_contents(trace: RoutingTrace, **settings) -> np.ndarray:
    """What a replay's cache holds when each pass reaches each layer: bool [P, L, E]. settings: as for `replay`."""
    held = np.zeros((trace.n_passes, trace.n_layers, trace.n_experts), bool)

    def look(number: int, layer: int, pool: Pool) -> None:
        for key in (*pool.held, *pool.resident):
            if key // trace.n_experts == layer:
                held[number, layer, key % trace.n_experts] = True

    replay(trace, **settings, watch=look)
    return held


def reuse_distances(trace: RoutingTrace) -> np.ndarray:
    """How many different experts of the layer were used between two uses of one expert: int64 [L, E + 1].

    Column d counts uses at distance d (an LRU cache of more than d slots has them); the last one counts first uses.
    """
    keys, bounds, uses = ordered_uses(trace)
    found = np.zeros((trace.n_layers, trace.n_experts + 1), np.int64)
    recent: list[list[int]] = [[] for _ in range(trace.n_layers)]  # most recent first
    layers = trace.use_layer[uses].tolist()
    for begin, end in pairwise(bounds):
        of_layer = recent[layers[begin]]
        before = list(of_layer)
        for key in keys[begin:end]:
            distance = before.index(key) if key in before else trace.n_experts
            found[layers[begin], distance] += 1
            if key in of_layer:
                of_layer.remove(key)
            of_layer.insert(0, key)
    return found
