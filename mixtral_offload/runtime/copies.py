"""One copy: what moves where, how far it is, and how to wait for it or be rid of it.

Knows one buffer and one slot. Knows nothing of who carries it out.
"""

from __future__ import annotations

import threading
import time

import torch
from torch import Tensor

from mixtral_offload.core.copy_order import NOW
from mixtral_offload.runtime.store import FilePart, Pieces

CREATED, RUNNING, DONE, ABANDONED, FAILED = "created", "running", "done", "abandoned", "failed"
OVER = (DONE, ABANDONED, FAILED)


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
        self.carrier = (
            None  # an engine without a thread: whoever waits does the work (`runtime/slow_link.py`)
        )
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

    def next_chunk(self, size: int) -> tuple[Tensor | FilePart, Tensor]:
        """The worker's: (source, target) of the next chunk, of at most `size` bytes."""
        offset, piece = self.pieces[self._at[0]]
        start = self._at[1]
        source = piece.part(start, size) if isinstance(piece, FilePart) else piece[start : start + size]
        end = start + source.numel()
        self._at = (self._at[0], end) if end < piece.numel() else (self._at[0] + 1, 0)
        return source, self.slot[offset + start : offset + end]

    def n_chunks(self, size: int) -> int:
        """How often `next_chunk` has something to give, from the start."""
        return sum(-(-piece.numel() // size) for _, piece in self.pieces)

    def finish(self, error: BaseException | None = None) -> None:
        """The engine's: all bytes are there (or, on a CUDA stream, are certain to be there before `event`), or the
        copy was cancelled."""
        with self._changed:
            self.error, self.ended_s = error, time.perf_counter()
            whole = self.moved_bytes == self.n_bytes and not self.cancelled
            self.state = FAILED if error else DONE if whole else ABANDONED
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when the calling thread (on CUDA: its current stream) may read the slot."""
        if self.cancelled:
            raise RuntimeError("waited for a copy that was cancelled")
        if self.carrier is not None:
            self.carrier.land(self)
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
    def has_begun(self) -> bool:
        return self.state != CREATED or (self.carrier is not None and self.carrier.has_begun(self))

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
        if self.carrier is not None:
            self.carrier.cancel(self)
        with self._changed:
            while self.state == RUNNING:
                self._changed.wait()
        if self.stream is not None:
            self.stream.synchronize()
