"""The picture of `fullsize.py`'s JSON: tokens/s of each contestant, and its memory, side by side."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from mixtral_offload.analysis.plots.style import BLUE, new_figure

OTHER = "0.65"


def plot_fullsize(result: dict) -> tuple[Figure, np.ndarray]:
    """Draw bars of tokens/s and of GB.

    Returns:
        The figure, and float64 [contestants, 3]: tokens/s, GB of memory without the page cache, GB with the
        pages of mapped files (see `memory_of`); nan for one that did not run.
    """
    rows = result["contestants"]
    shown = np.array([(row.get("tokens_per_s", np.nan), *memory_of(row)) for row in rows.values()], float)
    settings = result["settings"]
    figure = new_figure(9, 1.9 + 0.55 * len(rows), "A whole Mixtral in a small memory")
    speed, memory = figure.subplots(1, 2, sharey=True)
    colors = [BLUE if name == "ours" else OTHER for name in rows]
    _bars(speed, shown[:, 0], colors, "tokens/s", [why(row) for row in rows.values()])
    _bars(memory, shown[:, 1], colors, "GB", [""] * len(rows))
    for row, (_, anon, peak) in enumerate(shown):
        if peak > anon:
            memory.barh(row, peak - anon, 0.55, left=anon, color="none", edgecolor="0.5", hatch="///", lw=0.5)
    memory.set_xlim(0, 1.35 * max(np.nanmax(np.append(shown[:, 1:], 0)), 1e-9))
    speed.set_yticks(range(len(rows)), [label(name, row) for name, row in rows.items()], fontsize=9)
    speed.set_ylim(len(rows) - 0.4, -0.6)
    speed.set_xlabel("tokens/s while decoding")
    memory.set_xlabel("GB of memory (hatched: pages of mapped files)")
    weights = f"{result['checkpoint']['bytes'] / 1e9:.3g} GB of random weights, {settings['layers']} layers"
    where = f"{settings['device']}, {result['threads']} threads, budget {settings['ram']}"
    speed.set_title(f"{weights}; {where}; stay {settings['stay']}", fontsize=8, loc="left", color="0.3")
    return figure, shown


def memory_of(row: dict) -> tuple[float, float]:
    """Return GB without and with the pages of mapped files; nan if not measured.

    Where a few layers were measured and scaled, both are what all layers would hold.
    """
    if "anon_bytes" not in row or row["anon_bytes"] is None:
        return np.nan, np.nan
    if "full_size_bytes" in row:
        return row["full_size_bytes"] / 1e9, row["full_size_bytes"] / 1e9
    return row["anon_bytes"] / 1e9, row["peak_rss_bytes"] / 1e9


def why(row: dict) -> str:
    """Say why there is no bar."""
    return row.get("missing") or ("failed" if "failed" in row else "")


def label(name: str, row: dict) -> str:
    names = {"ours": "mixtral_offload", "accelerate": "accelerate, 16 bits", "llama.cpp": "llama.cpp, Q2_K"}
    scaled = f"\n({row['layers_measured']} layers, scaled)" if "layers_measured" in row else ""
    return names[name] + scaled


def _bars(axes, values: np.ndarray, colors: list[str], unit: str, instead: list[str]) -> None:
    """Draw a bar for each value with its number, or the text that replaces it."""
    largest = np.nanmax(np.append(values, 0))
    for row, (value, color, text) in enumerate(zip(values, colors, instead)):
        if np.isnan(value):
            axes.text(0, row, f" {text}", va="center", fontsize=8, color="0.4")
            continue
        axes.barh(row, value, 0.55, color=color)
        if unit == "tokens/s":
            axes.text(value, row, f" {value:,.{0 if value >= 100 else 2}f} {unit}", va="center", fontsize=8)
    axes.set_xlim(0, 1.35 * max(largest, 1e-9))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
