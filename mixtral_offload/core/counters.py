"""Counters of what a cache did, which can be added and subtracted."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Self = TypeVar("Self", bound="Counters")


@dataclass
class Counters:
    """Base of dataclasses whose fields are added and subtracted one by one."""

    def __add__(self: Self, other: Self) -> Self:
        return self._each(operator.add, other)

    def __sub__(self: Self, other: Self) -> Self:
        return self._each(operator.sub, other)

    def _each(self: Self, do: Callable[[Any, Any], Any], other: Self) -> Self:
        return type(self)(*map(do, vars(self).values(), vars(other).values()))


@dataclass
class CacheStats(Counters):
    """Counters since the last `reset`. One use is one expert needed by one pass through one layer.

    Attributes:
        hits: Uses that found their expert in a slot, or resident.
        misses: Uses that did not.
        prefetched: Misses whose copy a prediction had started.
        computed: Misses that the CPU computed, without a copy.
        predictions: Copies that predictions have started.
        bytes_moved: Bytes of all copies.
        wasted_bytes: Bytes copied for predictions that were not used.
        wait_s: Seconds that the host waited for copies. On CUDA with pinned memory the device waits instead.
    """

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    computed: int = 0
    predictions: int = 0
    bytes_moved: int = 0
    wasted_bytes: int = 0
    wait_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of uses that found their expert in a slot; nan before the first use."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else float("nan")

    @property
    def hits_as_text(self) -> str:
        """The hit rate as a phrase."""
        used = self.hits + self.misses
        return f"{self.hit_rate:.0%} of expert uses were hits" if used else "no experts used"

    def reset(self) -> None:
        """Set every counter to zero."""
        vars(self).update(vars(type(self)()))
