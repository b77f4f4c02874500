"""Counters are added and subtracted field by field, also where one holds another."""

from dataclasses import astuple, dataclass
from math import isnan

import pytest

from mixtral_offload.core.counters import CacheStats, Counters
from mixtral_offload.errors import OptionError
from mixtral_offload.units import check_whole, listed


@dataclass
class Turns(Counters):
    n: int
    cache: CacheStats


def test_sums_and_differences():
    a, b = CacheStats(*range(8)), CacheStats(*range(10, 90, 10))
    assert astuple(a + b) == tuple(x + y for x, y in zip(range(8), range(10, 90, 10)))
    assert a + b - b == a and astuple(a) == tuple(range(8))
    turns = Turns(3, a) + Turns(1, b)
    assert turns == Turns(4, a + b)


def test_hit_rate():
    stats = CacheStats(hits=3, misses=1)
    assert stats.hit_rate == 0.75 and stats.hits_as_text == "75% of expert uses were hits"
    stats.reset()
    assert stats == CacheStats() and isnan(stats.hit_rate) and stats.hits_as_text == "no experts used"


@pytest.mark.parametrize("value", [0, 9, 2.0, True, "3", None])
def test_what_is_no_whole_number_in_range(value):
    with pytest.raises(OptionError, match=r"(?s)impossible n.*a whole number from 1 to 8"):
        check_whole("n", value, 1, 8)
    check_whole("n", 10**30)


def test_parts_that_are_empty_are_not_listed():
    assert (
        listed({"dense part": 2 * 10**9, "KV cache": 0, "experts": 1500})
        == "dense part 2.00 GB, experts 2 kB"
    )
