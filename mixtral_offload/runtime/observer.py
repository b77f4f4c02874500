"""The interface of what observes a model's passes: a recorder, the widget's map, a server's metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from mixtral_offload.runtime.engines import Copy
    from mixtral_offload.runtime.pass_state import Pass


class Use(NamedTuple):
    """One expert needed by one pass through one layer.

    Attributes:
        layer: The expert's layer.
        expert: Its number.
        outcome: HIT, MISS, PREFETCHED or COMPUTED of `core/trace.py`.
        wait_s: Seconds that the host waited for it.
        at_s: When it could run (`time.perf_counter()`).
        copy: Its copy; None if there was none.
    """

    layer: int
    expert: int
    outcome: int
    wait_s: float
    at_s: float
    copy: Copy | None


class Dropped(NamedTuple):
    """A prediction that was not used; its copy was cancelled just now."""

    layer: int
    expert: int
    copy: Copy | None


class Observer:
    """Base class of observers. Every method is called under the model's lock; each does nothing by default.

    Attributes:
        is_exclusive: Whether nothing but the observed passes may change the cache.
    """

    is_exclusive = False

    def pass_began(self, current: Pass) -> None:
        """A pass of the whole model begins, before its first layer."""

    def routed(self, layer: int, top_k_index: Tensor, top_k_weights: Tensor, began_s: float) -> None:
        """One pass through one layer's experts has run: `top_k_index` and `top_k_weights` are `[T, k]`."""

    def used(self, use: Use) -> None:
        """The cache has an expert ready for its use."""

    def predicted(self, layer: int, experts: Sequence[int], distance: int) -> None:
        """Experts that `layer`, `distance` layers from now, will probably need; the most probable first."""

    def dropped(self, prediction: Dropped) -> None:
        """A prediction was not used."""


class Observers:
    """The observers of one model. Immutable tuples are exchanged, so that reading needs no lock."""

    def __init__(self) -> None:
        self._all: tuple[Observer, ...] = ()

    def __iter__(self) -> Iterator[Observer]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def is_exclusive(self) -> bool:
        """Whether nothing but the observed passes may change the cache."""
        return any(observer.is_exclusive for observer in self._all)

    def add(self, observer: Observer) -> None:
        """Call it from now on."""
        self._all += (observer,)

    def remove(self, observer: Observer) -> None:
        """Call it no more."""
        self._all = tuple(of for of in self._all if of is not observer)
