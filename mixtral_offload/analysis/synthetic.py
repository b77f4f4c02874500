"""Synthetic routing with a stated locality and recall, for models that were not traced.

Knows nothing of models. A recorded trace is always better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np

from mixtral_offload.analysis.replay import reuse_distances
from mixtral_offload.core.placement import Plan
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import OptionError
from mixtral_offload.units import check_whole

#: recall of predictions made one layer before, by layer (the last for all further ones), on Mixtral-8x7B
#: (AdapMoE, 2408.10284); layer 0 has no layer before it
MIXTRAL_RECALL = (0.0, 0.57, 0.72, 0.79, 0.88)
#: what each further layer of distance leaves of the recall: 0.81, 0.74, 0.67 at distances 1, 2, 3 on a small
#: Mixtral
RECALL_FALL = 0.91
FIT_TOKENS, FIT_LAYERS, FIT_STEPS = 1500, 4, 18

Recall = float | Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Curve:
    """Measured hit rates.

    Attributes:
        hit_rates: Slots per layer -> hit rate of an LRU cache; empty for routing by chance.
        source: In words.
        n_experts, top_k: Of the measured model's layers.
    """

    hit_rates: dict[int, float]
    source: str
    n_experts: int = 8
    top_k: int = 2

    @property
    def stay(self) -> float:
        """The locality that gives these hit rates (`fit_stay`); 0 where none were measured."""
        return _fit(tuple(self.hit_rates.items()), self.n_experts, self.top_k) if self.hit_rates else 0.0


CURVES = {
    "chance": Curve({}, "every token routed independently of the one before"),
    "mixtral": Curve(
        {2: 0.345, 3: 0.464, 4: 0.59}, "measured on Mixtral-8x7B by a fork of dvmazur/mixtral-offloading"
    ),
    "demo": Curve(
        {2: 0.66, 3: 0.78, 4: 0.85, 5: 0.90, 6: 0.94, 7: 0.98},
        "measured on the model that ships with the package",
    ),
}


def sticky_trace(
    n_tokens: int,
    n_layers: int,
    n_experts: int,
    top_k: int,
    stay: float,
    recall: Recall | None = None,
    n_predictions: int = 2,
    look_aheads: int = 1,
    seed: int = 0,
    expert_bytes: int = 0,
) -> RoutingTrace:
    """Make random routing of a stated locality, as if generated token by token.

    Args:
        stay: In each layer a token keeps each expert of the token before with this probability, and draws the
            others uniformly among all that it did not keep: 0 is chance (hit rate slots / n_experts), 1 never
                changes.
        recall: None: without predictions; else this and the next two as for `sticky_predictions`.

    Raises:
        OptionError: For impossible numbers.
    """
    _check(n_tokens=n_tokens, n_layers=n_layers, n_experts=n_experts, top_k=top_k)
    if top_k > n_experts or not 0 <= stay <= 1:
        raise OptionError(
            "impossible routing",
            expected="top_k <= n_experts and stay from 0 to 1",
            found=f"top_k {top_k} of {n_experts} experts, stay {stay}",
        )
    experts = _sticky(n_tokens, n_layers, n_experts, top_k, stay, np.random.default_rng(seed))
    weights = np.full(experts.shape, 1 / top_k, np.float32)
    trace = RoutingTrace.from_routing(experts, weights, n_experts, expert_bytes)
    if recall is None:
        return trace
    return _with_predictions(trace, sticky_predictions(trace, recall, n_predictions, look_aheads, seed))


def _with_predictions(trace: RoutingTrace, predicted: np.ndarray) -> RoutingTrace:
    """The trace with these predictions as its own, but for those that are none (-1)."""
    run = trace.settings
    trace = RoutingTrace.from_routing(
        trace.experts,
        trace.weights,
        run["n_experts"],
        run["expert_bytes"],
        predictions=np.maximum(predicted, 0),
    )
    distance = trace.predicted_layer - trace.predicted_from
    kept = predicted[trace.predicted_pass, trace.predicted_layer, distance - 1, trace.predicted_rank] >= 0
    return _replace_columns(trace, {name: getattr(trace, name)[kept] for name in _prediction_columns(trace)})


def _prediction_columns(trace: RoutingTrace) -> list[str]:
    return [field.name for field in fields(trace) if field.name.startswith("predicted_")]


def _replace_columns(trace: RoutingTrace, columns: dict[str, np.ndarray]) -> RoutingTrace:
    rest: dict[str, Any] = {**columns}  # mypy checks each value against the fields that are no arrays, too
    return replace(trace, **rest)


def as_prompt(trace: RoutingTrace) -> RoutingTrace:
    """Return the same tokens as one prompt: a single pass, which needs each of their experts once.

    Predictions are left out: a prompt needs nearly all experts, and every layer's copies keep the link busy.
    """
    layer_expert = np.unique(trace.use_layer.astype(np.int64) * trace.n_experts + trace.use_expert)
    layer, expert = (part.astype(np.int32) for part in divmod(layer_expert, trace.n_experts))
    n, zeros = len(expert), np.zeros(len(expert))
    columns = {
        "passes": np.zeros_like(trace.passes),
        "use_pass": np.zeros(n, np.int32),
        "use_layer": layer,
        "use_expert": expert,
        "use_outcome": np.zeros(n, np.uint8),
        "use_wait_s": zeros,
        "use_at_s": zeros,
        "use_bytes": np.zeros(n, np.int64),
        "use_copy_s": np.full((n, 2), np.nan),
        "spans": np.zeros((1, trace.n_layers, 2)),
    }
    return _replace_columns(trace, columns | dict.fromkeys(_prediction_columns(trace), np.zeros(0, np.int32)))


def with_plan(trace: RoutingTrace, plan: Plan) -> RoutingTrace:
    """Return the trace as if recorded with this plan: its replays have the plan's slots and residents."""
    slots, resident = list(plan.slots.values()), [list(of) for of in plan.resident.values()]
    run = {"slots": slots, "resident": resident, "store": plan.store, "expert_bytes": plan.sizes.expert_bytes}
    return replace(trace, settings={**trace.settings, **run, "policy": "lru", "shared_slots": False})


def _sticky(
    n_tokens: int, n_layers: int, n_experts: int, top_k: int, stay: float, random: np.random.Generator
) -> np.ndarray:
    """int16 `[N, L, k]`, the k lowest scores: of those kept, then a uniform draw of the others."""
    layers = np.arange(n_layers)[:, None]
    experts = np.empty((n_tokens, n_layers, top_k), np.int16)
    for token in range(n_tokens):
        scores = random.random((n_layers, n_experts))
        if token:
            kept = random.random((n_layers, top_k)) < stay
            scores[layers, experts[token - 1]] -= kept
        experts[token] = np.argsort(scores, -1)[:, :top_k]
    return experts


def sticky_predictions(
    trace: RoutingTrace, recall: Recall, n_predictions: int, look_aheads: int, seed: int = 0
) -> np.ndarray:
    """Make predictions that find each needed expert with a stated probability.

    Which needed expert is missed, and what is predicted in its place, is a uniform draw.

    Args:
        recall: One number, one for each distance `[D]`, or `[L, D]`.
        n_predictions: Experts for each layer and distance.
        look_aheads: D.

    Returns:
        int16 `[N, L, D, n]`: `[t, l, d]` holds the n experts predicted for layer l of token t, d + 1 layers
        before it, in random order; -1 where no layer is that far before.

    Raises:
        OptionError: For a recall that n predictions cannot have.
    """
    _check(n_predictions=n_predictions, look_aheads=look_aheads)
    n, n_layers, k = trace.experts.shape
    useful = min(n_predictions, k)
    try:
        # of those that can be right
        share = np.broadcast_to(recall, (n_layers, look_aheads)) * k / useful
    except ValueError:
        share = np.full(1, np.nan)
    if n_predictions > trace.n_experts or not ((share >= 0) & (share <= 1)).all():
        raise OptionError(
            "impossible predictions",
            expected=f"a recall of 0 to {useful / k:.3g}, the most of {n_predictions} predictions for {k} "
            f"needed experts, as one number, [{look_aheads}] or [{n_layers}, {look_aheads}]",
            found=f"{n_predictions} of {trace.n_experts} experts, recall {recall}",
        )
    random = np.random.default_rng((seed, 1))
    predicted = np.full((n, n_layers, look_aheads, n_predictions), -1, np.int16)
    rows = np.arange(n)[:, None]
    for layer in range(n_layers):
        needed = trace.experts[:, layer]
        for d in range(min(layer, look_aheads)):
            scores = random.random((n, trace.n_experts))
            right = np.arange(k) < (random.random((n, useful)) < share[layer, d]).sum(-1)[:, None]
            # the lowest are taken: the right ones first, the missed ones last
            scores[rows, random.permuted(needed, axis=-1)] += np.where(right, -1, 1)
            ranked = np.argsort(scores, -1)[:, :n_predictions]
            predicted[:, layer, d] = random.permuted(ranked, axis=-1)
    return predicted


def recall_by_layer(
    n_layers: int,
    look_aheads: int = 1,
    by_layer: Sequence[float] = MIXTRAL_RECALL,
    fall: float = RECALL_FALL,
) -> np.ndarray:
    """Extend a recall measured one layer ahead to all layers and distances, as `sticky_predictions` takes it.

    Args:
        by_layer: Of the first layers; the last value is that of all further ones.
        fall: What each further layer of distance leaves of it.

    Returns:
        float64 `[L, D]`.
    """
    near = np.array([by_layer[min(layer, len(by_layer) - 1)] for layer in range(n_layers)])
    return near[:, None] * fall ** np.arange(look_aheads)


def lru_hit_rates(trace: RoutingTrace) -> np.ndarray:
    """Compute the hit rate of LRU caches of 0, 1 ... E slots per layer, all layers together: `[E + 1]`."""
    distances = reuse_distances(trace).sum(0)  # a cache of more than d slots has those at distance d
    return np.concatenate(([0.0], np.cumsum(distances[:-1]) / distances.sum()))


def fit_stay(hit_rates: dict[int, float], n_experts: int, top_k: int) -> float:
    """Find the `stay` whose LRU replay is nearest (least squares) to measured hit rates, slots -> hit rate.

    Raises:
        OptionError: For impossible hit rates.
    """
    if not hit_rates or not all(top_k <= n <= n_experts and 0 <= rate <= 1 for n, rate in hit_rates.items()):
        expected = f"hit rates of 0 to 1 at {top_k} to {n_experts} slots"
        raise OptionError("impossible hit rates", expected=expected, found=hit_rates)
    return _fit(tuple(hit_rates.items()), n_experts, top_k)


@lru_cache
def _fit(hit_rates: tuple[tuple[int, float], ...], n_experts: int, top_k: int) -> float:
    """By ternary search: the same random numbers at every step, so that the error is smooth in `stay`."""
    slots = [n for n, _ in hit_rates]
    wanted = np.array([rate for _, rate in hit_rates])

    def error(stay: float) -> float:
        trace = sticky_trace(FIT_TOKENS, FIT_LAYERS, n_experts, top_k, stay)
        return float(((lru_hit_rates(trace)[slots] - wanted) ** 2).sum())

    low, high = 0.0, 1.0
    for _ in range(FIT_STEPS):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if error(left) < error(right) else (left, high)
    return (low + high) / 2


def _check(**counts: int) -> None:
    for name, value in counts.items():
        check_whole(name, value)
