"""Which copy goes next, in what chunks, and how long that takes on a simulated link. No experts.

The copy thread and the simulated link (of timed replays and of the throttled engine) share `most_urgent`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from typing import Protocol, TypeVar

NOW = -1  # due before every prediction
CHUNKS = 16  # of one expert
#: bounds: smaller chunks cost more than they save, larger ones make an urgent copy wait
CHUNK_BYTES = (256 << 10, 4 << 20)

NEEDED, RIGHT, WRONG, OPEN = range(4)
KINDS = ("needed", "right prediction", "wrong prediction", "open prediction")
SLACK = 1e-9  # of a chunk: rounding error of sums of times that should meet at a chunk's end


class Due(Protocol):
    """A copy with an urgency.

    Attributes:
        due: NOW if a layer waits for it, else the number of the layer call that may need it.
    """

    due: int


Copy = TypeVar("Copy", bound=Due)


def most_urgent(copies: Iterable[Copy]) -> Copy | None:
    """Return the copy that moves its next chunk now: the first one due; of equals, the first of `copies`."""
    return min(copies, key=lambda copy: copy.due, default=None)


def chunk_bytes(n_bytes: int) -> int:
    """Return the size of one chunk of a copy of `n_bytes`."""
    return min(max(n_bytes // CHUNKS, CHUNK_BYTES[0]), CHUNK_BYTES[1])


@dataclass(slots=True, eq=False)
class Transfer:
    """One copy on a simulated link.

    Attributes:
        key: What is copied.
        due: See `Due`.
        kind: NEEDED, RIGHT, WRONG or OPEN: a prediction that is neither right nor wrong yet.
        asked_s: When it was queued.
        chunks: Number of chunks moved, including one under way.
        begin_s: Begin of its first chunk.
        end_s: End of its last chunk; known as soon as that has begun.
        free_s: When nothing writes its target any more; known once it is cancelled.
    """

    link: Link
    key: int
    due: int
    kind: int
    asked_s: float
    chunks: int = 0
    begin_s: float | None = None
    end_s: float | None = None
    free_s: float = 0.0

    @property
    def has_begun(self) -> bool:
        self.link.run()
        return self.chunks > 0

    @property
    def is_good(self) -> bool:
        return self.kind != WRONG

    @property
    def is_over(self) -> bool:
        return self.link.clock() >= self.free_s


class Link:
    """Simulated link: moves one chunk at a time, the most urgent copy first.

    Args:
        chunk_s: Duration of a chunk.
        n_chunks: Chunks of each copy.
        clock: Returns the time, in the same unit.
        keep: Whether to keep `stretches`.

    Attributes:
        free_s: End of the chunk under way; nothing is under way if that is not after now.
        moved: Chunks moved by all copies.
        stretches: Uninterrupted parts of copies: (transfer, begin, end); None if they are not kept.
    """

    def __init__(self, chunk_s: float, n_chunks: int, clock: Callable[[], float], keep: bool = False):
        self._chunk_s, self._n_chunks, self.clock = chunk_s, n_chunks, clock
        self._waiting: list[Transfer] = []
        self.free_s, self.moved = 0.0, 0
        self.stretches: list[tuple[Transfer, float, float]] | None = [] if keep else None

    def ask(self, key: int, due: int) -> Transfer:
        """Queue a copy."""
        transfer = Transfer(self, key, due, NEEDED if due == NOW else OPEN, self.run())
        self._waiting.append(transfer)
        return transfer

    def promote(self, transfer: Transfer) -> None:
        """Make a predicted copy a needed one. It goes before needed ones that were queued later."""
        self.run()
        transfer.due, transfer.kind = NOW, RIGHT

    def cancel(self, transfer: Transfer) -> None:
        """Move no more chunks of it.

        A transfer that has begun stops when the chunk under way, of any transfer, ends.
        """
        self.run()
        transfer.kind = WRONG
        if transfer.end_s is not None:
            transfer.free_s = transfer.end_s
            return
        self._waiting.remove(transfer)
        transfer.free_s = self.free_s if transfer.chunks else self.clock()

    def run(self) -> float:
        """Begin every chunk that begins before now; return now."""
        until = self.clock()
        while self._waiting and self.free_s < until - SLACK * self._chunk_s:
            self._carry(ceil((until - self.free_s) / self._chunk_s - SLACK))
        self.free_s = max(self.free_s, until)
        return until

    def land(self, transfer: Transfer) -> float:
        """Advance until a transfer ends, with no new requests; return when that is."""
        while transfer.end_s is None:
            self._carry(self._n_chunks)
        return transfer.end_s

    def _carry(self, most: int) -> None:
        """Move at most `most` chunks of the most urgent transfer."""
        transfer = most_urgent(self._waiting)
        assert transfer is not None
        n, begin = min(most, self._n_chunks - transfer.chunks), self.free_s
        if transfer.chunks == 0:
            transfer.begin_s = begin
        # in this order, an interrupt leaves no transfer that is carried forever
        self.moved += n
        self.free_s = begin + n * self._chunk_s
        if transfer.chunks + n == self._n_chunks:
            transfer.end_s = self.free_s
            self._waiting.remove(transfer)
        transfer.chunks += n
        if self.stretches is None:
            return
        if self.stretches and self.stretches[-1][0] is transfer and self.stretches[-1][2] == begin:
            begin = self.stretches.pop()[1]
        self.stretches.append((transfer, begin, self.free_s))
