"""Engines carry copies out: a thread, CUDA streams, or a simulated link of a stated speed.

Knows byte buffers and devices. Knows nothing of experts' meaning or of who asked.

Predictions travel in chunks, and so does everything on the thread: a copy that is needed now waits for one chunk of a
prediction at most. A copy is recorded by its owner before it is started, so that an interrupt at any moment leaves either
a copy that never ran or one that can be waited for, never one that writes into a row that is not recorded.
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

    Args:
        pieces: (offset within the slot, bytes).
        slot: uint8.
        due: NOW if it is needed, else a prediction; see `core/copy_order.py`.

    Attributes:
        n_bytes: What has to be moved.
        moved_bytes: What has been moved.
        asked_s, began_s, ended_s: Of `time.perf_counter()`.
        event: When its bytes have arrived, on a stream (a CUDA event, or an object like one).
        stream: The CUDA stream on which it was enqueued.
        ready: On CUDA: the slot's last reader has finished.
        link: An engine without a thread, whose `land` moves the bytes.
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
        """Claim the copy, for the engine's thread; False if it was cancelled meanwhile."""
        with self._changed:
            self.state, self.began_s = RUNNING, time.perf_counter()
            if self.cancelled:  # looked at only after RUNNING can be seen: see `cancel`
                self.state = ABANDONED
                self._changed.notify_all()
            return not self.cancelled

    def next_chunk(self, size: int) -> tuple[Tensor | FilePart, Tensor]:
        """(source, target) of the next chunk, of at most `size` bytes, for the engine's thread."""
        offset, piece = self.pieces[self._at[0]]
        start = self._at[1]
        source = piece.part(start, size) if isinstance(piece, FilePart) else piece[start : start + size]
        end = start + source.numel()
        self._at = (self._at[0], end) if end < piece.numel() else (self._at[0] + 1, 0)
        return source, self.slot[offset + start : offset + end]

    def finish(self, error: BaseException | None = None) -> None:
        """End it, for the engine: all bytes are there (on a CUDA stream: will be before `event`), or it was cancelled."""
        with self._changed:
            self.error, self.ended_s = error, time.perf_counter()
            whole = self.moved_bytes == self.n_bytes and not self.cancelled
            self.state = FAILED if error else DONE if whole else ABANDONED
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when the calling thread (on CUDA: its current stream) may read the slot."""
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
            torch.cuda.current_stream(self.slot.device).wait_event(self.event)

    def cancel(self) -> None:
        """Move no more chunks; return at once. The slot may still be written until `is_over`.

        Takes no lock, which an interrupt could leave locked: either the thread's `begin` sees the mark, or RUNNING is
        seen by whoever reads `is_over` after this.
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
        """Of a cancelled copy: whether the slot is certain not to be written any more."""
        return self.state != RUNNING and (self.event is None or self.event.query())

    def abandon(self) -> None:
        """Cancel it; return when the slot is certain not to be written any more."""
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
        device: Of the slots.
        n_bytes: Of one expert.
    """

    def __init__(self, device: torch.device, n_bytes: int):
        self.device, self.chunk_bytes = device, chunk_bytes(n_bytes)
        self.n_chunks = -(-n_bytes // self.chunk_bytes)

    def start(self, copy: Copy) -> None:
        """Queue a copy. Raises RuntimeError after `close`."""
        raise NotImplementedError

    def promote(self, copy: Copy) -> None:
        """Make a predicted copy a needed one."""
        copy.due = NOW

    def cancel(self, copy: Copy) -> None:
        """Stop a copy; return at once (see `Copy.cancel`)."""
        copy.cancel()

    def slots_were_read(self) -> None:
        """Call after the last kernel that reads slots is enqueued. Free slots may be written when it has finished."""

    def after_fork(self) -> None:
        """In a forked child: forget the copies of the parent."""

    def close(self) -> None:
        """End the engine; it carries out nothing any more."""


class _FreeSince:
    """From when on a free slot may be written, on CUDA. A prediction comes while other layers' work is enqueued already:
    it need not wait for that, only for the last layer that read slots."""

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


class _Waiting:
    """The copies that wait for the thread, in the order in which they were asked for.

    They come through a SimpleQueue, whose `put` no interrupt can leave half-done.
    """

    def __init__(self) -> None:
        self._coming: queue.SimpleQueue[Copy | None] = queue.SimpleQueue()
        self._copies: list[Copy] = []
        self._ended = False

    def put(self, copy: Copy) -> None:
        if self._ended:
            raise RuntimeError("the copy engine has been closed")
        copy.asked_s = time.perf_counter()
        self._coming.put(copy)

    def end(self) -> None:
        self._ended = True
        self._coming.put(None)

    def pick(self) -> Copy | None:
        """The copy to go on with, for the thread; blocks while there is none; None at the end."""
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
        self._copies.remove(copy)


def _start_thread(owner: Engine, waiting: _Waiting, move: Move, size: int) -> weakref.finalize:
    """Start the thread; return what ends it, which is also called when the owner is dropped. size: of a chunk."""
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
        error = None
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
    """Copies on a thread: for the CPU, and for CUDA where the store is not pinned memory."""

    def __init__(self, device: torch.device, n_bytes: int):
        super().__init__(device, n_bytes)
        self._free_since = _FreeSince(device)
        self._move = _bounce(device, self.chunk_bytes) if device.type == "cuda" else copy_chunk
        self._begin()

    def _begin(self) -> None:
        self._waiting, self._was_forked = _Waiting(), False
        self._end = _start_thread(self, self._waiting, self._move, self.chunk_bytes)

    def after_fork(self) -> None:
        """In a forked child, where the thread does not run: start another one with the next copy."""
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
    """Copies from pinned memory on CUDA streams. Needed ones are enqueued at once, the host never waits; predictions go
    chunk by chunk from a thread, and only while no needed copy is under way."""

    def __init__(self, device: torch.device, n_bytes: int):
        super().__init__(device, n_bytes)
        self._waiting, self._free_since = _Waiting(), _FreeSince(device)
        self._stream, predictions = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._last: list[torch.cuda.Event] = [torch.cuda.Event()]  # of the needed copies
        last = self._last

        def move(copy: Copy, source: Tensor, target: Tensor) -> None:
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
                copy.slot[offset : offset + piece.numel()].copy_(piece, non_blocking=True)
                copy.moved_bytes += piece.numel()
            copy.event = self._last[0] = self._stream.record_event()
        copy.finish()

    def slots_were_read(self) -> None:
        self._free_since.mark()

    def close(self) -> None:
        self._end()
        self._stream.synchronize()


#: the last part of a wait is spent polling the clock: a core that has slept computes slower for a millisecond, and the
#: device that a real link serves does not sleep (LOG.md)
SPIN_S = 0.02
#: of one expert: an answer that is stopped ends with its current token, which waits for the copies that it needs
MOST_COPY_S = 10.0


class _Moment:
    """Takes the place of a CUDA event: what is over at this `time.perf_counter()`."""

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

    There is no thread: progress is computed on demand, and an expert's bytes move, all at once, when it is waited for.

    Raises:
        OptionError: For a link on which one expert takes too long.
    """

    def __init__(self, device: torch.device, n_bytes: int, bytes_per_s: float):
        super().__init__(device, n_bytes)
        if n_bytes / bytes_per_s > MOST_COPY_S:  # nothing can stop an answer before its token is there
            raise OptionError(
                "impossible link: one expert would take too long", expected=f"{n_bytes / MOST_COPY_S:.0f} bytes/s or more",
                found=f"{bytes_per_s} bytes/s, {n_bytes / bytes_per_s:.0f} s for an expert of {n_bytes} bytes",
            )  # fmt: skip
        self.chunk_bytes, self.n_chunks = n_bytes // CHUNKS, CHUNKS
        self._chunk_s = n_bytes / CHUNKS / bytes_per_s
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
        """Whether a copy that was started and not cancelled has moved a chunk."""
        return self._transfers[copy].has_begun

    def land(self, copy: Copy) -> None:
        """Wait until the copy has crossed the link, and move its bytes."""
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
    """Move chunks from pageable memory to a CUDA device through pinned memory."""
    memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    stream = torch.cuda.Stream(device)

    def move(copy: Copy, source: Tensor | FilePart, target: Tensor) -> None:
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
        n_bytes: Of one expert.
        bytes_per_s: Emulate a link of this speed instead.
    """
    if bytes_per_s is not None:
        return ThrottledEngine(device, n_bytes, bytes_per_s)
    kind = StreamEngine if device.type == "cuda" and pinned else ThreadEngine
    return kind(device, n_bytes)
