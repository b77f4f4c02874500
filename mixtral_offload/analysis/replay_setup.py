"""What every replay begins with: its settings, the order of the uses, and the residency of its experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mixtral_offload.core.misses import COPY, MissCosts, MissRule
from mixtral_offload.core.policies import POLICIES, Belady, Policy, make_policy
from mixtral_offload.core.residency import Pool
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import OptionError

BELADY = "belady"


def resolve_settings(
    trace: RoutingTrace, cache_size: int | Sequence[int] | None, policy: str | None, shared: bool | None
) -> tuple[list[int], list[Sequence[int]], str, bool]:
    """Return slots and residents by layer, policy, and whether there is one pool. None: as in the run.

    Raises:
        OptionError: For settings that no run could have.
    """
    run = trace.settings
    policy = run["policy"] if policy is None else policy
    shared = run["shared_slots"] if shared is None else shared
    residents = run["resident"] if cache_size is None else [()] * trace.n_layers
    slots = run["slots"] if cache_size is None else np.broadcast_to(cache_size, trace.n_layers).tolist()
    if cache_size is not None and not all(trace.top_k <= n <= trace.n_experts for n in slots):
        expected = f"{trace.top_k} to {trace.n_experts} experts per layer"
        raise OptionError("impossible cache_size", expected=expected, found=cache_size)
    if policy not in (*POLICIES, BELADY):
        raise OptionError("unknown policy", expected=", ".join((*POLICIES, BELADY)), found=policy)
    return slots, residents, policy, shared


def ordered_uses(trace: RoutingTrace) -> tuple[list[int], list[int], np.ndarray]:
    """Order the uses as the live cache handles them.

    Returns:
        The key (layer * E + expert) of each; where each pass of a layer begins, and the last one ends; and
        the number of the trace's use for each.
    """
    uses = np.lexsort((trace.use_expert, trace.use_layer, trace.use_pass))
    layer, number = trace.use_layer[uses], trace.use_pass[uses]
    changes = np.flatnonzero((np.diff(layer) != 0) | (np.diff(number) != 0)) + 1
    keys = layer * trace.n_experts + trace.use_expert[uses]
    return keys.tolist(), [0, *changes.tolist(), len(uses)] if len(uses) else [0], uses


def tokens_of_uses(trace: RoutingTrace) -> np.ndarray:
    """How many tokens of its pass each use of the trace was for: int64, like use_pass."""
    layer, n_layers, n_experts = np.arange(trace.n_layers)[None, :, None], trace.n_layers, trace.n_experts
    chosen = (trace.passes.astype(np.int64)[:, None, None] * n_layers + layer) * n_experts + trace.experts
    use = (trace.use_pass.astype(np.int64) * n_layers + trace.use_layer) * n_experts + trace.use_expert
    found, counts = np.unique(chosen, return_counts=True)
    return counts[np.searchsorted(found, use)]


def rule_of_run(trace: RoutingTrace) -> MissRule:
    """Return the rule by which a run treated its misses."""
    kept = trace.settings.get("misses") or {}  # none in traces of before there was a choice
    costs = kept.get("costs")
    return MissRule(kept.get("mode", COPY), None if costs is None else MissCosts(**costs))


def pool_maker(
    trace: RoutingTrace,
    keys: Sequence[int],
    slots: Sequence[int],
    residents: Sequence[Sequence[int]],
    policy: str,
    shared: bool,
) -> Callable[[], dict[int, Pool]]:
    """Return a function that makes a `Residency`'s pools.

    Args:
        keys: All uses in their order, for Belady.
        slots, residents: By layer.
    """
    n = trace.n_experts
    resident = frozenset(layer * n + expert for layer, of in enumerate(residents) for expert in of)

    def make(of_layer: int | None) -> Policy:
        if policy != BELADY:
            return make_policy(policy)
        return Belady(key for key in keys if of_layer is None or key // n == of_layer)

    def make_pools() -> dict[int, Pool]:
        if shared:
            return dict.fromkeys(range(trace.n_layers), Pool(sum(slots), make(None), resident))
        return {layer: Pool(n_slots, make(layer), resident) for layer, n_slots in enumerate(slots)}

    return make_pools
