"""What a client implements to watch the experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Observer(Protocol):
    """Is called under the model's lock, from `Offload.recorders`.

    Attributes:
        is_exclusive: Whether nothing but the observed passes may change the cache.
    """

    is_exclusive: bool

    def add(self, layer: int, top_k_index: Tensor, top_k_weights: Tensor, began_s: float) -> None:
        """One pass through one layer's experts: `top_k_index` and `top_k_weights` are `[T, K]`."""

    def add_guess(self, layer: int, experts: Sequence[int], distance: int) -> None:
        """Predicted experts of `layer`, `distance` layers from now, the most probable first."""
