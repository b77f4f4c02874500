"""A replay with a clock has a twin, the live cache on a virtual clock; and what must hold for every trace."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mixtral_offload.runtime.cache
from mixtral_offload.analysis.replay import replay
from mixtral_offload.analysis.timed_replay import EXPERT, timed_replay
from mixtral_offload.core.copy_order import NEEDED, NOW, RIGHT, WRONG
from mixtral_offload.core.costs import DeviceCosts
from mixtral_offload.core.policies import POLICIES, staging_rows
from mixtral_offload.runtime.cache import ExpertCache
from mixtral_offload.runtime.engines import RUNNING, Copy
from tests.analysis.test_timed_replay import copies, merged, routed

# --- the live cache on a virtual clock -------------------------------------------------------------------------------


class VirtualEngine:
    """The copy thread's order of work (`worker.Waiting.pick`, `worker._work`), tick by tick.

    chunk: how many ticks one takes; a copy has 16 of 10 bytes.
    """

    def __init__(self, chunk):
        self.chunk = chunk
        self.now, self.n_asked, self.waiting, self.under_way, self.left = 0, 0, [], None, 0

    def start(self, copy):
        self.n_asked += 1
        copy.asked_s, copy.engine = self.n_asked, self  # only the order matters
        self.waiting.append(copy)

    def promote(self, copy):
        copy.due = NOW

    def cancel(self, copy):
        copy.cancel()
        if self.under_way is None:
            self._sort_out()

    def _sort_out(self):
        for copy in [copy for copy in self.waiting if copy.cancelled]:
            copy.state = "abandoned"
            self.waiting.remove(copy)

    def tick(self):
        if self.under_way is None and self.waiting:
            self.under_way, self.left = min(self.waiting, key=lambda copy: copy.due), self.chunk
            self.under_way.state = RUNNING
            self.under_way.moved_bytes += 10
        self.now += 1
        self.left -= 1
        if self.under_way is not None and self.left == 0:
            copy, self.under_way = self.under_way, None
            if copy.moved_bytes == copy.n_bytes and not copy.cancelled:
                copy.state = "done"
                self.waiting.remove(copy)
            self._sort_out()

    def advance(self, ticks):
        for _ in range(ticks):
            self.tick()

    def slots_were_read(self):
        pass


class VirtualCopy(Copy):
    def wait(self):
        while self.state != "done":
            assert not self.cancelled
            self.engine.tick()


def twin(trace, costs, slots, policy, shared, prefetch, look_ahead) -> SimpleNamespace:
    """The trace through the real `ExpertCache`."""
    engine = VirtualEngine(int(costs.copy_s / 16))
    layout = SimpleNamespace(n_bytes=160, views=lambda row: row)
    store = SimpleNamespace(pieces=lambda key: [(0, torch.empty(160, dtype=torch.uint8))])
    n_staging = staging_rows(prefetch, look_ahead)
    cache = ExpertCache(layout, dict.fromkeys(range(trace.n_layers), (slots, ())), store, engine, torch.device("cpu"),
                        policy=POLICIES[policy], shared=shared, n_staging=n_staging)  # fmt: skip
    pass_s, n_full = [], 0
    for number in range(trace.n_passes):
        begin = engine.now
        engine.advance(int(costs.token_s))
        guess(trace, cache, number, -1, prefetch, look_ahead)
        for layer in range(trace.n_layers):
            engine.advance(int(costs.attention_s))
            needed = trace.use_expert[(trace.use_pass == number) & (trace.use_layer == layer)]
            streams = (trace.passes == number).sum() >= trace.n_experts
            ask = partial(guess, trace, cache, number, layer, prefetch, look_ahead)
            for _ in cache.fetch(layer, sorted(needed.tolist()), ask if streams else None):
                engine.advance(int(costs.expert_s))
            if not streams:
                ask()
            n_full += len(cache._residency.staged) + len(cache._residency.dropped) == n_staging > 0
        pass_s.append(engine.now - begin)
    engine.advance(engine.chunk)
    cache.settle()
    return SimpleNamespace(pass_s=pass_s, stats=cache.stats, n_full=n_full)


def guess(trace, cache, number, made_after, prefetch, look_ahead):
    streamed = made_after >= 0 and (trace.passes == number).sum() >= trace.n_experts
    for distance in range(1, (trace.n_layers if streamed else look_ahead) + 1) if prefetch else ():
        layer = made_after + distance
        asked = (
            (trace.predicted_pass == number)
            & (trace.predicted_from == made_after)
            & (trace.predicted_layer == layer)
        )
        if asked.any():
            asked &= streamed | (trace.predicted_rank < prefetch)
            cache.prefetch(layer, trace.predicted_expert[asked].tolist(), distance)


@st.composite
def traces(draw, n_experts=5, top_k=2):
    """With a prompt's pass of up to six tokens first; guesses up to 2 experts and 3 layers ahead."""
    n, n_layers, prompt = draw(st.integers(1, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts = random.random((n, n_layers, n_experts)).argsort(-1)[..., :top_k]
    guesses = random.random((n, n_layers, 3, n_experts)).argsort(-1)[..., :2]
    right = random.random(guesses.shape[:3]) < draw(st.sampled_from((0.0, 0.5, 0.9)))
    guesses[right] = np.broadcast_to(experts[:, :, None], guesses.shape)[right]
    return merged(routed(experts, guesses, n_experts), np.maximum(np.arange(n) - prompt + 1, 0))


def plays(trace):
    """Random arguments for `play`."""
    return st.fixed_dictionaries({
        "cache_size": st.integers(2, 5), "policy": st.sampled_from(("lru", "lfu")), "shared": st.booleans(),
        "prefetch": st.integers(0, 2), "look_ahead": st.integers(1, min(3, trace.n_layers)),
    })  # fmt: skip


whole = st.integers(1, 40).map(float)
cards = st.builds(
    DeviceCosts, copy_s=st.just(32.0), attention_s=whole, expert_s=st.integers(1, 9).map(float), token_s=whole
)


def check_twin(trace, costs, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixtral_offload.runtime.cache, "Copy", VirtualCopy)
        live = twin(trace, costs, **options)
    played = timed_replay(
        trace, costs, **{"cache_size" if name == "slots" else name: value for name, value in options.items()}
    )
    assert played.pass_s.tolist() == live.pass_s
    for name in ("hits", "misses", "prefetched", "predictions", "wasted_bytes", "bytes_moved"):
        assert getattr(played.stats, name) == getattr(live.stats, name), name
    return live


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_it_is_the_live_cache_on_a_virtual_clock(data):
    trace, costs = data.draw(traces()), data.draw(cards)
    options = data.draw(plays(trace))
    check_twin(trace, costs, slots=options.pop("cache_size"), **options)


@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_it_is_so_where_staging_rows_run_out(chunk):
    """Ever new guesses, each begun before the next one is made, and wrong ones whose last chunk is still under way."""
    random, n_full = np.random.default_rng(7), 0
    for attention_s in (20.0, 40.0, 60.0, 90.0, 120.0, 200.0):
        experts = random.random((12, 7, 5)).argsort(-1)[..., :2]
        guesses = random.random((12, 7, 3, 5)).argsort(-1)[..., :1]
        trace, costs = routed(experts, guesses, 5), DeviceCosts(16.0 * chunk, attention_s, 1.0, 3.0)
        options = {"policy": "lru", "shared": False, "prefetch": 1, "look_ahead": 3}
        n_full += check_twin(trace, costs, slots=3, **options).n_full
    assert n_full > 0


# --- what must hold for every trace ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_time_counts_and_the_link_are_consistent(data):
    trace = data.draw(traces())
    seconds = st.floats(0.01, 30)
    rest = {"token_s": st.floats(0, 9), "host_s": st.floats(0, 40), "latency_s": st.floats(0, 2)}
    costs = data.draw(
        st.builds(DeviceCosts, seconds, seconds, seconds, chunks=st.integers(1, 20), **rest), label="card"
    )
    options = data.draw(plays(trace))
    played = timed_replay(trace, costs, **options, keep_events=True)
    counts = replay(trace, **{name: options[name] for name in ("cache_size", "policy", "shared")})
    assert (played.stats.hits, played.stats.misses) == (counts.hits, counts.misses)
    assert played.stats.bytes_moved - played.stats.wasted_bytes == counts.bytes_moved
    assert played.stats.prefetched <= min(played.stats.misses, played.stats.predictions)
    total, tiny = played.pass_s.sum(), 1e-9 * played.pass_s.sum()
    assert (
        played.pass_s >= np.maximum(played.pass_compute_s, played.pass_misses * costs.copy_s) - tiny
    ).all()
    assert not played.decoding.any() or played.over_floor >= 1 - 1e-9
    events = played.events
    for spans in (events.copy_span_s, events.part_span_s):
        assert (spans[1:, 0] >= spans[:-1, 1] - tiny).all() and (spans[:, 1] >= spans[:, 0]).all()
    assert np.isclose(np.diff(events.copy_span_s).sum(), played.link_busy_s)
    assert played.link_busy_s <= total + costs.copy_s / costs.chunks + tiny
    assert np.isclose(np.diff(events.part_span_s).sum() + played.stall_s.sum(), total)
    assert set(events.copy_kind.tolist()) <= {
        NEEDED,
        RIGHT,
        WRONG,
    }  # nothing stays open: guesses are for their own pass
    runs = events.part_kind == EXPERT
    for layer, expert in set(zip(events.part_layer[runs].tolist(), events.part_expert[runs].tolist())):
        here = (events.part_layer == layer) & (events.part_expert == expert)
        first_s = events.part_span_s[here, 0].min()  # before which a whole copy has crossed the link
        crossed = [end - begin for *key, kind, begin, end in copies(played)
                   if key == [layer, expert] and kind != WRONG and end <= first_s + tiny]  # fmt: skip
        assert sum(crossed) >= costs.copy_s - tiny
    assert timed_replay(trace, costs, **options).pass_s.tolist() == played.pass_s.tolist()


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_perfect_guesses_never_cost_time(data):
    """All misses of each layer, in the order needed: the link carries the same, in the same order, earlier."""
    trace, costs = data.draw(traces()), data.draw(cards)
    costs = replace(costs, copy_s=data.draw(st.floats(0.1, 60)), latency_s=data.draw(st.floats(0, 3)))
    size, look_ahead = data.draw(st.integers(2, 5)), data.draw(st.integers(1, trace.n_layers))
    without = timed_replay(trace, costs, cache_size=size)
    perfect = timed_replay(trace, costs, cache_size=size, prefetch=5, look_ahead=look_ahead, perfect=True)
    assert (
        perfect.stats.wasted_bytes == 0
        and perfect.stats.prefetched == perfect.stats.misses == without.stats.misses
    )
    assert (perfect.begins_s <= without.begins_s + 1e-9 * without.begins_s[-1]).all()
    assert perfect.pass_s.sum() >= max(perfect.compute_s, perfect.stats.misses * costs.copy_s) - 1e-6
