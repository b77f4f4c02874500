"""A timed replay has a twin, the live cache on a virtual clock; and what holds for every trace."""

from dataclasses import replace
from functools import partial
from itertools import chain, combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mixtral_offload.runtime.cache
from mixtral_offload.analysis.replay import replay
from mixtral_offload.analysis.timed_replay import EXPERT, ON_CPU, timed_replay
from mixtral_offload.core.copy_order import NEEDED, NOW, RIGHT, WRONG
from mixtral_offload.core.costs import DeviceCosts
from mixtral_offload.core.misses import COPY, CPU, MISSES, MissCosts, MissRule
from mixtral_offload.core.policies import POLICIES, staging_rows
from mixtral_offload.runtime.cache import ExpertCache, OnCpu
from mixtral_offload.runtime.engines import RUNNING, Copy
from mixtral_offload.runtime.store import RamStore
from tests.analysis.test_timed_replay import copies, merged, routed

# --- the live cache on a virtual clock ---


class VirtualEngine:
    """The copy thread's order of work (`core/copy_order.py`), tick by tick.

    Args:
        chunk: Ticks of one; a copy has 16 of 10 bytes.
    """

    def __init__(self, chunk):
        self.chunk = chunk
        self.now, self.n_started, self.waiting, self.under_way, self.left = 0, 0, [], None, 0

    def start(self, copy):
        self.n_started += 1
        copy.asked_s, copy.engine = self.n_started, self  # only the order matters
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


class VirtualStore(RamStore):
    def __init__(self):
        self.pinned = False

    def pieces(self, expert):
        return [(0, torch.empty(160, dtype=torch.uint8))]

    def views(self, expert):
        return {}


class VirtualCpu:
    """Computes experts while the device's clock stands: it is at `until` when that is over."""

    def __init__(self, costs, now):
        self.costs, self.until = costs, now

    def on_cpu(self, needed, n_tokens):
        tokens = dict(zip(needed, n_tokens))

        def run(expert, views):
            self.until += self.costs.cpu_expert_s + self.costs.prompt_cpu_expert_s * (tokens[expert] - 1)

        return OnCpu(n_tokens, run)


def twin(trace, costs, slots, policy, shared, prefetch, look_ahead, misses="copy") -> SimpleNamespace:
    """The trace through the real `ExpertCache`."""
    engine = VirtualEngine(int(costs.copy_s / 16))
    layout = SimpleNamespace(n_bytes=160, views=lambda row: row)
    store = VirtualStore()
    n_staging = staging_rows(prefetch, look_ahead)
    cache = ExpertCache(
        layout,
        dict.fromkeys(range(trace.n_layers), (slots, ())),
        store,
        engine,
        torch.device("cpu"),
        policy=POLICIES[policy],
        shared=shared,
        n_staging=n_staging,
    )
    cache.misses = MissRule() if misses == COPY else MissRule(misses, costs.of_misses)
    pass_s, n_full = [], 0
    for number in range(trace.n_passes):
        begin = engine.now
        engine.advance(int(costs.token_s))
        predict(trace, cache, number, -1, prefetch, look_ahead)
        for layer in range(trace.n_layers):
            engine.advance(int(costs.attention_s))
            needed = trace.use_expert[(trace.use_pass == number) & (trace.use_layer == layer)]
            streams = (trace.passes == number).sum() >= trace.n_experts
            start = partial(predict, trace, cache, number, layer, prefetch, look_ahead)
            needed = sorted(needed.tolist())
            chosen = trace.experts[trace.passes == number, layer]
            n_tokens = [int((chosen == expert).sum()) for expert in needed]
            cpu = VirtualCpu(costs, engine.now)
            on_cpu = cpu.on_cpu(needed, n_tokens)
            n_hits = cache.stats.hits
            for _ in cache.fetch(layer, needed, start if streams else None, on_cpu):
                is_hit, n_hits = cache.stats.hits > n_hits, cache.stats.hits
                if not is_hit:  # the host enqueued it after its own work
                    engine.advance(max(0, int(cpu.until - engine.now)))
                engine.advance(int(costs.expert_s))
            engine.advance(max(0, int(cpu.until - engine.now)))
            if not streams:
                start()
            n_full += len(cache._residency.staged) + len(cache._residency.dropped) == n_staging > 0
        pass_s.append(engine.now - begin)
    engine.advance(engine.chunk)
    cache.settle()
    return SimpleNamespace(pass_s=pass_s, stats=cache.stats, n_full=n_full)


def predict(trace, cache, number, made_after, prefetch, look_ahead):
    streamed = made_after >= 0 and (trace.passes == number).sum() >= trace.n_experts
    for distance in range(1, (trace.n_layers if streamed else look_ahead) + 1) if prefetch else ():
        layer = made_after + distance
        made = (trace.predicted_pass == number) & (trace.predicted_from == made_after)
        made &= trace.predicted_layer == layer
        if made.any():
            made &= streamed | (trace.predicted_rank < prefetch)
            cache.prefetch(layer, trace.predicted_expert[made].tolist(), distance)


@st.composite
def traces(draw, n_experts=5, top_k=2):
    """A prompt of up to six tokens, then single tokens; predictions of 2 experts, up to 3 layers ahead."""
    n, n_layers, prompt = draw(st.integers(1, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts = random.random((n, n_layers, n_experts)).argsort(-1)[..., :top_k]
    predicted = random.random((n, n_layers, 3, n_experts)).argsort(-1)[..., :2]
    right = random.random(predicted.shape[:3]) < draw(st.sampled_from((0.0, 0.5, 0.9)))
    predicted[right] = np.broadcast_to(experts[:, :, None], predicted.shape)[right]
    return merged(routed(experts, predicted, n_experts), np.maximum(np.arange(n) - prompt + 1, 0))


def replay_settings(trace):
    """Random arguments for `timed_replay`."""
    return st.fixed_dictionaries(
        {
            "cache_size": st.integers(2, 5),
            "policy": st.sampled_from(("lru", "lfu")),
            "shared": st.booleans(),
            "prefetch": st.integers(0, 2),
            "look_ahead": st.integers(1, min(3, trace.n_layers)),
        }
    )


whole = st.integers(1, 40).map(float)
all_costs = st.builds(
    DeviceCosts,
    copy_s=st.just(32.0),
    attention_s=whole,
    expert_s=st.integers(1, 9).map(float),
    token_s=whole,
    cpu_expert_s=st.integers(1, 80).map(float),
    prompt_cpu_expert_s=st.integers(0, 20).map(float),
)


def check_twin(trace, costs, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixtral_offload.runtime.cache, "Copy", VirtualCopy)
        live = twin(trace, costs, **options)
    timed = timed_replay(
        trace, costs, **{"cache_size" if name == "slots" else name: value for name, value in options.items()}
    )
    assert timed.pass_s.tolist() == live.pass_s
    for name in ("hits", "misses", "prefetched", "computed", "predictions", "wasted_bytes", "bytes_moved"):
        assert getattr(timed.stats, name) == getattr(live.stats, name), name
    return live


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_it_is_the_live_cache_on_a_virtual_clock(data):
    trace, costs = data.draw(traces()), data.draw(all_costs)
    options = data.draw(replay_settings(trace)) | {"misses": data.draw(st.sampled_from(MISSES))}
    check_twin(trace, costs, slots=options.pop("cache_size"), **options)


@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_it_is_so_where_staging_rows_run_out(chunk):
    """Each prediction begins before the next one is made; the last chunk of wrong ones is under way."""
    random, n_full = np.random.default_rng(7), 0
    for attention_s in (20.0, 40.0, 60.0, 90.0, 120.0, 200.0):
        experts = random.random((12, 7, 5)).argsort(-1)[..., :2]
        predicted = random.random((12, 7, 3, 5)).argsort(-1)[..., :1]
        trace, costs = routed(experts, predicted, 5), DeviceCosts(16.0 * chunk, attention_s, 1.0, 3.0)
        options = {"policy": "lru", "shared": False, "prefetch": 1, "look_ahead": 3}
        n_full += check_twin(trace, costs, slots=3, **options).n_full
    assert n_full > 0


# --- what holds for every trace ---


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_time_counts_and_the_link_are_consistent(data):
    trace = data.draw(traces())
    seconds = st.floats(0.01, 30)
    rest = {"token_s": st.floats(0, 9), "host_s": st.floats(0, 40), "latency_s": st.floats(0, 2)}
    costs = data.draw(
        st.builds(DeviceCosts, seconds, seconds, seconds, chunks=st.integers(1, 20), **rest), label="costs"
    )
    options = data.draw(replay_settings(trace))
    timed = timed_replay(trace, costs, **options, keep_events=True)
    counts = replay(trace, **{name: options[name] for name in ("cache_size", "policy", "shared")})
    assert (timed.stats.hits, timed.stats.misses) == (counts.hits, counts.misses)
    assert timed.stats.bytes_moved - timed.stats.wasted_bytes == counts.bytes_moved
    assert timed.stats.prefetched <= min(timed.stats.misses, timed.stats.predictions)
    total, tiny = timed.pass_s.sum(), 1e-9 * timed.pass_s.sum()
    least = np.maximum(timed.pass_compute_s, timed.pass_misses * costs.copy_s)
    assert (timed.pass_s >= least - tiny).all()
    assert not timed.decoding.any() or timed.over_floor >= 1 - 1e-9
    events = timed.events
    for spans in (events.copy_span_s, events.part_span_s):
        assert (spans[1:, 0] >= spans[:-1, 1] - tiny).all() and (spans[:, 1] >= spans[:, 0]).all()
    assert np.isclose(np.diff(events.copy_span_s).sum(), timed.link_busy_s)
    assert timed.link_busy_s <= total + costs.copy_s / costs.chunks + tiny
    assert np.isclose(np.diff(events.part_span_s).sum() + timed.stall_s.sum(), total)
    # no prediction stays open: each is for its own pass
    assert set(events.copy_kind.tolist()) <= {NEEDED, RIGHT, WRONG}
    runs = events.part_kind == EXPERT
    for layer, expert in set(zip(events.part_layer[runs].tolist(), events.part_expert[runs].tolist())):
        here = (events.part_layer == layer) & (events.part_expert == expert)
        first_s = events.part_span_s[here, 0].min()  # before which a whole copy has crossed the link
        crossed = [
            end - begin
            for *key, kind, begin, end in copies(timed)
            if key == [layer, expert] and kind != WRONG and end <= first_s + tiny
        ]
        assert sum(crossed) >= costs.copy_s - tiny
    assert timed_replay(trace, costs, **options).pass_s.tolist() == timed.pass_s.tolist()


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_what_the_cpu_computes_takes_its_time(data):
    trace, costs = data.draw(traces()), data.draw(all_costs)
    options = data.draw(replay_settings(trace)) | {"misses": data.draw(st.sampled_from(MISSES))}
    timed = timed_replay(trace, costs, **options, keep_events=True)
    events, tiny = timed.events, 1e-9 * timed.pass_s.sum()
    is_cpu = events.part_kind == ON_CPU
    assert is_cpu.sum() == timed.stats.computed == timed.pass_computed.sum() <= timed.stats.misses
    on_cpu, on_device = events.part_span_s[is_cpu], events.part_span_s[~is_cpu]
    for spans in (on_cpu, on_device):
        assert (spans[1:, 0] >= spans[:-1, 1] - tiny).all()
    assert np.isclose(np.diff(on_device).sum() + timed.stall_s.sum(), timed.pass_s.sum())
    assert (np.diff(on_cpu)[:, 0] >= costs.cpu_expert_s - tiny).all()
    assert on_cpu.size == 0 or on_cpu[-1, 1] <= timed.pass_s.sum() + tiny
    copied = timed.stats.misses - timed.stats.computed
    assert np.isclose(timed.link_busy_s - 0.2 * timed.stats.wasted_bytes, 0.2 * 160 * copied)
    if options["misses"] == CPU and not options["prefetch"]:
        assert copied <= options["cache_size"] * trace.n_layers  # what the slots hold, once
        own = {name: options[name] for name in ("cache_size", "policy", "shared")}
        again = replay(trace, **own, misses=MissRule(CPU))
        assert (again.hits, int(again.on_cpu.sum())) == (timed.stats.hits, timed.stats.computed)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_the_split_ends_soonest(data):
    """For one call: no other number of experts on the CPU ends sooner than that of "auto"."""
    costs = data.draw(st.builds(MissCosts, *[st.floats(0.1, 50)] * 2, st.floats(0, 5)))
    n_tokens = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    n_coming, n_free = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 9))
    found = MissRule("auto", costs).for_cpu(range(len(n_tokens)), n_tokens, n_coming, n_free)

    def end_s(on_cpu):
        copies = len(n_tokens) - len(on_cpu) + n_coming
        return max(sum(costs.on_cpu(n_tokens[of]) for of in on_cpu), copies * costs.copy_s)

    open_ = range(n_free, len(n_tokens))  # the first ones fill empty slots
    choices = chain.from_iterable(combinations(open_, n) for n in range(len(open_) + 1))
    assert set(found) <= set(open_)
    best = min(map(end_s, choices))
    assert end_s(found) <= best * (1 + 1e-9)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("cpu_expert_s", [0.1, 1.0, 4.0, 8.0, 16.0, 50.0])
def test_a_split_is_not_slower_than_both_extremes(cpu_expert_s):
    """Over many tokens: a fast CPU must not leave the cache empty."""
    experts = np.random.default_rng(3).random((150, 4, 8)).argsort(-1)[..., :2]
    trace = routed(experts, np.zeros((150, 4, 1, 1), int), 8)
    costs = DeviceCosts(8.0, 1.0, 0.5, 1.0, cpu_expert_s=cpu_expert_s)
    seconds = {of: timed_replay(trace, costs, cache_size=5, misses=of).pass_s[20:].mean() for of in MISSES}
    assert seconds["auto"] <= 1.02 * min(seconds.values())


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_perfect_predictions_never_cost_time(data):
    """They name all misses in the order of need: the link carries the same, in the same order, earlier."""
    trace, costs = data.draw(traces()), data.draw(all_costs)
    costs = replace(costs, copy_s=data.draw(st.floats(0.1, 60)), latency_s=data.draw(st.floats(0, 3)))
    size, look_ahead = data.draw(st.integers(2, 5)), data.draw(st.integers(1, trace.n_layers))
    without = timed_replay(trace, costs, cache_size=size)
    perfect = timed_replay(trace, costs, cache_size=size, prefetch=5, look_ahead=look_ahead, perfect=True)
    assert perfect.stats.wasted_bytes == 0
    assert perfect.stats.prefetched == perfect.stats.misses == without.stats.misses
    assert (perfect.begins_s <= without.begins_s + 1e-9 * without.begins_s[-1]).all()
    assert perfect.pass_s.sum() >= max(perfect.compute_s, perfect.stats.misses * costs.copy_s) - 1e-6
