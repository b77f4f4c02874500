"""The thread that carries copies out, chunk by chunk, the most urgent first.

Knows copies and time. Knows nothing of devices: how a chunk moves is given to it.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

from torch import Tensor

from .copies import NOW, RUNNING, Copy
from .store import FilePart

CHUNKS = 16  # of one expert
CHUNK_BYTES = (
    256 << 10,
    4 << 20,
)  # smaller ones cost more than they save, larger ones make an urgent copy wait
Move = Callable[[Copy, Tensor | FilePart, Tensor], None]  # (copy, source, target): one chunk


def chunk_bytes(n_bytes: int) -> int:
    """The size of one chunk of a copy of n_bytes."""
    return min(max(n_bytes // CHUNKS, CHUNK_BYTES[0]), CHUNK_BYTES[1])


class Waiting:
    """The copies that wait for the worker: by when they are due, equals in the order they came.

    They come through a SimpleQueue, whose `put` no interrupt can leave half-done. Waiting for a while needs a lock of its
    own (free: something has come), because SimpleQueue's `get` may wait for ever where its timeout is a few
    microseconds: CPython waits anew for what is left of it, which is then less than nothing.
    """

    def __init__(self):
        self._coming: queue.SimpleQueue[Copy | None] = queue.SimpleQueue()
        self._news = threading.Lock()
        self._copies: list[Copy] = []
        self._ended = False

    def put(self, copy: Copy) -> None:
        """Raises RuntimeError after `end`: nobody would ever carry it out."""
        if self._ended:
            raise RuntimeError("the copy engine has been closed")
        copy.asked_s = time.perf_counter()
        self._send(copy)

    def nudge(self) -> None:
        """Something about a copy has changed: look again."""
        self._send(None)

    def _send(self, copy: Copy | None) -> None:
        self._coming.put(copy)
        with suppress(RuntimeError):  # not locked: the worker has not seen the last news yet
            self._news.release()

    def end(self) -> None:
        self._ended = True
        self.nudge()

    def pick(self) -> Copy | None:
        """The worker's: the copy to go on with; blocks while there is none; None at the end."""
        while not self._coming.empty() or not (self._copies or self._ended):
            copy = self._coming.get()
            if copy is not None:
                self._copies.append(copy)
        self._news.acquire(blocking=False)  # what has come since is seen by `until`
        if self._ended:
            for copy in self._copies:
                copy.cancel()
        return min(self._copies, key=lambda copy: NOW if copy.cancelled else copy.due, default=None)

    def until(self, time_s: float) -> None:
        """The worker's: return at this time.perf_counter(), or as soon as something has come or changed."""
        timeout = time_s - time.perf_counter()
        if timeout > 0 and self._coming.empty():
            self._news.acquire(timeout=timeout)

    def remove(self, copy: Copy) -> None:
        self._copies.remove(copy)


class SlowLink:
    """Stands in for a link of so many bytes per second, in chunks: nothing that comes interrupts the one under way.

    It sleeps until a copy is through or something comes, not once per chunk: each time the thread wakes up, it takes
    Python's lock from the computing thread, which a real link does not.
    """

    def __init__(self, bytes_per_s: float, chunk: int):
        self._bytes_per_s, self._chunk = bytes_per_s, chunk
        self._free_s = 0.0  # when it has carried everything so far

    def carry(self, copy: Copy, waiting: Waiting) -> None:
        """Adds to copy.moved_bytes whole chunks, up to the end if nothing comes."""
        begin = max(self._free_s, copy.asked_s)
        left = copy.n_bytes - copy.moved_bytes
        waiting.until(begin + left / self._bytes_per_s)
        n_chunks = math.ceil((time.perf_counter() - begin) * self._bytes_per_s / self._chunk)
        crossed = min(left, max(n_chunks, 1) * self._chunk)
        self._free_s = begin + crossed / self._bytes_per_s
        time.sleep(max(0.0, self._free_s - time.perf_counter()))
        copy.moved_bytes += crossed


def start_worker(owner, waiting: Waiting, move: Move, size: int, link: SlowLink | None):
    """Start the thread; returns what ends it, which is also called when the owner is dropped. size: of a chunk."""
    # the thread holds no reference to the owner, so that dropping the owner ends the thread
    thread = threading.Thread(
        target=_work, args=(waiting, move, size, link), name="expert-copies", daemon=True
    )
    thread.start()
    return weakref.finalize(owner, _end, waiting, thread)


def _end(waiting: Waiting, thread: threading.Thread) -> None:
    """Also runs at interpreter exit: a thread still inside torch then would abort the process."""
    waiting.end()
    if thread is not threading.current_thread():
        thread.join()


def _work(waiting: Waiting, move: Move, size: int, link: SlowLink | None) -> None:
    """The thread: some of whatever is most urgent, again and again, until the end."""
    while (copy := waiting.pick()) is not None:
        error = None
        if copy.state == RUNNING or copy.begin():
            try:
                if not copy.cancelled:
                    _go_on(copy, waiting, move, size, link)
                    if copy.moved_bytes < copy.n_bytes:
                        continue
            except BaseException as caught:
                error = caught
            copy.finish(error)
        waiting.remove(copy)


def _go_on(copy: Copy, waiting: Waiting, move: Move, size: int, link: SlowLink | None) -> None:
    """One chunk more; over a slow link, the bytes move when all of them would have crossed it."""
    if link is None:
        source, target = copy.next_chunk(size)
        move(copy, source, target)
        copy.moved_bytes += source.numel()
        return
    link.carry(copy, waiting)
    if copy.moved_bytes == copy.n_bytes and not copy.cancelled:
        for _ in range(copy.n_chunks(size)):
            move(copy, *copy.next_chunk(size))
