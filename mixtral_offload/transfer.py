"""Asynchronous copies of one expert's bytes from its home into a slot.

Knows byte buffers, one CUDA stream or one worker thread. Knows nothing of experts' meaning or of who asked.

Both engines have one interface: `start(copy)`, `copy.wait()`, `copy.abandon()`. A copy is registered by its owner
before it is started, so that an interrupt at any moment leaves either a copy that never ran or one that can be waited
for, never one that writes into a slot nobody remembers.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref

import torch
from torch import Tensor

from .store import Pieces

CREATED, RUNNING, DONE, ABANDONED, FAILED = "created", "running", "done", "abandoned", "failed"


class Copy:
    """One copy `pieces -> slot`; n_bytes is what crosses the link."""

    def __init__(self, pieces: Pieces, slot: Tensor):
        self.pieces, self.slot = pieces, slot
        self.n_bytes = sum(piece.numel() for _, piece in pieces)
        self.state = CREATED
        self.error: BaseException | None = None
        self.stream: torch.cuda.Stream | None = None  # the stream it was enqueued on, and
        self.event: torch.cuda.Event | None = None  # when its bytes have arrived there
        self.ready: torch.cuda.Event | None = None  # on CUDA: when the slot's last reader is through
        self._changed = threading.Condition()

    def begin(self) -> bool:
        """The worker's: claim the copy; False if it was abandoned meanwhile."""
        with self._changed:
            if self.state != CREATED:
                return False
            self.state = RUNNING
            return True

    def finish(self, error: BaseException | None = None) -> None:
        """The engine's: all bytes are there (or, on a CUDA stream, are certain to be there before `event`)."""
        with self._changed:
            self.error, self.state = error, FAILED if error else DONE
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when the calling thread (on CUDA: its current stream) may read the slot."""
        with self._changed:
            while self.state not in (DONE, FAILED):
                self._changed.wait()
        if self.error is not None:
            raise self.error
        if self.event is not None:
            torch.cuda.current_stream(self.slot.device).wait_event(self.event)

    def abandon(self) -> None:
        """Return when the slot is certain not to be written any more."""
        with self._changed:
            if self.state == CREATED:
                self.state = ABANDONED
            while self.state == RUNNING:
                self._changed.wait()
        if self.stream is not None:
            self.stream.synchronize()


class ThreadEngine:
    """Copies on a worker thread: for the CPU, and for CUDA where the home is not pinned memory.

    link_bytes_per_s: slow the copies down to a link of this speed, for experiments (None: as fast as it goes).
    """

    def __init__(self, device: torch.device, n_bytes: int, link_bytes_per_s: float | None = None):
        self._device = device
        self._queue: queue.SimpleQueue[Copy | None] = queue.SimpleQueue()
        bounce = _BounceBuffer(device, n_bytes) if device.type == "cuda" else None
        # the thread holds no reference to the engine, so that dropping the engine ends the thread
        arguments = (self._queue, bounce, link_bytes_per_s)
        thread = threading.Thread(target=_serve_copies, args=arguments, name="expert-copies", daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _end, self._queue, thread)

    def start(self, copy: Copy) -> None:
        if self._device.type == "cuda":
            copy.ready = torch.cuda.current_stream(self._device).record_event()
        self._queue.put(copy)


class _BounceBuffer:
    """Pinned memory for one expert, between pageable memory and a CUDA device."""

    def __init__(self, device: torch.device, n_bytes: int):
        self._memory = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        self._stream = torch.cuda.Stream(device)

    def copy(self, copy: Copy) -> None:
        _gather(copy.pieces, self._memory)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(copy.ready)
            copy.slot.copy_(self._memory, non_blocking=True)
        self._stream.synchronize()  # the memory is free again


def _gather(pieces: Pieces, target: Tensor) -> None:
    for offset, piece in pieces:
        target.numpy()[offset : offset + piece.numel()] = piece.numpy()


def _end(copies: queue.SimpleQueue, thread: threading.Thread) -> None:
    """Also runs at interpreter exit: a thread still inside torch then would abort the process."""
    copies.put(None)
    if thread is not threading.current_thread():
        thread.join()


def _serve_copies(copies: queue.SimpleQueue, bounce: _BounceBuffer | None, link: float | None) -> None:
    """The worker thread: one copy after the other, until None comes."""
    while (copy := copies.get()) is not None:
        if not copy.begin():
            continue
        begin, error = time.perf_counter(), None
        try:
            if bounce is None:
                _gather(copy.pieces, copy.slot)
            else:
                bounce.copy(copy)
            if link is not None:
                time.sleep(max(0.0, begin + copy.n_bytes / link - time.perf_counter()))
        except BaseException as caught:
            error = caught
        copy.finish(error)


class StreamEngine:
    """Copies from pinned memory on a CUDA stream of their own; the host never waits."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, copy: Copy) -> None:
        copy.stream = self._stream  # from here on `abandon` waits for whatever has been enqueued
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # the slot's last reader
        with torch.cuda.stream(self._stream):
            for offset, piece in copy.pieces:
                copy.slot[offset : offset + piece.numel()].copy_(piece, non_blocking=True)
            copy.event = self._stream.record_event()
        copy.finish()

    def close(self) -> None:
        self._stream.synchronize()


def make_engine(device: torch.device, pinned: bool, n_bytes: int, link_bytes_per_s: float | None = None):
    """The engine for a device and a home: a stream for pinned memory, a worker thread otherwise."""
    if device.type == "cuda" and pinned and link_bytes_per_s is None:
        return StreamEngine(device)
    return ThreadEngine(device, n_bytes, link_bytes_per_s)
