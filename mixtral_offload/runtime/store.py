"""Where experts live off the device: one slab in RAM, or the files on disk.

Knows bytes and where they lie. Read-only once built: the source of truth never changes, so an eviction only drops.
Knows nothing of slots, policies or models.
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
from typing import NamedTuple

import torch
from torch import Tensor

from mixtral_offload.errors import CheckpointError
from mixtral_offload.models.checkpoint import Checkpoint, ExpertId
from mixtral_offload.weights.safetensors_io import StoredTensor, Watch

OPEN_FILES = 64  # at most, of a store on disk
READERS = 2  # threads for one large read: from the system's page cache, one core copies slower than memory is
LARGE_BYTES = 1 << 20


def host_slab(n_rows: int, n_bytes: int) -> Tensor:
    """Host memory, uint8 [n_rows, n_bytes], in huge pages where the system has them: quicker to fill, to read and to pin.

    Private, which Python's `mmap` is not by default: a forked child that fills its slots must not fill the parent's.
    """
    if not n_rows or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(n_rows, n_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, n_rows * n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(n_rows, n_bytes)


class RamStore:
    """Experts in one slab of host memory (uint8 [n, layout.n_bytes]), pinned where the current CUDA device will read it.

    One slab, registered with CUDA once: PyTorch's own pinned allocator rounds each block up to a power of two.
    """

    kind = "ram"

    def __init__(
        self, checkpoint: Checkpoint, experts: Iterable[ExpertId], pin: bool, progress=lambda n_bytes: None
    ):
        self._row = {expert: row for row, expert in enumerate(experts)}
        self._slab = host_slab(len(self._row), checkpoint.layout.n_bytes)
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
        """In a forked child: nothing runs here that the fork has ended."""

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
    """Experts where they are: in the checkpoint's files, read when a copy asks for them."""

    kind = "disk"
    pinned = False

    def __init__(self, checkpoint: Checkpoint, experts: Iterable[ExpertId]):
        self._open = functools.lru_cache(OPEN_FILES)(lambda path: open(path, "rb", buffering=0))  # noqa: SIM115
        self.after_fork()
        self._fields = checkpoint.layout.fields
        self._experts = {expert: checkpoint.experts[expert] for expert in experts}
        self._seen: set[StoredTensor] = set()  # read whole once, and found right

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._experts

    def after_fork(self) -> None:
        """In a forked child, where the reading threads do not run: others, which start with the next read."""
        self._pool = ThreadPoolExecutor(READERS - 1, "expert-reads")

    def pieces(self, expert: ExpertId) -> Pieces:
        stored = [(field.offset, self._experts[expert][field.matrix, field.name]) for field in self._fields]
        pieces = [(at, self._piece(of)) for at, of in stored]
        first, last = (pick(of.offset for _, of in stored) for pick in (min, max))
        if last - first <= sum(of.n_bytes for _, of in stored) and len({of.path for _, of in stored}) == 1:
            pieces[0] = pieces[0][0], pieces[0][1]._replace(ahead=(first, last - first))
            return pieces
        # the rest of the file lies between: where all experts are in one tensor, or their matrices in several files
        return [(at, of._replace(ahead=(of.offset, of.n_bytes))) for at, of in pieces]

    def _piece(self, of: StoredTensor) -> FilePart:
        """A tensor's bytes; checked when they are read for the first time, and again after a fault."""
        is_sound = of in self._seen and (of.check is None or of.check.error is None)
        check = None if is_sound else Check(Watch(of), of, self._seen)
        return FilePart(self._open, self._pool, of.path, of.offset, of.n_bytes, check=check)


class Check(NamedTuple):
    """Looks at what is read of one tensor, and notes in `seen` that all of it was right."""

    watch: Watch
    stored: StoredTensor
    seen: set[StoredTensor]

    def see(self, offset: int, data: Tensor) -> None:
        """Raises CheckpointError where the bytes `data`, from the file's byte `offset` on, cannot be right."""
        if self.watch.see(offset - self.stored.offset, data):
            self.seen.add(self.stored)


class FilePart(NamedTuple):
    """Bytes of a file, with what a copy asks of a tensor: their number, a slice. Read by one thread only.

    ahead: (first byte, number) of what will be read soon: the system fetches it meanwhile. check: of what was read.
    """

    open: Callable[[Path], FileIO]
    pool: Executor
    path: Path
    offset: int
    n_bytes: int
    ahead: tuple[int, int] | None = None
    check: Check | None = None

    def numel(self) -> int:
        return self.n_bytes

    def part(self, start: int, size: int) -> FilePart:
        ahead = None if start else self.ahead
        return self._replace(offset=self.offset + start, n_bytes=min(size, self.n_bytes - start), ahead=ahead)

    def read_into(self, target: Tensor) -> None:
        """Raises CheckpointError where the file cannot be read, or has become shorter, or is damaged."""
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
        mine, *others = (
            target.chunk(READERS) if self.n_bytes >= LARGE_BYTES and hasattr(os, "preadv") else [target]
        )
        at, reads = self.offset + mine.numel(), []
        for other in others:
            reads.append(self.pool.submit(self._read, file, at, other))
            at += other.numel()
        try:
            self._read(file, self.offset, mine)
        finally:
            wait(reads)  # whatever happens, nothing writes into the target any more
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
            self.open.cache_clear()  # close our own, where the process may have no more
            return self.open(self.path)

    def _read(self, file: FileIO, offset: int, target: Tensor) -> None:
        left = memoryview(target.numpy())
        while left:
            if hasattr(os, "preadv"):
                n = os.preadv(file.fileno(), [left], offset)
            else:
                file.seek(offset)
                n = file.readinto(left)
            if not n:
                raise CheckpointError(
                    "a file has become shorter while the model runs", path=self.path, found=f"{len(left)} bytes are missing",
                    hint="restore the file, and load the model again",
                )  # fmt: skip
            left, offset = left[n:], offset + n


Pieces = list[tuple[int, Tensor | FilePart]]  # (byte offset within the expert's buffer, its bytes)
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
