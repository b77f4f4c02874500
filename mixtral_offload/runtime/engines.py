"""Engines carry out copies: on a thread, on CUDA streams, or over a simulated link of a stated speed.

Knows byte buffers and devices. Knows nothing of experts.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from mixtral_offload.core.copy_order import CHUNKS, NOW, Link, Transfer, chunk_bytes, most_urgent
from mixtral_offload.errors import OptionError
from mixtral_offload.runtime.store import FilePart, Pieces

CREATED, RUNNING, DONE, ABANDONED, FAILED = "created", "running", "done", "abandoned", "failed"
OVER = (DONE, ABANDONED, FAILED)
Move = Callable[["Copy", Tensor | FilePart, Tensor], None]  # (copy, source, target): one chunk


class Copy:
    """One copy of `pieces` into `slot`.

    Predictions move in chunks, and so does everything on a thread: a needed copy waits for one chunk of a
    prediction at most. The owner records a copy before it starts it, so that an interrupt at any moment
    leaves a copy that never ran or one that can be waited for, never one that writes into a row that is not
    recorded.

    Args:
        pieces: (offset within the slot, bytes).
        slot: uint8 `[n]`, the target.
        due: NOW if it is needed, else of a prediction; see `core/copy_order.py`.

    Attributes:
        n_bytes: Bytes to move.
        moved_bytes: Bytes moved so far.
        asked_s: `time.perf_counter()` of its request.
        began_s: The same of its first chunk.
        ended_s: The same of its end.
        event: CUDA event of its end; of a cancelled copy on a simulated link, the time at which that is free.
        stream: The CUDA stream on which it was enqueued.
        ready: CUDA event: the slot's last reader has finished.
        link: The engine whose `land` moves the bytes, if that has no thread.
    """

    def __init__(self, pieces: Pieces, slot: Tensor, due: int = NOW):
        self.pieces, self.slot, self.due = pieces, slot, due
        self.n_bytes = sum(piece.numel() for _, piece in pieces)
        self.moved_bytes = 0
        self.asked_s = self.began_s = self.ended_s = 0.0
        self.state = CREATED
        self.error: BaseException | None = None
        self.stream: torch.cuda.Stream | None = None
        self.event: torch.cuda.Event | _Moment | None = None
        self.ready: torch.cuda.Event | None = None
        self.link: ThrottledEngine | None = None
        self.cancelled = False
        self._at = (0, 0)  # the next chunk: number of the piece, byte within it
        self._changed = threading.Condition()

    def begin(self) -> bool:
        """Claim the copy for the engine's thread; return False if it was cancelled meanwhile."""
        with self._changed:
            self.state, self.began_s = RUNNING, time.perf_counter()
            if self.cancelled:  # read only after RUNNING can be seen: see `cancel`
                self.state = ABANDONED
                self._changed.notify_all()
            return not self.cancelled

    def next_chunk(self, size: int) -> tuple[Tensor | FilePart, Tensor]:
        """Return (source, target) of the next chunk, of at most `size` bytes, for the engine's thread."""
        offset, piece = self.pieces[self._at[0]]
        start = self._at[1]
        source = piece.part(start, size) if isinstance(piece, FilePart) else piece[start : start + size]
        end = start + source.numel()
        self._at = (self._at[0], end) if end < piece.numel() else (self._at[0] + 1, 0)
        return source, self.slot[offset + start : offset + end]

    def finish(self, error: BaseException | None = None) -> None:
        """End the copy, for the engine: all bytes are moved or enqueued, or it failed or was cancelled."""
        with self._changed:
            self.error, self.ended_s = error, time.perf_counter()
            whole = self.moved_bytes == self.n_bytes and not self.cancelled
            self.state = FAILED if error else DONE if whole else ABANDONED
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when the calling thread (on CUDA: its current stream) may read the slot; re-raise errors."""
        if self.cancelled:
            raise RuntimeError("waited for a copy that was cancelled")
        if self.link is not None:
            self.link.land(self)
        with self._changed:
            while self.state not in OVER:
                self._changed.wait()
        if self.error is not None:
            raise self.error
        if self.event is not None:
            assert not isinstance(self.event, _Moment)  # which only a cancelled copy has
            torch.cuda.current_stream(self.slot.device).wait_event(self.event)

    def cancel(self) -> None:
        """Move no more chunks; return at once. The slot may still be written until `is_over`.

        Takes no lock, which an interrupt could leave locked: either the thread's `begin` sees the mark, or
        `is_over`, read after this, sees RUNNING.
        """
        self.cancelled = True

    @property
    def has_begun(self) -> bool:
        """Whether a chunk has moved or is moving."""
        return self.state != CREATED or (self.link is not None and self.link.has_begun(self))

    @property
    def is_good(self) -> bool:
        """Whether it can still arrive."""
        return not self.cancelled and self.state not in (ABANDONED, FAILED)

    @property
    def is_over(self) -> bool:
        """Whether the slot of a cancelled copy is certain not to be written any more."""
        return self.state != RUNNING and (self.event is None or self.event.query())

    def abandon(self) -> None:
        """Cancel the copy; return when the slot is certain not to be written any more."""
        self.cancel()
        if self.link is not None:
            self.link.cancel(self)
        with self._changed:
            while self.state == RUNNING:
                self._changed.wait()
        if self.stream is not None:
            self.stream.synchronize()


class Engine:
    """Base class of engines.

    Args:
        device: Device of the slots.
        n_bytes: Bytes of one expert.

    Attributes:
        chunk_bytes: Bytes of a chunk.
        n_chunks: Chunks of one expert.
    """

    def __init__(self, device: torch.device, n_bytes: int):
        self.device, self.chunk_bytes = device, chunk_bytes(n_bytes)
        self.n_chunks = -(-n_bytes // self.chunk_bytes)

    def start(self, copy: Copy) -> None:
        """Queue a copy.

        Raises:
            RuntimeError: After `close`.
        """
        raise NotImplementedError

    def promote(self, copy: Copy) -> None:
        """Make a predicted copy a needed one."""
        copy.due = NOW

    def cancel(self, copy: Copy) -> None:
        """Stop a copy; return at once (see `Copy.cancel`)."""
        copy.cancel()

    def slots_were_read(self) -> None:
        """Call after the last kernel that reads slots is enqueued; then free slots may be written."""

    def after_fork(self) -> None:
        """In a forked child: forget the copies of the parent."""

    def close(self) -> None:
        """Cancel waiting copies and end the thread, if there is one."""


class _FreeSince:
    """CUDA events after which a free slot may be written.

    Predictions are made while work of other layers is enqueued already. They wait only for the last layer
    that read slots.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._last: torch.cuda.Event | None = None

    def mark(self) -> None:
        """See `Engine.slots_were_read`."""
        if self._device.type == "cuda":
            self._last = torch.cuda.current_stream(self._device).record_event()

    def event(self, copy: Copy) -> torch.cuda.Event:
        """Return what the copy must wait for; a needed one may take a slot that its layer has just read."""
        if copy.due == NOW or self._last is None:
            return torch.cuda.current_stream(self._device).record_event()
        return self._last


class _Waiting:
    """The copies that wait for the thread. No interrupt leaves a SimpleQueue's `put` half-done."""

    def __init__(self) -> None:
        self._coming: queue.SimpleQueue[Copy | None] = queue.SimpleQueue()
        self._copies: list[Copy] = []
        self._ended = False

    def put(self, copy: Copy) -> None:
        """See `Engine.start`."""
        if self._ended:
            raise RuntimeError("the copy engine has been closed")
        copy.asked_s = time.perf_counter()
        self._coming.put(copy)

    def end(self) -> None:
        """Cancel all copies and end the thread."""
        self._ended = True
        self._coming.put(None)

    def pick(self) -> Copy | None:
        """Return the copy that moves next, for the thread; block while there is none; None at the end."""
        while not self._coming.empty() or not (self._copies or self._ended):
            copy = self._coming.get()
            if copy is not None:
                self._copies.append(copy)
        if self._ended:
            for copy in self._copies:
                copy.cancel()
        over = next((copy for copy in self._copies if copy.cancelled), None)  # costs the link nothing
        return over or most_urgent(self._copies)

    def remove(self, copy: Copy) -> None:
        """Remove a copy that is over, for the thread."""
        self._copies.remove(copy)


def _start_thread(owner: Engine, waiting: _Waiting, move: Move, size: int) -> weakref.finalize:
    """Start the thread; return what ends it, also when the owner is dropped. size: bytes of a chunk."""
    # the thread holds no reference to the owner, so that dropping the owner ends the thread
    thread = threading.Thread(target=_work, args=(waiting, move, size), name="expert-copies", daemon=True)
    thread.start()
    return weakref.finalize(owner, _end, waiting, thread)


def _end(waiting: _Waiting, thread: threading.Thread) -> None:
    """Also runs at interpreter exit: a thread still inside torch then would abort the process."""
    waiting.end()
    if thread is not threading.current_thread():
        thread.join()


def _work(waiting: _Waiting, move: Move, size: int) -> None:
    """The thread's loop: move one chunk of the most urgent copy until closed."""
    while (copy := waiting.pick()) is not None:
        error: BaseException | None = None
        if copy.state == RUNNING or copy.begin():
            try:
                if not copy.cancelled:
                    source, target = copy.next_chunk(size)
                    move(copy, source, target)
                    copy.moved_bytes += source.numel()
                    if copy.moved_bytes < copy.n_bytes:
                        continue
            except BaseException as caught:
                error = caught
            copy.finish(error)
        waiting.remove(copy)


class ThreadEngine(Engine):
    """Copies on a thread: for the CPU, and for CUDA if the store is not pinned memory."""

    def __init__(self, device: torch.device, n_bytes: int):
        super().__init__(device, n_bytes)
        self._free_since = _FreeSince(device)
        self._move = _bounce(device, self.chunk_bytes) if device.type == "cuda" else copy_chunk
        self._begin()

    def _begin(self) -> None:
        self._waiting, self._was_forked = _Waiting(), False
        self._end = _start_thread(self, self._waiting, self._move, self.chunk_bytes)

    def after_fork(self) -> None:
        """In a forked child, where the thread does not run: start another thread with the next copy."""
        self._end.detach()
        self._was_forked = True

    def start(self, copy: Copy) -> None:
        if self._was_forked:
            self._begin()
        if self.device.type == "cuda":
            copy.ready = self._free_since.event(copy)
        self._waiting.put(copy)

    def slots_were_read(self) -> None:
        self._free_since.mark()

    def close(self) -> None:
        self._end()


class StreamEngine(Engine):
    """Copies from pinned memory on CUDA streams.

    Needed copies are enqueued at once: the host never waits. A thread enqueues predictions chunk by chunk,
    and only while no needed copy is under way.
    """

    def __init__(self, device: torch.device, n_bytes: int):
        super().__init__(device, n_bytes)
        self._waiting, self._free_since = _Waiting(), _FreeSince(device)
        self._stream, predictions = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._last: list[torch.cuda.Event] = [torch.cuda.Event()]  # of the needed copies
        last = self._last

        def move(copy: Copy, source: Tensor | FilePart, target: Tensor) -> None:
            assert isinstance(source, Tensor) and copy.ready is not None
            if copy.due != NOW:
                last[0].synchronize()
            with torch.cuda.stream(predictions):
                predictions.wait_event(copy.ready)
                target.copy_(source, non_blocking=True)
                arrived = predictions.record_event()
            arrived.synchronize()

        self._end = _start_thread(self, self._waiting, move, self.chunk_bytes)

    def start(self, copy: Copy) -> None:
        if copy.due != NOW:
            copy.ready = self._free_since.event(copy)
            self._waiting.put(copy)
            return
        copy.stream = self._stream  # from here on `abandon` waits for whatever has been enqueued
        copy.asked_s = copy.began_s = time.perf_counter()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # the slot's last reader
        with torch.cuda.stream(self._stream):
            for offset, piece in copy.pieces:
                assert isinstance(piece, Tensor)  # of pinned memory
                copy.slot[offset : offset + piece.numel()].copy_(piece, non_blocking=True)
                copy.moved_bytes += piece.numel()
            copy.event = self._last[0] = self._stream.record_event()
        copy.finish()

    def slots_were_read(self) -> None:
        self._free_since.mark()

    def close(self) -> None:
        self._end()
        self._stream.synchronize()


#: the last part of a wait polls the clock: a core that has slept computes slower for a millisecond, and a
#: device with a real link does not sleep (LOG.md)
SPIN_S = 0.02
#: limit for one expert: an answer can be stopped only between tokens, and a token waits for its copies
MOST_COPY_S = 10.0


class _Moment:
    """A time of `time.perf_counter()`, with the methods of a CUDA event."""

    def __init__(self, at_s: float):
        self._at_s = at_s

    def query(self) -> bool:
        return time.perf_counter() >= self._at_s

    def synchronize(self) -> None:
        left = self._at_s - time.perf_counter()
        if left > SPIN_S:
            time.sleep(left - SPIN_S)
        while not self.query():
            time.sleep(0)  # other threads may run


class ThrottledEngine(Engine):
    """Runs the simulated link in real time, for experiments with a link of `bytes_per_s`.

    There is no thread: progress is computed on demand, and all bytes of an expert move when it is waited for.

    Raises:
        OptionError: If one expert would take too long.
    """

    def __init__(self, device: torch.device, n_bytes: int, bytes_per_s: float):
        super().__init__(device, n_bytes)
        copy_s = n_bytes / bytes_per_s
        if copy_s > MOST_COPY_S:
            raise OptionError(
                "impossible throttle: one expert would take too long",
                expected=f"{n_bytes / MOST_COPY_S:.0f} bytes/s or more",
                found=f"{bytes_per_s} bytes/s, {copy_s:.0f} s for an expert of {n_bytes} bytes",
            )
        self.chunk_bytes, self.n_chunks = n_bytes // CHUNKS, CHUNKS
        self._chunk_s = copy_s / CHUNKS
        self._closed = False
        self.after_fork()

    def after_fork(self) -> None:
        self._link = Link(self._chunk_s, CHUNKS, time.perf_counter)
        self._transfers: dict[Copy, Transfer] = {}  # of copies neither landed nor cancelled

    def start(self, copy: Copy) -> None:
        if self._closed:
            raise RuntimeError("the copy engine has been closed")
        copy.link = self
        transfer = self._transfers[copy] = self._link.ask(id(copy), copy.due)
        copy.asked_s = transfer.asked_s

    def promote(self, copy: Copy) -> None:
        super().promote(copy)
        self._link.promote(self._transfers[copy])

    def cancel(self, copy: Copy) -> None:
        super().cancel(copy)
        transfer = self._transfers.pop(copy, None)
        if transfer is not None:
            self._link.cancel(transfer)
            copy.moved_bytes = min(transfer.chunks * self.chunk_bytes, copy.n_bytes)
            copy.began_s, copy.ended_s = transfer.begin_s or 0.0, transfer.free_s
            copy.event = _Moment(transfer.free_s)
            copy.state = ABANDONED

    def has_begun(self, copy: Copy) -> bool:
        """Return whether a copy that was started and not cancelled has moved a chunk."""
        transfer = self._transfers.get(copy)  # none where an interrupt came between two lines
        return transfer is not None and transfer.has_begun

    def land(self, copy: Copy) -> None:
        """Wait until the simulated copy has ended, and move its bytes."""
        if copy.state == DONE:
            return
        transfer = self._transfers[copy]
        _Moment(self._link.land(transfer)).synchronize()
        try:
            for offset, piece in copy.pieces:
                _move_whole(piece, copy.slot[offset : offset + piece.numel()])
        except Exception as error:  # re-raised by wait()
            copy.finish(error)
            return
        copy.moved_bytes = copy.n_bytes
        copy.finish()
        assert transfer.begin_s is not None and transfer.end_s is not None
        copy.began_s, copy.ended_s = transfer.begin_s, transfer.end_s
        del self._transfers[copy]

    def close(self) -> None:
        self._closed = True


def _move_whole(source: Tensor | FilePart, target: Tensor) -> None:
    if isinstance(source, FilePart):
        host = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
        source.read_into(host)
        source = host
    if source is not target:
        target.copy_(source)


def copy_chunk(copy: Copy, source: Tensor | FilePart, target: Tensor) -> None:
    """Move one chunk within host memory, or from a file."""
    if isinstance(source, FilePart):
        source.read_into(target)
    else:
        target.numpy()[:] = source.numpy()


def _bounce(device: torch.device, size: int) -> Move:
    """Return what moves chunks from pageable memory or files to a CUDA device, through pinned memory."""
    memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    stream = torch.cuda.Stream(device)

    def move(copy: Copy, source: Tensor | FilePart, target: Tensor) -> None:
        assert copy.ready is not None
        part = memory[: source.numel()]
        copy_chunk(copy, source, part)
        with torch.cuda.stream(stream):
            stream.wait_event(copy.ready)
            target.copy_(part, non_blocking=True)
        stream.synchronize()  # the memory is free again

    return move


def make_engine(device: torch.device, pinned: bool, n_bytes: int, bytes_per_s: float | None = None) -> Engine:
    """Make the engine for a device and a store: streams for pinned memory, a thread otherwise.

    Args:
        device: Device of the slots.
        pinned: Whether the store is pinned memory.
        n_bytes: Bytes of one expert.
        bytes_per_s: Emulate a link of this speed instead.
    """
    if bytes_per_s is not None:
        return ThrottledEngine(device, n_bytes, bytes_per_s)
    kind = StreamEngine if device.type == "cuda" and pinned else ThreadEngine
    return kind(device, n_bytes)
