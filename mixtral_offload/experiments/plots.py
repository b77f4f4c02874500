"""Pictures of the papers' tables, as measured here: the ablation, batches, quality against size.

Each function returns (figure, what it shows as arrays).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

from mixtral_offload.analysis.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    RED,
    SKY,
    legend_below,
    new_figure,
    patches,
    plain,
    set_labels,
)
from mixtral_offload.experiments.ablation import PAPER_TABLE_2, RESIDENT, Ablation
from mixtral_offload.experiments.batching import Throughput
from mixtral_offload.experiments.bit_widths import PAPER_TABLE_1

LABELS = {
    RESIDENT: "everything on the device",
    "full": "LRU cache and prefetch",
    "without prefetch": "without prefetch",
    "without cache and prefetch": "without cache and prefetch",
    "naive": "naive: all experts of a layer,\nin each pass",
}
#: of the cache sizes, the smallest first; all experts on the device is black
COLOURS, MARKERS = (RED, ORANGE, SKY, GREEN), "ovs^"
#: attention bits -> colour, marker, colour of a text on it
SERIES = {
    16: (BLACK, "o", "white"),
    8: (RED, "H", "white"),
    4: (BLUE, "s", "white"),
    3: (GREEN, "p", "white"),
    2: (ORANGE, "D", "black"),
}


def plot_ablation(result: Ablation) -> tuple[Figure, np.ndarray]:
    """Draw tokens/s of each variant, and its multiple of the naive speed with the paper's on a T4.

    The paper is 2312.17238, table 2. The bar of everything on the device is cut off where it is too long.

    Returns:
        The figure, and float64 `[variants, 3]` of tokens/s, multiple, and the paper's multiple (nan where it
        has none), in the order of `result.tokens_per_s`.
    """
    names = [*result.tokens_per_s]
    paper = [
        PAPER_TABLE_2[name] / PAPER_TABLE_2["naive"] if name in PAPER_TABLE_2 else np.nan for name in names
    ]
    shown = np.array(
        [(result.tokens_per_s[name], result.over_naive(name), of) for name, of in zip(names, paper)]
    )
    naive, table = result.tokens_per_s["naive"], [name in PAPER_TABLE_2 for name in names]
    limit = 1.35 * max(shown[table, 0].max(), naive * np.nanmax(paper))  # room for the text behind the bars
    figure = new_figure(8, 2 + 0.5 * len(names), "What the expert cache and prefetching are each worth")
    axes = figure.subplots()
    for row, (name, (speed, multiple, of)) in enumerate(zip(names, shown)):
        _row(axes, row, name, speed, f"{speed:.3g} tokens/s, {multiple:.1f}\u00d7", limit)
        if name in PAPER_TABLE_2:
            _paper_row(axes, row, of, naive, limit)
    axes.set_title(_subtitle(result), fontsize=8, loc="left", color="0.3")
    axes.set_yticks(range(len(names)), [LABELS[name] for name in names], fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.5)
    axes.set_xlim(0, limit)
    axes.set_xlabel("tokens/s while decoding")
    plain(axes)
    axes.tick_params(axis="y", length=0)
    handles = patches({"here, and as a multiple of naive": BLUE})
    handles += patches({"the paper's multiple of naive, on a T4": "white"}, edgecolor="0.3")
    legend_below(figure, handles, 2)
    return figure, shown


def _row(axes: Axes, row: int, name: str, speed: float, text: str, limit: float) -> None:
    """One variant's bar with its number behind it, or inside where there is no room."""
    axes.barh(row - 0.06, min(speed, limit), 0.5, color="0.88" if name == RESIDENT else BLUE)
    if speed < 0.75 * limit:
        axes.text(speed + 0.008 * limit, row - 0.06, text, va="center", fontsize=9)
        return
    text = f"{text}, bar cut off \u2192" if speed > limit else text
    axes.text(min(speed, limit) - 0.012 * limit, row - 0.06, text, va="center", ha="right", fontsize=9)


def _paper_row(axes: Axes, row: int, multiple: float, naive: float, limit: float) -> None:
    """What this machine's tokens/s would be with the paper's multiple."""
    end = multiple * naive
    axes.barh(row + 0.31, end, 0.14, facecolor="white", edgecolor="0.3", linewidth=0.8)
    where, text = (end + 0.008 * limit, row + 0.32), f"{multiple:.1f}\u00d7"
    axes.text(*where, text, va="center", fontsize=7.5, color="0.3")


def _subtitle(result: Ablation) -> str:
    run = result.settings
    link = "link as it is" if run["ratio"] is None else "link throttled for the experiment"
    ratio = result.copy_s / result.layer_s
    return (
        f"{run['model']} on {run['device']}\n"
        f"{run['cache_size']} experts of each layer cached; {run['prefetch']} predictions, "
        f"{run['look_ahead']} layer(s) ahead, save {result.prefetch_saves[1]:.0%} of the time\n"
        f"{link}: one expert's copy takes {1e3 * result.copy_s:.3g} ms, {ratio:.1f} layers' compute"
    )


def plot_batches(
    sweeps: dict[int, Throughput],
    expected: dict[int, dict[int, float]] | None = None,
    ablations: dict[str, Throughput] | None = None,
    n_experts: int | None = None,
) -> tuple[Figure, dict[str, np.ndarray]]:
    """Draw tokens/s and bytes moved per token against the batch size, and speed without each optimization.

    Args:
        sweeps: Experts of a layer cached -> what `measure_batches` found.
        expected: Experts cached -> batch size -> bytes per token, of `expected_bytes`.
        ablations: Where the experts are -> what `ablate_batch` found, all with the same variants.
        n_experts: Of a layer; a sweep with this cache size has everything on the device.

    Returns:
        The figure, and float64 arrays: "speed", "bytes" and "expected" (nan where there are none), each
        `[sweeps, sizes]`, and "ablation" `[ablations, variants]`, as a share of the speed with all
        optimizations.
    """
    sizes = sorted({n for of in sweeps.values() for n in of.seconds if isinstance(n, int)})
    values = {"speed": Throughput.tokens_per_s, "bytes": Throughput.bytes_per_token}
    shown = {name: _grid(sweeps, sizes, value) for name, value in values.items()}
    shown["expected"] = np.array(
        [[(expected or {}).get(k, {}).get(n, np.nan) for n in sizes] for k in sweeps]
    )
    panels = 3 if ablations else 2
    figure = new_figure(4.1 * panels, 4.3, "Many sequences at once")
    speed, moved, *rest = figure.subplots(1, panels)
    for row, k in enumerate(sweeps):
        resident = k == n_experts
        colour, marker = (BLACK, "D") if resident else (COLOURS[row % 4], MARKERS[row % 4])
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5}
        speed.plot(sizes, shown["speed"][row], label="all" if resident else str(k), **style)
        if not resident:
            moved.plot(sizes, shown["bytes"][row] / 1e3, label=str(k), **style)
            moved.plot(sizes, shown["expected"][row] / 1e3, "--", color=colour, linewidth=1)
    _label(speed, sizes, "tokens/s, prompts' time included")
    _label(moved, sizes, "kB moved per generated token")
    speed.legend(title="experts of a layer cached", fontsize=8, title_fontsize=8, ncols=2)
    if not np.isnan(shown["expected"]).all():
        moved.plot([], [], "--", color="0.4", linewidth=1, label="expected for independent tokens")
    moved.legend(fontsize=8)
    if ablations:
        shown["ablation"] = _ablation(rest[0], ablations)
    return figure, shown


def _grid(
    sweeps: dict[int, Throughput], sizes: list[int], value: Callable[[Throughput, int], float]
) -> np.ndarray:
    return np.array([[value(of, n) if n in of.seconds else np.nan for n in sizes] for of in sweeps.values()])


def _label(axes: Axes, sizes: list[int], text: str) -> None:
    """Make both axes logarithmic, with plain numbers."""
    axes.set(xscale="log", yscale="log", xlabel="batch size", title=text)
    axes.title.set_fontsize(9)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(alpha=0.25)
    plain(axes)


def _ablation(axes: Axes, ablations: dict[str, Throughput]) -> np.ndarray:
    """Draw each variant's speed as a share of the first one's, which has all optimizations."""
    variants = [*next(iter(ablations.values())).seconds]
    shares = np.array([[of.over(name, variants[0]) for name in variants] for of in ablations.values()])
    height = 0.8 / len(ablations)
    for row, (name, colour) in enumerate(zip(ablations, (BLUE, SKY, ORANGE))):
        places = np.arange(len(variants)) + (row - (len(ablations) - 1) / 2) * height
        axes.barh(places, shares[row], 0.9 * height, color=colour, label=name)
        for place, share in zip(places, shares[row]):
            axes.text(share + 0.01, place, f"{share:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(variants)), [str(name).replace(", ", ",\n") for name in variants], fontsize=8)
    axes.set_ylim(len(variants) - 0.5, -0.5)
    axes.set_xlim(0, 1.15 * shares.max())
    axes.set_xlabel("throughput as a share of that with all")
    axes.set_title("without one optimization each", fontsize=9)
    plain(axes)
    axes.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.32))  # next to the shortest bars
    return shares


def plot_quality(rows: Sequence[dict[str, Any]]) -> tuple[Figure, np.ndarray]:
    """Draw what each width costs: KL divergence from the unquantized model against size, with the paper's.

    A line joins widths with the same attention; at the right, numbers are the bits of Mixtral-8x7B's experts.

    Args:
        rows: Of `compare_widths`.

    Returns:
        The figure, and float64 `[rows, 2]` of bytes on disk and nats per token.
    """
    points = np.array([(row["disk_bytes"], row["kl"]) for row in rows], float)
    unit, name = (1e9, "GB") if points[:, 0].max() >= 1e9 else (1e6, "MB")
    found = points[:, 1][points[:, 1] > 0]
    floor = found.min() / 3 if len(found) else 1e-6  # a divergence of 0 has no place on a logarithmic axis
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


def _draw_widths(axes: Axes, points: list[tuple[int, str, float, float]]) -> None:
    """Draw points of (attention bits, label, size, loss). Short labels are inside the markers."""
    inside = max(len(point[1]) for point in points) <= 2
    for number, bits in enumerate(sorted({point[0] for point in points}, reverse=True)):
        colour, marker, on_it = SERIES[bits]
        own = sorted((point for point in points if point[0] == bits), key=lambda point: point[2])
        _, labels, sizes, losses = zip(*own)
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 10 if inside else 6}
        axes.plot(sizes, losses, label=f"{bits}-bit attention", **style)
        # lines fall to the right: there is room above right and below left of a point
        place: dict[str, Any] = (
            {"xytext": (-5, -4), "ha": "right", "va": "top"} if number % 2 else {"xytext": (5, 3)}
        )
        place["path_effects"] = [withStroke(linewidth=2, foreground="white")]
        if inside:
            place = {"xytext": (0, 0), "ha": "center", "va": "center_baseline", "color": on_it}
        for label, size, loss in zip(labels, sizes, losses):
            axes.annotate(
                label, (size, loss), textcoords="offset points", fontsize=7 if inside else 8, **place
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.12, y=0.08)
    axes.grid(color="0.9")
    axes.legend(fontsize=8, markerscale=0.7 if inside else 1)
