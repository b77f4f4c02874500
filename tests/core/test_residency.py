"""Decisions alone: any calls, predictions and interrupts, with copies that arrive and stop in any order."""

from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mixtral_offload.core.misses import COPY, CPU, MISSES, MissCosts, MissRule
from mixtral_offload.core.policies import LRU
from mixtral_offload.core.residency import Do, Pool, Residency

N_LAYERS, N_EXPERTS, N_SLOTS, N_STAGING = 2, 6, 3, 2
RESIDENT = frozenset({(0, 5)})
experts_of_a_call = st.lists(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=N_EXPERTS, unique=True)


class FakeCopy:
    """A copy whose progress the test decides."""

    def __init__(self):
        self.has_begun = self.is_cancelled = self.is_over = False

    @property
    def is_good(self):
        return not self.is_cancelled


class Interrupted(Exception):
    pass


class Driver:
    """Carries actions out; with `stop_at`, it stops at the n-th one, before or after it."""

    def __init__(self, n_staging=N_STAGING):
        n_rows = N_LAYERS * N_SLOTS + n_staging
        self.residency = Residency(
            lambda: {layer: Pool(N_SLOTS, LRU(), RESIDENT) for layer in range(N_LAYERS)}, n_staging, n_rows
        )
        self.holds = {}  # row -> the expert whose bytes are there
        self.writing = {}  # load -> what a copy may write, in rows that are not free yet
        self.n_copies, self.stop_at, self.after = 0, None, False

    def carry_out(self, actions, used=None):
        for n, action in enumerate(actions):
            if self.stop_at == n and not self.after:
                raise Interrupted
            self._do(action, used)
            if self.stop_at == n:
                raise Interrupted

    def _do(self, action, used):
        do, key, load = action
        if do is Do.START:
            load.row = self.residency.free_row()
            assert load.row not in self.writing.values()  # nothing else may write there
            load.copy, self.writing[load] = FakeCopy(), load.row
            self.n_copies += 1
        elif do is Do.CANCEL and load.copy is not None:
            load.copy.is_cancelled = True
        elif do is Do.ABANDON:
            self.end(load)
        elif do is Do.FREE:
            assert load not in self.writing
        elif do is Do.LAND:
            assert load.copy.is_good
            self.holds[load.row] = key
            self.end(load)
        elif do is Do.COMPUTE:
            assert load is None
            used.append((key, None))
        elif do is Do.USE:
            row = self.residency.pools[key[0]].held.get(key)
            assert key in RESIDENT if row is None else self.holds[row] == key
            used.append((key, load is None))

    def end(self, load):
        self.writing.pop(load, None)
        if load.copy is not None:
            load.copy.is_over = True


class Calls(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.driver, self.naive = Driver(), [OrderedDict() for _ in range(N_LAYERS)]

    @property
    def residency(self):
        return self.driver.residency

    @rule(layer=st.integers(0, N_LAYERS - 1), experts=experts_of_a_call)
    def call(self, layer, experts):
        used, held = [], self.naive[layer]
        needed = [(layer, expert) for expert in experts]
        self.driver.carry_out(self.residency.begin(layer, needed), used)
        assert sorted(key for key, _ in used) == sorted(needed)
        assert [key for key, hit in used if hit] == [key for key in needed if key in held or key in RESIDENT]
        in_slots = [key for key in needed if key not in RESIDENT]
        if len(in_slots) <= N_SLOTS:  # the textbook's LRU; waves have an order of their own
            for key in in_slots:
                if key in held:
                    held.move_to_end(key)
            for key in in_slots:
                if key not in held and len(held) == N_SLOTS:
                    held.popitem(last=False)
                held[key] = True
            for key in in_slots:
                held.move_to_end(key)
            assert set(held) == set(self.residency.pools[layer].held)
        else:
            self._as_it_is(layer)

    @rule(
        layer=st.integers(0, N_LAYERS - 1),
        counts=st.dictionaries(st.integers(0, N_EXPERTS - 1), st.integers(1, 5), min_size=1),
        mode=st.sampled_from(MISSES),
    )
    def call_with_cpu(self, layer, counts, mode):
        """Each expert is used once; what the CPU computes takes no slot and evicts nothing."""
        residency, used, held = self.residency, [], self.naive[layer]
        residency.misses = MissRule(mode, MissCosts(2.0, 3.0, 1.0))
        needed = sorted((layer, expert) for expert in counts)
        coming = {key for key in needed if residency._is_coming(key)}
        n_copies, n_free = self.driver.n_copies, N_SLOTS - len(held)
        self.driver.carry_out(residency.begin(layer, needed, [counts[expert] for _, expert in needed]), used)
        assert sorted(key for key, _ in used) == needed
        assert {key for key, how in used if how} == {key for key in needed if key in held or key in RESIDENT}
        computed = {key for key, how in used if how is None}
        loaded = {key for key, how in used if how is False}
        assert not computed & ({*residency.pools[layer].held} | coming)
        assert self.driver.n_copies - n_copies == len(loaded - coming)
        if mode == CPU:
            assert len(loaded - coming) <= max(0, n_free - len(loaded & coming))
        elif mode == COPY:
            assert not computed
        residency.misses = MissRule()
        self._as_it_is(layer)

    def _as_it_is(self, layer):
        pool = self.residency.pools[layer]
        self.naive[layer] = OrderedDict.fromkeys(sorted(pool.held, key=pool.policy.score.__getitem__), True)

    @rule(layer=st.integers(0, N_LAYERS - 1), experts=experts_of_a_call, distance=st.integers(1, 3))
    def predict(self, layer, experts, distance):
        keys = [(layer, expert) for expert in experts]
        self.driver.carry_out(self.residency.predict(layer, keys, distance))

    @rule(
        layer=st.integers(0, N_LAYERS - 1),
        experts=experts_of_a_call,
        at=st.integers(0, 12),
        after=st.booleans(),
        predicts=st.booleans(),
        mode=st.sampled_from(MISSES),
    )
    def interrupted(self, layer, experts, at, after, predicts, mode):
        """An exception in the middle of a call leaves no wrong expert and no lost row."""
        keys = [(layer, expert) for expert in experts]
        self.driver.stop_at, self.driver.after = at, after
        self.residency.misses = MissRule(mode, MissCosts(2.0, 3.0, 1.0))
        begin = self.residency.begin(layer, keys, [1] * len(keys))
        actions = self.residency.predict(layer, keys, 1) if predicts else begin
        try:
            self.driver.carry_out(actions, [])
        except Interrupted:
            actions.close()
        self.driver.stop_at, self.residency.misses = None, MissRule()
        for of in range(N_LAYERS):
            self._as_it_is(of)

    @precondition(lambda self: self.driver.writing)
    @rule(data=st.data())
    def time_passes(self, data):
        """A copy begins, or a cancelled one stops at last."""
        load = data.draw(st.sampled_from(list(self.driver.writing)))
        if load.copy.is_cancelled:
            self.driver.end(load)
        else:
            load.copy.has_begun = True

    @rule()
    def clear(self):
        self.driver.carry_out(self.residency.clear())
        assert not any(pool.held or pool.loading for pool in self.residency.distinct_pools())
        self.naive = [OrderedDict() for _ in range(N_LAYERS)]

    @invariant()
    def no_row_is_used_twice_or_lost(self):
        rows = self.residency.rows_in_use()
        assert len(rows) == len(set(rows)) <= N_LAYERS * N_SLOTS + N_STAGING
        assert len(self.residency.staged) + len(self.residency.dropped) <= N_STAGING
        assert set(self.driver.writing.values()) <= set(rows)  # what a copy may write is not free


Calls.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
test_any_order_of_calls_predictions_and_interrupts = Calls.TestCase


@given(st.lists(st.tuples(st.integers(0, N_LAYERS - 1), experts_of_a_call, st.booleans()), max_size=25))
@settings(max_examples=200, deadline=None)
def test_predictions_change_neither_hits_nor_evictions(steps):
    plain, predicting = Driver(n_staging=0), Driver()
    for layer, experts, predicts in steps:
        keys = [(layer, expert) for expert in experts]
        if predicts:
            predicting.carry_out(predicting.residency.predict(layer, keys, 1))
            continue
        uses = [], []
        for driver, used in zip((plain, predicting), uses):
            driver.carry_out(driver.residency.begin(layer, keys), used)
        assert sorted(uses[0]) == sorted(uses[1])
        held = [[*driver.residency.pools[layer].held] for driver in (plain, predicting)]
        assert set(held[0]) == set(held[1])
