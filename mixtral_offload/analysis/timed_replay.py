"""Timed replay: replay a trace's compute, copies and predictions with given `DeviceCosts`.

Carries out the decisions of `core/residency.py`, as the live cache does, on the simulated link of
`core/copy_order.py`. Exact, without randomness. Knows no models; times are in the unit of the costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixtral_offload.analysis.replay_setup import (
    ordered_uses,
    pool_maker,
    resolve_settings,
    rule_of_run,
    tokens_of_uses,
)
from mixtral_offload.core.copy_order import NOW, Link, Transfer
from mixtral_offload.core.costs import DeviceCosts
from mixtral_offload.core.counters import CacheStats
from mixtral_offload.core.misses import COPY, MissRule
from mixtral_offload.core.policies import staging_rows
from mixtral_offload.core.residency import Action, Do, Load, Pool, Residency
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import OptionError

OUTSIDE, ATTENTION, EXPERT, ON_CPU = range(4)
PARTS = ("outside the layers", "attention, norms, router", "experts", "experts on the CPU")


@dataclass(frozen=True)
class Events:
    """Everything that lasted, by begin: float64 seconds from the start.

    Attributes:
        copy_layer, copy_expert: int32, of each stretch in which the link carries one copy.
        copy_kind: uint8, NEEDED, RIGHT or WRONG of `core/copy_order.py`.
        copy_span_s: `[., 2]`.
        part_kind: uint8, OUTSIDE, ATTENTION or EXPERT, of what the device computes, or ON_CPU.
        part_layer, part_expert: int32; -1 for none.
        part_span_s: `[., 2]`.
    """

    copy_layer: np.ndarray
    copy_expert: np.ndarray
    copy_kind: np.ndarray
    copy_span_s: np.ndarray
    part_kind: np.ndarray
    part_layer: np.ndarray
    part_expert: np.ndarray
    part_span_s: np.ndarray


@dataclass(frozen=True)
class TimedReplay:
    """Result of a timed replay: P passes through L layers.

    Attributes:
        costs: Of the device.
        pass_s: float64 `[P]`, duration of each pass.
        stall_s: float64 `[P, L]`, time in which the device computes nothing because a copy, or an expert on
            the CPU, is not finished.
        pass_compute_s: float64 `[P]`, the rest of pass_s.
        pass_tokens, pass_misses: int64 `[P]`.
        pass_computed: int64 `[P]`, misses that the CPU computes.
        stats: Counters of all passes.
        link_busy_s: How long the link carried something.
        events: None if they were not kept.
    """

    costs: DeviceCosts
    pass_s: np.ndarray
    stall_s: np.ndarray
    pass_compute_s: np.ndarray
    pass_tokens: np.ndarray
    pass_misses: np.ndarray
    pass_computed: np.ndarray
    stats: CacheStats
    link_busy_s: float
    events: Events | None = None

    @property
    def compute_s(self) -> float:
        """Compute of all passes, in seconds."""
        return float(self.pass_compute_s.sum())

    @property
    def begins_s(self) -> np.ndarray:
        """Begin of each pass, and end of the last one: float64 `[P + 1]`."""
        return np.concatenate([[0.0], np.cumsum(self.pass_s)])

    @property
    def decoding(self) -> np.ndarray:
        """Which passes have one token: bool `[P]`. A prompt of one token counts too."""
        return self.pass_tokens == 1

    @property
    def time_per_token(self) -> float:
        """Mean duration of the decoding passes; nan if there are none."""
        return _mean(self.pass_s[self.decoding])

    @property
    def link_use(self) -> float:
        """Share of all time in which the link carried something; nan without passes."""
        return self.link_busy_s / self.pass_s.sum() if len(self.pass_s) else float("nan")

    @property
    def floor_s(self) -> float:
        """Lower bound of time_per_token with any predictions: its compute, or the copies of its misses.

        The larger of the two averages. Recorded predictions reach no farther back than their own pass.
        Perfect ones do, and may gain once what was copied for the first token during the prompt's pass.
        """
        compute = _mean(self.pass_compute_s[self.decoding])
        copies = _mean((self.pass_misses - self.pass_computed)[self.decoding])
        return max(compute, copies * self.costs.copy_s)

    @property
    def over_floor(self) -> float:
        """time_per_token over floor_s."""
        return self.time_per_token / self.floor_s


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


Prediction = tuple[int, int, list[int]]  # (layer, layers from now, keys, the most probable first)


def timed_replay(
    trace: RoutingTrace,
    costs: DeviceCosts,
    *,
    cache_size: int | Sequence[int] | None = None,
    policy: str | None = None,
    shared: bool | None = None,
    prefetch: int = 0,
    look_ahead: int = 1,
    perfect: bool = False,
    keep_events: bool = False,
    misses: str | MissRule | None = None,
) -> TimedReplay:
    """Replay the trace's passes one after the other on a device of these costs.

    Args:
        cache_size, policy, shared: As for `replay`.
        prefetch: Experts to predict for each of the next `look_ahead` layers, by the trace's own predictions;
            0: none.
        perfect: Predict what those layers will really need and not have, also across the end of a token: the
            bound for any predictor.
        keep_events: For a timeline.
        misses: As in `OffloadOptions`, by the costs; or a rule; None: the run's own rule.

    Raises:
        OptionError: For settings that no run could have, and for more predictions than the trace has.
    """
    slots, residents, policy, shared = resolve_settings(trace, cache_size, policy, shared)
    _check_predictions(trace, prefetch, look_ahead, perfect)
    keys, bounds, uses = ordered_uses(trace)
    parts = _Parts(trace, costs, keys, bounds, uses)
    make_pools = pool_maker(trace, keys, slots, residents, policy, shared)
    rule = _rule(trace, costs, misses)
    residency = Residency(make_pools, staging_rows(prefetch, look_ahead), misses=rule)
    device = _Device(trace, costs, residency, keep_events)
    recorded = {} if perfect or not prefetch else _recorded_predictions(trace, prefetch, look_ahead)
    ahead, predict_s = range(1, look_ahead + 1) if perfect else (), costs.predict_s if prefetch else 0.0
    begins, stall_s = np.zeros(trace.n_passes + 1), np.zeros((trace.n_passes, trace.n_layers))
    n_missed, n_computed = np.zeros((2, trace.n_passes), np.int64)

    def coming(part: int, moment: tuple[int, int]) -> Iterable[Prediction]:
        return parts.coming(part, ahead, device.pools, prefetch) if perfect else recorded.get(moment, ())

    for i, (number, layer) in enumerate(parts.order):
        if layer == 0:
            begins[number] = device.now
            device.compute(costs.token_s, OUTSIDE)
            device.compute_prediction(predict_s)
            device.predict(coming(i, (number, -1)))
        device.compute(parts.attention_s[i], ATTENTION, layer)
        streams = not perfect and parts.is_prompt[number]
        predictions = coming(i + 1, (number, layer))
        computed = device.stats.computed
        stall_s[number, layer], missed = device.run_layer(
            layer, parts.needed(i), parts.n_tokens(i), predictions if streams else ()
        )
        n_missed[number] += missed
        n_computed[number] += device.stats.computed - computed
        if not streams:
            device.compute_prediction(predict_s if layer < trace.n_layers - 1 else 0.0)
            device.predict(predictions)
    begins[-1] = device.now
    pass_s, n_tokens = np.diff(begins), np.bincount(trace.passes, minlength=trace.n_passes)
    compute_s = pass_s - stall_s.sum(1)
    return TimedReplay(costs, pass_s, stall_s, compute_s, n_tokens, n_missed, n_computed, **device.totals())


def _rule(trace: RoutingTrace, costs: DeviceCosts, misses: str | MissRule | None) -> MissRule:
    if misses is None:
        misses = rule_of_run(trace)
    if isinstance(misses, str):
        return MissRule() if misses == COPY else MissRule(misses, costs.of_misses)
    if misses.mode != COPY:
        _ = costs.of_misses  # what the CPU computes takes time
    return misses


def _check_predictions(trace: RoutingTrace, prefetch: int, look_ahead: int, perfect: bool) -> None:
    for name, n, least in (("prefetch", prefetch, int(perfect)), ("look_ahead", look_ahead, 1)):
        if not isinstance(n, int | np.integer) or n < least:
            raise OptionError(f"impossible {name}", expected=f"a whole number from {least}", found=n)
    if perfect and look_ahead > trace.n_layers:
        expected = f"at most {trace.n_layers} layers"
        raise OptionError("impossible look_ahead", expected=expected, found=look_ahead)
    if perfect or not prefetch or not trace.n_passes:
        return
    ranked = ~_streamed(trace)
    most_ranked = int(trace.predicted_rank[ranked].max(initial=-1)) + 1
    farthest = int((trace.predicted_layer - trace.predicted_from)[ranked].max(initial=0))
    for name, n, most in (("prefetch", prefetch, most_ranked), ("look_ahead", look_ahead, farthest)):
        if n > most:
            raise OptionError(
                f"the trace has fewer predictions than this {name}",
                expected=f"at most {most}",
                found=n,
                hint=f"record it with {name}={n} or more, or use perfect=True",
            )


def _recorded_predictions(
    trace: RoutingTrace, prefetch: int, look_ahead: int
) -> dict[tuple[int, int], list[Prediction]]:
    """(pass, layer after which) -> the predictions that a prefetcher of these settings would have made."""
    distance = trace.predicted_layer - trace.predicted_from
    made = (trace.predicted_rank < prefetch) & (distance <= look_ahead)
    chosen = np.flatnonzero(made | _streamed(trace))
    columns = (trace.predicted_rank, trace.predicted_layer, trace.predicted_from, trace.predicted_pass)
    chosen = chosen[np.lexsort([column[chosen] for column in columns])]
    keys = trace.predicted_layer[chosen] * trace.n_experts + trace.predicted_expert[chosen]
    rows = zip(*(column[chosen].tolist() for column in (*columns[::-1], distance)), keys.tolist())
    found: dict[tuple[int, int], list[Prediction]] = {}
    for number, made_after, layer, rank, ahead, key in rows:
        of_moment = found.setdefault((number, made_after), [])
        if rank == 0:
            of_moment.append((layer, ahead, []))
        of_moment[-1][2].append(key)
    return found


def _prompts(trace: RoutingTrace) -> np.ndarray:
    """Which passes have enough tokens to need nearly every expert (`Prefetcher.is_prompt`): bool `[P]`."""
    return np.bincount(trace.passes, minlength=trace.n_passes) >= trace.n_experts


def _streamed(trace: RoutingTrace) -> np.ndarray:
    """Which predictions name all of a layer's experts, during the layer before: bool `[G]`."""
    return _prompts(trace)[trace.predicted_pass] & (trace.predicted_from >= 0)


class _Parts:
    """A trace's parts as the live cache runs them: (pass, layer), experts needed, compute times."""

    def __init__(
        self, trace: RoutingTrace, costs: DeviceCosts, keys: list[int], bounds: list[int], uses: np.ndarray
    ):
        starts = uses[bounds[:-1]]
        numbers, layers = trace.use_pass[starts], trace.use_layer[starts]
        if len(starts) != trace.n_passes * trace.n_layers:
            raise OptionError(
                "a pass of this trace used nothing in some layer",
                expected=f"{trace.n_passes * trace.n_layers} pairs of a pass and a layer",
                found=f"{len(starts)} pairs",
            )
        self.order = list(zip(numbers.tolist(), layers.tolist()))
        self._keys, self._bounds, self._n_experts = keys, bounds, trace.n_experts
        n_tokens = np.bincount(trace.passes, minlength=trace.n_passes)
        self.is_prompt = _prompts(trace).tolist()
        of_uses = tokens_of_uses(trace)[uses]
        expert_s = costs.expert_s + costs.prompt_expert_s * (of_uses - 1)
        in_experts = np.add.reduceat(expert_s, bounds[:-1]) if len(starts) else np.zeros(0)
        attention_s = costs.attention_s + costs.prompt_attention_s * (n_tokens[numbers] - 1)
        self.attention_s = np.maximum(attention_s, costs.host_s - in_experts).tolist()
        self._n_tokens = of_uses.tolist()

    def needed(self, i: int) -> list[int]:
        return self._keys[self._bounds[i] : self._bounds[i + 1]]

    def n_tokens(self, i: int) -> list[int]:
        """How many tokens each of `needed` is for."""
        return self._n_tokens[self._bounds[i] : self._bounds[i + 1]]

    def coming(
        self, i: int, ahead: Sequence[int], pools: dict[int, Pool], prefetch: int
    ) -> Iterator[Prediction]:
        """Perfect predictions, before part i: what the next parts will need and their pools do not hold."""
        for distance, part in zip(ahead, range(i, len(self.order))):
            layer = self.order[part][1]
            pool = pools[layer]
            missing = [key for key in self.needed(part) if key not in pool.held and key not in pool.resident]
            yield layer, distance, missing[:prefetch]


class _Device:
    """Carries out a residency's actions on a simulated link, and lets time pass."""

    def __init__(self, trace: RoutingTrace, costs: DeviceCosts, residency: Residency, keep_events: bool):
        self.now, self.stats = 0.0, CacheStats()
        self._costs, self._residency = costs, residency
        self._n_experts, self._expert_bytes = trace.n_experts, trace.expert_bytes
        self._link = Link(costs.copy_s / costs.chunks, costs.chunks, lambda: self.now, keep_events)
        self._wasted = 0  # chunks
        self._spans: list[tuple[int, int, int, float, float]] | None = [] if keep_events else None

    @property
    def pools(self) -> dict[int, Pool]:
        return self._residency.pools

    def compute(self, seconds: float, kind: int, layer: int = -1, expert: int = -1) -> None:
        end = self.now + seconds
        self._keep(kind, layer, expert, self.now, end)
        self.now = end

    def _keep(self, kind: int, layer: int, expert: int, begin: float, end: float) -> None:
        if self._spans is not None:
            self._spans.append((kind, layer, expert, begin, end))

    def compute_prediction(self, seconds: float) -> None:
        if seconds:
            self.compute(seconds, OUTSIDE)

    def run_layer(
        self, layer: int, needed: list[int], n_tokens: list[int], meanwhile: Iterable[Prediction]
    ) -> tuple[float, int]:
        """Run its experts; return the stall in seconds, and the misses.

        The host computes its experts after it has enqueued those that are on the device, and enqueues those
        that are copied after that.

        Args:
            n_tokens: How many tokens each expert is for.
            meanwhile: Predictions to make once the copies that the slots allow are under way.
        """
        stall, misses, costs = 0.0, 0, self._costs
        tokens_of, cpu_s = dict(zip(needed, n_tokens)), self.now
        for action in self._residency.begin(layer, needed, n_tokens):
            do, key, load = action
            if do is not Do.USE and do is not Do.LAND and do is not Do.COMPUTE:
                self._carry_out(action)
                continue
            self.predict(meanwhile)
            meanwhile = ()
            if do is Do.LAND:
                stall += self._wait(max(self._link.land(_transfer(load)) + costs.latency_s, cpu_s))
                continue
            assert isinstance(key, int)  # as `ordered_uses` makes them
            expert, more = key % self._n_experts, tokens_of[key] - 1
            if do is Do.COMPUTE:
                misses += 1
                self.stats.computed += 1
                end = cpu_s + costs.cpu_expert_s + costs.prompt_cpu_expert_s * more
                self._keep(ON_CPU, layer, expert, cpu_s, end)
                cpu_s = end
                continue
            if load is not None:
                misses += 1
                self.stats.prefetched += load.is_predicted
            self.compute(costs.expert_s + costs.prompt_expert_s * more, EXPERT, layer, expert)
        stall += self._wait(cpu_s)
        self.stats.hits += len(needed) - misses
        self.stats.misses += misses
        return stall, misses

    def _wait(self, until: float) -> float:
        """Let time pass until then; return how long that is."""
        waited = max(0.0, until - self.now)
        self.now = max(self.now, until)
        return waited

    def predict(self, predictions: Iterable[Prediction]) -> None:
        """Start copies of these, as `ExpertCache.prefetch` does for each layer."""
        for layer, distance, keys in predictions:
            for action in self._residency.predict(layer, keys, distance):
                self._carry_out(action)

    def _carry_out(self, action: Action) -> None:
        do, key, load = action
        if do is Do.START:
            assert load is not None and isinstance(key, int)  # as `ordered_uses` makes them
            load.copy = self._link.ask(key, load.due)
            self.stats.predictions += load.due != NOW
        elif do is Do.PROMOTE:
            self._link.promote(_transfer(load))
        elif do is Do.CANCEL:
            self._link.cancel(_transfer(load))
            self._wasted += _transfer(load).chunks

    def totals(self) -> dict[str, Any]:
        """The fields of `TimedReplay` that are of all passes; a chunk has its share of an expert's bytes."""
        chunks, moved = self._costs.chunks, self._link.moved
        self.stats.bytes_moved = round(moved * self._expert_bytes / chunks)
        self.stats.wasted_bytes = round(self._wasted * self._expert_bytes / chunks)
        return {
            "stats": self.stats,
            "link_busy_s": moved * self._costs.copy_s / chunks,
            "events": self._events(),
        }

    def _events(self) -> Events | None:
        if self._spans is None or self._link.stretches is None:
            return None
        rows = [(*divmod(of.key, self._n_experts), of.kind, *span) for of, *span in self._link.stretches]
        copies, parts = (np.array(of, float).reshape(-1, 5) for of in (rows, self._spans))
        return Events(
            copy_layer=copies[:, 0].astype(np.int32),
            copy_expert=copies[:, 1].astype(np.int32),
            copy_kind=copies[:, 2].astype(np.uint8),
            copy_span_s=copies[:, 3:],
            part_kind=parts[:, 0].astype(np.uint8),
            part_layer=parts[:, 1].astype(np.int32),
            part_expert=parts[:, 2].astype(np.int32),
            part_span_s=parts[:, 3:],
        )


def _transfer(load: Load | None) -> Transfer:
    """What `_Device` has set for this load."""
    assert load is not None and isinstance(load.copy, Transfer)
    return load.copy
