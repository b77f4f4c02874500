"""Pictures of the cache: hit rates, predictions, reuse.

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
    heat_map,
    layer_rows,
    new_figure,
)
from mixtral_offload.analysis.recall import Recall
from mixtral_offload.analysis.replay import hit_rate_curves, reuse_distances
from mixtral_offload.analysis.replay_setup import BELADY
from mixtral_offload.core.trace import COMPUTED, HIT, MISS, PREFETCHED, RoutingTrace

STYLES = {
    "lru": (BLUE, "o", "LRU"),
    "lfu": (ORANGE, "s", "LFU"),
    "lrfu": (GREEN, "^", "LRFU"),
    BELADY: (BLACK, "D", "Belady's optimum"),
}


def plot_hit_rates(
    trace: RoutingTrace, policies: Sequence[str] = ("lru", "lfu", "lrfu", BELADY), shared: bool = False
) -> tuple[Figure, np.ndarray]:
    """Draw the hit rate against the cache size, averaged, and LRU's by layer (2312.17238, figure 2).

    Args:
        policies: Eviction policies to replay.
        shared: One pool of slots for all layers.

    Returns:
        The figure, and float64 `[policies, sizes, L]`, sizes from the top-k to all experts.
    """
    curves = hit_rate_curves(trace, policies, shared=shared)
    sizes = range(trace.top_k, trace.n_experts + 1)
    title = "Hit rate against cache size" + (", one pool for all layers" if shared else "")
    figure = new_figure(6.4, 4.2, title)
    axes = figure.subplots()
    for number, layer in enumerate(curves.get("lru", np.empty((0, 0))).T):
        label = "LRU, one layer each" if number == 0 else None
        axes.plot(sizes, layer, color="0.75", linewidth=0.8, label=label)
    axes.plot(sizes, np.array(sizes) / trace.n_experts, "--", color="0.4", label="chance")
    for name, curve in curves.items():
        colour, marker, label = STYLES[name]
        axes.plot(sizes, curve.mean(1), marker=marker, color=colour, label=label, markersize=5)
    finish_curves(axes, "experts of each layer in the cache", "hit rate", sizes, legend="lower right")
    return figure, np.stack(list(curves.values()))


def plot_recall(recall: Recall) -> tuple[Figure, np.ndarray]:
    """Draw the recall of predictions against their number (2312.17238, figure 2, right).

    Returns:
        The figure, and float64 `[look-aheads, E + 1]`, averaged over layers.
    """
    average, counts = recall.average(), range(recall.n_experts + 1)
    figure = new_figure(6.4, 4.2, f"Recall of predictions ({recall.n_tokens} tokens)")
    axes = figure.subplots()
    axes.plot(counts, recall.chance(), "--", color="0.4", label="chance")
    styles = zip((BLUE, ORANGE, GREEN, RED, SKY), "os^Dv")
    for curve, layers, (colour, marker) in zip(average, recall.look_aheads, styles):
        axes.plot(counts, curve, color=colour, marker=marker, markersize=5, label=ahead(layers))
    across, up = "experts predicted for each layer", "share of the needed experts among them"
    finish_curves(axes, across, up, counts, legend="lower right")
    return figure, average


def plot_hit_heatmap(trace: RoutingTrace, bins: int = 24) -> tuple[Figure, np.ndarray]:
    """Draw the hit rate by layer and position in the text.

    Returns:
        The figure, and float64 `[L, bins]`, nan where nothing ran.
    """
    bins = min(bins, trace.n_passes)
    column = trace.use_pass * bins // max(trace.n_passes, 1)
    shape = trace.n_layers, bins
    uses, hits = np.zeros(shape), np.zeros(shape)
    np.add.at(uses, (trace.use_layer, column), 1)
    np.add.at(hits, (trace.use_layer, column), trace.use_outcome == HIT)
    rates = np.divide(hits, uses, out=np.full(shape, np.nan), where=uses > 0)
    figure = new_figure(7, 1.6 + 0.26 * trace.n_layers, "Hit rate by layer and position")
    axes = figure.subplots()
    extent = 0, trace.n_passes, trace.n_layers - 0.5, -0.5
    image = heat_map(axes, rates, aspect="auto", extent=extent)
    axes.set_xlabel("pass (the prompt, then one for each token)")
    layer_rows(axes, trace.settings["layers"])
    figure.colorbar(image, label="hit rate")
    return figure, rates


def plot_speculation(trace: RoutingTrace) -> tuple[Figure, np.ndarray]:
    """Draw precision (the share of right predictions) and recall (of predicted misses) by layer.

    Returns:
        The figure, and float64 `[2, L]`.
    """
    count = trace.n_layers
    right = np.bincount(trace.use_layer[trace.use_outcome == PREFETCHED], minlength=count)
    unpredicted = (trace.use_outcome == MISS) | (trace.use_outcome == COMPUTED)
    missed = np.bincount(trace.use_layer[unpredicted], minlength=count)
    wrong = np.bincount(trace.wasted_layer, minlength=count)
    shown = np.stack([right / np.maximum(right + wrong, 1), right / np.maximum(right + missed, 1)])
    figure = new_figure(6.4, 3.6, "Predictions by layer")
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
    """Draw how soon an expert is used again: how many other experts of its layer are used in between.

    Returns:
        The figure, and float64 `[L, E + 1]`, shares of a layer's uses; the last column counts first uses.
    """
    counts = reuse_distances(trace)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = new_figure(6.4, 1.8 + 0.28 * trace.n_layers, "Reuse distance of experts")
    axes = figure.subplots()
    image = heat_map(axes, shares, high=None, aspect="auto")
    axes.set_xticks(range(trace.n_experts + 1), [*range(trace.n_experts), "first\nuse"], fontsize=8)
    axes.set_xlabel("different experts of the layer used in between")
    layer_rows(axes, trace.settings["layers"])
    figure.colorbar(image, label="share of uses")
    return figure, shares
