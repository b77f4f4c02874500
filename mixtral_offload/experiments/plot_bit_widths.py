"""The picture of quality against size, beside the paper's table 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mixtral_offload.analysis.plots.quantization import set_labels
from mixtral_offload.analysis.plots.routing import BLACK, BLUE, GREEN, ORANGE, RED, new_figure
from mixtral_offload.experiments.bit_widths import PAPER_TABLE_1

#: attention bits -> colour, marker, colour of a text on it
SERIES = {16: (BLACK, "o", "white"), 8: (RED, "H", "white"), 4: (BLUE, "s", "white"), 3: (GREEN, "p", "white"),
          2: (ORANGE, "D", "black")}  # fmt: skip


def plot_quality(rows: Sequence[dict]) -> tuple[Figure, np.ndarray]:
    """What each width costs: KL divergence from the unquantized model against size, beside the paper's Mixtral-8x7B.

    rows: of `compare_widths`. A line joins widths with the same attention; right, numbers are the experts' bits.
    Array: float64 [rows, 2] of bytes on disk and nats per token.
    """
    points = np.array([(row["disk_bytes"], row["kl"]) for row in rows], float)
    unit, name = (1e9, "GB") if points[:, 0].max() >= 1e9 else (1e6, "MB")
    found = points[:, 1][points[:, 1] > 0]
    floor = found.min() / 3 if len(found) else 1e-6  # nothing lost has no place on a logarithmic axis
    shown = [*zip(points[:, 0] / unit, np.maximum(points[:, 1], floor))]
    own = [(row["attention_bits"], row["name"], *point) for row, point in zip(rows, shown)]
    paper = [(row.attention_bits, str(row.expert_bits), row.gb, row.wikitext2) for row in PAPER_TABLE_1]
    figure = new_figure(11, 5.4, "What quantization saves, and what it costs")
    left, right = figure.subplots(1, 2)
    _draw_widths(left, own)
    left.set_yscale("log")
    if len(found) < len(points):
        left.axhline(floor, color="0.6", linewidth=0.8, linestyle=":")
        left.text(0.01, floor, "no difference", transform=left.get_yaxis_transform(), fontsize=7, va="bottom")
    set_labels(left, "this model", f"weights on disk, {name}", "KL divergence from 16 bits, nats per token")
    _draw_widths(right, paper)
    set_labels(right, "Mixtral-8x7B (2312.17238, table 1)", "size, GB", "perplexity on WikiText2")
    return figure, points


def _draw_widths(axes, points: list[tuple[int, str, float, float]]) -> None:
    """points: attention bits, label, size, loss. Short labels go inside the markers, others beside."""
    inside = max(len(point[1]) for point in points) <= 2
    for number, bits in enumerate(sorted({point[0] for point in points}, reverse=True)):
        colour, marker, on_it = SERIES[bits]
        own = sorted((point for point in points if point[0] == bits), key=lambda point: point[2])
        _, labels, sizes, losses = zip(*own)
        style = {"color": colour, "marker": marker, "markersize": 10 if inside else 6}
        axes.plot(sizes, losses, label=f"{bits}-bit attention", **style)
        # lines fall to the right: above right and below left of a point is room
        place = {"xytext": (-5, -4), "ha": "right", "va": "top"} if number % 2 else {"xytext": (5, 3)}
        place["path_effects"] = [withStroke(linewidth=2, foreground="white")]
        if inside:
            place = {"xytext": (0, 0), "ha": "center", "va": "center_baseline", "color": on_it}
        for label, *point in zip(labels, sizes, losses):
            axes.annotate(label, point, textcoords="offset points", fontsize=7 if inside else 8, **place)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.12, y=0.08)
    axes.grid(color="0.9")
    axes.legend(fontsize=8, markerscale=0.7 if inside else 1)
