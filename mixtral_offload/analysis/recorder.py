"""Record a RoutingTrace while a model runs.

An observer that only keeps references while the model runs; everything is put into arrays at the end.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import OptionError
from mixtral_offload.runtime.observer import Dropped, Observer, Use
from mixtral_offload.runtime.offload import OffloadedModel
from mixtral_offload.runtime.pass_state import Pass

#: in a trace: the token of a position that was given as an embedding
NO_TOKEN = -1


class _Part(NamedTuple):
    """One pass through one layer's experts.

    Attributes:
        number: Of the pass; 0 where a layer is called outside of one.
        begin, end: Its part of the events.
    """

    number: int
    layer: int
    top_k_index: Tensor
    top_k_weights: Tensor
    began_s: float
    ended_s: float
    begin: int
    end: int


class Recorder(Observer):
    """Made by `record`.

    Args:
        is_exclusive: Refuse other recordings, which would clear the cache meanwhile: only then is a replay
            exact.

    Attributes:
        trace: Set when the recording ends.
    """

    def __init__(self, model: OffloadedModel, is_exclusive: bool = False):
        self._offload, self.is_exclusive = model.offload, is_exclusive
        self._began_s = time.perf_counter()
        self._ids: dict[int, Tensor] = {}  # number of the pass -> its real tokens, in the order of the passes
        self._starts: dict[int, int] = {}  # number of the pass -> entries of `_events` when it began
        self._parts: list[_Part] = []
        self._events: list[Use | Dropped] = []
        self._predictions: list[tuple[int, int, list[int], int]] = []
        self.trace: RoutingTrace | None = None
        self.start()

    def start(self) -> None:
        """Record from the next pass on."""
        offload = self._offload
        with offload.passes.lock, offload.cache.lock:
            offload.observers.add(self)

    def pass_began(self, current: Pass) -> None:
        """Keep the tokens of a pass."""
        ids = torch.full((current.n_tokens,), NO_TOKEN) if current.ids is None else current.ids.reshape(-1)
        self._ids[current.number] = ids if current.real is None else ids[current.real]
        self._starts[current.number] = len(self._events)

    def _number(self) -> int:
        """Of the pass under way in this thread; 0 where a layer is called outside of one."""
        current = self._offload.passes.current
        return 0 if current is None else current.number

    def used(self, use: Use) -> None:
        """Keep a use."""
        self._events.append(use)

    def dropped(self, prediction: Dropped) -> None:
        """Keep a wrong prediction."""
        self._events.append(prediction)

    def routed(self, layer: int, top_k_index: Tensor, top_k_weights: Tensor, began_s: float) -> None:
        """Keep a pass through a layer; the events since the one before are its own."""
        number, now, end = self._number(), time.perf_counter(), len(self._events)
        # events from before the pass began are of a pass that was interrupted
        begin = max(self._parts[-1].end if self._parts else 0, self._starts.get(number, 0))
        weights = top_k_weights.detach()
        self._parts.append(_Part(number, layer, top_k_index, weights, began_s, now, begin, end))

    def predicted(self, layer: int, experts: Sequence[int], distance: int) -> None:
        """Keep predictions."""
        self._predictions.append((self._number(), layer, list(experts), distance))

    @property
    def n_tokens(self) -> int:
        """Tokens of all passes so far."""
        return sum(ids.numel() for ids in tuple(self._ids.values()))

    def last_pass(self) -> list[dict[int, int]]:
        """Return what the last token of the newest complete pass used.

        By layer: expert -> HIT, PREFETCHED, COMPUTED or MISS. Empty before there is such a pass. Safe from
        any thread.
        """
        layers, parts = self._offload.checkpoint.layers, self._parts
        end = next((i for i in range(len(parts), 0, -1) if parts[i - 1].layer == layers[-1]), 0)
        if end < len(layers):
            return []
        uses = []
        for part in parts[end - len(layers) : end]:
            entries = [entry for entry in self._events[part.begin : part.end] if isinstance(entry, Use)]
            outcomes = {entry.expert: entry.outcome for entry in entries}
            uses.append({expert: outcomes[expert] for expert in part.top_k_index[-1].tolist()})
        return uses

    def stop(self) -> None:
        """Record no more."""
        offload = self._offload
        with offload.passes.lock, offload.cache.lock:
            offload.observers.remove(self)

    def finish(self, tokenizer: PreTrainedTokenizerBase | None = None) -> RoutingTrace:
        """Make the trace of the passes that ran to their end; warn if a replay of it is not exact.

        Args:
            tokenizer: To keep the tokens' text.
        """
        number = {layer: i for i, layer in enumerate(self._offload.checkpoint.layers)}
        ran: dict[int, list[int]] = {}
        for part in self._parts:
            ran.setdefault(part.number, []).append(part.layer)
        whole = [pass_ for pass_, layers in ran.items() if layers == [*number] and pass_ in self._ids]
        passes = {old: new for new, old in enumerate(whole)}
        interrupted = len(self._ids) - len(passes)
        self._warn_if_inexact(passes, interrupted)
        ids = [self._ids[old].cpu().numpy() for old in passes]
        tokens = np.concatenate(ids) if ids else np.zeros(0, np.int64)
        return RoutingTrace(
            tokens=tokens.astype(np.int64),
            passes=np.repeat(np.arange(len(ids)), [len(of) for of in ids]).astype(np.int32),
            **self._routing_arrays(passes, number),
            **self._event_arrays(passes, number),
            **self._prediction_arrays(passes, number),
            settings=self._offload.settings() | {"interrupted_passes": interrupted},
            counters=asdict(self._offload.stats),
            pieces=[_piece(tokenizer, token) for token in tokens.tolist()] if tokenizer else [],
        )

    def _routing_arrays(self, passes: dict[int, int], number: dict[int, int]) -> dict[str, Any]:
        """Experts, weights and spans of the trace. passes: those to keep."""
        by_layer = [
            [part for part in self._parts if part.layer == layer and part.number in passes]
            for layer in number
        ]
        none = np.zeros((0, self._offload.checkpoint.top_k))
        experts = [
            np.concatenate([part.top_k_index.cpu().numpy() for part in of] or [none]) for of in by_layer
        ]
        weights = [
            np.concatenate([part.top_k_weights.float().cpu().numpy() for part in of] or [none])
            for of in by_layer
        ]
        spans = np.array([[(part.began_s, part.ended_s) for part in of] for of in by_layer])
        return {
            "experts": np.stack(experts, 1).astype(np.int16),
            "weights": np.stack(weights, 1).astype(np.float32),
            "spans": spans.reshape(len(number), len(passes), 2).transpose(1, 0, 2) - self._began_s,
        }

    def _warn_if_inexact(self, passes: dict[int, int], interrupted: int) -> None:
        """Warn of what a replay of the trace does not know. passes: those that are in it."""
        kept = [part for part in self._parts if part.number in passes]
        n_uses = sum(isinstance(entry, Use) for entry in self._events)
        n_kept = sum(isinstance(entry, Use) for part in kept for entry in self._events[part.begin : part.end])
        changes = sum(a.number != b.number for a, b in pairwise(kept))
        if interrupted:
            what = (
                f"{interrupted} of {len(self._ids)} passes did not run to their end, "
                "through every layer once: they are not in the trace"
            )
        elif n_kept < n_uses:
            what = (
                f"{n_uses - n_kept} of {n_uses} uses of experts were outside of passes of the whole model: "
                "they are not in the trace"
            )
        elif changes >= max(len(passes), 1):
            what = "a pass ran inside of another one: the trace has one after the other"
        else:
            return
        warnings.warn(f"{what}, and its replay does not know what they did to the cache", stacklevel=5)

    def _event_arrays(self, passes: dict[int, int], number: dict[int, int]) -> dict[str, np.ndarray]:
        """The columns use_* and wasted_* of the trace. passes: those to keep -> their number in the trace."""
        used: list[tuple[float, ...]] = []
        wasted: list[tuple[float, ...]] = []
        for part in self._parts:
            for entry in self._events[part.begin : part.end] if part.number in passes else ():
                copy, which = entry.copy, (number[entry.layer], entry.expert)
                times = (np.nan, np.nan) if copy is None or not copy.began_s else (copy.began_s, copy.ended_s)
                row = passes[part.number], copy.moved_bytes if copy else 0, *times
                if isinstance(entry, Use):
                    used.append((*which, entry.outcome, entry.wait_s, entry.at_s, *row))
                else:
                    wasted.append((*which, *row))
        return _columns("use", used, self._began_s) | _columns("wasted", wasted, self._began_s)

    def _prediction_arrays(self, passes: dict[int, int], number: dict[int, int]) -> dict[str, np.ndarray]:
        """The columns predicted_* of the trace. passes: those to keep -> their number in the trace."""
        rows = [
            (passes[in_pass], number[layer] - distance, number[layer], expert, rank)
            for in_pass, layer, experts, distance in self._predictions
            if in_pass in passes
            for rank, expert in enumerate(experts)
        ]
        columns = np.array(rows, np.int32).reshape(-1, 5).T
        names = ("pass", "from", "layer", "expert", "rank")
        return {f"predicted_{name}": column for name, column in zip(names, columns)}


def _piece(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return "" if token == NO_TOKEN else str(tokenizer.decode([token]))


def _columns(kind: str, rows: list[tuple[float, ...]], began_s: float) -> dict[str, np.ndarray]:
    names = ["layer", "expert", "outcome", "wait_s", "at_s", "pass", "bytes"]
    names = names if kind == "use" else ["layer", "expert", "pass", "bytes"]
    types: dict[str, type] = {
        "outcome": np.uint8,
        "wait_s": np.float64,
        "at_s": np.float64,
        "bytes": np.int64,
    }
    columns = list(zip(*rows)) if rows else [()] * (len(names) + 2)
    found: dict[str, np.ndarray] = {
        f"{kind}_{name}": np.array(column, types.get(name, np.int32)) for name, column in zip(names, columns)
    }
    if kind == "use":
        found["use_at_s"] -= began_s
    return found | {f"{kind}_copy_s": np.array(columns[-2:], np.float64).T.reshape(-1, 2) - began_s}


@contextmanager
def record(model: OffloadedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Recorder]:
    """Record what `model` routes:

        with record(model, tokenizer) as recording:
            model.generate(...)
        recording.trace.save("trace.safetensors")

    The cache begins empty and its counters at zero, so that a replay of the trace is exact. Batches are
    recorded as one stream of tokens, and so are the passes of several threads, which take turns. A pass that
    began with embeddings has the token NO_TOKEN.

    Args:
        tokenizer: To keep the tokens' text.

    Raises:
        OptionError: The model is being recorded already; a second recording would clear the cache under the
            first one.
    """
    offload = model.offload
    with offload.passes.lock, offload.cache.lock:
        if offload.observers.is_exclusive:
            raise OptionError(
                "this model is being recorded already",
                found="record() inside another record() of the same model",
                hint="end the first recording, or record both parts in one",
            )
        offload.cache.clear()
        offload.stats.reset()
        recorder = Recorder(model, is_exclusive=True)
    try:
        yield recorder
    finally:
        recorder.stop()
        with offload.cache.lock:
            offload.cache.end_dropped()  # what they moved is in the trace and in the counters
        recorder.trace = recorder.finish(tokenizer)
