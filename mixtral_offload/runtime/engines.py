"""Asynchronous copies of one expert's bytes from its home into a slot.

Knows byte buffers, CUDA streams and one worker thread. Knows nothing of experts' meaning or of who asked.

Guesses travel in chunks, and so does everything on the worker thread: a copy that is needed now waits for one chunk of a
guess at most. A copy is registered by its owner before it is started, so that an interrupt at any
moment leaves either a copy that never ran or one that can be waited for, never one that writes into a slot nobody
remembers.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from mixtral_offload.core.copy_order import NOW
from mixtral_offload.runtime.copies import Copy
from mixtral_offload.runtime.slow_link import SlowEngine
from mixtral_offload.runtime.store import FilePart
from mixtral_offload.runtime.worker import Waiting, chunk_bytes, start_worker


class FreeSince:
    """From when on a free slot may be written, on CUDA. A guess comes while other layers' work is enqueued already: it
    need not wait for that, only for the last layer that read slots."""

    def __init__(self, device: torch.device):
        self._device, self._last = device, None

    def mark(self) -> None:
        if self._device.type == "cuda":
            self._last = torch.cuda.current_stream(self._device).record_event()

    def event(self, copy: Copy) -> torch.cuda.Event:
        """What the copy must wait for; one that is needed may take a slot that its own layer has just read."""
        if copy.due == NOW or self._last is None:
            return torch.cuda.current_stream(self._device).record_event()
        return self._last


class ThreadEngine:
    """Copies on a worker thread: for the CPU, and for CUDA where the home is not pinned memory."""

    def __init__(self, device: torch.device, n_bytes: int):
        self._device, self._chunk_bytes, self._free_since = device, chunk_bytes(n_bytes), FreeSince(device)
        self._move = _bounce(device, self._chunk_bytes) if device.type == "cuda" else _copy_chunk
        self._start_worker()

    def _start_worker(self) -> None:
        self._waiting, self._was_forked = Waiting(), False
        self.close = start_worker(self, self._waiting, self._move, self._chunk_bytes)

    def after_fork(self) -> None:
        """In a forked child, where the worker does not run: start another one with the next copy."""
        self.close.detach()
        self._was_forked = True

    def start(self, copy: Copy) -> None:
        if self._was_forked:
            self._start_worker()
        if self._device.type == "cuda":
            copy.ready = self._free_since.event(copy)
        self._waiting.put(copy)

    def slots_were_read(self) -> None:
        """All that has been enqueued to read slots, has been; what is free now is free once that is through."""
        self._free_since.mark()

    def promote(self, copy: Copy) -> None:
        """A guess has become a need."""
        copy.due = NOW

    def cancel(self, copy: Copy) -> None:
        """No more of it; returns at once (see `Copy.cancel`)."""
        copy.cancel()


class StreamEngine:
    """Copies from pinned memory on CUDA streams of their own. Urgent ones are enqueued at once, the host never waits;
    guesses go chunk by chunk from a worker thread, and only while no urgent copy is under way."""

    def __init__(self, device: torch.device, n_bytes: int):
        self._device, self._waiting, self._free_since = device, Waiting(), FreeSince(device)
        self._stream, guesses = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._last: list[torch.cuda.Event] = [torch.cuda.Event()]  # of the urgent copies
        last = self._last

        def move(copy: Copy, source: Tensor, target: Tensor) -> None:
            if copy.due != NOW:
                last[0].synchronize()
            with torch.cuda.stream(guesses):
                guesses.wait_event(copy.ready)
                target.copy_(source, non_blocking=True)
                arrived = guesses.record_event()
            arrived.synchronize()

        self._end = start_worker(self, self._waiting, move, chunk_bytes(n_bytes))

    def start(self, copy: Copy) -> None:
        if copy.due != NOW:
            copy.ready = self._free_since.event(copy)
            self._waiting.put(copy)
            return
        copy.stream = self._stream  # from here on `abandon` waits for whatever has been enqueued
        copy.asked_s = copy.began_s = time.perf_counter()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # the slot's last reader
        with torch.cuda.stream(self._stream):
            for offset, piece in copy.pieces:
                copy.slot[offset : offset + piece.numel()].copy_(piece, non_blocking=True)
                copy.moved_bytes += piece.numel()
            copy.event = self._last[0] = self._stream.record_event()
        copy.finish()

    def slots_were_read(self) -> None:
        """See `ThreadEngine.slots_were_read`."""
        self._free_since.mark()

    def promote(self, copy: Copy) -> None:
        copy.due = NOW

    def cancel(self, copy: Copy) -> None:
        copy.cancel()

    def close(self) -> None:
        self._end()
        self._stream.synchronize()


def _copy_chunk(copy: Copy, source: Tensor | FilePart, target: Tensor) -> None:
    if isinstance(source, FilePart):
        source.read_into(target)
    else:
        target.numpy()[:] = source.numpy()


def _bounce(device: torch.device, size: int):
    """Moves chunks from pageable memory to a CUDA device through pinned memory."""
    memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    stream = torch.cuda.Stream(device)

    def move(copy: Copy, source: Tensor | FilePart, target: Tensor) -> None:
        part = memory[: source.numel()]
        _copy_chunk(copy, source, part)
        with torch.cuda.stream(stream):
            stream.wait_event(copy.ready)
            target.copy_(part, non_blocking=True)
        stream.synchronize()  # the memory is free again

    return move


def make_engine(device: torch.device, pinned: bool, n_bytes: int, link_bytes_per_s: float | None = None):
    """The engine for a device and a home: a stream for pinned memory, a worker thread otherwise; or a link of a stated speed."""
    if link_bytes_per_s is not None:
        return SlowEngine(device, n_bytes, link_bytes_per_s)
    kind = StreamEngine if device.type == "cuda" and pinned else ThreadEngine
    return kind(device, n_bytes)
