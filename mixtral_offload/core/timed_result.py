"""What came of playing a trace against time: passes, stalls, the link, and every event if they were kept.

Knows arrays in a card's unit of time. `analysis/timed_replay.py` fills it, `analysis/plots/timeline.py` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixtral_offload.core.costs import Card

BESIDE, ATTENTION, EXPERT = range(3)
PARTS = ("beside the layers", "attention, norms, router", "experts")


@dataclass(frozen=True)
class Events:
    """Everything that lasted, by begin: float64 seconds from the start.

    copy_*: stretches of uninterrupted carrying over the link: copy_layer, copy_expert int32, copy_kind uint8 (NEEDED,
    RIGHT or WRONG of core/link.py), copy_span_s [., 2]. part_*: what the device computes: part_kind uint8 (BESIDE, ATTENTION
    or EXPERT), part_layer and part_expert int32 (-1 for none), part_span_s [., 2].
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
class Played:
    """P passes through L layers on a card.

    pass_s: float64 [P], how long each took. stall_s: float64 [P, L], how long the device stood still for copies;
    pass_compute_s: float64 [P], the rest of pass_s. pass_tokens, pass_misses: int64 [P]. Counters as in `CacheStats`,
    for all passes: hits, prefetched (misses whose copy a guess had asked for), guesses (for which a copy was asked
    for), bytes_moved, wasted_bytes (of wrong guesses). link_busy_s: how long the link carried something.
    """

    card: Card
    pass_s: np.ndarray
    stall_s: np.ndarray
    pass_compute_s: np.ndarray
    pass_tokens: np.ndarray
    pass_misses: np.ndarray
    hits: int
    prefetched: int
    guesses: int
    bytes_moved: int
    wasted_bytes: int
    link_busy_s: float
    events: Events | None = None

    @property
    def misses(self) -> int:
        return int(self.pass_misses.sum())

    @property
    def compute_s(self) -> float:
        """The device's, over all passes."""
        return float(self.pass_compute_s.sum())

    @property
    def begins_s(self) -> np.ndarray:
        """When each pass begins, and the last one ends: float64 [P + 1]."""
        return np.concatenate([[0.0], np.cumsum(self.pass_s)])

    @property
    def decoding(self) -> np.ndarray:
        """bool [P]: the passes of one token. A prompt's are others, unless it has only one token."""
        return self.pass_tokens == 1

    @property
    def time_per_token(self) -> float:
        """The mean of the decoding passes; nan if there are none."""
        return _mean(self.pass_s[self.decoding])

    @property
    def link_use(self) -> float:
        """The share of all time in which the link carried something; nan if there were no passes."""
        return self.link_busy_s / self.pass_s.sum() if len(self.pass_s) else float("nan")

    @property
    def floor_s(self) -> float:
        """What no guesses can beat, for a decoding token: all its compute, or the copies of all its misses one after
        the other, whichever takes longer on average.

        Recorded guesses reach no farther back than their own pass. Perfect ones do, and may gain once what the prompt's
        pass copied for the first token after it.
        """
        compute = _mean(self.pass_compute_s[self.decoding])
        return max(compute, _mean(self.pass_misses[self.decoding]) * self.card.copy_s)

    @property
    def over_floor(self) -> float:
        return self.time_per_token / self.floor_s


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
