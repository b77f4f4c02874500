"""The cache: experts in rows of device memory, filled on demand or by prediction (2312.17238, 3.1 and 3.2).

`core/residency.py` decides; this maps rows to memory and loads to copies, and counts. Knows no models.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from mixtral_offload.core.copy_order import NOW
from mixtral_offload.core.counters import CacheStats
from mixtral_offload.core.misses import MissRule
from mixtral_offload.core.policies import LRU, Policy
from mixtral_offload.core.residency import Action, Do, Load, Pool, Residency
from mixtral_offload.core.trace import COMPUTED, HIT, MISS, PREFETCHED
from mixtral_offload.errors import CapacityError, OptionError
from mixtral_offload.models.checkpoint import ExpertId
from mixtral_offload.runtime.engines import Copy, Engine
from mixtral_offload.runtime.observer import Dropped, Observer, Observers, Use
from mixtral_offload.runtime.store import RamStore, Store, host_slab
from mixtral_offload.weights.hqq import Fields
from mixtral_offload.weights.layout import ExpertLayout

Views = dict[str, Fields]  # of one expert: matrix -> field -> tensor
# `core/residency.py` takes any hashable as a key; here it is an ExpertId, hence the casts


class OnCpu(NamedTuple):
    """What a `fetch` needs so that the CPU may compute some of its experts from the store.

    Attributes:
        n_tokens: How many tokens each requested expert is for.
        run: Computes one: called with its number and its views in the store.
    """

    n_tokens: Sequence[int]
    run: Callable[[int, Views], None]


class ExpertCache:
    """Experts on one device.

    Args:
        layout: Layout of one expert in a row.
        layers: layer -> (number of slots, resident experts).
        store: Has all experts that are not resident; None if there are none.
        engine: Carries out copies; None without a store.
        device: Device of the rows.
        policy: Makes an eviction policy.
        shared: One pool of slots for all layers in place of one for each.
        n_staging: Number of rows for predicted experts.
        observers: Called for uses and dropped predictions.
        lender: Use the memory and the residents of this cache, and allocate only rows that it lacks.

    Attributes:
        memory: Rows of the slots, staging rows and residents, in this order: uint8 `[layout.n_bytes]` each.
        lock: Held while experts are used.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        layers: Mapping[int, tuple[int, Sequence[int]]],
        store: Store | None,
        engine: Engine | None,
        device: torch.device | str,
        *,
        policy: Callable[[], Policy] = LRU,
        shared: bool = False,
        n_staging: int = 0,
        observers: Observers | None = None,
        lender: ExpertCache | None = None,
    ):
        self.layout, self.stats, self.lock = layout, CacheStats(), threading.RLock()
        self.observers = Observers() if observers is None else observers
        self.store, self.engine, self.device = store, engine, torch.device(device)
        self.n_staging = n_staging = n_staging if store else 0
        self._slots, self._policy = {layer: n for layer, (n, _) in layers.items()}, policy
        n_rows = sum(self._slots.values()) + n_staging
        residents = [(layer, expert) for layer, (_, resident) in layers.items() for expert in resident]
        if lender is None:
            self._slab = _allocate(n_rows + len(residents), layout.n_bytes, self.device)
            self.memory = list(self._slab)
        else:
            residents, self.memory = list(lender._resident), lender._lend(n_rows)
        self._resident: dict[ExpertId, int] = {key: row for row, key in enumerate(residents, n_rows)}
        self._n_rows, self._is_muted = n_rows, False
        self._views = [layout.views(row) for row in self.memory]
        self._addresses = [row.data_ptr() for row in self.memory]
        # holds nothing of this cache, so that a dropped model frees its memory at once
        make_pools = partial(_make_pools, self._slots, policy, self._resident, shared)
        self._residency = Residency(make_pools, n_staging, n_rows)

    def lend(
        self,
        slots: dict[int, int],
        kind: type[ExpertCache] | None = None,
        *,
        n_staging: int = 0,
        shared: bool = False,
    ) -> ExpertCache:
        """Make another cache over the same store, engine, memory and residents, for an experiment.

        It has the same eviction policy and the same rule for misses.

        Only one of the two may hold anything at a time: `drain` one before the other is used.

        Args:
            slots: layer -> number of slots. Rows that this cache lacks are allocated.
            kind: Class of the other cache; default: ExpertCache.
        """
        other = (kind or ExpertCache)(
            self.layout,
            {layer: (n, ()) for layer, n in slots.items()},
            self.store,
            self.engine,
            self.device,
            policy=self._policy,
            n_staging=n_staging,
            shared=shared,
            observers=self.observers,
            lender=self,
        )
        other._residency.misses = self.misses
        return other

    def _lend(self, n_rows: int) -> list[Tensor]:
        more = _allocate(max(0, n_rows - self._n_rows), self.layout.n_bytes, self.device)
        return [*self.memory[: min(n_rows, self._n_rows)], *more, *self.memory[self._n_rows :]]

    @property
    def n_bytes(self) -> int:
        """Bytes of its rows."""
        return len(self.memory) * self.layout.n_bytes

    def resident_slots(self) -> Iterator[tuple[ExpertId, Tensor]]:
        """Yield each resident expert with its row, which is filled once, while building."""
        for key, row in self._resident.items():
            yield key, self.memory[row]

    def resident_rows(self, layer: int) -> Tensor:
        """Return the memory of a layer's resident experts: uint8 `[residents, layout.n_bytes]`."""
        rows = [row for (of, _), row in self._resident.items() if of == layer]
        return self._slab[rows[0] : rows[-1] + 1]

    def contents(self, layer: int) -> list[int]:
        """Return the experts of `layer` on the device: residents, then cached ones in order of eviction."""
        pool = self._residency.pools[layer]
        held = cast(list[ExpertId], sorted(pool.held, key=pool.policy.score.__getitem__))
        return [expert for at, expert in (*self._resident, *held) if at == layer]

    def n_slots(self, layer: int) -> int:
        """Return the number of slots of this layer; with a shared pool, its share."""
        return self._slots[layer]

    @property
    def misses(self) -> MissRule:
        """Which missing experts the CPU computes, from a store in RAM. Default: none.

        Another one may be set between layer calls, but not during a recording.
        """
        return self._residency.misses

    @misses.setter
    def misses(self, rule: MissRule) -> None:
        if self.observers.is_exclusive:
            raise OptionError("the rule for misses cannot change while a model is recorded", found=rule.mode)
        self._residency.misses = rule

    def lacks(self, layer: int, experts: Sequence[int]) -> bool:
        """Return whether one of these is neither in a slot nor resident."""
        held = self._residency.pools[layer].held
        return any(
            (layer, expert) not in held and (layer, expert) not in self._resident for expert in experts
        )

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Hold the lock, and call no observers meanwhile."""
        with self.lock:
            is_muted, self._is_muted = self._is_muted, True
            try:
                yield
            finally:
                self._is_muted = is_muted

    def fetch(
        self,
        layer: int,
        experts: Sequence[int],
        meanwhile: Callable[[], None] | None = None,
        on_cpu: OnCpu | None = None,
    ) -> Iterator[tuple[int, Views]]:
        """Yield each of `experts` with its views, once: those on the device first, the others as they arrive.

        Views are valid until the next expert is requested. More experts than slots go through in waves.

        Args:
            meanwhile: Called after all copies that the slots allow have started, before the first expert is
                yielded.
            on_cpu: Computes those experts that the cache's rule gives to the CPU; these are not yielded.
                None: all misses are copied.
        """
        try:
            yield from self._fetch(layer, experts, meanwhile, on_cpu)
        finally:
            if self.engine is not None:
                self.engine.slots_were_read()

    def _fetch(
        self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None, on_cpu: OnCpu | None
    ) -> Iterator[tuple[int, Views]]:
        held, wait_s = self._residency.pools[layer].held, 0.0
        keys: list[ExpertId] = [(layer, expert) for expert in experts]
        for action in self._residency.begin(layer, keys, None if on_cpu is None else on_cpu.n_tokens):
            do, load = action.do, action.load
            if do is not Do.USE and do is not Do.LAND and do is not Do.COMPUTE:
                self._carry_out(action)
                continue
            if meanwhile is not None:
                meanwhile()
                meanwhile = None
            if do is Do.LAND:
                began_s = time.perf_counter()
                _copy_of(load).wait()
                wait_s = time.perf_counter() - began_s
                continue
            key = cast(ExpertId, action.key)
            if do is Do.COMPUTE:
                assert on_cpu is not None and isinstance(self.store, RamStore)
                self._count_computed(key)
                on_cpu.run(key[1], self.store.views(key))
                continue
            self._count(key, load, wait_s)
            row = self._resident.get(key)
            yield key[1], self._views[held[key] if row is None else row]

    def rows_here(
        self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None = None
    ) -> list[int] | None:
        """Do what `fetch` does for experts that are all on the device, at once.

        Args:
            meanwhile: As in `fetch`.

        Returns:
            The address of each expert's row, valid until the next request; None if one is missing, and then
            nothing was done.
        """
        needed: list[ExpertId] = [(layer, expert) for expert in experts]
        actions = self._residency.use_held(layer, needed)
        if actions is None:
            return None
        self._carry_out_all(actions)
        if meanwhile is not None:
            meanwhile()
        self.stats.hits += len(needed)
        at_s = time.perf_counter()
        for observer in self._listeners():
            for expert in experts:
                observer.used(Use(layer, expert, HIT, 0.0, at_s, None))
        held, resident = self._residency.pools[layer].held, self._resident
        return [self._addresses[resident[key] if key in resident else held[key]] for key in needed]

    def _listeners(self) -> Iterable[Observer]:
        return () if self._is_muted else self.observers

    def count_residents(self, layer: int, experts: set[int]) -> None:
        """Count uses of resident experts that were run without `fetch`."""
        self.stats.hits += len(experts)
        at_s = time.perf_counter()
        for observer in self._listeners():
            for expert in sorted(experts):
                observer.used(Use(layer, expert, HIT, 0.0, at_s, None))

    def prefetch(self, layer: int, experts: Sequence[int], distance: int = 1) -> None:
        """Start copies of experts that `layer` will probably need; see `Residency.predict`."""
        self._carry_out_all(self._residency.predict(layer, [(layer, expert) for expert in experts], distance))

    def forget(self, layer: int) -> None:
        """Evict what the slots of `layer` hold; of all layers, if they share their slots."""
        self._residency.pools[layer].held.clear()

    def clear(self) -> None:
        """Evict every expert that is not resident, and forget what the policy has learned."""
        self._carry_out_all(self._residency.clear())

    def drain(self) -> None:
        """`clear`, and wait until no copy writes a row any more."""
        with self.lock:
            self.clear()
            self.end_dropped()

    def end_dropped(self) -> None:
        """Wait until no dropped prediction is copied any more, and count what they moved."""
        for load in self._residency.dropped:
            _abandon(load)
        self.settle()

    def settle(self) -> None:
        """Free the rows of dropped predictions that nothing writes any more, and count what they moved."""
        self._carry_out_all(self._residency.settle())

    def _carry_out_all(self, actions: Iterable[Action]) -> None:
        for action in actions:
            self._carry_out(action)

    def _carry_out(self, action: Action) -> None:
        do, key, load = action.do, cast(ExpertId, action.key), action.load
        assert load is not None and self.store is not None and self.engine is not None
        if do is Do.START:
            load.row = self._residency.free_row()
            load.copy = copy = Copy(self.store.pieces(key), self.memory[load.row], load.due)
            self.engine.start(copy)
            self.stats.predictions += load.due != NOW
        elif do is Do.PROMOTE:
            self.engine.promote(_copy_of(load))
        elif do is Do.CANCEL:
            cancelled = None if load.copy is None else _copy_of(load)
            if cancelled is not None:
                self.engine.cancel(cancelled)
            for observer in self._listeners():
                observer.dropped(Dropped(*key, cancelled))
        elif do is Do.ABANDON:
            _abandon(load)
        elif do is Do.FREE and load.copy is not None:
            n_bytes = _copy_of(load).moved_bytes
            self.stats.bytes_moved += n_bytes
            self.stats.wasted_bytes += n_bytes

    def _count(self, key: ExpertId, load: Load | None, wait_s: float) -> None:
        stats, at_s = self.stats, time.perf_counter()
        if load is None:
            stats.hits += 1
            use = Use(*key, HIT, 0.0, at_s, None)
        else:
            stats.misses += 1
            stats.prefetched += load.is_predicted
            stats.wait_s += wait_s
            copy = _copy_of(load)
            stats.bytes_moved += copy.moved_bytes
            use = Use(*key, PREFETCHED if load.is_predicted else MISS, wait_s, at_s, copy)
        for observer in self._listeners():
            observer.used(use)

    def _count_computed(self, key: ExpertId) -> None:
        self.stats.misses += 1
        self.stats.computed += 1
        at_s = time.perf_counter()
        for observer in self._listeners():
            observer.used(Use(*key, COMPUTED, 0.0, at_s, None))

    def after_fork(self) -> None:
        """In a forked child: begin empty.

        The parent's threads do not run here, but may have left work half done and locks held: locks are
        replaced, and copies are forgotten, not waited for.
        """
        self.lock = threading.RLock()
        self._residency.forget()
        for part in (self.engine, self.store):
            if part is not None:
                part.after_fork()

    def close(self) -> None:
        """Wait for all copies and end the engine; the cache must not be used afterwards."""
        self.drain()
        if self.engine is not None:
            self.engine.close()


def _make_pools(
    slots: dict[int, int], policy: Callable[[], Policy], resident: Collection[ExpertId], shared: bool
) -> dict[int, Pool]:
    """Return layer -> pool; the same pool for all layers if it is shared."""
    if shared:
        return dict.fromkeys(slots, Pool(sum(slots.values()), policy(), resident))
    return {layer: Pool(n, policy(), resident) for layer, n in slots.items()}


def _copy_of(load: Load | None) -> Copy:
    assert load is not None and isinstance(load.copy, Copy)  # set at START
    return load.copy


def _abandon(load: Load) -> None:
    if load.copy is not None:
        _copy_of(load).abandon()


def _allocate(n_rows: int, n_bytes: int, device: torch.device) -> Tensor:
    try:
        if device.type == "cpu":
            return host_slab(n_rows, n_bytes)
        return torch.empty(n_rows, n_bytes, dtype=torch.uint8, device=device)
    except (torch.OutOfMemoryError, RuntimeError, OSError) as error:
        raise CapacityError(
            f"no memory on {device} for {n_rows} experts",
            expected=f"{n_rows * n_bytes / 1e9:.2f} GB",
            found=error,
            hint="choose a smaller cache_size, or a shorter context_length",
        ) from error
