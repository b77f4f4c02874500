"""Pictures of time: that of one token, recorded or replayed, and time per token against the cache size.

Each function returns (figure, the array it shows).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from mixtral_offload.analysis.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    RED,
    SKY,
    ahead,
    finish_curves,
    legend_below,
    mark_layers,
    new_figure,
    patches,
    spans,
)
from mixtral_offload.analysis.timed_replay import (
    ATTENTION,
    EXPERT,
    ON_CPU,
    OUTSIDE,
    PARTS,
    Events,
    TimedReplay,
    timed_replay,
)
from mixtral_offload.core.copy_order import KINDS, NEEDED, RIGHT, WRONG
from mixtral_offload.core.costs import DeviceCosts
from mixtral_offload.core.trace import COMPUTED, MISS, PREFETCHED, RoutingTrace
from mixtral_offload.errors import OptionError

LINES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (RED, "v"), (SKY, "P"), (BLACK, "X"))
STALL = len(PARTS)
DEVICE, LINK, PROCESSOR = range(3)
COLOURS = {
    DEVICE: {OUTSIDE: "0.55", ATTENTION: "0.82", EXPERT: BLUE, STALL: RED},
    LINK: {NEEDED: ORANGE, RIGHT: GREEN, WRONG: "0.35"},
    PROCESSOR: {ON_CPU: SKY},
}
RECORDED_ROWS = {
    "attention, norms, router": "0.75",
    "experts": BLUE,
    "stall: waiting for a copy": RED,
    "copy on demand": ORANGE,
    "right prediction": GREEN,
    "wasted prediction": "0.35",
    "experts on the CPU": SKY,
}
ON_CPU_ROW = len(RECORDED_ROWS) - 1  # drawn if the CPU computed something
NAMES = {DEVICE: (*PARTS, "stall: waiting"), LINK: KINDS, PROCESSOR: PARTS}


def plot_time_over_slots(
    trace: RoutingTrace,
    costs: DeviceCosts,
    cache_sizes: Sequence[int] | None = None,
    look_aheads: Sequence[int] = (0, 1, 2, 3),
    prefetch: int = 2,
    unit: str = "s",
) -> tuple[Figure, np.ndarray]:
    """Draw time per token against the cache size: a line for each look-ahead, and the floor of all.

    Args:
        cache_sizes: Experts of each layer in the cache. Default: from the top-k to all.
        look_aheads: Layers to predict ahead; 0: no predictions.
        prefetch: Experts predicted per layer, by the trace's own predictions.
        unit: The costs' unit of time.

    Returns:
        The figure, and float64 `[look-aheads + 1, sizes]`, the last row the floor.

    Raises:
        OptionError: As `timed_replay` raises it, and for a trace without a pass of one token.
    """
    sizes = range(trace.top_k, trace.n_experts + 1) if cache_sizes is None else cache_sizes
    shown = np.empty((len(look_aheads) + 1, len(sizes)))
    for column, size in enumerate(sizes):
        for row, layers in enumerate(look_aheads):
            n = prefetch if layers else 0
            timed = timed_replay(trace, costs, cache_size=size, prefetch=n, look_ahead=max(layers, 1))
            shown[row, column] = timed.time_per_token
        shown[-1, column] = timed_replay(trace, costs, cache_size=size).floor_s
    if np.isnan(shown).any():
        raise OptionError("no pass of this trace is one token's", hint="record more than the prompt")
    figure = new_figure(6.8, 4.4, f"Time per token, {prefetch} predictions per layer, replayed from a trace")
    axes = figure.subplots()
    for number, (times, layers) in enumerate(zip(shown, look_aheads)):
        colour, marker = LINES[number % len(LINES)]
        label = ahead(layers) if layers else "without predictions"
        axes.plot(sizes, times, color=colour, marker=marker, markersize=5, label=label)
    axes.plot(sizes, shown[-1], "--", color="0.4", label="floor: link or compute alone")
    up = f"time per token ({unit})"
    finish_curves(axes, "experts of each layer in the cache", up, sizes, 1.05 * shown.max())
    return figure, shown


def plot_replayed_pass(
    timed: TimedReplay, pass_number: int | None = None, unit: str = "s"
) -> tuple[Figure, np.ndarray]:
    """Draw what the device, the link and (if it computes experts) the CPU do during one pass.

    Copies, and experts on the CPU, are labelled with their number.

    Args:
        timed: With its events.
        pass_number: Default: the decoding pass of median length.
        unit: The costs' unit of time.

    Returns:
        The figure, and float64 `[bars, 4]` of (lane, kind, begin, length) from the pass's begin; lane DEVICE
        with the parts of `Events` and STALL, LINK with its kinds, or PROCESSOR with ON_CPU.

    Raises:
        OptionError: There are no events, or no such pass.
    """
    if timed.events is None:
        raise OptionError("there are no events to draw", hint="timed_replay(..., keep_events=True)")
    n_passes = len(timed.pass_s)
    if pass_number is None and n_passes:
        which = np.flatnonzero(timed.decoding) if timed.decoding.any() else np.arange(n_passes)
        pass_number = int(which[np.argsort(timed.pass_s[which])[len(which) // 2]])
    if pass_number is None or not 0 <= pass_number < n_passes:
        raise OptionError("no such pass", expected=f"0 to {n_passes - 1}", found=pass_number)
    begin, end = timed.begins_s[pass_number : pass_number + 2]
    bars, labels, layers = _replayed_bars(timed.events, begin, end)
    stall = timed.stall_s[pass_number].sum()
    title = f"Pass {pass_number}: {end - begin:.4g} {unit}, of which {stall:.3g} stalled"
    lanes = ("device", "link", "CPU")[: 3 if (bars[:, 0] == PROCESSOR).any() else 2]
    figure = new_figure(10, 1.7 + 0.6 * len(lanes), title)
    axes = figure.subplots()
    for (lane, kind, start, length), label in zip(bars, labels):
        spans(axes, lane, 0.7, [(start, length)], COLOURS[lane][kind], 0.4)
        if label and length > 0.012 * (end - begin):
            axes.text(start + length / 2, lane, label, fontsize=7, ha="center", va="center", color="white")
    mark_layers(axes, layers, -0.55, "0.8", "left")
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_ylim(len(lanes) - 0.5, -0.75)
    axes.set_xlim(0, end - begin)
    axes.set_xlabel(
        f"{unit} from the pass's begin (above: where a layer begins; on the link: the expert copied)"
    )
    _add_legend(figure, bars)
    return figure, bars


def _replayed_bars(
    events: Events, begin: float, end: float
) -> tuple[np.ndarray, list[str], list[tuple[float, int]]]:
    """(bars as `plot_replayed_pass` returns them, a label for each, (begin, number) of each layer)."""
    bars: list[tuple[float, float, float, float]] = []
    labels: list[str] = []
    layers: list[tuple[float, int]] = []
    last = begin
    tiny = 1e-9 * (end - begin)
    parts = zip(events.part_kind, events.part_layer, events.part_expert, events.part_span_s)
    for kind, layer, expert, (start, stop) in parts:
        if start < begin - tiny or stop > end + tiny:
            continue
        if kind == ON_CPU:
            bars.append((PROCESSOR, kind, start - begin, stop - start))
            labels.append(str(expert))
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
    """Name the kinds of bars that are there."""
    present = set(map(tuple, bars[:, :2].astype(int).tolist()))
    kinds = [(lane, kind) for lane, of_lane in COLOURS.items() for kind in of_lane if (lane, kind) in present]
    handles = patches({NAMES[lane][kind]: COLOURS[lane][kind] for lane, kind in kinds})
    legend_below(figure, handles, len(handles), 7)


def plot_recorded_pass(trace: RoutingTrace, number: int | None = None) -> tuple[Figure, np.ndarray]:
    """Draw where the time of one pass (one token's generation) goes: compute, copies, stalls, on one clock.

    Times are the host's; on CUDA, kernels run behind them.

    Args:
        number: Of the pass. Default: the one of median length after the prompt.

    Returns:
        The figure, and float64 `[bars, 3]` of (row, begin ms, length ms); rows in the order of RECORDED_ROWS.

    Raises:
        OptionError: The trace has only one pass.
    """
    if trace.n_passes < 2:
        raise OptionError("a timeline needs at least two passes", found=trace.n_passes)
    if number is None:
        lengths = trace.spans[1:, -1, 1] - trace.spans[:-1, -1, 1]
        number = int(np.argsort(lengths)[len(lengths) // 2]) + 1
    begin, end = trace.spans[number - 1, -1, 1], trace.spans[number, -1, 1]
    bars = np.array(_recorded_bars(trace, number, begin, end)).reshape(-1, 3)
    bars[:, 1:] = np.stack([bars[:, 1] - begin, bars[:, 2] - bars[:, 1]], 1) * 1e3
    figure = new_figure(9, 3.2, f"One token's generation (pass {number}, {1e3 * (end - begin):.1f} ms)")
    axes = figure.subplots()
    rows = [*RECORDED_ROWS][: None if (bars[:, 0] == ON_CPU_ROW).any() else ON_CPU_ROW]
    for row, colour in enumerate(RECORDED_ROWS[name] for name in rows):
        spans(axes, row, 0.8, [(start, length) for at, start, length in bars if at == row], colour, 0.3)
    begins = 1e3 * (trace.spans[number, :, 0] - begin)
    mark_layers(axes, zip(begins, trace.settings["layers"]), -0.75, "0.85", "center")
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -1)
    axes.set_xlim(0, 1e3 * (end - begin))
    axes.set_xlabel("ms (numbers above: where a layer's experts begin)")
    return figure, bars


def _recorded_bars(
    trace: RoutingTrace, number: int, begin: float, end: float
) -> list[tuple[int, float, float]]:
    """(row, begin, end) in seconds of everything that happened between two moments."""
    bars: list[tuple[int, float, float]] = []
    last = begin
    for layer, (start, stop) in enumerate(trace.spans[number]):
        bars.append((0, last, start))
        uses = (trace.use_pass == number) & (trace.use_layer == layer)
        ready, waits = trace.use_at_s[uses], trace.use_wait_s[uses]
        ends = np.append((ready - waits)[1:], stop)
        computed = trace.use_outcome[uses] == COMPUTED
        bars += [(ON_CPU_ROW if on_cpu else 1, a, b) for a, b, on_cpu in zip(ready, ends, computed)]
        bars += [(2, at - wait, at) for at, wait in zip(ready, waits) if wait > 0]
        last = stop
    kinds = [
        (3, trace.use_copy_s[trace.use_outcome == MISS]),
        (4, trace.use_copy_s[trace.use_outcome == PREFETCHED]),
        (5, trace.wasted_copy_s),
    ]
    for row, copies in kinds:
        for start, stop in copies:
            if stop > begin and start < end:
                bars.append((row, max(start, begin), min(stop, end)))
    return bars
