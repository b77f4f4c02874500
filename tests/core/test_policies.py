"""Eviction policies on sequences whose right answers can be worked out by hand or by trying everything."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_offload.core.policies import LFU, LRFU, LRU, POLICIES, Belady, make_policy
from mixtral_offload.core.residency import Do, Pool, Residency
from mixtral_offload.errors import OptionError


def replay(policy, sequence, n_slots):
    """Hits of passes that need one key each, and what is held at the end."""
    residency, hits = Residency(lambda: {0: Pool(n_slots, policy)}), 0
    for needed in sequence:
        hits += sum(of.do is Do.USE and of.load is None for of in residency.begin(0, [needed]))
    return hits, set(residency.pools[0].held)


def test_what_each_policy_keeps():
    often_then_others = [1, 1, 1, 1, 2, 3]
    assert replay(LRU(), often_then_others, 2)[1] == {2, 3}
    assert replay(LFU(), often_then_others, 2)[1] == {1, 3}
    assert replay(LRFU(half_life=100), often_then_others, 2)[1] == {1, 3}  # like LFU
    assert replay(LRFU(half_life=0.5), often_then_others, 2)[1] == {2, 3}  # like LRU
    assert replay(Belady([*often_then_others, 2]), often_then_others, 2)[1] >= {2}


def best(sequence, n_slots):
    """The most hits that any choice of victims gives, by trying them all."""

    @cache
    def go(at, held):
        if at == len(sequence):
            return 0
        key = sequence[at]
        if key in held:
            return 1 + go(at + 1, held)
        if len(held) < n_slots:
            return go(at + 1, held | {key})
        return max(go(at + 1, held - {victim} | {key}) for victim in held)

    return go(0, frozenset())


@given(sequence=st.lists(st.integers(0, 4), max_size=12), n_slots=st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_belady_is_the_best_that_any_choice_could_do(sequence, n_slots):
    bound = replay(Belady(sequence), sequence, n_slots)[0]
    assert bound == best(tuple(sequence), n_slots)
    assert all(replay(make(), sequence, n_slots)[0] <= bound for make in POLICIES.values())


def test_unknown_policy():
    with pytest.raises(OptionError, match="lru, lfu, lrfu"):
        make_policy("fifo")
