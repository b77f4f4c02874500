"""The picture of many sequences at once: speed and bytes against the batch size, and the ablation beside them.

Knows `Throughput` and matplotlib. Knows nothing of models.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from mixtral_offload.analysis.plots.routing import BLACK, BLUE, GREEN, ORANGE, RED, SKY, new_figure
from mixtral_offload.experiments.batching import Throughput

#: of the cache sizes, the smallest first; all experts on the device is black
COLOURS, MARKERS = (RED, ORANGE, SKY, GREEN), "ovs^"


def plot_batches(
    sweeps: dict[int, Throughput],
    expected: dict[int, dict[int, float]] | None = None,
    ablations: dict[str, Throughput] | None = None,
    n_experts: int | None = None,
) -> tuple[Figure, dict[str, np.ndarray]]:
    """Tokens/s and bytes moved per generated token against the batch size, and speed without each optimization.

    sweeps: experts of a layer cached -> what `measure_batches` found; as many as n_experts: everything on the device.
    expected: experts cached -> batch size -> bytes per token, as `expected_bytes` computes them. ablations: where the
    experts are -> what `ablate_batch` found, all with the same variants. Arrays, float64: "speed [sweeps, sizes]",
    "bytes", "expected" (nan where there are none), and "ablation [ablations, variants]", each as a share of all of them.
    """
    sizes = sorted({n for of in sweeps.values() for n in of.seconds})
    shown = {"speed": _grid(sweeps, sizes, Throughput.tokens_per_s), "bytes": _grid(sweeps, sizes, Throughput.bytes_per_token)}  # fmt: skip
    shown["expected"] = np.array(
        [[(expected or {}).get(k, {}).get(n, np.nan) for n in sizes] for k in sweeps]
    )
    panels = 3 if ablations else 2
    figure = new_figure(4.1 * panels, 4.3, "Many sequences at once")
    speed, moved, *rest = figure.subplots(1, panels)
    for row, k in enumerate(sweeps):
        resident = k == n_experts
        colour, marker = (BLACK, "D") if resident else (COLOURS[row % 4], MARKERS[row % 4])
        style = {"color": colour, "marker": marker, "markersize": 5}
        speed.plot(sizes, shown["speed"][row], label="all" if resident else str(k), **style)
        if not resident:
            moved.plot(sizes, shown["bytes"][row] / 1e3, label=str(k), **style)
            moved.plot(sizes, shown["expected"][row] / 1e3, "--", color=colour, linewidth=1)
    _label(speed, sizes, "tokens/s, prompts' time included")
    _label(moved, sizes, "kB moved per generated token")
    speed.legend(title="experts of a layer cached", fontsize=8, title_fontsize=8, ncols=2)
    if not np.isnan(shown["expected"]).all():
        moved.plot(
            [], [], "--", color="0.4", linewidth=1, label="expected of tokens that\nhave nothing in common"
        )
    moved.legend(fontsize=8)
    if ablations:
        shown["ablation"] = _ablation(rest[0], ablations)
    return figure, shown


def _grid(sweeps: dict[int, Throughput], sizes: list[int], value) -> np.ndarray:
    return np.array([[value(of, n) if n in of.seconds else np.nan for n in sizes] for of in sweeps.values()])


def _label(axes, sizes: list[int], text: str) -> None:
    """Both axes logarithmic, with plain numbers."""
    axes.set(xscale="log", yscale="log", xlabel="batch size", title=text)
    axes.title.set_fontsize(9)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _ablation(axes, ablations: dict[str, Throughput]) -> np.ndarray:
    """Bars of each variant's speed as a share of the first one's, which is all of them."""
    variants = [*next(iter(ablations.values())).seconds]
    shares = np.array([[of.over(name, variants[0]) for name in variants] for of in ablations.values()])
    height = 0.8 / len(ablations)
    for row, (name, colour) in enumerate(zip(ablations, (BLUE, SKY, ORANGE))):
        places = np.arange(len(variants)) + (row - (len(ablations) - 1) / 2) * height
        axes.barh(places, shares[row], 0.9 * height, color=colour, label=name)
        for place, share in zip(places, shares[row]):
            axes.text(share + 0.01, place, f"{share:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(variants)), [name.replace(", ", ",\n") for name in variants], fontsize=8)
    axes.set_ylim(len(variants) - 0.5, -0.5)
    axes.set_xlim(0, 1.15 * shares.max())
    axes.set_xlabel("throughput as a share of all of them")
    axes.set_title("each taken away alone", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.32))  # beside the shortest bars
    return shares
