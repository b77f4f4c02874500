"""Which experts are on the device: fixed slots per layer, least recently used out first (2312.17238, section 3.1).

Knows slots, copies and recency. Knows nothing of models, routers or how an expert is run.

A slot is invalidated, then copied into, then published. Which slots are free is derived, never stored, so an
interrupt at any moment leaves nothing to repair: the next call drops what was under way.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .checkpoint import ExpertId
from .errors import CapacityError
from .experts import ExpertLayout
from .quantization import Fields
from .store import Store
from .transfer import Copy

Views = dict[str, Fields]


@dataclass
class CacheStats:
    """Counters since the last `reset`. One use is one expert needed by one pass through one layer."""

    hits: int = 0
    misses: int = 0
    bytes_moved: int = 0
    wait_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of uses that found their expert on the device; nan before the first use."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else float("nan")

    def reset(self) -> None:
        self.__init__()


@dataclass
class _Layer:
    """One layer's part of the device memory. Slots are row numbers of the slab."""

    slots: tuple[int, ...]
    resident: dict[int, int]  # expert -> slot, for good
    published: OrderedDict[int, int] = field(
        default_factory=OrderedDict
    )  # expert -> slot, least recent first
    loading: dict[int, tuple[int, Copy]] = field(default_factory=dict)  # expert -> (slot, copy), oldest first

    def find(self, expert: int) -> int | None:
        slot = self.resident.get(expert)
        return self.published.get(expert) if slot is None else slot

    def free_slot(self, keep: set[int]) -> int | None:
        """A slot to copy into, its old expert invalidated; None if all hold experts of `keep` or copies under way."""
        used = {*self.published.values(), *(slot for slot, _ in self.loading.values())}
        for slot in self.slots:
            if slot not in used:
                return slot
        victim = next((expert for expert in self.published if expert not in keep), None)
        return None if victim is None else self.published.pop(victim)


class ExpertCache:
    """Experts on the device.

    layers: layer -> (number of slots, resident experts). store: home of all experts that are not resident.
    memory: one uint8 slab [slots and residents, layout.n_bytes] on `device`.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        layers: dict[int, tuple[int, Sequence[int]]],
        store: Store | None,
        engine,
        device,
    ):
        self.layout, self.stats, self.lock = layout, CacheStats(), threading.RLock()
        self._store, self._engine = store, engine
        n_rows = sum(n_slots + len(resident) for n_slots, resident in layers.values())
        self._slab = _allocate(n_rows, layout.n_bytes, device)
        self._views = [layout.views(row) for row in self._slab]
        self._layers: dict[int, _Layer] = {}
        rows = iter(range(n_rows))
        for layer, (n_slots, resident) in layers.items():
            self._layers[layer] = _Layer(
                slots=tuple(next(rows) for _ in range(n_slots)),
                resident={expert: next(rows) for expert in resident},
            )

    def resident_slots(self) -> Iterator[tuple[ExpertId, torch.Tensor]]:
        """(layer, expert) and the memory of each resident expert, to be filled once while building."""
        for layer, state in self._layers.items():
            for expert, slot in state.resident.items():
                yield (layer, expert), self._slab[slot]

    def contents(self, layer: int) -> list[int]:
        """Experts of `layer` on the device: residents, then the least to the most recently used."""
        state = self._layers[layer]
        return [*state.resident, *state.published]

    def n_slots(self, layer: int) -> int:
        return len(self._layers[layer].slots)

    def serve(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Views]]:
        """Yield each of `experts` with its views, once: those on the device first, the others as they land.

        All copies that the slots allow are under way before the first expert is yielded. The views are valid until
        the next one is asked for. More experts than slots pass through in waves.
        """
        state = self._layers[layer]
        self._drop_interrupted(state)
        hits = [expert for expert in experts if state.find(expert) is not None]
        missing = deque(expert for expert in experts if expert not in hits)
        self.stats.hits += len(hits)
        self.stats.misses += len(missing)
        keep = set(hits)
        self._start_copies(layer, state, missing, keep)
        for expert in hits:
            if expert in state.published:
                state.published.move_to_end(expert)
            yield expert, self._views[state.find(expert)]
            keep.discard(expert)
            self._start_copies(layer, state, missing, keep)
        while state.loading:
            expert = self._land(state)
            keep.add(expert)
            yield expert, self._views[state.published[expert]]
            keep.discard(expert)
            self._start_copies(layer, state, missing, keep)

    def _start_copies(self, layer: int, state: _Layer, missing: deque[int], keep: set[int]) -> None:
        while missing and (slot := state.free_slot(keep)) is not None:
            expert = missing.popleft()
            copy = Copy(self._store.pieces((layer, expert)), self._slab[slot])
            state.loading[expert] = (slot, copy)  # remembered before it can write
            self._engine.start(copy)
            self.stats.bytes_moved += copy.n_bytes

    def _land(self, state: _Layer) -> int:
        """Wait for the oldest copy and publish its expert."""
        expert, (slot, copy) = next(iter(state.loading.items()))
        begin = time.perf_counter()
        copy.wait()
        self.stats.wait_s += time.perf_counter() - begin
        state.published[expert] = slot
        del state.loading[expert]
        return expert

    def _drop_interrupted(self, state: _Layer) -> None:
        """Forget what an exception left under way, once it cannot write any more."""
        while state.loading:
            expert, (_, copy) = next(iter(state.loading.items()))
            copy.abandon()
            del state.loading[expert]

    def close(self) -> None:
        """Wait for all copies and end the engine; the cache must not be used afterwards."""
        for state in self._layers.values():
            self._drop_interrupted(state)
        if self._engine is not None:
            self._engine.close()


def _allocate(n_rows: int, n_bytes: int, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty(n_rows, n_bytes, dtype=torch.uint8, device=device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise CapacityError(
            f"no memory on {device} for {n_rows} experts", expected=f"{n_rows * n_bytes / 1e9:.2f} GB", found=error,
            hint="choose a smaller cache_size, or a shorter context_length",
        ) from error  # fmt: skip
