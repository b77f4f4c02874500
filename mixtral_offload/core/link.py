"""A link on which time passes: copies in chunks, the most urgent first, as `runtime/worker.py` does it. For a replay with a clock, and
for experiments with a link of a stated speed (`runtime/slow_link.py`).

Knows transfers and time. Knows nothing of experts or of who asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mixtral_offload.core.copy_order import NOW

NEEDED, RIGHT, WRONG, OPEN = range(4)
KINDS = ("needed", "right guess", "wrong guess", "open guess")
SLACK = 1e-9  # of a chunk: sums of times that should meet at a chunk's end miss it by their rounding


@dataclass(slots=True, eq=False)
class Transfer:
    """One copy. due: as in `copies.Copy`; number: in the order asked. kind: what it was for, as known by now; an open
    guess is neither right nor wrong yet. chunks: across the link, that under way included. begin_s: of the first one, end_s:
    of the last one, as soon as it has begun."""

    key: int
    due: int
    number: int
    kind: int
    chunks: int = 0
    begin_s: float | None = None
    end_s: float | None = None


class Link:
    """Carries one chunk at a time. What is decided at the very moment of a chunk's end comes before the next one.

    free_s: when the chunk under way ends; nothing is under way if that is not after now. moved: chunks. stretches: of
    uninterrupted carrying, (transfer, begin, end), if they are kept.
    """

    def __init__(self, chunk_s: float, n_chunks: int, keep: bool = False):
        self._chunk_s, self._n_chunks = chunk_s, n_chunks
        self._waiting: list[Transfer] = []
        self._asked = 0
        self.free_s, self.moved = 0.0, 0
        self.stretches: list[tuple[Transfer, float, float]] | None = [] if keep else None

    def ask(self, key: int, due: int, now: float) -> Transfer:
        self.run(now)
        transfer = Transfer(key, due, self._asked, NEEDED if due == NOW else OPEN)
        self._asked += 1
        self._waiting.append(transfer)
        return transfer

    def promote(self, transfer: Transfer, now: float) -> None:
        """A guess has become a need; asked for earlier than other needs, it goes before them."""
        self.run(now)
        transfer.due, transfer.kind = NOW, RIGHT

    def cancel(self, transfer: Transfer, now: float) -> float:
        """No more chunks of it. Returns when its row is free: one that has begun is seen to be cancelled at the end of
        the chunk under way, whosever that is."""
        self.run(now)
        transfer.kind = WRONG
        if transfer.end_s is not None:
            return transfer.end_s
        self._waiting.remove(transfer)
        return self.free_s if transfer.chunks else now

    def run(self, until: float) -> None:
        """Begin whatever begins before this moment, with nothing new coming meanwhile."""
        while self._waiting and self.free_s < until - SLACK * self._chunk_s:
            self._carry(ceil((until - self.free_s) / self._chunk_s - SLACK))
        self.free_s = max(self.free_s, until)

    def land(self, transfer: Transfer) -> float:
        """When a transfer will have ended, with nothing new coming meanwhile."""
        while transfer.end_s is None:
            self._carry(self._n_chunks)
        return transfer.end_s

    def _carry(self, most: int) -> None:
        transfer = min(self._waiting, key=_urgency)
        n, begin = min(most, self._n_chunks - transfer.chunks), self.free_s
        if transfer.chunks == 0:
            transfer.begin_s = begin
        # in this order, an interrupt in between leaves nothing that is carried for ever
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


def _urgency(transfer: Transfer) -> tuple[int, int]:
    return transfer.due, transfer.number
