"""Stores of the experts that are not resident: a slab in RAM, or their files on disk. Read-only once built.

Knows bytes and where they lie. Knows nothing of slots, policies or models.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mixtral_offload.errors import CheckpointError
from mixtral_offload.models.checkpoint import Checkpoint, ExpertId
from mixtral_offload.weights.hqq import Fields
from mixtral_offload.weights.safetensors_io import StoredTensor, Watch

OPEN_FILES = 64  # of a store on disk, at most
READERS = 2  # threads for one large read: one core copies from the system's page cache slower than memory is
LARGE_BYTES = 1 << 20


def host_slab(n_rows: int, n_bytes: int) -> Tensor:
    """Allocate host memory, uint8 `[n_rows, n_bytes]`, in huge pages if possible: faster to fill, read and
    pin.

    Private, which Python's `mmap` is not by default: a forked child that fills its slots must not fill the
    parent's.
    """
    if not n_rows or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(n_rows, n_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, n_rows * n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(n_rows, n_bytes)


class RamStore:
    """Experts in one slab of host memory, uint8 `[n, layout.n_bytes]`.

    One slab, registered with CUDA once: PyTorch's own pinned allocator rounds each block up to a power of
    two.

    Args:
        experts: The experts to hold.
        pin: Pin the slab for the current CUDA device.
        progress: Called with the bytes of each expert that was read.

    Attributes:
        pinned: Whether the slab is pinned.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        experts: Iterable[ExpertId],
        pin: bool,
        progress: Callable[[int], object] = lambda n_bytes: None,
    ):
        self._row = {expert: row for row, expert in enumerate(experts)}
        self._slab = host_slab(len(self._row), checkpoint.layout.n_bytes)
        self._layout = checkpoint.layout
        self.pinned = pin and len(self._row) > 0 and _pin(self._slab)
        self._device = torch.cuda.current_device() if self.pinned else None
        for _ in checkpoint.read_experts(zip(self._row, self._slab)):
            progress(checkpoint.layout.n_bytes)

    @property
    def n_bytes(self) -> int:
        """Bytes of its slab."""
        return self._slab.nbytes

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._row

    def after_fork(self) -> None:
        """In a forked child: nothing to do, because there are no threads."""

    def pieces(self, expert: ExpertId) -> Pieces:
        """Return where an expert's bytes are, for a `Copy`."""
        return [(0, self._slab[self._row[expert]])]

    def views(self, expert: ExpertId) -> dict[str, Fields]:
        """Return an expert's tensors where they lie: matrix -> field -> tensor."""
        return self._layout.views(self._slab[self._row[expert]])

    def close(self) -> None:
        """Unpin the slab, as dropping the store does; the store must not be used afterwards."""
        if self.pinned:
            self.pinned = False
            torch.cuda.synchronize(self._device)
            torch.cuda.cudart().cudaHostUnregister(self._slab.data_ptr())

    def __del__(self) -> None:
        if getattr(self, "pinned", False):
            self.close()


class FileStore:
    """Experts in the checkpoint's files, read by each copy."""

    pinned = False

    def __init__(self, checkpoint: Checkpoint, experts: Iterable[ExpertId]):
        self.open = functools.lru_cache(OPEN_FILES)(_open)
        self.after_fork()
        self._fields = checkpoint.layout.fields
        self._experts = {expert: checkpoint.experts[expert] for expert in experts}
        self._seen: set[StoredTensor] = set()  # read completely once, and correct

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._experts

    def after_fork(self) -> None:
        """In a forked child, where the reading threads do not run: others start with the next read."""
        self.pool = ThreadPoolExecutor(READERS - 1, "expert-reads")

    def close(self) -> None:
        """End the reading threads and close the files; the store must not be used afterwards."""
        self.pool.shutdown()
        self.open.cache_clear()

    def pieces(self, expert: ExpertId) -> Pieces:
        """Return where an expert's bytes are, for a `Copy`."""
        stored = [(field.offset, self._experts[expert][field.matrix, field.name]) for field in self._fields]
        parts = [(at, self._piece(of)) for at, of in stored]
        first, last = (pick(of.offset for _, of in stored) for pick in (min, max))
        if last - first <= sum(of.n_bytes for _, of in stored) and len({of.path for _, of in stored}) == 1:
            at, part = parts[0]
            return [(at, part._replace(ahead=(first, last - first))), *parts[1:]]
        # all experts are in one tensor, or an expert's matrices in several files: other bytes lie between
        return [(at, of._replace(ahead=(of.offset, of.n_bytes))) for at, of in parts]

    def _piece(self, of: StoredTensor) -> FilePart:
        """A tensor's bytes, checked when they are read for the first time, and again after a fault."""
        is_sound = of in self._seen and (of.check is None or of.check.error is None)
        check = None if is_sound else Check(Watch(of), of, self._seen)
        return FilePart(self.open, self.pool, of.path, of.offset, of.n_bytes, check=check)


class Check(NamedTuple):
    """Checks what is read of one tensor, and adds it to `seen` when all of it was correct."""

    watch: Watch
    stored: StoredTensor
    seen: set[StoredTensor]

    def see(self, offset: int, data: Tensor) -> None:
        """Check bytes that were read at the file's `offset`.

        Raises:
            CheckpointError: If they are damaged.
        """
        if self.watch.see(offset - self.stored.offset, data):
            self.seen.add(self.stored)


class OpenFiles(Protocol):
    """Opens files, and keeps a number of them open."""

    def __call__(self, path: Path, /) -> FileIO: ...
    def cache_clear(self) -> None: ...


class FilePart(NamedTuple):
    """Bytes of a file, for one thread; with the parts of a tensor's interface that a copy uses.

    Attributes:
        pool: Threads for large reads.
        ahead: (first byte, number) of what will be read soon, which the system fetches meanwhile.
        check: Checks what is read.
    """

    open: OpenFiles
    pool: Executor
    path: Path
    offset: int
    n_bytes: int
    ahead: tuple[int, int] | None = None
    check: Check | None = None

    def numel(self) -> int:
        """Return the number of bytes."""
        return self.n_bytes

    def part(self, start: int, size: int) -> FilePart:
        """Return at most `size` of the bytes, from `start` on."""
        ahead = None if start else self.ahead
        return self._replace(offset=self.offset + start, n_bytes=min(size, self.n_bytes - start), ahead=ahead)

    def read_into(self, target: Tensor) -> None:
        """Fill `target` (uint8 `[n_bytes]`, CPU).

        Raises:
            CheckpointError: The file cannot be read, has become shorter, or is damaged.
        """
        try:
            self._read_into(target)
        except OSError as error:
            raise CheckpointError(
                "cannot read an expert", path=self.path, found=error.strerror or error,
                hint="check the disk; experts in RAM (store=\"ram\") need no files while the model runs",
            ) from error  # fmt: skip

    def _read_into(self, target: Tensor) -> None:
        file = self._file()
        if self.ahead and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), *self.ahead, os.POSIX_FADV_WILLNEED)
        is_large = self.n_bytes >= LARGE_BYTES and hasattr(os, "preadv")
        mine, *others = target.chunk(READERS) if is_large else [target]
        at, reads = self.offset + mine.numel(), []
        for other in others:
            reads.append(self.pool.submit(self._read, file, at, other))
            at += other.numel()
        try:
            self._read(file, self.offset, mine)
        finally:
            wait(reads)  # after an error too, nothing may write into the target
        for read in reads:
            read.result()
        if self.check is not None:
            self.check.see(self.offset, target)

    def _file(self) -> FileIO:
        try:
            return self.open(self.path)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            self.open.cache_clear()  # the process may have no more open files: close our own
            return self.open(self.path)

    def _read(self, file: FileIO, offset: int, target: Tensor) -> None:
        left = target.numpy().data
        while left:
            if hasattr(os, "preadv"):
                n = os.preadv(file.fileno(), [left], offset)
            else:
                file.seek(offset)
                n = file.readinto(left)
            if not n:
                raise CheckpointError(
                    "a file has become shorter while the model runs",
                    path=self.path,
                    found=f"{len(left)} bytes are missing",
                    hint="restore the file, and load the model again",
                )
            left, offset = left[n:], offset + n


def _open(path: Path) -> FileIO:
    return open(path, "rb", buffering=0)


Pieces = list[tuple[int, Tensor | FilePart]]  # (byte offset within the expert's buffer, its bytes)
Store = RamStore | FileStore


def _pin(slab: Tensor) -> bool:
    """Pin the slab in place; if that fails, warn, and return False."""
    result = torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.numel(), 0)
    if int(result) == 0:
        return True
    try:  # the failure stays CUDA's last error until an operation reports it: let it be this one
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError:
        pass
    warnings.warn(
        f"cannot pin {slab.numel() / 1e9:.1f} GB of memory (CUDA error {int(result)}; common on WSL and "
        "under small locked-memory limits): ordinary memory is used, copies to the device will be slower",
        stacklevel=2,
    )
    return False
