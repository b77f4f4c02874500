"""Which expert leaves when a slot is needed: eviction policies, and one layer's pass through the slots.

Knows keys and slots as names only: no bytes, no copies, no models. The live cache and the replay of a trace run this
same code, which is why they count the same hits.

A key is anything hashable that names an expert of a layer. A policy gives every key a score at each use; the held key
with the lowest score is evicted first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from math import inf, log2

from mixtral_offload.errors import OptionError

Key = Hashable
LOAD, USE = "load", "use"


class LRU:
    """The least recently used goes first (2312.17238, section 3.1)."""

    def __init__(self):
        self.score: dict[Key, float] = {}
        self._now = 0

    def use(self, key: Key) -> None:
        self._now += 1
        self.score[key] = self._now


class LFU:
    """The least often used goes first; of equals, the least recently used."""

    def __init__(self):
        self.score: dict[Key, float] = {}
        self._now = 0

    def use(self, key: Key) -> None:
        self._now += 1
        uses = (self.score.get(key, 0) >> 40) + 1
        self.score[key] = uses << 40 | self._now


class LRFU:
    """Between the two: every use counts, and counts half after `half_life` uses of the pool (Lee et al. 2001, LRFU).

    The score is the logarithm of the decayed count, carried to time 0: its order does not change between uses.
    """

    def __init__(self, half_life: float = 32.0):
        self.score: dict[Key, float] = {}
        self._now, self._decay = 0, 1 / half_life

    def use(self, key: Key) -> None:
        self._now += 1
        now = self._now * self._decay
        self.score[key] = now + log2(1 + 2 ** (self.score.get(key, -inf) - now))


class Belady:
    """The one used farthest in the future goes first: the bound that no policy without foresight can beat.

    future: the keys of all uses to come, in the order in which they will be used (Belady 1966).
    """

    def __init__(self, future: Iterable[Key]):
        self.score: dict[Key, float] = {}
        self._uses: dict[Key, deque[int]] = {}
        for time, key in enumerate(future):
            self._uses.setdefault(key, deque()).append(time)

    def use(self, key: Key) -> None:
        uses = self._uses[key]
        uses.popleft()
        self.score[key] = -uses[0] if uses else -inf


Policy = LRU | LFU | LRFU | Belady
POLICIES = {"lru": LRU, "lfu": LFU, "lrfu": LRFU}


def make_policy(name: str) -> Policy:
    if name not in POLICIES:
        raise OptionError("unknown policy", expected=", ".join(POLICIES), found=name)
    return POLICIES[name]()


def staging_rows(prefetch: int, look_ahead: int) -> int:
    """Rows of memory for guesses on their way: most guesses are in a slot already, so far fewer than could be asked for at
    once will do (2312.17238, section 3.2, has 4); and one for a copy that is still being stopped."""
    return min(prefetch * look_ahead, 4) + 1 if prefetch else 0


class Pool:
    """Slots that hold some experts, and the policy that says which of them leaves.

    n_slots: how many may be held or on their way. resident: keys that are there for good, beside the slots.
    held: key -> whatever the owner keeps with it (the live cache: a row of memory). loading: likewise, on its way.
    """

    def __init__(self, n_slots: int, policy: Policy, resident: Collection[Key] = ()):
        self.n_slots, self.policy, self.resident = n_slots, policy, resident
        self.held: dict[Key, object] = {}
        self.loading: dict[Key, object] = {}

    def make_room(self, busy: set[Key]) -> bool:
        """Whether one more may be loaded, after evicting the policy's choice of what is held and not `busy`."""
        if len(self.held) + len(self.loading) < self.n_slots:
            return True
        candidates = [key for key in self.held if key not in busy]
        if not candidates:
            return False
        del self.held[min(candidates, key=self.policy.score.__getitem__)]
        return True

    def publish(self, key: Key, value: object) -> None:
        """What was loading is there."""
        self.held[key] = value
        del self.loading[key]


def serve(pool: Pool, needed: Sequence[Key]) -> Iterator[tuple[str, Key | None, bool]]:
    """One pass of one layer that needs these keys: yields what to do next, as (LOAD or USE, key, hit).

    All loads that the slots allow come first, then the uses: what is held, then what was loaded. At LOAD, the caller
    puts the key into `pool.loading`, where its evicted predecessor is gone from `held` already; at a USE that is not
    a hit, it calls `pool.publish`. Such a USE names no key where the caller may take any of `pool.loading`, in the
    order in which they arrive: the policy has seen all uses in the order of `needed`. More keys than slots go through
    in waves, and their order is fixed.
    """
    hits = [key for key in needed if key in pool.held or key in pool.resident]
    waiting = deque(key for key in needed if key not in hits) if len(hits) < len(needed) else ()
    roaming = [key for key in needed if key not in pool.resident]
    if len(roaming) > pool.n_slots:
        yield from _in_waves(pool, hits, waiting)
        return
    busy = {*hits}
    for key in _loads(pool, waiting, busy):
        yield LOAD, key, False
    for key in roaming:
        pool.policy.use(key)
    for key in hits:
        yield USE, key, True
    while pool.loading:
        yield USE, None, False


def _in_waves(pool: Pool, hits: list[Key], waiting: deque[Key]) -> Iterator[tuple[str, Key, bool]]:
    """A pass that needs more keys than there are slots: each used one makes room for one more."""
    busy = {*hits}
    for key in _loads(pool, waiting, busy):
        yield LOAD, key, False
    hits = deque(hits)
    while hits or pool.loading:
        hit = bool(hits)
        key = hits.popleft() if hit else next(iter(pool.loading))
        if key not in pool.resident:
            pool.policy.use(key)
        busy.add(key)
        yield USE, key, hit
        busy.discard(key)
        for more in _loads(pool, waiting, busy):
            yield LOAD, more, False


def _loads(pool: Pool, waiting, busy: set[Key]) -> Iterator[Key]:
    while waiting and pool.make_room(busy):
        yield waiting.popleft()
