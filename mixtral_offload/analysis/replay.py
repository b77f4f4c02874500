"""Replay a trace with another cache: policies, sizes, one pool or many, and Belady's optimum as the bound.

Carries out the decisions of `core/residency.py`, as the live cache does: with a run's own settings, a replay
counts exactly its hits, misses and bytes. Knows no models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mixtral_offload.analysis.replay_setup import (
    BELADY,
    ordered_uses,
    pool_maker,
    resolve_settings,
    rule_of_run,
    tokens_of_uses,
)
from mixtral_offload.analysis.timed_replay import TimedReplay, timed_replay
from mixtral_offload.core.costs import DeviceCosts
from mixtral_offload.core.misses import COPY, MissRule
from mixtral_offload.core.policies import Key
from mixtral_offload.core.residency import Do, Pool, Residency
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import OptionError


@dataclass(frozen=True)
class Replay:
    """Result of a replay.

    Attributes:
        trace: The replayed one.
        hit: bool, for each use of the trace.
        on_cpu: bool, likewise: misses that the CPU computes.
        settings: Slots, policy, whether there is one pool.
        timing: None for a replay without costs.
    """

    trace: RoutingTrace
    hit: np.ndarray
    on_cpu: np.ndarray
    settings: dict[str, Any]
    timing: TimedReplay | None = None

    @property
    def hits(self) -> int:
        """Uses whose expert is resident or cached."""
        return int(self.hit.sum())

    @property
    def misses(self) -> int:
        """Uses whose expert is neither resident nor cached."""
        return len(self.hit) - self.hits

    @property
    def hit_rate(self) -> float:
        """Hits divided by uses; nan without uses."""
        return self.hits / len(self.hit) if len(self.hit) else float("nan")

    @property
    def bytes_moved(self) -> int:
        """Bytes that the misses copy; those that the CPU computes copy none."""
        return (self.misses - int(self.on_cpu.sum())) * self.trace.expert_bytes

    def hit_rates(self) -> np.ndarray:
        """Compute the hit rate by layer: float64 `[L]`."""
        of_layer = self.trace.use_layer
        uses = np.bincount(of_layer, minlength=self.trace.n_layers)
        return np.bincount(of_layer, self.hit, minlength=self.trace.n_layers) / np.maximum(uses, 1)


def replay(
    trace: RoutingTrace,
    cache_size: int | Sequence[int] | None = None,
    policy: str | None = None,
    shared: bool | None = None,
    watch: Callable[[int, int, Pool], None] | None = None,
    *,
    costs: DeviceCosts | None = None,
    prefetch: int = 0,
    look_ahead: int = 1,
    misses: MissRule | None = None,
) -> Replay:
    """Replay a trace with other settings; what is None stays as in the run.

    Args:
        trace: From `record`, `RoutingTrace.load` or `analysis/synthetic.py`.
        cache_size: Slots of each layer, or one number for all. None keeps the residents, too.
        policy: "lru", "lfu", "lrfu" or "belady".
        shared: One pool for all layers, as large as the layers' slots together.
        watch: Called with (pass, layer, pool) before each pass of a layer.
        costs: Replay in time too (`timed_replay`). prefetch and look_ahead matter only then.
        prefetch: Experts to predict for each of the next `look_ahead` layers, by the trace's own predictions.
        look_ahead: Layers.
        misses: Which missing experts the CPU computes; None: as in the run.

    Raises:
        OptionError: For settings that no run could have, and for a run in which the CPU computed misses and
            predictions decided what was copied: without times, nothing says which of them came in time.
    """
    rule = rule_of_run(trace) if misses is None else misses
    if misses is None and rule.mode != COPY and trace.settings.get("prefetch"):
        raise OptionError(
            "what this run's cache held depended on when predictions arrived",
            found=f"misses={rule.mode!r}, prefetch={trace.settings['prefetch']}",
            hint="timed_replay(trace, costs, prefetch=...), or replay(trace, misses=MissRule()) as if all "
            "had been copied",
        )
    slots, residents, policy, shared = resolve_settings(trace, cache_size, policy, shared)
    if prefetch and costs is None:
        raise OptionError(
            "predictions change no hits, only times",
            found=f"prefetch={prefetch} without costs",
            hint="replay(..., costs=DeviceCosts(...), prefetch=...)",
        )
    keys, bounds, uses = ordered_uses(trace)
    hit, on_cpu = np.zeros((2, len(keys)), bool)
    of_uses = tokens_of_uses(trace)[uses].tolist()
    residency = Residency(pool_maker(trace, keys, slots, residents, policy, shared), misses=rule)
    starts = uses[bounds[:-1]]
    parts = zip(trace.use_pass[starts].tolist(), trace.use_layer[starts].tolist(), pairwise(bounds))
    for number, layer, (begin, end) in parts:
        pool = residency.pools[layer]
        needed: Sequence[Key] = keys[begin:end]
        if watch is not None:
            watch(number, layer, pool)
        if pool.use_held(needed):  # nothing to decide: most passes of a large cache
            hit[begin:end] = True
            continue
        for action in residency.begin(layer, needed, of_uses[begin:end]):
            if action.load is None and action.do in (Do.USE, Do.COMPUTE):
                of = hit if action.do is Do.USE else on_cpu
                of[begin + needed.index(action.key)] = True
    in_order = np.empty((2, len(keys)), bool)
    in_order[:, uses] = hit, on_cpu
    timing = None
    if costs is not None:
        timing = timed_replay(
            trace,
            costs,
            cache_size=cache_size,
            policy=policy,
            shared=shared,
            prefetch=prefetch,
            look_ahead=look_ahead,
            misses=misses,
        )
    settings = {"slots": slots, "policy": policy, "shared_slots": shared}
    return Replay(trace, in_order[0], in_order[1], settings, timing)


def hit_rate_curves(
    trace: RoutingTrace,
    policies: Sequence[str] = ("lru", "lfu", "lrfu", BELADY),
    sizes: Sequence[int] | None = None,
    shared: bool = False,
) -> dict[str, np.ndarray]:
    """Replay every policy with every cache size: policy -> hit rate by layer, float64 `[sizes, L]`.

    Args:
        sizes: Slots of each layer. Default: from the top-k to all experts.
        shared: One pool for all layers.
    """
    sizes = range(trace.top_k, trace.n_experts + 1) if sizes is None else sizes
    return {
        name: np.stack([replay(trace, k, name, shared, misses=MissRule()).hit_rates() for k in sizes])
        for name in policies
    }


def best_allocation(trace: RoutingTrace, total: int, policy: str = "lru") -> list[int]:
    """Find the slots of each layer, `total` together, that give this trace the most hits (exactly).

    Raises:
        OptionError: The total does not give each layer from top-k slots to all experts.
    """
    sizes = list(range(trace.top_k, trace.n_experts + 1))
    least, most = trace.n_layers * sizes[0], trace.n_layers * sizes[-1]
    if not least <= total <= most:
        raise OptionError("impossible total of slots", expected=f"{least} to {most}", found=total)
    uses = np.bincount(trace.use_layer, minlength=trace.n_layers)
    hits = hit_rate_curves(trace, [policy], sizes)[policy] * uses  # [sizes, L]
    best, chosen = {0: 0.0}, list[dict[int, tuple[float, int]]]()
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


def cache_contents(trace: RoutingTrace, **settings: Any) -> np.ndarray:
    """Find what a replay's cache holds when each pass reaches each layer: bool `[P, L, E]`.

    Args:
        settings: As for `replay`.
    """
    n = trace.n_experts
    held = np.zeros((trace.n_passes, trace.n_layers, n), bool)

    def look(number: int, layer: int, pool: Pool) -> None:
        keys = range(layer * n, layer * n + n)
        held[number, layer] = [key in pool.held or key in pool.resident for key in keys]

    replay(trace, **settings, watch=look)
    return held


def reuse_distances(trace: RoutingTrace) -> np.ndarray:
    """Count how many other experts of a layer were used between two uses of one: int64 `[L, E + 1]`.

    Column d counts uses at distance d (an LRU cache of more than d slots has them); the last one counts first
    uses.
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
