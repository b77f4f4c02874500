"""The thread that carries copies out, chunk by chunk, the most urgent first.

Knows copies. Knows nothing of devices: how a chunk moves is given to it.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable

from torch import Tensor

from mixtral_offload.core.copy_order import CHUNKS, NOW
from mixtral_offload.runtime.copies import RUNNING, Copy
from mixtral_offload.runtime.store import FilePart

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


def start_worker(owner, waiting: Waiting, move: Move, size: int):
    """Start the thread; returns what ends it, which is also called when the owner is dropped. size: of a chunk."""
    # the thread holds no reference to the owner, so that dropping the owner ends the thread
    thread = threading.Thread(target=_work, args=(waiting, move, size), name="expert-copies", daemon=True)
    thread.start()
    return weakref.finalize(owner, _end, waiting, thread)


def _end(waiting: Waiting, thread: threading.Thread) -> None:
    """Also runs at interpreter exit: a thread still inside torch then would abort the process."""
    waiting.end()
    if thread is not threading.current_thread():
        thread.join()


def _work(waiting: Waiting, move: Move, size: int) -> None:
    """The thread: some of whatever is most urgent, again and again, until the end."""
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
