"""Eviction policies: which cached expert makes room for another one.

A key is any hashable that names an expert of a layer. A policy gives every key a score at each use; the
cached key with the lowest score is evicted first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from math import inf, log2

from mixtral_offload.errors import OptionError

Key = Hashable


class LRU:
    """The least recently used goes first (2312.17238, section 3.1)."""

    def __init__(self) -> None:
        self.score: dict[Key, float] = {}
        self._now = 0

    def use(self, key: Key) -> None:
        """Update the score of a key that is used."""
        self._now += 1
        self.score[key] = self._now


class LFU:
    """The least often used goes first; of equals, the least recently used."""

    def __init__(self) -> None:
        self.score: dict[Key, int] = {}
        self._now = 0

    def use(self, key: Key) -> None:
        """Update the score of a key that is used."""
        self._now += 1
        uses = (self.score.get(key, 0) >> 40) + 1
        self.score[key] = uses << 40 | self._now


class LRFU:
    """Between the two: a use counts half after `half_life` further uses of the pool (Lee et al. 2001).

    The score is the logarithm of the decayed count, carried to time 0: its order does not change between
        uses.
    """

    def __init__(self, half_life: float = 32.0):
        self.score: dict[Key, float] = {}
        self._now, self._decay = 0, 1 / half_life

    def use(self, key: Key) -> None:
        """Update the score of a key that is used."""
        self._now += 1
        now = self._now * self._decay
        self.score[key] = now + log2(1 + 2 ** (self.score.get(key, -inf) - now))


class Belady:
    """The one used farthest in the future goes first: no policy has more hits (Belady 1966).

    Args:
        future: The keys of all uses to come, in their order.
    """

    def __init__(self, future: Iterable[Key]):
        self.score: dict[Key, float] = {}
        self._uses: dict[Key, deque[int]] = {}
        for time, key in enumerate(future):
            self._uses.setdefault(key, deque()).append(time)

    def use(self, key: Key) -> None:
        """Update the score of a key that is used."""
        uses = self._uses[key]
        uses.popleft()
        self.score[key] = -uses[0] if uses else -inf


Policy = LRU | LFU | LRFU | Belady
POLICIES: dict[str, type[LRU | LFU | LRFU]] = {"lru": LRU, "lfu": LFU, "lrfu": LRFU}


def make_policy(name: str) -> Policy:
    """Make the policy of this name; raise OptionError if there is none."""
    if not isinstance(name, str) or name not in POLICIES:
        raise OptionError("unknown policy", expected=", ".join(POLICIES), found=name)
    return POLICIES[name]()


def check_predictions(prefetch: int, look_ahead: int, n_experts: int, n_layers: int) -> None:
    """Refuse more predictions than a model can need.

    Raises:
        OptionError: More experts than a layer has, or layers beyond the last one.
    """
    if prefetch and (prefetch > n_experts or look_ahead > max(1, n_layers - 1)):
        raise OptionError(
            "impossible predictions",
            expected=f"at most {n_experts} experts, less than {n_layers} layers ahead",
            found=f"prefetch {prefetch}, look_ahead {look_ahead}",
        )


def staging_rows(prefetch: int, look_ahead: int) -> int:
    """Return the number of staging rows for these options.

    Most predicted experts are in a slot already, so 4 rows do (2312.17238, section 3.2); one more is for a
    copy that is being stopped.
    """
    return min(prefetch * look_ahead, 4) + 1 if prefetch else 0
