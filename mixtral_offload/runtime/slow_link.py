"""A link of a stated speed, for experiments: time passes on it as on a real one, which takes nothing from the host.

Knows the link of a replay (`core/link.py`) and the clock on the wall. There is no thread: what has crossed is seen when somebody
looks, and an expert's bytes move, all at once, when it is waited for.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from mixtral_offload.core.copy_order import CHUNKS, NOW
from mixtral_offload.core.link import Link, Transfer
from mixtral_offload.errors import OptionError
from mixtral_offload.runtime.copies import ABANDONED, DONE, Copy
from mixtral_offload.runtime.store import FilePart

#: the last of a wait is spent looking at the clock: a core that has slept computes slower for a millisecond, and the device that
#: a real link serves does not sleep (LOG.md)
SPIN_S = 0.02
#: of one expert: an answer that is stopped ends with its current token, which waits for the copies that it needs
MOST_COPY_S = 10.0


class Moment:
    """Stands in for a CUDA event: what is over at this time.perf_counter()."""

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


class SlowEngine:
    """Copies over a link of `bytes_per_s`, in chunks, the most urgent first. n_bytes: of one expert."""

    def __init__(self, device: torch.device, n_bytes: int, bytes_per_s: float):
        if n_bytes / bytes_per_s > MOST_COPY_S:  # nothing can stop an answer before its token is there
            raise OptionError(
                "impossible link: one expert would take too long", expected=f"{n_bytes / MOST_COPY_S:.0f} bytes/s or more",
                found=f"{bytes_per_s} bytes/s, {n_bytes / bytes_per_s:.0f} s for an expert of {n_bytes} bytes",
            )  # fmt: skip
        self._device, self._chunk_bytes = device, n_bytes // CHUNKS
        self._chunk_s = n_bytes / CHUNKS / bytes_per_s
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        self._link = Link(self._chunk_s, CHUNKS)
        self._transfers: dict[Copy, Transfer] = {}  # of copies neither landed nor cancelled

    def start(self, copy: Copy) -> None:
        if self._closed:
            raise RuntimeError("the copy engine has been closed")
        copy.carrier, copy.asked_s = self, time.perf_counter()
        self._transfers[copy] = self._link.ask(id(copy), copy.due, copy.asked_s)

    def promote(self, copy: Copy) -> None:
        """A guess has become a need."""
        copy.due = NOW
        self._link.promote(self._transfers[copy], time.perf_counter())

    def cancel(self, copy: Copy) -> None:
        """No more of it; returns at once (see `Copy.cancel`)."""
        copy.cancel()
        transfer = self._transfers.pop(copy, None)
        if transfer is not None:
            free_s = self._link.cancel(transfer, time.perf_counter())
            copy.moved_bytes = min(transfer.chunks * self._chunk_bytes, copy.n_bytes)
            copy.began_s, copy.ended_s, copy.event = transfer.begin_s or 0.0, free_s, Moment(free_s)
            copy.state = ABANDONED

    def has_begun(self, copy: Copy) -> bool:
        self._link.run(time.perf_counter())
        return self._transfers[copy].chunks > 0

    def land(self, copy: Copy) -> None:
        """Wait until the copy has crossed the link, and move its bytes."""
        if copy.state == DONE:
            return
        transfer = self._transfers[copy]
        Moment(self._link.land(transfer)).synchronize()
        try:
            for offset, piece in copy.pieces:
                _move(piece, copy.slot[offset : offset + piece.numel()])
        except Exception as error:  # said by whoever waits for it
            copy.finish(error)
            return
        copy.moved_bytes = copy.n_bytes
        copy.finish()
        copy.began_s, copy.ended_s = transfer.begin_s, transfer.end_s
        del self._transfers[copy]

    def slots_were_read(self) -> None:
        """On CUDA, bytes move on the stream that reads them."""

    def after_fork(self) -> None:
        """In a forked child: forget the copies that the parent was waiting for."""
        self._begin()

    def close(self) -> None:
        self._closed = True


def _move(source: Tensor | FilePart, target: Tensor) -> None:
    if isinstance(source, FilePart):
        host = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
        source.read_into(host)
        source = host
    if source is not target:
        target.copy_(source)
