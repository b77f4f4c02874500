"""Counters of a cache, live or replayed."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class CacheStats:
    """Counters since the last `reset`. One use is one expert needed by one pass through one layer.

    Attributes:
        hits: Uses that found their expert in a slot, or resident.
        misses: The other uses.
        prefetched: Misses whose copy a prediction had started.
        predictions: Copies that predictions have started.
        bytes_moved: Bytes of all copies.
        wasted_bytes: Bytes of predictions that were not used.
        wait_s: Seconds that the host waited for copies. 0 on CUDA with pinned memory: the device waits there.
    """

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    predictions: int = 0
    bytes_moved: int = 0
    wasted_bytes: int = 0
    wait_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of uses that were hits; nan before the first use."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else float("nan")

    def reset(self) -> None:
        """Set every counter to zero."""
        self.__init__()

    def __add__(self, other: CacheStats) -> CacheStats:
        return CacheStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: CacheStats) -> CacheStats:
        return CacheStats(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))
