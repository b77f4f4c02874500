"""Pictures of a replay with a clock: time per token over the cache's size, and one token on the device and the link.

Knows traces, what came of playing them, and matplotlib. Each function returns (figure, the array it shows).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mixtral_offload.analysis.plots.routing import BLACK, BLUE, GREEN, ORANGE, RED, SKY, new_figure
from mixtral_offload.analysis.timed_replay import (
    ATTENTION,
    EXPERT,
    OUTSIDE,
    PARTS,
    Events,
    TimedReplay,
    timed_replay,
)
from mixtral_offload.core.copy_order import KINDS, NEEDED, RIGHT, WRONG
from mixtral_offload.core.costs import DeviceCosts
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import OptionError

LINES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (RED, "v"), (SKY, "P"), (BLACK, "X"))
STALL = len(PARTS)
DEVICE, LINK = range(2)
COLOURS = {DEVICE: {OUTSIDE: "0.55", ATTENTION: "0.82", EXPERT: BLUE, STALL: RED},
           LINK: {NEEDED: ORANGE, RIGHT: GREEN, WRONG: "0.35"}}  # fmt: skip
NAMES = {DEVICE: (*PARTS, "stall: waiting for a copy"), LINK: KINDS}


def plot_time_over_slots(
    trace: RoutingTrace, costs: DeviceCosts, cache_sizes: Sequence[int] | None = None,
    look_aheads: Sequence[int] = (0, 1, 2, 3), prefetch: int = 2, unit: str = "s",
) -> tuple[Figure, np.ndarray]:  # fmt: skip
    """Time per token against the experts of each layer in the cache: a line for each look-ahead (0: no guesses), and
    the floor that no guesses can beat.

    cache_sizes: default from the top-k to all. prefetch: experts guessed per layer, by the trace's own guesses. unit:
    the card's. Array: float64 [look-aheads + 1, sizes], the last row the floor. Raises OptionError as `play` does, and
    for a trace without a pass of one token.
    """
    sizes = range(trace.top_k, trace.n_experts + 1) if cache_sizes is None else cache_sizes
    shown = np.empty((len(look_aheads) + 1, len(sizes)))
    for column, size in enumerate(sizes):
        for row, ahead in enumerate(look_aheads):
            guesses = {"prefetch": prefetch, "look_ahead": ahead} if ahead else {}
            shown[row, column] = timed_replay(trace, costs, cache_size=size, **guesses).time_per_token
        shown[-1, column] = timed_replay(trace, costs, cache_size=size).floor_s
    if np.isnan(shown).any():
        raise OptionError("no pass of this trace is one token's", hint="record more than the prompt")
    figure = new_figure(6.8, 4.4, f"Time per token, {prefetch} guesses per layer, played from a trace")
    axes = figure.subplots()
    for number, (times, ahead) in enumerate(zip(shown, look_aheads)):
        colour, marker = LINES[number % len(LINES)]
        label = f"{ahead} layer{'s' if ahead > 1 else ''} ahead" if ahead else "without guesses"
        axes.plot(sizes, times, color=colour, marker=marker, markersize=5, label=label)
    axes.plot(sizes, shown[-1], "--", color="0.4", label="floor: link or compute alone")
    axes.set_xlabel("experts of each layer in the cache")
    axes.set_ylabel(f"time per token ({unit})")
    axes.set_xticks(sizes)
    axes.set_ylim(0, 1.05 * shown.max())
    axes.grid(color="0.9")
    axes.legend(fontsize=8)
    return figure, shown


def plot_timeline(
    played: TimedReplay, pass_number: int | None = None, unit: str = "s"
) -> tuple[Figure, np.ndarray]:
    """What the device and the link do during one pass; copies are labelled with their expert.

    played: with its events. pass_number: default the decoding pass of median length. unit: the card's. Array: float64
    [bars, 4] of (lane, kind, begin, length) from the pass's begin; lane DEVICE, with the parts of `Events` and STALL,
    or LINK, with its kinds. Raises OptionError where there are no events, or no such pass.
    """
    if played.events is None:
        raise OptionError("there are no events to draw", hint="timed_replay(..., keep_events=True)")
    n_passes = len(played.pass_s)
    if pass_number is None and n_passes:
        which = np.flatnonzero(played.decoding) if played.decoding.any() else np.arange(n_passes)
        pass_number = int(which[np.argsort(played.pass_s[which])[len(which) // 2]])
    if pass_number is None or not 0 <= pass_number < n_passes:
        raise OptionError("no such pass", expected=f"0 to {n_passes - 1}", found=pass_number)
    begin, end = played.begins_s[pass_number : pass_number + 2]
    bars, labels, layers = _bars(played.events, begin, end)
    title = f"Pass {pass_number}: {end - begin:.4g} {unit}, of which {played.stall_s[pass_number].sum():.3g} stalled"
    figure = new_figure(10, 2.9, title)
    axes = figure.subplots()
    for (lane, kind, start, length), label in zip(bars, labels):
        axes.broken_barh([(start, length)], (lane - 0.35, 0.7), facecolors=COLOURS[lane][kind], edgecolor="white",
                         linewidth=0.4)  # fmt: skip
        if label and length > 0.012 * (end - begin):
            axes.text(start + length / 2, lane, label, fontsize=7, ha="center", va="center", color="white")
    for start, layer in layers:
        axes.axvline(start, color="0.8", linewidth=0.6, zorder=0)
        axes.text(start, -0.55, str(layer), fontsize=7, ha="left")
    axes.set_yticks((DEVICE, LINK), ("device", "link"))
    axes.set_ylim(1.5, -0.75)
    axes.set_xlim(0, end - begin)
    axes.set_xlabel(
        f"{unit} from the pass's begin (above: where a layer begins; on the link: the expert copied)"
    )
    _add_legend(figure, bars)
    return figure, bars


def _bars(events: Events, begin: float, end: float) -> tuple[np.ndarray, list[str], list[tuple[float, int]]]:
    """(bars [., 4] as `plot_timeline` returns them, a label for each, (begin, number) of each layer)."""
    bars, labels, layers, last = [], [], [], begin
    tiny = 1e-9 * (end - begin)
    for kind, layer, (start, stop) in zip(events.part_kind, events.part_layer, events.part_span_s):
        if start < begin - tiny or stop > end + tiny:
            continue
        if start > last + tiny:
            bars.append((DEVICE, STALL, last - begin, start - last))
            labels.append("")
        if kind == ATTENTION:
            layers.append((start - begin, int(layer)))
        if stop > start:
            bars.append((DEVICE, kind, start - begin, stop - start))
            labels.append("")
        last = stop
    for kind, expert, (start, stop) in zip(events.copy_kind, events.copy_expert, events.copy_span_s):
        start, stop = max(start, begin), min(stop, end)
        if stop > start + tiny:
            bars.append((LINK, kind, start - begin, stop - start))
            labels.append(str(expert))
    return np.array(bars, float).reshape(-1, 4), labels, layers


def _add_legend(figure: Figure, bars: np.ndarray) -> None:
    """Of the kinds that are there."""
    present = set(map(tuple, bars[:, :2].astype(int).tolist()))
    handles = [
        Patch(facecolor=colour, label=NAMES[lane][kind])
        for lane, of_lane in COLOURS.items()
        for kind, colour in of_lane.items()
        if (lane, kind) in present
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=7)
