"""Which experts are on the device: fixed slots, filled on demand (2312.17238, section 3.1) or by a guess (3.2).

Knows rows of device memory, copies and the order of things. Knows nothing of models, routers or how an expert is run.

A row is invalidated, then copied into, then published. Guesses arrive in staging rows; a guess that comes true takes
its row into the cache and leaves the evicted expert's row for the next guess: nothing is copied twice. Which rows are
free is derived, never stored, so an interrupt at any moment leaves nothing to repair: the next call drops what was
under way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mixtral_offload.core.policies import LOAD, LRU, Policy, Pool, serve
from mixtral_offload.core.trace import HIT, MISS, PREFETCHED
from mixtral_offload.errors import CapacityError
from mixtral_offload.models.checkpoint import ExpertId
from mixtral_offload.runtime.copies import Copy
from mixtral_offload.runtime.store import Store, host_slab
from mixtral_offload.weights.hqq import Fields
from mixtral_offload.weights.layout import ExpertLayout

Views = dict[str, Fields]


@dataclass
class CacheStats:
    """Counters since the last `reset`. One use is one expert needed by one pass through one layer.

    misses: uses that found their expert in no slot; prefetched: those of them whose copy a guess had started.
    bytes_moved: of all copies; wasted_bytes: of guesses that were not used. wait_s: the host stood still for copies (on
    CUDA with pinned memory it does not: there the device waits).
    """

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    guesses: int = 0
    bytes_moved: int = 0
    wasted_bytes: int = 0
    wait_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of uses that found their expert in a slot; nan before the first use."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else float("nan")

    def reset(self) -> None:
        self.__init__()


class Use(NamedTuple):
    """One use, for a trace: outcome is HIT, MISS or PREFETCHED; copy is None for a hit. at_s: when it could run."""

    layer: int
    expert: int
    outcome: int
    wait_s: float
    at_s: float
    copy: Copy | None


class Guess(NamedTuple):
    """An expert in a staging row, or on its way there. In a journal: one that did not come true."""

    key: ExpertId
    row: int
    copy: Copy


class ExpertCache:
    """Experts on the device.

    layers: layer -> (number of slots, resident experts). store: home of all experts that are not resident.
    policy: makes an eviction policy. shared: one pool of slots for all layers instead of one for each.
    n_staging: rows for guesses. memory: one uint8 slab [slots, staging and residents, layout.n_bytes] on `device`.
    """

    def __init__(
        self, layout: ExpertLayout, layers: dict[int, tuple[int, Sequence[int]]], store: Store | None, engine, device,
        *, policy: Callable[[], Policy] = LRU, shared: bool = False, n_staging: int = 0,
    ):  # fmt: skip
        self.layout, self.stats, self.lock = layout, CacheStats(), threading.RLock()
        self.journals: tuple[list[Use | Guess], ...] = ()  # of recorders: each gets every use and wrong guess
        self.n_staging = n_staging if store else 0
        self.store, self.engine = store, engine
        n_slots = sum(n for n, _ in layers.values())
        residents = [(layer, expert) for layer, (_, resident) in layers.items() for expert in resident]
        self._rows = range(n_slots + self.n_staging)
        self._resident = {key: row for row, key in enumerate(residents, len(self._rows))}
        self._slab = _allocate(len(self._rows) + len(residents), layout.n_bytes, device)
        self._views = [layout.views(row) for row in self._slab]
        self._slots, self._policy, self._shared = (
            {layer: n for layer, (n, _) in layers.items()},
            policy,
            shared,
        )
        self._passes = 0
        self._staged: dict[ExpertId, Guess] = {}
        self._dropped: list[Guess] = []  # their rows may still be written
        self._pools = self._make_pools()

    def clear(self) -> None:
        """Forget every expert that is not resident, and what the policy has learnt."""
        for pool in self._pools.values():
            self._drop_interrupted(pool)
        for key in list(self._staged):
            self._drop_guess(key)
        self._pools = self._make_pools()

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Hold the lock; what is served meanwhile comes into no journal."""
        with self.lock:
            journals, self.journals = self.journals, ()
            try:
                yield
            finally:
                self.journals = journals

    def _make_pools(self) -> dict[int, Pool]:
        """layer -> its pool; one and the same for all layers if it is shared."""
        if self._shared:
            return dict.fromkeys(self._slots, Pool(sum(self._slots.values()), self._policy(), self._resident))
        return {layer: Pool(n, self._policy(), self._resident) for layer, n in self._slots.items()}

    def resident_slots(self) -> Iterator[tuple[ExpertId, torch.Tensor]]:
        """(layer, expert) and the memory of each resident expert, to be filled once while building."""
        for key, row in self._resident.items():
            yield key, self._slab[row]

    def resident_rows(self, layer: int) -> torch.Tensor:
        """The memory of a layer's resident experts, after each other: uint8 [residents, layout.n_bytes]."""
        rows = [row for (of, _), row in self._resident.items() if of == layer]
        return self._slab[rows[0] : rows[-1] + 1]

    def contents(self, layer: int) -> list[int]:
        """Experts of `layer` on the device: residents, then those in slots, the next to be evicted first."""
        pool = self._pools[layer]
        held = sorted((key for key in pool.held if key[0] == layer), key=pool.policy.score.__getitem__)
        return [expert for at, expert in (*self._resident, *held) if at == layer]

    def n_slots(self, layer: int) -> int:
        """Slots of this layer; with a shared pool, its share."""
        return self._slots[layer]

    def serve(
        self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None = None
    ) -> Iterator[tuple[int, Views]]:
        """Yield each of `experts` with its views, once: those on the device first, the others as they land.

        All copies that the slots allow are under way, and then `meanwhile` has been called, before the first expert
        is yielded. The views are valid until the next one is asked for. More experts than slots go through in waves.
        """
        try:
            yield from self._serve(layer, experts, meanwhile)
        finally:
            if self.engine is not None:
                self.engine.slots_were_read()

    def _serve(self, layer: int, experts: Sequence[int], meanwhile) -> Iterator[tuple[int, Views]]:
        pool = self._pools[layer]
        self._drop_interrupted(pool)
        self._passes += 1
        for key in [key for key in self._staged if key[0] == layer and key[1] not in experts]:
            self._drop_guess(key)  # at once: its row and the link are for the next guesses
        for action, key, hit in serve(pool, [(layer, expert) for expert in experts]):
            if action is LOAD:
                self._load(pool, key)
                continue
            if meanwhile is not None:
                meanwhile()
                meanwhile = None
            if hit:
                self._count(Use(*key, HIT, 0.0, time.perf_counter(), None))
            else:
                key = self._land(pool, key)
            row = self._resident.get(key)
            yield key[1], self._views[pool.held[key] if row is None else row]

    def count_residents(self, layer: int, experts: set[int]) -> None:
        """Uses of resident experts that were run without `serve`."""
        self.stats.hits += len(experts)
        at_s = time.perf_counter()
        for journal in self.journals:
            journal += [Use(layer, expert, HIT, 0.0, at_s, None) for expert in sorted(experts)]

    def prefetch(self, layer: int, experts: Sequence[int], distance: int = 1) -> None:
        """Start copies of the experts that `layer`, `distance` layers from now, will probably need, likeliest first.

        One that is there or on its way is left alone; an earlier guess for this layer whose copy has not begun, and
        which is not among `experts` now, makes room. Without a free staging row, nothing happens.
        """
        pool = self._pools[layer]
        for key in [key for key in self._staged if key[0] == layer and key[1] not in experts]:
            if not self._staged[key].copy.has_begun:
                self._drop_guess(key)
        for expert in experts:
            key = (layer, expert)
            if key in self._resident or key in pool.held or key in pool.loading or key in self._staged:
                continue
            self.settle()
            if len(self._staged) + len(self._dropped) >= self.n_staging:
                return
            row = self._free_row()
            guess = Guess(key, row, Copy(self.store.pieces(key), self._slab[row], self._passes + distance))
            self._staged[key] = guess  # remembered before it can write
            self.engine.start(guess.copy)
            guess.copy.was_guess = True  # only now: one that never started must not be waited for
            self.stats.guesses += 1

    def _load(self, pool: Pool, key: ExpertId) -> None:
        """Start the copy of an expert that is needed, or take over the guess that has started it."""
        guess = self._staged.get(key)
        if guess is not None and guess.copy.is_good:
            pool.loading[key] = guess.row, guess.copy
            del self._staged[key]
            self.engine.promote(guess.copy)
            return
        if guess is not None:
            self._drop_guess(key)
        row = self._free_row()
        copy = Copy(self.store.pieces(key), self._slab[row])
        pool.loading[key] = row, copy  # remembered before it can write
        self.engine.start(copy)

    def _land(self, pool: Pool, key: ExpertId | None) -> ExpertId:
        """Wait for an expert's copy (None: for the first asked for) and publish it."""
        if key is None:
            key = min(pool.loading, key=lambda key: pool.loading[key][1].asked_s)
        row, copy = pool.loading[key]
        begin = time.perf_counter()
        copy.wait()
        end = time.perf_counter()
        pool.publish(key, row)
        self._count(Use(*key, PREFETCHED if copy.was_guess else MISS, end - begin, end, copy))
        return key

    def _count(self, use: Use) -> None:
        stats = self.stats
        stats.hits += use.outcome == HIT
        stats.misses += use.outcome != HIT
        stats.prefetched += use.outcome == PREFETCHED
        stats.wait_s += use.wait_s
        stats.bytes_moved += use.copy.moved_bytes if use.copy else 0
        for journal in self.journals:
            journal.append(use)

    def settle(self) -> None:
        """Free the rows of dropped guesses that nothing writes any more, and count what they moved."""
        for guess in [guess for guess in self._dropped if guess.copy.is_over]:
            self._dropped.remove(guess)
            self.stats.bytes_moved += guess.copy.moved_bytes
            self.stats.wasted_bytes += guess.copy.moved_bytes

    def _free_row(self) -> int:
        """A row that nothing is in or on its way to; there is one whenever a pool or the staging has room."""
        used = {guess.row for guess in (*self._staged.values(), *self._dropped)}
        for pool in {id(pool): pool for pool in self._pools.values()}.values():
            used.update(pool.held.values())
            used.update(row for row, _ in pool.loading.values())
        return next(row for row in self._rows if row not in used)

    def _drop_guess(self, key: ExpertId) -> None:
        guess = self._staged[key]
        self.engine.cancel(guess.copy)
        self._dropped.append(guess)  # before it is forgotten: its row is free only when nothing writes it
        del self._staged[key]
        for journal in self.journals:
            journal.append(guess)

    def _drop_interrupted(self, pool: Pool) -> None:
        """Forget what an exception left under way, once it cannot write any more."""
        while pool.loading:
            key, (_, copy) = next(iter(pool.loading.items()))
            copy.abandon()
            pool.loading.pop(key)

    def after_fork(self) -> None:
        """In a forked child: begin empty.

        No thread of the parent's writes here. Whatever one of them was doing may be half done, and its locks held: they
        are replaced, and its copies are forgotten, not waited for.
        """
        self.lock = threading.RLock()
        self._staged, self._dropped, self._pools = {}, [], self._make_pools()
        for part in (self.engine, self.store):
            if part is not None:
                part.after_fork()

    def close(self) -> None:
        """Wait for all copies and end the engine; the cache must not be used afterwards."""
        self.clear()
        for guess in self._dropped:
            guess.copy.abandon()
        self.settle()
        if self.engine is not None:
            self.engine.close()


def _allocate(n_rows: int, n_bytes: int, device: torch.device) -> torch.Tensor:
    try:
        if torch.device(device).type == "cpu":
            return host_slab(n_rows, n_bytes)
        return torch.empty(n_rows, n_bytes, dtype=torch.uint8, device=device)
    except (torch.OutOfMemoryError, RuntimeError, OSError) as error:
        raise CapacityError(
            f"no memory on {device} for {n_rows} experts", expected=f"{n_rows * n_bytes / 1e9:.2f} GB", found=error,
            hint="choose a smaller cache_size, or a shorter context_length",
        ) from error  # fmt: skip
