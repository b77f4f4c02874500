"""Made-up routing for models that nobody has traced: experts that stay as often, guesses right as often as stated.

Knows probabilities and measured hit rates. Knows nothing of models: a recorded trace is always better than these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np

from mixtral_offload.analysis.replay import reuse_distances
from mixtral_offload.core.placement import Plan
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import OptionError
from mixtral_offload.units import check_whole

#: accuracy of guesses made one layer before, by layer (the last for all further ones), on Mixtral-8x7B (AdapMoE,
#: 2408.10284); layer 0 has no layer before it
MIXTRAL_RECALL = (0.0, 0.57, 0.72, 0.79, 0.88)
#: what each further layer of distance leaves of the recall: .81, .74, .67 at distances 1, 2, 3 on a small Mixtral
RECALL_FALL = 0.91
FIT_TOKENS, FIT_LAYERS, FIT_STEPS = 1500, 4, 18


@dataclass(frozen=True)
class Curve:
    """hit_rates: cache slots per layer -> hit rate of an LRU cache. n_experts, top_k: of the measured model's layers."""

    hit_rates: dict[int, float]
    source: str
    n_experts: int = 8
    top_k: int = 2

    @property
    def stay(self) -> float:
        """How sticky routing must be to give these hit rates (`fit_stay`); 0 where none were measured."""
        return _fit(tuple(self.hit_rates.items()), self.n_experts, self.top_k) if self.hit_rates else 0.0


CURVES = {
    "chance": Curve({}, "routing that has nothing to do with the token before"),
    "mixtral": Curve(
        {2: 0.345, 3: 0.464, 4: 0.59}, "measured on Mixtral-8x7B by a fork of dvmazur/mixtral-offloading"
    ),
    "demo": Curve(
        {2: 0.66, 3: 0.78, 4: 0.85, 5: 0.90, 6: 0.94, 7: 0.98}, "measured on the model that ships with the package"
    ),
}  # fmt: skip


def sticky_trace(
    n_tokens: int, n_layers: int, n_experts: int, top_k: int, stay: float, recall=None, n_guesses: int = 2,
    look_aheads: int = 1, seed: int = 0, expert_bytes: int = 0,
) -> RoutingTrace:  # fmt: skip
    """Random routing, generated token by token, of a stated locality.

    In each layer a token keeps each expert of the token before with probability `stay`, and draws the others uniformly
    among all that it did not keep: stay=0 is chance (hit rate slots / n_experts), stay=1 never changes. recall: with
    guesses, see `sticky_guesses`. Raises OptionError for impossible numbers.
    """
    _check(n_tokens=n_tokens, n_layers=n_layers, n_experts=n_experts, top_k=top_k)
    if top_k > n_experts or not 0 <= stay <= 1:
        raise OptionError(
            "impossible routing", expected="top_k <= n_experts and stay from 0 to 1",
            found=f"top_k {top_k} of {n_experts} experts, stay {stay}",
        )  # fmt: skip
    experts = _sticky(n_tokens, n_layers, n_experts, top_k, stay, np.random.default_rng(seed))
    weights = np.full(experts.shape, 1 / top_k, np.float32)
    trace = RoutingTrace.from_routing(experts, weights, n_experts, expert_bytes)
    if recall is None:
        return trace
    guesses = sticky_guesses(trace, recall, n_guesses, look_aheads, seed)
    return _with_guesses(trace, guesses)


def _with_guesses(trace: RoutingTrace, guesses: np.ndarray) -> RoutingTrace:
    """The trace with these guesses as its own, but for those that are none (-1)."""
    run = trace.settings
    trace = RoutingTrace.from_routing(
        trace.experts,
        trace.weights,
        run["n_experts"],
        run["expert_bytes"],
        predictions=np.maximum(guesses, 0),
    )
    distance = trace.predicted_layer - trace.predicted_from
    there = guesses[trace.predicted_pass, trace.predicted_layer, distance - 1, trace.predicted_rank] >= 0
    names = [f"predicted_{name}" for name in ("pass", "from", "layer", "expert", "rank")]
    return replace(trace, **{name: getattr(trace, name)[there] for name in names})


def as_prompt(trace: RoutingTrace) -> RoutingTrace:
    """The same tokens as one prompt: a single pass, which needs each of their experts once. Guesses are left out: a
    prompt needs nearly all experts, and every layer's copies keep the link busy."""
    layer_expert = np.unique(trace.use_layer.astype(np.int64) * trace.n_experts + trace.use_expert)
    layer, expert = (part.astype(np.int32) for part in divmod(layer_expert, trace.n_experts))
    n, zeros, none = len(expert), np.zeros(len(expert)), np.zeros(0, np.int32)
    guesses = {field.name: none for field in fields(trace) if field.name.startswith("predicted_")}
    return replace(
        trace, passes=np.zeros_like(trace.passes), use_pass=np.zeros(n, np.int32), use_layer=layer, use_expert=expert,
        use_outcome=np.zeros(n, np.uint8), use_wait_s=zeros, use_at_s=zeros, use_bytes=np.zeros(n, np.int64),
        use_copy_s=np.full((n, 2), np.nan), spans=np.zeros((1, trace.n_layers, 2)), **guesses,
    )  # fmt: skip


def with_plan(trace: RoutingTrace, plan: Plan) -> RoutingTrace:
    """The trace as if it had been recorded under this plan: replays of it have the plan's slots and residents."""
    slots, resident = list(plan.slots.values()), [list(of) for of in plan.resident.values()]
    run = {"slots": slots, "resident": resident, "store": plan.store, "expert_bytes": plan.sizes.expert_bytes}
    return replace(trace, settings={**trace.settings, **run, "policy": "lru", "shared_slots": False})


def _sticky(n_tokens: int, n_layers: int, n_experts: int, top_k: int, stay: float, random) -> np.ndarray:
    """int16 [N, L, k]: those kept get the lowest scores; the rest of the k lowest is a uniform draw of the others."""
    layers = np.arange(n_layers)[:, None]
    experts = np.empty((n_tokens, n_layers, top_k), np.int16)
    for token in range(n_tokens):
        scores = random.random((n_layers, n_experts))
        if token:
            kept = random.random((n_layers, top_k)) < stay
            scores[layers, experts[token - 1]] -= kept
        experts[token] = np.argsort(scores, -1)[:, :top_k]
    return experts


def sticky_guesses(
    trace: RoutingTrace, recall: float | Sequence[float] | np.ndarray, n_guesses: int, look_aheads: int, seed: int = 0
) -> np.ndarray:  # fmt: skip
    """Guesses that find each needed expert with a stated probability: int16 [N, L, D, n].

    [t, l, d] holds the n experts guessed for layer l of token t, d + 1 layers before it, in random order; -1 where no
    layer is that far before. recall: one number, one for each distance [D], or [L, D]. Which needed expert is missed,
    and what is guessed instead, is a uniform draw. Raises OptionError for a recall that so few guesses cannot have.
    """
    _check(n_guesses=n_guesses, look_aheads=look_aheads)
    n, n_layers, k = trace.experts.shape
    useful = min(n_guesses, k)
    try:
        share = (
            np.broadcast_to(recall, (n_layers, look_aheads)) * k / useful
        )  # of the useful guesses, those right
    except ValueError:
        share = np.full(1, np.nan)
    if n_guesses > trace.n_experts or not ((share >= 0) & (share <= 1)).all():
        raise OptionError(
            "impossible guesses", found=f"{n_guesses} of {trace.n_experts} experts, recall {recall}",
            expected=f"a recall of 0 to {useful / k:.3g}, all that {n_guesses} guesses for {k} needed experts can have,"
            f" as one number, [{look_aheads}] or [{n_layers}, {look_aheads}]",
        )  # fmt: skip
    random = np.random.default_rng((seed, 1))
    guesses = np.full((n, n_layers, look_aheads, n_guesses), -1, np.int16)
    rows = np.arange(n)[:, None]
    for layer in range(n_layers):
        needed = trace.experts[:, layer]
        for d in range(min(layer, look_aheads)):
            scores = random.random((n, trace.n_experts))
            right = np.arange(k) < (random.random((n, useful)) < share[layer, d]).sum(-1)[:, None]
            scores[rows, random.permuted(needed, axis=-1)] += np.where(
                right, -1, 1
            )  # found first, missed last
            ranked = np.argsort(scores, -1)[:, :n_guesses]
            guesses[:, layer, d] = random.permuted(ranked, axis=-1)
    return guesses


def recall_by_layer(
    n_layers: int, look_aheads: int = 1, by_layer: Sequence[float] = MIXTRAL_RECALL, fall: float = RECALL_FALL
) -> np.ndarray:  # fmt: skip
    """A recall measured one layer ahead, by layer, as `sticky_guesses` takes it: float64 [L, D]. The last value goes
    for all further layers, and each further layer of distance leaves `fall` of it."""
    near = np.array([by_layer[min(layer, len(by_layer) - 1)] for layer in range(n_layers)])
    return near[:, None] * fall ** np.arange(look_aheads)


def lru_hit_rates(trace: RoutingTrace) -> np.ndarray:
    """Hit rate of an LRU cache of 0, 1, 2 ... E slots per layer, all layers together: float64 [E + 1]."""
    distances = reuse_distances(trace).sum(0)  # a cache of more than d slots has those at distance d
    return np.concatenate(([0.0], np.cumsum(distances[:-1]) / distances.sum()))


def fit_stay(hit_rates: dict[int, float], n_experts: int, top_k: int) -> float:
    """The `stay` whose LRU replay comes nearest (least squares) to measured hit rates, {slots per layer: hit rate}."""
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
