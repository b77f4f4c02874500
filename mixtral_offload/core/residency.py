"""Which expert is where on one device, and what to do next: slots, staging rows, predictions. Only decisions.

The live cache and the replays carry out the same actions: they count the same hits and copy in the same
order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from mixtral_offload.core.copy_order import NOW
from mixtral_offload.core.misses import MissRule
from mixtral_offload.core.policies import Key, Policy


class CopyState(Protocol):
    """The state of a copy under way that decisions depend on.

    Attributes:
        has_begun: A chunk has moved or is moving.
        is_good: It can still arrive.
        is_over: It was cancelled, and nothing writes its target any more.
    """

    @property
    def has_begun(self) -> bool: ...
    @property
    def is_good(self) -> bool: ...
    @property
    def is_over(self) -> bool: ...


class Load:
    """One expert on its way into a row.

    Args:
        number: Position among all loads, in the order of their creation.
        due: NOW if its layer waits for it, else the number of the layer call that is predicted to use it.

    Attributes:
        row: Row of device memory, set by the driver (see `Residency.free_row`); -1 before.
        copy: Set by the driver before the copy starts; None before.
        is_predicted: Whether a prediction has started it; False also while it is being started.
    """

    __slots__ = ("copy", "due", "is_predicted", "key", "layer", "number", "row")

    def __init__(self, key: Key, layer: int, number: int, due: int):
        self.key, self.layer, self.number, self.due = key, layer, number, due
        self.row, self.is_predicted = -1, False
        self.copy: CopyState | None = None


class Do(Enum):
    """What the driver does with an action's load before it takes the next action."""

    START = "make a copy of it, set `load.copy`, then start that copy"
    PROMOTE = "the layer waits for it now"
    CANCEL = "stop its copy; return at once"
    ABANDON = "stop its copy; return when nothing writes its row any more"
    FREE = "count what it has moved: nothing writes its row any more"
    LAND = "wait for its copy"
    USE = "run the expert; its row is valid until the next action"
    COMPUTE = "run the expert on the CPU, from the store"


class Action(NamedTuple):
    """One step. load is None for a COMPUTE, and for a USE of what was on the device: a hit."""

    do: Do
    key: Key
    load: Load | None = None


class Pool:
    """Slots that hold some experts, and the policy that selects which one is evicted.

    Args:
        n_slots: How many experts may be held or loading.
        policy: Eviction policy.
        resident: Keys that are on the device permanently, in addition to the slots.

    Attributes:
        held: key -> row.
        loading: key -> its load.
    """

    def __init__(self, n_slots: int, policy: Policy, resident: Collection[Key] = ()):
        self.n_slots, self.policy, self.resident = n_slots, policy, resident
        self.held: dict[Key, int] = {}
        self.loading: dict[Key, Load] = {}

    def make_room(self, busy: Collection[Key]) -> bool:
        """Evict one that is not `busy` if all slots are full; return whether one more can be loaded."""
        if len(self.held) + len(self.loading) < self.n_slots:
            return True
        candidates = [key for key in self.held if key not in busy]
        if not candidates:
            return False
        del self.held[min(candidates, key=self.policy.score.__getitem__)]
        return True

    def publish(self, load: Load) -> None:
        """Hold an expert whose copy has landed."""
        self.held[load.key] = load.row
        del self.loading[load.key]

    def use_held(self, needed: Sequence[Key]) -> bool:
        """Note a use of each and return True if all are on the device: such a call needs no more."""
        if not all(key in self.held or key in self.resident for key in needed):
            return False
        for key in needed:
            if key not in self.resident:
                self.policy.use(key)
        return True


class Residency:
    """The experts on one device. A driver carries out each action before it takes the next one.

    A copy is recorded before it can write, and an expert is published after its copy has landed. A right
    prediction's staging row becomes a slot, and the evicted expert's slot a staging row: nothing is copied
    twice. Free rows are computed, never stored: an interrupt at any line leaves nothing to repair; the next
    `begin` drops what was under way.

    Args:
        make_pools: Returns layer -> empty pool; the same pool for all layers if they share their slots.
        n_staging: Rows for predicted experts.
        n_rows: Rows of device memory for slots and staging, together.
        misses: Which missing experts the CPU computes; None: none.

    Attributes:
        misses: The same; may be exchanged between calls.
        n_begun: Layer calls so far.
        staged: Predicted experts, landed or on their way.
        dropped: Predictions that were cancelled and whose rows may still be written.
    """

    def __init__(
        self,
        make_pools: Callable[[], dict[int, Pool]],
        n_staging: int = 0,
        n_rows: int = 0,
        misses: MissRule | None = None,
    ):
        self._make_pools, self._n_staging, self._rows = make_pools, n_staging, range(n_rows)
        self.misses = misses or MissRule()
        self.n_begun = self._n_loads = 0
        self.forget()

    def forget(self) -> None:
        """Start empty. Only for a driver whose copies are all over, or cannot write here (a forked child)."""
        self.staged: dict[Key, Load] = {}
        self.dropped: list[Load] = []
        self.pools = self._make_pools()

    def clear(self) -> Iterator[Action]:
        """Evict everything that is not resident, and forget what the policies have learned."""
        for pool in self.distinct_pools():
            yield from self._abandon_loading(pool)
        for load in list(self.staged.values()):
            yield from self._drop(load)
        self.pools = self._make_pools()

    def begin(
        self, layer: int, needed: Sequence[Key], n_tokens: Sequence[int] | None = None
    ) -> Iterator[Action]:
        """Call a layer that needs these experts, each once.

        All loads that the slots allow come first; then the uses of what is held, then what the CPU computes
        meanwhile, then the uses of what was loaded, in the order of their loads. More experts than slots go
        through in waves, whose order is fixed. The policy sees the uses in the order of `needed`, not of
        arrival.

        Args:
            n_tokens: How many tokens each expert is for. None: all misses are copied.
        """
        pool = self.pools[layer]
        yield from self._enter(pool, layer, needed)
        hits = [key for key in needed if key in pool.held or key in pool.resident]
        waiting = deque(key for key in needed if key not in hits) if len(hits) < len(needed) else deque()
        for_cpu: list[Key] = []
        if waiting and n_tokens is not None:
            for_cpu = self._for_cpu(pool, waiting, dict(zip(needed, n_tokens)))
            for key in for_cpu:
                waiting.remove(key)
                if key in self.staged:  # a copy that can no longer arrive
                    yield from self._drop(self.staged[key])
        stored = [key for key in needed if key not in pool.resident]
        if len(stored) - len(for_cpu) > pool.n_slots:
            yield from self._in_waves(pool, layer, deque(hits), waiting, for_cpu)
            return
        yield from self._load_waiting(pool, layer, waiting, hits)
        for key in stored:
            pool.policy.use(key)
        for key in hits:
            yield Action(Do.USE, key)
        for key in for_cpu:
            yield Action(Do.COMPUTE, key)
        while pool.loading:
            yield from self._land(pool, min(pool.loading.values(), key=lambda load: load.number))

    def use_held(self, layer: int, needed: Sequence[Key]) -> Iterator[Action] | None:
        """Do what `begin` does if all are on the device, without an action for each use.

        Returns:
            The actions that are left, which drop what is not needed and are to be carried out; None if an
            expert is missing, and then nothing was done.
        """
        pool = self.pools[layer]
        return self._enter(pool, layer, needed) if pool.use_held(needed) else None

    def predict(self, layer: int, keys: Sequence[Key], distance: int) -> Iterator[Action]:
        """Load experts that `layer`, `distance` layer calls from now, will probably need; the most probable
        first.

        Experts that are on the device or on their way are skipped. Earlier predictions for this layer that
        are not among `keys` and whose copies have not begun are dropped. Without a free staging row, nothing
        is loaded.
        """
        pool = self.pools[layer]
        for load in [of for of in self.staged.values() if of.layer == layer and of.key not in keys]:
            if load.copy is None or not load.copy.has_begun:
                yield from self._drop(load)
        for key in keys:
            if key in pool.resident or key in pool.held or key in pool.loading or key in self.staged:
                continue
            yield from self.settle()
            if len(self.staged) + len(self.dropped) >= self._n_staging:
                return
            load = self.staged[key] = self._new(key, layer, self.n_begun + distance)
            yield Action(Do.START, key, load)
            load.is_predicted = True  # only now: one that never started must not be waited for

    def settle(self) -> Iterator[Action]:
        """Free the rows of dropped predictions that nothing writes any more."""
        for load in [of for of in self.dropped if of.copy is None or of.copy.is_over]:
            self.dropped.remove(load)
            yield Action(Do.FREE, load.key, load)

    def distinct_pools(self) -> list[Pool]:
        """Return each pool once, even if layers share one."""
        return list({id(pool): pool for pool in self.pools.values()}.values())

    def rows_in_use(self) -> list[int]:
        """Return the rows that hold an expert or that a copy may write."""
        loads = [*self.staged.values(), *self.dropped]
        rows: list[int] = []
        for pool in self.distinct_pools():
            rows += pool.held.values()
            loads += pool.loading.values()
        return rows + [load.row for load in loads if load.row >= 0]

    def free_row(self) -> int:
        """Return a row that holds nothing and that no copy may write; there is one at each START."""
        used = set(self.rows_in_use())
        return next(row for row in self._rows if row not in used)

    def _enter(self, pool: Pool, layer: int, needed: Sequence[Key]) -> Iterator[Action]:
        yield from self._abandon_loading(pool)
        self.n_begun += 1
        for load in [of for of in self.staged.values() if of.layer == layer and of.key not in needed]:
            yield from self._drop(load)  # at once: its row and the link are for the next predictions

    def _new(self, key: Key, layer: int, due: int) -> Load:
        self._n_loads += 1
        return Load(key, layer, self._n_loads, due)

    def _for_cpu(self, pool: Pool, missing: Sequence[Key], n_tokens: Mapping[Key, int]) -> list[Key]:
        """Those that the CPU computes."""
        open_ = [key for key in missing if not self._is_coming(key)]
        n_free = pool.n_slots - len(pool.held) - len(pool.loading)
        n_coming = len(missing) - len(open_)
        counts = [n_tokens[key] for key in open_]
        return self.misses.for_cpu(open_, counts, n_coming, max(0, n_free - n_coming))

    def _is_coming(self, key: Key) -> bool:
        """Whether a prediction has started a copy that can still arrive."""
        load = self.staged.get(key)
        return load is not None and load.is_predicted and load.copy is not None and load.copy.is_good

    def _in_waves(
        self, pool: Pool, layer: int, hits: deque[Key], waiting: deque[Key], for_cpu: Sequence[Key]
    ) -> Iterator[Action]:
        """A call that needs more experts than there are slots: each used one makes room for one more."""
        busy = {*hits}
        yield from self._load_waiting(pool, layer, waiting, busy)
        computing = deque(for_cpu)
        while hits or computing or pool.loading:
            if computing and not hits:
                pool.policy.use(computing[0])
                yield Action(Do.COMPUTE, computing.popleft())
                continue
            key = hits[0] if hits else next(iter(pool.loading))
            if key not in pool.resident:
                pool.policy.use(key)
            busy.add(key)
            if hits:
                yield Action(Do.USE, hits.popleft())
            else:
                yield from self._land(pool, pool.loading[key])
            busy.discard(key)
            yield from self._load_waiting(pool, layer, waiting, busy)

    def _load_waiting(
        self, pool: Pool, layer: int, waiting: deque[Key], busy: Collection[Key]
    ) -> Iterator[Action]:
        while waiting and pool.make_room(busy):
            yield from self._load(pool, layer, waiting.popleft())

    def _load(self, pool: Pool, layer: int, key: Key) -> Iterator[Action]:
        """Start the copy of an expert that is needed, or take over the prediction that has started it."""
        load = self.staged.get(key)
        if load is not None and self._is_coming(key):
            pool.loading[key] = load
            del self.staged[key]
            load.due = NOW
            yield Action(Do.PROMOTE, key, load)
            return
        if load is not None:
            yield from self._drop(load)
        load = pool.loading[key] = self._new(key, layer, NOW)
        yield Action(Do.START, key, load)

    def _land(self, pool: Pool, load: Load) -> Iterator[Action]:
        """Wait for an expert and use it."""
        yield Action(Do.LAND, load.key, load)
        pool.publish(load)
        yield Action(Do.USE, load.key, load)

    def _drop(self, load: Load) -> Iterator[Action]:
        """Cancel a prediction."""
        yield Action(Do.CANCEL, load.key, load)
        self.dropped.append(load)  # record it first: its row is free only when nothing writes it
        del self.staged[load.key]

    def _abandon_loading(self, pool: Pool) -> Iterator[Action]:
        """Forget what an exception left under way."""
        while pool.loading:
            load = next(iter(pool.loading.values()))
            yield Action(Do.ABANDON, load.key, load)
            pool.loading.pop(load.key)
