"""Pictures of the cache and the link: hit rates, speculation, reuse, and where one token's time goes.

Knows traces, replays and matplotlib. Each function returns (figure, the array it shows).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from mixtral_offload.analysis.plots.routing import BLACK, BLUE, GREEN, ORANGE, RED, SKY, new_figure
from mixtral_offload.analysis.recall import Recall
from mixtral_offload.analysis.replay import hit_rate_curves, reuse_distances
from mixtral_offload.analysis.replay_setup import BELADY
from mixtral_offload.core.trace import HIT, MISS, PREFETCHED, RoutingTrace
from mixtral_offload.errors import OptionError

STYLES = {
    "lru": (BLUE, "o", "LRU"),
    "lfu": (ORANGE, "s", "LFU"),
    "lrfu": (GREEN, "^", "LRFU"),
    BELADY: (BLACK, "D", "Belady's optimum"),
}


def plot_hit_rates(
    trace: RoutingTrace, policies: Sequence[str] = ("lru", "lfu", "lrfu", BELADY), shared: bool = False
) -> tuple[Figure, np.ndarray]:
    """Hit rate against cache size, on average and (thin) LRU's by layer (2312.17238, figure 2, left).

    Array: float64 [policies, sizes, L], sizes from the top-k to all experts.
    """
    curves = hit_rate_curves(trace, policies, shared=shared)
    sizes = np.arange(trace.top_k, trace.n_experts + 1)
    figure = new_figure(
        6.4, 4.2, "Hit rate against cache size" + (", one pool for all layers" if shared else "")
    )
    axes = figure.subplots()
    for number, layer in enumerate(curves.get("lru", np.empty((0, 0))).T):
        axes.plot(
            sizes, layer, color="0.75", linewidth=0.8, label="LRU, one layer each" if number == 0 else None
        )
    axes.plot(sizes, sizes / trace.n_experts, "--", color="0.4", label="chance")
    for name, curve in curves.items():
        colour, marker, label = STYLES[name]
        axes.plot(sizes, curve.mean(1), marker=marker, color=colour, label=label, markersize=5)
    axes.set_xlabel("experts of each layer in the cache")
    axes.set_ylabel("hit rate")
    axes.set_xticks(sizes)
    axes.set_ylim(0, 1.02)
    axes.grid(color="0.9")
    axes.legend(fontsize=8, loc="lower right")
    return figure, np.stack(list(curves.values()))


def plot_recall(recall: Recall) -> tuple[Figure, np.ndarray]:
    """Recall of speculative loading against the number of experts fetched ahead (2312.17238, figure 2, right).

    Array: float64 [look-aheads, E + 1], averaged over layers.
    """
    average, guesses = recall.average(), np.arange(recall.n_experts + 1)
    figure = new_figure(6.4, 4.2, f"Recall of speculative loading ({recall.n_tokens} tokens)")
    axes = figure.subplots()
    axes.plot(guesses, recall.chance(), "--", color="0.4", label="chance")
    for curve, ahead, colour, marker in zip(
        average, recall.look_aheads, (BLUE, ORANGE, GREEN, RED, SKY), "os^Dv"
    ):
        label = f"{ahead} layer{'s' if ahead > 1 else ''} ahead"
        axes.plot(guesses, curve, color=colour, marker=marker, markersize=5, label=label)
    axes.set_xlabel("experts fetched ahead for each layer")
    axes.set_ylabel("share of the needed experts among them")
    axes.set_xticks(guesses)
    axes.set_ylim(0, 1.02)
    axes.grid(color="0.9")
    axes.legend(fontsize=8, loc="lower right")
    return figure, average


def plot_hit_heatmap(trace: RoutingTrace, bins: int = 24) -> tuple[Figure, np.ndarray]:
    """Hit rate by layer and position in the text. Array: float64 [L, bins], nan where nothing ran."""
    bins = min(bins, trace.n_passes)
    column = trace.use_pass * bins // max(trace.n_passes, 1)
    shape = trace.n_layers, bins
    uses, hits = np.zeros(shape), np.zeros(shape)
    np.add.at(uses, (trace.use_layer, column), 1)
    np.add.at(hits, (trace.use_layer, column), trace.use_outcome == HIT)
    rates = np.divide(hits, uses, out=np.full(shape, np.nan), where=uses > 0)
    figure = new_figure(7, 1.6 + 0.26 * trace.n_layers, "Hit rate by layer and position")
    axes = figure.subplots()
    image = axes.imshow(
        rates,
        cmap="cividis",
        vmin=0,
        vmax=1,
        aspect="auto",
        extent=(0, trace.n_passes, trace.n_layers - 0.5, -0.5),
    )
    axes.set_xlabel("pass (the prompt, then one for each token)")
    axes.set_ylabel("layer")
    axes.set_yticks(range(trace.n_layers), trace.settings["layers"], fontsize=8)
    figure.colorbar(image, label="hit rate")
    return figure, rates


def plot_speculation(trace: RoutingTrace) -> tuple[Figure, np.ndarray]:
    """Precision (guesses that came true) and recall (misses that a guess had foreseen) by layer. Array: [2, L]."""
    count = trace.n_layers
    right = np.bincount(trace.use_layer[trace.use_outcome == PREFETCHED], minlength=count)
    missed = np.bincount(trace.use_layer[trace.use_outcome == MISS], minlength=count)
    wrong = np.bincount(trace.wrong_layer, minlength=count)
    shown = np.stack([right / np.maximum(right + wrong, 1), right / np.maximum(right + missed, 1)])
    figure = new_figure(6.4, 3.6, "Speculative loading by layer")
    axes = figure.subplots()
    for row, (label, colour, hatch) in enumerate((("precision", SKY, ""), ("recall", BLUE, "//"))):
        place = np.arange(count) + 0.4 * row - 0.2
        axes.bar(place, shown[row], 0.38, label=label, color=colour, hatch=hatch, edgecolor="white")
    axes.set_xlabel("layer")
    axes.set_ylabel("share")
    axes.set_xticks(range(count), trace.settings["layers"])
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8)
    return figure, shown


def plot_reuse(trace: RoutingTrace) -> tuple[Figure, np.ndarray]:
    """How soon an expert is used again: how many other experts of its layer came in between.

    Array: float64 [L, E + 1], shares of a layer's uses; the last column counts first uses.
    """
    counts = reuse_distances(trace)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = new_figure(6.4, 1.8 + 0.28 * trace.n_layers, "Reuse distance of experts")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="cividis", vmin=0, aspect="auto")
    axes.set_xticks(range(trace.n_experts + 1), [*range(trace.n_experts), "first\nuse"], fontsize=8)
    axes.set_xlabel("different experts of the layer used in between")
    axes.set_yticks(range(trace.n_layers), trace.settings["layers"], fontsize=8)
    axes.set_ylabel("layer")
    figure.colorbar(image, label="share of uses")
    return figure, shares


def plot_timeline(trace: RoutingTrace, number: int | None = None) -> tuple[Figure, np.ndarray]:
    """Where the time of one pass (one token's generation) goes: compute, copies, stalls, on one clock.

    number: of the pass; default: the one of median length after the prompt. Times are the host's; on CUDA, kernels
    run behind them. Array: float64 [bars, 3] of (row, begin ms, length ms); rows in the order of the legend.
    """
    if trace.n_passes < 2:
        raise OptionError("a timeline needs at least two passes", found=trace.n_passes)
    if number is None:
        lengths = trace.spans[1:, -1, 1] - trace.spans[:-1, -1, 1]
        number = int(np.argsort(lengths)[len(lengths) // 2]) + 1
    begin, end = trace.spans[number - 1, -1, 1], trace.spans[number, -1, 1]
    bars = np.array(_bars(trace, number, begin, end)).reshape(-1, 3)
    bars[:, 1:] = np.stack([bars[:, 1] - begin, bars[:, 2] - bars[:, 1]], 1) * 1e3
    rows = [("attention, norms, router", "0.75"), ("experts", BLUE), ("stall: waiting for a copy", RED), ("copy on demand", ORANGE),
            ("guess, came true", GREEN), ("guess, wasted", "0.35")]  # fmt: skip
    figure = new_figure(9, 3.2, f"One token's generation (pass {number}, {1e3 * (end - begin):.1f} ms)")
    axes = figure.subplots()
    for row, (_, colour) in enumerate(rows):
        spans = [(start, length) for at, start, length in bars if at == row]
        axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.3)
    for layer, (start, _) in enumerate(trace.spans[number]):
        axes.axvline(1e3 * (start - begin), color="0.85", linewidth=0.6, zorder=0)
        axes.text(1e3 * (start - begin), -0.75, str(trace.settings["layers"][layer]), fontsize=7, ha="center")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -1)
    axes.set_xlim(0, 1e3 * (end - begin))
    axes.set_xlabel("ms (numbers above: where a layer's experts begin)")
    return figure, bars


def _bars(trace: RoutingTrace, number: int, begin: float, end: float) -> list[tuple[int, float, float]]:
    """(row, begin, end) in seconds of everything that happened between two moments."""
    bars = []
    last = begin
    for layer, (start, stop) in enumerate(trace.spans[number]):
        bars.append((0, last, start))
        uses = (trace.use_pass == number) & (trace.use_layer == layer)
        ready, waits = trace.use_at_s[uses], trace.use_wait_s[uses]
        ends = np.append((ready - waits)[1:], stop)
        bars += [(1, a, b) for a, b in zip(ready, ends)]
        bars += [(2, at - wait, at) for at, wait in zip(ready, waits) if wait > 0]
        last = stop
    kinds = [
        (3, trace.use_copy_s[trace.use_outcome == MISS]),
        (4, trace.use_copy_s[trace.use_outcome == PREFETCHED]),
        (5, trace.wrong_copy_s),
    ]
    for row, copies in kinds:
        for start, stop in copies:
            if stop > begin and start < end:
                bars.append((row, max(start, begin), min(stop, end)))
    return bars
