"""The cache against a naive one, with real copies on a worker thread, interrupted wherever it can be."""

import sys
import threading
import time
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_offload.cache import ExpertCache
from mixtral_offload.experts import ExpertLayout
from mixtral_offload.transfer import ThreadEngine

CPU = torch.device("cpu")
N_EXPERTS = 8
LAYOUT = ExpertLayout.build(
    4, 8, {(matrix, "weight"): (torch.float16, 32) for matrix in ("gate", "up", "down")}
)  # fmt: skip


class Home:
    """A store whose experts are filled with their own number."""

    pinned = False

    def __init__(self):
        self.asked = []

    def pieces(self, expert):
        self.asked.append(expert)
        half = LAYOUT.n_bytes // 2
        data = torch.full((LAYOUT.n_bytes,), expert[0] * N_EXPERTS + expert[1], dtype=torch.uint8)
        return [(0, data[:half]), (half, data[half:])]


class UnorderedEngine:
    """A thread for each copy, so that an early one may arrive after a later one: what is forgotten shows."""

    def __init__(self):
        self.delay_s, self.threads = 0.0, []

    def start(self, copy):
        self.threads.append(threading.Thread(target=self._run, args=(copy, self.delay_s)))
        self.threads[-1].start()

    def _run(self, copy, delay_s):
        if copy.begin():
            time.sleep(delay_s)
            while copy.moved_bytes < copy.n_bytes and not copy.cancelled:
                source, target = copy.next_chunk(1000)
                target.copy_(source)
                copy.moved_bytes += source.numel()
            copy.finish()

    def promote(self, copy):
        copy.due = -1

    def close(self):
        for thread in self.threads:
            thread.join()


def make_cache(n_slots=2, n_layers=2, resident=(), link=None, engine=None):
    home, engine = Home(), engine or ThreadEngine(CPU, LAYOUT.n_bytes, link)
    cache = ExpertCache(LAYOUT, dict.fromkeys(range(n_layers), (n_slots, resident)), home, engine, CPU)
    for (layer, expert), slot in cache.resident_slots():
        slot.fill_(layer * N_EXPERTS + expert)
    return cache, home


def is_right(layer, expert, views) -> bool:
    wanted = layer * N_EXPERTS + expert
    return all(
        (field.view(torch.uint8) == wanted).all() for fields in views.values() for field in fields.values()
    )


def serve(cache, layer, experts):
    """All experts served, each checked while it is valid; returns the order."""
    order = []
    for expert, views in cache.serve(layer, experts):
        assert is_right(layer, expert, views)
        order.append(expert)
    return order


class NaiveLRU:
    """The textbook: one at a time, no copies under way."""

    def __init__(self, n_slots):
        self.n_slots, self.held, self.hits, self.misses = n_slots, OrderedDict(), 0, 0

    def serve(self, experts):
        hits = [expert for expert in experts if expert in self.held]
        for expert in hits:
            self.held.move_to_end(expert)
        self.hits += len(hits)
        for expert in experts:
            if expert not in hits:
                self.misses += 1
                if len(self.held) == self.n_slots:
                    self.held.popitem(last=False)
                self.held[expert] = True
        for expert in experts:  # of one pass, the later ones count as more recent
            self.held.move_to_end(expert)


passes = st.lists(
    st.tuples(
        st.integers(0, 1), st.lists(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=2, unique=True)
    ),
    max_size=30,
)


@given(passes=passes, n_slots=st.integers(2, N_EXPERTS))
@settings(max_examples=300, deadline=None)
def test_hits_misses_and_contents_are_those_of_the_textbook(passes, n_slots):
    cache, _ = make_cache(n_slots)
    naive = [NaiveLRU(n_slots), NaiveLRU(n_slots)]
    for layer, experts in passes:
        experts = sorted(experts)
        assert sorted(serve(cache, layer, experts)) == experts
        naive[layer].serve(experts)
        assert cache.contents(layer) == list(naive[layer].held)
    assert cache.stats.hits == sum(n.hits for n in naive)
    assert cache.stats.misses == sum(n.misses for n in naive)
    assert cache.stats.bytes_moved == cache.stats.misses * LAYOUT.n_bytes
    cache.close()


@given(
    passes=st.lists(st.lists(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=N_EXPERTS, unique=True), max_size=8),
    n_slots=st.integers(1, 5), n_resident=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_more_experts_than_slots_pass_through_in_waves(passes, n_slots, n_resident):
    cache, home = make_cache(n_slots, 1, tuple(range(n_resident)))
    for experts in passes:
        before = set(cache.contents(0))
        order = serve(cache, 0, experts)
        assert sorted(order) == sorted(experts)
        hits = [expert for expert in experts if expert in before]
        assert order[: len(hits)] == hits  # what is there goes first
        assert len(cache.contents(0)) <= n_slots + n_resident
    assert not any(expert < n_resident for _, expert in home.asked)
    cache.close()


def test_all_copies_that_fit_are_under_way_before_the_first_expert_is_served():
    cache, home = make_cache(n_slots=4, n_layers=1, link=LAYOUT.n_bytes / 0.01)
    serve(cache, 0, [0])
    home.asked.clear()
    served = cache.serve(0, [0, 1, 2])
    assert next(served)[0] == 0
    assert home.asked == [(0, 1), (0, 2)]
    assert [expert for expert, _ in served] == [1, 2]
    cache.close()


def test_a_failing_home_is_reported_and_the_cache_goes_on():
    cache, home = make_cache()
    good = home.pieces
    home.pieces = lambda expert: [
        (LAYOUT.n_bytes - 1, torch.zeros(8, dtype=torch.uint8))
    ]  # does not fit the slot
    with pytest.raises(ValueError):
        serve(cache, 0, [1])
    home.pieces = good
    assert serve(cache, 0, [1]) == [1]
    cache.close()


def test_a_reader_that_goes_away_leaves_nothing_behind():
    cache, _ = make_cache(n_slots=2, n_layers=1, link=LAYOUT.n_bytes / 0.002)
    for _ in range(5):
        served = cache.serve(0, [0, 1, 2, 3])
        next(served)
        served.close()
        assert sorted(serve(cache, 0, [4, 5, 6, 7])) == [4, 5, 6, 7]
    cache.close()


def interrupted_at(line_number: int, run) -> bool:
    """Run, with KeyboardInterrupt raised at the n-th line executed in cache.py or transfer.py; False if it has fewer."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if not frame.f_code.co_filename.endswith(("offload/cache.py", "offload/transfer.py")):
            return None
        if event == "line":
            count += 1
            if count == line_number:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("unordered", [False, True])
@pytest.mark.parametrize("experts", [[0, 1], [1, 2], [4, 5, 6, 7]])
def test_an_interrupt_at_any_line_leaves_no_wrong_expert_and_no_lost_slot(experts, unordered):
    """An interrupt at one in five points once left the original cache with an expert's bytes under another's name."""
    line = 1
    while True:
        engine = UnorderedEngine() if unordered else None
        cache, _ = make_cache(n_slots=3, n_layers=1, link=LAYOUT.n_bytes / 0.0005, engine=engine)
        serve(cache, 0, [0, 1])
        if unordered:
            engine.delay_s = 0.002
        was_interrupted = interrupted_at(line, lambda cache=cache: serve(cache, 0, experts))
        if unordered:
            engine.delay_s = 0.0
        for _ in range(2):
            for expert in range(N_EXPERTS):
                assert serve(cache, 0, [expert]) == [expert]
            time.sleep(0.003 if unordered else 0)  # what was forgotten arrives now
            for expert in cache.contents(0):
                assert serve(cache, 0, [expert]) == [expert]
        assert len(cache.contents(0)) == 3  # every slot in use again
        cache.close()
        if not was_interrupted:
            break
        line += 1
    assert line > 20
