"""Asynchronous copies of one expert's bytes from its home into a slot.

Knows byte buffers, CUDA streams and one worker thread. Knows nothing of experts' meaning or of who asked.

Guesses travel in chunks, and so does everything on the worker thread: a copy that is needed now waits for one chunk of a
guess at most. A copy is registered by its owner before it is started, so that an interrupt at any
moment leaves either a copy that never ran or one that can be waited for, never one that writes into a slot nobody
remembers.
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
OVER = (DONE, ABANDONED, FAILED)
NOW = -1
CHUNKS = 16  # of one expert
CHUNK_BYTES = (4096, 4 << 20)  # smallest and largest chunk


class Copy:
    """One copy `pieces -> slot`.

    due: NOW if it is needed, else a guess, and the earlier of two goes first.
    n_bytes: what has to cross the link. moved_bytes: what has. asked_s, began_s, ended_s: of time.perf_counter().
    """

    def __init__(self, pieces: Pieces, slot: Tensor, due: int = NOW):
        self.pieces, self.slot, self.due = pieces, slot, due
        self.n_bytes = sum(piece.numel() for _, piece in pieces)
        self.moved_bytes = 0
        self.began_s = self.ended_s = 0.0
        self.state = CREATED
        self.error: BaseException | None = None
        self.stream: torch.cuda.Stream | None = None  # the stream it was enqueued on, and
        self.event: torch.cuda.Event | None = None  # when its bytes have arrived there
        self.ready: torch.cuda.Event | None = None  # on CUDA: when the slot's last reader is through
        self.cancelled = False
        self.was_guess = False  # started before anybody needed it
        self.asked_s = 0.0
        self._at = (0, 0)  # the next chunk: number of the piece, byte within it
        self._changed = threading.Condition()

    def begin(self) -> bool:
        """The worker's: claim the copy; False if it was cancelled meanwhile."""
        with self._changed:
            self.state, self.began_s = RUNNING, time.perf_counter()
            if self.cancelled:  # looked at only after RUNNING can be seen: see `cancel`
                self.state = ABANDONED
                self._changed.notify_all()
            return not self.cancelled

    def next_chunk(self, size: int) -> tuple[Tensor, Tensor]:
        """The worker's: (source, target) of the next chunk, of at most `size` bytes."""
        offset, piece = self.pieces[self._at[0]]
        start = self._at[1]
        source = piece[start : start + size]
        end = start + source.numel()
        self._at = (self._at[0], end) if end < piece.numel() else (self._at[0] + 1, 0)
        return source, self.slot[offset + start : offset + end]

    def finish(self, error: BaseException | None = None) -> None:
        """The engine's: all bytes are there (or, on a CUDA stream, are certain to be there before `event`), or the
        copy was cancelled."""
        with self._changed:
            self.error, self.ended_s = error, time.perf_counter()
            whole = self.moved_bytes == self.n_bytes
            self.state = FAILED if error else DONE if whole else ABANDONED
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when the calling thread (on CUDA: its current stream) may read the slot."""
        if self.cancelled:
            raise RuntimeError("waited for a copy that was cancelled")
        with self._changed:
            while self.state not in OVER:
                self._changed.wait()
        if self.error is not None:
            raise self.error
        if self.event is not None:
            torch.cuda.current_stream(self.slot.device).wait_event(self.event)

    def cancel(self) -> None:
        """No more chunks; returns at once. The slot may still be written until `is_over`.

        Takes no lock, which an interrupt could leave locked: either the worker's `begin` sees the mark, or RUNNING is
        seen by whoever asks `is_over` after this.
        """
        self.cancelled = True

    @property
    def is_good(self) -> bool:
        """Whether a guess may be waited for."""
        return self.was_guess and not self.cancelled and self.state not in (ABANDONED, FAILED)

    @property
    def is_over(self) -> bool:
        """Of a cancelled copy: whether the slot is certain not to be written any more."""
        return self.state != RUNNING and (self.event is None or self.event.query())

    def abandon(self) -> None:
        """Return when the slot is certain not to be written any more."""
        self.cancel()
        with self._changed:
            while self.state == RUNNING:
                self._changed.wait()
        if self.stream is not None:
            self.stream.synchronize()


class _Waiting:
    """The copies that wait for the worker: by when they are due, equals in the order they came.

    They come through a SimpleQueue, whose `put` no interrupt can leave half-done.
    """

    def __init__(self):
        self._coming: queue.SimpleQueue[Copy | None] = queue.SimpleQueue()
        self._copies: list[Copy] = []
        self._ended = False

    def put(self, copy: Copy) -> None:
        """Raises RuntimeError after `end`: nobody would ever carry it out."""
        if self._ended:
            raise RuntimeError("the copy engine has been closed")
        copy.asked_s = time.perf_counter()
        self._coming.put(copy)

    def end(self) -> None:
        self._ended = True
        self._coming.put(None)

    def pick(self) -> Copy | None:
        """The worker's: the copy to go on with; blocks while there is none; None at the end."""
        while not self._coming.empty() or not (self._copies or self._ended):
            copy = self._coming.get()
            if copy is not None:
                self._copies.append(copy)
        if self._ended:
            for copy in self._copies:
                copy.cancel()
        return min(self._copies, key=lambda copy: NOW if copy.cancelled else copy.due, default=None)

    def remove(self, copy: Copy) -> None:
        self._copies.remove(copy)


class ThreadEngine:
    """Copies on a worker thread: for the CPU, and for CUDA where the home is not pinned memory.

    link_bytes_per_s: slow the copies down to a link of this speed, for experiments (None: as fast as it goes).
    """

    def __init__(self, device: torch.device, n_bytes: int, link_bytes_per_s: float | None = None):
        self._device, self._waiting = device, _Waiting()
        size = chunk_bytes(n_bytes)
        move = _bounce(device, size) if device.type == "cuda" else _copy_chunk
        # the thread holds no reference to the engine, so that dropping the engine ends the thread
        self.close = _start_worker(self, self._waiting, move, size, link_bytes_per_s)

    def start(self, copy: Copy) -> None:
        if self._device.type == "cuda":
            copy.ready = torch.cuda.current_stream(self._device).record_event()
        self._waiting.put(copy)

    def promote(self, copy: Copy) -> None:
        """A guess has become a need."""
        copy.due = NOW


class StreamEngine:
    """Copies from pinned memory on CUDA streams of their own. Urgent ones are enqueued at once, the host never waits;
    guesses go chunk by chunk from a worker thread, and only while no urgent copy is under way."""

    def __init__(self, device: torch.device, n_bytes: int):
        self._device, self._waiting = device, _Waiting()
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

        self._end = _start_worker(self, self._waiting, move, chunk_bytes(n_bytes), None)

    def start(self, copy: Copy) -> None:
        if copy.due != NOW:
            copy.ready = torch.cuda.current_stream(self._device).record_event()
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

    def promote(self, copy: Copy) -> None:
        copy.due = NOW

    def close(self) -> None:
        self._end()
        self._stream.synchronize()


def chunk_bytes(n_bytes: int) -> int:
    """The size of one chunk of a copy of n_bytes."""
    return min(max(n_bytes // CHUNKS, CHUNK_BYTES[0]), CHUNK_BYTES[1])


def _copy_chunk(copy: Copy, source: Tensor, target: Tensor) -> None:
    target.numpy()[:] = source.numpy()


def _bounce(device: torch.device, size: int):
    """Moves chunks from pageable memory to a CUDA device through pinned memory."""
    memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    stream = torch.cuda.Stream(device)

    def move(copy: Copy, source: Tensor, target: Tensor) -> None:
        part = memory[: source.numel()]
        part.copy_(source)
        with torch.cuda.stream(stream):
            stream.wait_event(copy.ready)
            target.copy_(part, non_blocking=True)
        stream.synchronize()  # the memory is free again

    return move


def _start_worker(owner, waiting: _Waiting, move, size: int, link: float | None):
    """Returns what ends the thread; it is also called when the owner is dropped."""
    thread = threading.Thread(
        target=_work, args=(waiting, move, size, link), name="expert-copies", daemon=True
    )
    thread.start()
    return weakref.finalize(owner, _end, waiting, thread)


def _end(waiting: _Waiting, thread: threading.Thread) -> None:
    """Also runs at interpreter exit: a thread still inside torch then would abort the process."""
    waiting.end()
    if thread is not threading.current_thread():
        thread.join()


def _work(waiting: _Waiting, move, size: int, link: float | None) -> None:
    """The worker thread: chunk by chunk of whatever is most urgent, until the end."""
    free_s = 0.0  # when the emulated link has carried everything so far
    while (copy := waiting.pick()) is not None:
        error = None
        if copy.state == RUNNING or copy.begin():
            try:
                if not copy.cancelled:
                    source, target = copy.next_chunk(size)
                    move(copy, source, target)
                    copy.moved_bytes += source.numel()
                    if link is not None:
                        free_s = max(free_s, copy.asked_s) + source.numel() / link
                        time.sleep(max(0.0, free_s - time.perf_counter()))
                    if copy.moved_bytes < copy.n_bytes:
                        continue
            except BaseException as caught:
                error = caught
            copy.finish(error)
        waiting.remove(copy)


def make_engine(device: torch.device, pinned: bool, n_bytes: int, link_bytes_per_s: float | None = None):
    """The engine for a device and a home: a stream for pinned memory, a worker thread otherwise."""
    if device.type == "cuda" and pinned and link_bytes_per_s is None:
        return StreamEngine(device, n_bytes)
    return ThreadEngine(device, n_bytes, link_bytes_per_s)
