"""A replay with a clock: plays a trace against time on a card, with one link, its copies and its guesses.

Knows traces, the live cache's decisions (`policies.serve`), what it does with guesses (`runtime/cache.py`, which this mirrors)
and a `Link` that works as the copy thread does. Exact, without randomness. Knows no models; times are a `Card`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mixtral_offload.analysis.replay_setup import make_pools, ordered_uses, resolve_settings
from mixtral_offload.core.copy_order import NOW
from mixtral_offload.core.costs import Card
from mixtral_offload.core.link import Link, Transfer
from mixtral_offload.core.policies import LOAD, Pool, serve, staging_rows
from mixtral_offload.core.timed_result import ATTENTION, BESIDE, EXPERT, Events, Played
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import OptionError

Guess = tuple[int, int, list[int]]  # (layer, layers from now, keys, the likeliest first)


def play(
    trace: RoutingTrace, card: Card, *, cache_size: int | Sequence[int] | None = None, policy: str | None = None,
    shared: bool | None = None, prefetch: int = 0, look_ahead: int = 1, perfect: bool = False,
    keep_events: bool = False,
) -> Played:  # fmt: skip
    """The trace's passes one after the other on `card`; cache_size, policy, shared: as for `replay.simulate`.

    prefetch: how many experts to ask for, of those that the trace's guesses name for each of the next `look_ahead`
    layers; 0: none. perfect: ask, in place of the trace's guesses, for what those
    layers will really need and not have, also across the end of a token: the bound for any predictor. keep_events: for
    a timeline. Raises OptionError for what no run could have, and for more guesses than the trace has.
    """
    slots, residents, policy, shared = resolve_settings(trace, cache_size, policy, shared)
    _check_guesses(trace, prefetch, look_ahead, perfect)
    keys, bounds, uses = ordered_uses(trace)
    parts = _Parts(trace, card, keys, bounds, uses)
    pools = make_pools(trace, keys, slots, residents, policy, shared)
    guesses = {} if perfect or not prefetch else _recorded_guesses(trace, prefetch, look_ahead)
    device = _Device(card, pools, trace.n_experts, staging_rows(prefetch, look_ahead), keep_events)
    ahead, guess_s = range(1, look_ahead + 1) if perfect else (), card.guess_s if prefetch else 0.0
    begins, stall_s = np.zeros(trace.n_passes + 1), np.zeros((trace.n_passes, trace.n_layers))
    misses = np.zeros(trace.n_passes, np.int64)
    for i, (number, layer) in enumerate(parts.order):
        if layer == 0:
            begins[number] = device.now
            device.compute(card.token_s, BESIDE)
            device.compute_guess(guess_s)
            device.guess(
                parts.coming(i, ahead, pools, prefetch) if perfect else guesses.get((number, -1), ())
            )
        device.compute(parts.attention_s[i], ATTENTION, layer)
        coming = parts.coming(i + 1, ahead, pools, prefetch) if perfect else guesses.get((number, layer), ())
        streams = not perfect and parts.is_prompt[number]
        stall_s[number, layer], missed = device.run_layer(
            layer, parts.needed(i), parts.seconds(i), coming if streams else ()
        )
        misses[number] += missed
        if not streams:
            device.compute_guess(guess_s if layer < trace.n_layers - 1 else 0.0)
            device.guess(coming)
    begins[-1] = device.now
    pass_s, n_tokens = np.diff(begins), np.bincount(trace.passes, minlength=trace.n_passes)
    return Played(
        card,
        pass_s,
        stall_s,
        pass_s - stall_s.sum(1),
        n_tokens,
        misses,
        **device.counters(trace.expert_bytes),
    )


def _check_guesses(trace: RoutingTrace, prefetch: int, look_ahead: int, perfect: bool) -> None:
    for name, n, least in (("prefetch", prefetch, int(perfect)), ("look_ahead", look_ahead, 1)):
        if not isinstance(n, int | np.integer) or n < least:
            raise OptionError(f"impossible {name}", expected=f"a whole number from {least}", found=n)
    if perfect and look_ahead > trace.n_layers:
        raise OptionError(
            "impossible look_ahead", expected=f"at most {trace.n_layers} layers", found=look_ahead
        )
    if perfect or not prefetch or not trace.n_passes:
        return
    ranked = ~_streamed(trace)
    most = {"prefetch": int(trace.guess_rank[ranked].max(initial=-1)) + 1,
            "look_ahead": int((trace.guess_layer - trace.guess_from)[ranked].max(initial=0))}  # fmt: skip
    for name, n in (("prefetch", prefetch), ("look_ahead", look_ahead)):
        if n > most[name]:
            raise OptionError(
                f"the trace has fewer guesses than this {name}", expected=f"at most {most[name]}", found=n,
                hint=f"record it with {name}={n} or more, or play it with perfect=True",
            )  # fmt: skip


def _recorded_guesses(
    trace: RoutingTrace, prefetch: int, look_ahead: int
) -> dict[tuple[int, int], list[Guess]]:
    """(pass, layer after which) -> the guesses that a prefetcher of these settings would have asked for."""
    distance = trace.guess_layer - trace.guess_from
    asked = (trace.guess_rank < prefetch) & (distance <= look_ahead)
    chosen = np.flatnonzero(asked | _streamed(trace))
    columns = (trace.guess_rank, trace.guess_layer, trace.guess_from, trace.guess_pass)
    chosen = chosen[np.lexsort([column[chosen] for column in columns])]
    keys = trace.guess_layer[chosen] * trace.n_experts + trace.guess_expert[chosen]
    rows = zip(*(column[chosen].tolist() for column in (*columns[::-1], distance)), keys.tolist())
    found: dict[tuple[int, int], list[Guess]] = {}
    for number, made_after, layer, rank, ahead, key in rows:
        of_moment = found.setdefault((number, made_after), [])
        if rank == 0:
            of_moment.append((layer, ahead, []))
        of_moment[-1][2].append(key)
    return found


def _prompts(trace: RoutingTrace) -> np.ndarray:
    """Which passes had so many tokens that they needed about every expert (`Prefetcher.is_prompt`): bool [P]."""
    return np.bincount(trace.passes, minlength=trace.n_passes) >= trace.n_experts


def _streamed(trace: RoutingTrace) -> np.ndarray:
    """Which guesses were all of a layer's experts, asked for with the copies of the layer before: bool [G]."""
    return _prompts(trace)[trace.guess_pass] & (trace.guess_from >= 0)


class _Parts:
    """A trace's parts in the order in which the live cache is asked: (pass, layer), experts needed, compute times."""

    def __init__(self, trace: RoutingTrace, card: Card, keys: list[int], bounds: list[int], uses: np.ndarray):
        starts = uses[bounds[:-1]]
        numbers, layers = trace.use_pass[starts], trace.use_layer[starts]
        if len(starts) != trace.n_passes * trace.n_layers:
            raise OptionError("a pass of this trace used nothing in some layer", found=f"{len(starts)} pairs",
                              expected=f"{trace.n_passes * trace.n_layers} pairs of a pass and a layer")  # fmt: skip
        self.order = list(zip(numbers.tolist(), layers.tolist()))
        self._keys, self._bounds, self._n_experts = keys, bounds, trace.n_experts
        n_tokens = np.bincount(trace.passes, minlength=trace.n_passes)
        self.is_prompt = _prompts(trace).tolist()
        expert_s = card.expert_s + card.prompt_expert_s * (_tokens_of_uses(trace)[uses] - 1)
        in_experts = np.add.reduceat(expert_s, bounds[:-1]) if len(starts) else np.zeros(0)
        attention_s = card.attention_s + card.prompt_attention_s * (n_tokens[numbers] - 1)
        self.attention_s = np.maximum(attention_s, card.host_s - in_experts).tolist()
        self._expert_s = expert_s.tolist()

    def needed(self, i: int) -> list[int]:
        return self._keys[self._bounds[i] : self._bounds[i + 1]]

    def seconds(self, i: int) -> list[float]:
        """How long each of `needed` computes."""
        return self._expert_s[self._bounds[i] : self._bounds[i + 1]]

    def coming(self, i: int, ahead: Sequence[int], pools: list[Pool], prefetch: int) -> Iterator[Guess]:
        """Perfect guesses, before part i: what the parts from there on will need and their pools do not hold."""
        for distance, part in zip(ahead, range(i, len(self.order))):
            layer = self.order[part][1]
            pool = pools[layer]
            missing = [key for key in self.needed(part) if key not in pool.held and key not in pool.resident]
            yield layer, distance, missing[:prefetch]


def _tokens_of_uses(trace: RoutingTrace) -> np.ndarray:
    """How many tokens of its pass each use of the trace was for: int64, like use_pass."""
    layer, n_layers, n_experts = np.arange(trace.n_layers)[None, :, None], trace.n_layers, trace.n_experts
    chosen = (trace.passes.astype(np.int64)[:, None, None] * n_layers + layer) * n_experts + trace.experts
    use = (trace.use_pass.astype(np.int64) * n_layers + trace.use_layer) * n_experts + trace.use_expert
    found, counts = np.unique(chosen, return_counts=True)
    return counts[np.searchsorted(found, use)]


class _Device:
    """The device's time, and what `ExpertCache` keeps beside its pools: guesses in staging rows."""

    def __init__(self, card: Card, pools: list[Pool], n_experts: int, n_staging: int, keep_events: bool):
        self.now = 0.0
        self._card, self._pools, self._n_experts, self._n_staging = card, pools, n_experts, n_staging
        self._link = Link(card.copy_s / card.chunks, card.chunks, keep_events)
        self._staged: dict[int, Transfer] = {}
        self._dropped: list[float] = []  # when their rows are free
        self._n_served = 0
        self._hits = self._prefetched = self._guesses = self._wasted = 0  # the last one in chunks
        self._spans: list[tuple[int, int, int, float, float]] | None = [] if keep_events else None

    def compute(self, seconds: float, kind: int, layer: int = -1, expert: int = -1) -> None:
        end = self.now + seconds
        if self._spans is not None:
            self._spans.append((kind, layer, expert, self.now, end))
        self.now = end

    def compute_guess(self, seconds: float) -> None:
        if seconds:
            self.compute(seconds, BESIDE)

    def run_layer(
        self, layer: int, needed: list[int], expert_s: list[float], meanwhile: Iterable[Guess] = ()
    ) -> tuple[float, int]:
        """Its experts' part, as `ExpertCache.serve` orders it; returns how long it stood still, and the misses.
        meanwhile: guesses to ask for once the copies that the slots allow are under way."""
        pool, stall, misses = self._pools[layer], 0.0, 0
        seconds = dict(zip(needed, expert_s))
        self._n_served += 1
        for key in [key for key in self._staged if key // self._n_experts == layer and key not in seconds]:
            self._drop(key)
        for action, key, hit in serve(pool, needed):
            if action is LOAD:
                pool.loading[key] = self._load(key)
                continue
            self.guess(meanwhile)
            meanwhile = ()
            if not hit:
                key = min(pool.loading, key=lambda key: pool.loading[key].number) if key is None else key
                usable = self._link.land(pool.loading[key]) + self._card.latency_s
                stall += max(0.0, usable - self.now)
                self.now = max(self.now, usable)
                pool.publish(key, None)
            misses += not hit
            self.compute(seconds[key], EXPERT, layer, key % self._n_experts)
        self._hits += len(needed) - misses
        return stall, misses

    def _load(self, key: int) -> Transfer:
        guess = self._staged.pop(key, None)
        if guess is None:
            return self._link.ask(key, NOW, self.now)
        self._link.promote(guess, self.now)
        self._prefetched += 1
        return guess

    def guess(self, guesses: Iterable[Guess]) -> None:
        """Ask for these, as `ExpertCache.prefetch` does for each layer."""
        for layer, distance, keys in guesses:
            self._link.run(self.now)
            for key in [key for key in self._staged if key // self._n_experts == layer and key not in keys]:
                if not self._staged[key].chunks:
                    self._drop(key)
            pool = self._pools[layer]
            for key in keys:
                if key in pool.resident or key in pool.held or key in pool.loading or key in self._staged:
                    continue
                self._dropped = [free_s for free_s in self._dropped if free_s > self.now]
                if len(self._staged) + len(self._dropped) >= self._n_staging:
                    break
                self._staged[key] = self._link.ask(key, self._n_served + distance, self.now)
                self._guesses += 1

    def _drop(self, key: int) -> None:
        guess = self._staged.pop(key)
        self._dropped.append(self._link.cancel(guess, self.now))
        self._wasted += guess.chunks

    def counters(self, expert_bytes: int) -> dict:
        """What `Played` has of the device and its link; a chunk's bytes are its share of an expert's."""
        card, moved = self._card, self._link.moved
        n_bytes = {"bytes_moved": moved, "wasted_bytes": self._wasted}
        counts = {"hits": self._hits, "prefetched": self._prefetched, "guesses": self._guesses}
        return {name: round(n * expert_bytes / card.chunks) for name, n in n_bytes.items()} | counts | {
            "link_busy_s": moved * card.copy_s / card.chunks, "events": self._events()}  # fmt: skip

    def _events(self) -> Events | None:
        if self._spans is None:
            return None
        copies = [(*divmod(of.key, self._n_experts), of.kind, *span) for of, *span in self._link.stretches]
        copies, spans = (np.array(rows, float).reshape(-1, 5) for rows in (copies, self._spans))
        return Events(
            copy_layer=copies[:, 0].astype(np.int32), copy_expert=copies[:, 1].astype(np.int32),
            copy_kind=copies[:, 2].astype(np.uint8), copy_span_s=copies[:, 3:],
            part_kind=spans[:, 0].astype(np.uint8), part_layer=spans[:, 1].astype(np.int32),
            part_expert=spans[:, 2].astype(np.int32), part_span_s=spans[:, 3:],
        )  # fmt: skip
