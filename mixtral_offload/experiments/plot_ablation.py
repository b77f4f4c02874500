"""The picture of the paper's table 2, as measured here.

Knows an `Ablation` and matplotlib. Knows nothing of models.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mixtral_offload.analysis.plots.routing import BLUE, new_figure
from mixtral_offload.experiments.ablation import PAPER, RESIDENT, Ablation

LABELS = {
    RESIDENT: "everything on the device",
    "full": "LRU cache and prefetch",
    "without prefetch": "without prefetch",
    "without cache and prefetch": "without cache and prefetch",
    "naive": "naive: all experts of a layer,\neach time",
}


def plot_ablation(result: Ablation) -> tuple[Figure, np.ndarray]:
    """Tokens/s of each variant, and their multiple of the naive way's beside the paper's on a T4 (2312.17238, table 2).

    The row of everything on the device is cut off where it would dwarf the others. Array: float64 [variants, 3] of
    tokens/s, multiple, and the paper's multiple (nan where it has none), in the order of `result.tokens_per_s`.
    """
    names = [*result.tokens_per_s]
    paper = [PAPER[name] / PAPER["naive"] if name in PAPER else np.nan for name in names]
    shown = np.array(
        [(result.tokens_per_s[name], result.over_naive(name), of) for name, of in zip(names, paper)]
    )
    naive, table = result.tokens_per_s["naive"], [name in PAPER for name in names]
    limit = 1.35 * max(shown[table, 0].max(), naive * np.nanmax(paper))  # room for the text behind the bars
    figure = new_figure(8, 2 + 0.5 * len(names), "What the expert cache and prefetching are each worth")
    axes = figure.subplots()
    for row, (name, (speed, multiple, of)) in enumerate(zip(names, shown)):
        _row(axes, row, name, speed, f"{speed:.3g} tokens/s, {multiple:.1f}\u00d7", limit)
        if name in PAPER:
            _paper_row(axes, row, of, naive, limit)
    axes.set_title(_subtitle(result), fontsize=8, loc="left", color="0.3")
    axes.set_yticks(range(len(names)), [LABELS[name] for name in names], fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.5)
    axes.set_xlim(0, limit)
    axes.set_xlabel("tokens/s while decoding")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [
        Patch(facecolor=BLUE, label="here, and as a multiple of naive"),
        Patch(facecolor="white", edgecolor="0.3", label="the paper's multiple of naive, on a T4"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    return figure, shown


def _row(axes, row: int, name: str, speed: float, text: str, limit: float) -> None:
    """One variant's bar with its number behind it, or inside where there is no room."""
    axes.barh(row - 0.06, min(speed, limit), 0.5, color="0.88" if name == RESIDENT else BLUE)
    if speed < 0.75 * limit:
        axes.text(speed + 0.008 * limit, row - 0.06, text, va="center", fontsize=9)
        return
    text = f"{text}, bar cut off \u2192" if speed > limit else text
    axes.text(min(speed, limit) - 0.012 * limit, row - 0.06, text, va="center", ha="right", fontsize=9)


def _paper_row(axes, row: int, multiple: float, naive: float, limit: float) -> None:
    """What this machine's tokens/s would be with the paper's multiple."""
    end = multiple * naive
    axes.barh(row + 0.31, end, 0.14, facecolor="white", edgecolor="0.3", linewidth=0.8)
    where, text = (end + 0.008 * limit, row + 0.32), f"{multiple:.1f}\u00d7"
    axes.text(*where, text, va="center", fontsize=7.5, color="0.3")


def _subtitle(result: Ablation) -> str:
    asked = result.settings
    link = "link as it is" if asked["ratio"] is None else "link slowed down for the experiment"
    ratio = result.copy_s / result.layer_s
    return (
        f"{asked['model']} on {asked['device']}\n"
        f"{asked['cache_size']} experts of each layer cached; {asked['prefetch']} guesses, "
        f"{asked['look_ahead']} layer(s) ahead, save {result.prefetch_saves[1]:.0%} of the time\n"
        f"{link}: one expert's copy takes {1e3 * result.copy_s:.3g} ms, {ratio:.1f} layers' compute"
    )
