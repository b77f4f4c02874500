"""Where experts live off the device: one slab in RAM, or the files on disk, memory-mapped.

Knows bytes and where they lie. Read-only once built: the source of truth never changes, so an eviction only drops.
Knows nothing of slots, policies or models.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint, ExpertId

Pieces = list[tuple[int, Tensor]]  # (byte offset within the expert's buffer, uint8 tensor)


class RamStore:
    """Experts in one slab of host memory (uint8 [n, layout.n_bytes]), pinned where the current CUDA device will read it.

    One slab, registered with CUDA once: PyTorch's own pinned allocator rounds each block up to a power of two.
    """

    kind = "ram"

    def __init__(
        self, checkpoint: Checkpoint, experts: Iterable[ExpertId], pin: bool, progress=lambda n_bytes: None
    ):
        self._row = {expert: row for row, expert in enumerate(experts)}
        self._slab = torch.empty(len(self._row), checkpoint.layout.n_bytes, dtype=torch.uint8)
        self.pinned = pin and len(self._row) > 0 and _pin(self._slab)
        self._device = torch.cuda.current_device() if self.pinned else None
        for _ in checkpoint.read_experts(zip(self._row, self._slab)):
            progress(checkpoint.layout.n_bytes)

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._row

    def pieces(self, expert: ExpertId) -> Pieces:
        return [(0, self._slab[self._row[expert]])]

    def close(self) -> None:
        """Unpin; the store must not be used afterwards. Also done when the store is dropped."""
        if self.pinned:
            self.pinned = False
            torch.cuda.synchronize(self._device)
            torch.cuda.cudart().cudaHostUnregister(self._slab.data_ptr())

    def __del__(self):
        if getattr(self, "pinned", False):
            self.close()


class FileStore:
    """Experts where they are: in the checkpoint's files, memory-mapped, read when a copy asks for them."""

    kind = "disk"
    pinned = False

    def __init__(self, checkpoint: Checkpoint, experts: Iterable[ExpertId]):
        self._maps: dict[Path, Tensor] = {}
        self._fields = checkpoint.layout.fields
        self._experts = {expert: checkpoint.experts[expert] for expert in experts}

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._experts

    def pieces(self, expert: ExpertId) -> Pieces:
        pieces = []
        for field in self._fields:
            stored = self._experts[expert][field.matrix, field.name]
            pieces.append(
                (field.offset, self._map(stored.path)[stored.offset : stored.offset + stored.n_bytes])
            )
        return pieces

    def _map(self, path: Path) -> Tensor:
        if path not in self._maps:
            size = path.stat().st_size
            self._maps[path] = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return self._maps[path]


Store = RamStore | FileStore


def _pin(slab: Tensor) -> bool:
    """Page-lock the slab in place; says so once and goes on with ordinary memory where that is refused."""
    result = torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.numel(), 0)
    if int(result) == 0:
        return True
    try:  # the refusal stays CUDA's last error until an operation trips over it: let it be this one
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError:
        pass
    warnings.warn(
        f"cannot pin {slab.numel() / 1e9:.1f} GB of memory (CUDA error {int(result)}; common on WSL and under small "
        "locked-memory limits): ordinary memory is used, copies to the device will be slower",
        stacklevel=2,
    )
    return False
