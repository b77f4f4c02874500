"""Pictures of routing: experts used by each token, and what became of each use.

Each function returns (figure, the array it shows).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mixtral_offload.analysis.plots.style import (
    BLACK,
    GREEN,
    SKY,
    heat_map,
    layer_rows,
    legend_below,
    new_figure,
    patches,
)
from mixtral_offload.analysis.replay import cache_contents
from mixtral_offload.core.trace import COMPUTED, MISS, PREFETCHED, RoutingTrace

HIT_CELL, PREDICTED_CELL, CPU_CELL, STALL_CELL = range(4)
CELLS = {"hit": "#E4EEF5", "right prediction": SKY, "computed by the CPU": GREEN, "stall": "#8A2F00"}


def token_labels(trace: RoutingTrace, tokens: Sequence[int]) -> list[str]:
    """Return short readable texts, with spaces and line ends made visible."""
    if not trace.pieces:
        return [str(trace.tokens[i]) for i in tokens]
    shown = [trace.pieces[i].replace("\n", "⏎").replace(" ", "␣") for i in tokens]
    return [text if len(text) <= 12 else text[:11] + "…" for text in shown]


def _label_tokens(axes: Axes, trace: RoutingTrace, tokens: Sequence[int]) -> None:
    size = 8 if len(tokens) <= 40 else 6
    style: dict[str, Any] = {"rotation": 90, "fontsize": size, "family": "monospace", "parse_math": False}
    axes.set_xticks(range(len(tokens)), token_labels(trace, tokens), **style)
    axes.set_xlabel("token")


def plot_activations(
    trace: RoutingTrace,
    layers: Sequence[int] | None = None,
    tokens: Sequence[int] | slice = slice(0, 48),
    **settings: Any,
) -> tuple[Figure, np.ndarray]:
    """Draw which experts each token used, and the cached ones (2312.17238, figure 1).

    Blue squares: the router's weight. Grey: the expert was cached before the token.

    Args:
        layers: Their numbers. Default: four spread over the depth.
        settings: Of the cache, as for `replay`. Default: the run's own.

    Returns:
        The figure, and the router's weights, float32 `[layers, E, tokens]`, 0 where not chosen.
    """
    columns = np.arange(trace.n_tokens)[tokens].tolist()
    if layers is None:
        layers = np.unique(np.linspace(0, trace.n_layers - 1, 4).round().astype(int)).tolist()
    held = cache_contents(trace, **settings)[trace.passes[columns]][:, layers].transpose(1, 2, 0)
    shown = np.zeros(held.shape, np.float32)  # [layers, E, tokens]
    chosen = trace.experts[columns][:, layers].transpose(1, 2, 0)  # [layers, k, tokens]
    np.put_along_axis(shown, chosen.astype(int), trace.weights[columns][:, layers].transpose(1, 2, 0), axis=1)
    height = 0.8 + len(layers) * (0.4 + 0.16 * trace.n_experts)
    width = max(6, 0.21 * len(columns) + 1.5)
    figure = new_figure(width, height, "Experts used by each token, and the cache before it")
    panels = np.atleast_1d(figure.subplots(len(layers), 1, sharex=True))
    for axes, layer, of_layer, weights in zip(panels, layers, held, shown):
        axes.imshow(
            np.where(of_layer, 0.22, 0.0), cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="none"
        )
        _squares(axes, weights)
        axes.set_ylabel(f"layer {trace.settings['layers'][layer]}\nexpert")
        axes.set_yticks(range(trace.n_experts), range(trace.n_experts), fontsize=7)
    _label_tokens(panels[-1], trace, columns)
    chosen_colours = {f"chosen, router's weight {weight}": _shade(weight) for weight in (1, 0.5)}
    handles = patches(chosen_colours, edgecolor=BLACK)
    legend_below(figure, [*handles, *patches({"in the cache": "0.82"})], 3)
    return figure, shown


def _shade(weight: float) -> tuple[float, float, float]:
    return 0.85 * (1 - weight), 0.3 + 0.55 * (1 - weight), 0.55 + 0.4 * (1 - weight)


def _squares(axes: Axes, weights: np.ndarray) -> None:
    """Draw a square for each of the router's weights `[E, tokens]` that is not 0."""
    for expert, column in zip(*weights.nonzero()):
        where, colour = (column - 0.38, expert - 0.36), _shade(weights[expert, column])
        axes.add_patch(Rectangle(where, 0.76, 0.72, facecolor=colour, edgecolor=BLACK, linewidth=0.5))


def cells(trace: RoutingTrace) -> tuple[np.ndarray, np.ndarray]:
    """Find what became of each token in each layer.

    Returns:
        HIT_CELL, PREDICTED_CELL, CPU_CELL or STALL_CELL, the worst of its uses, int `[N, L]`; and the wrong
        predictions, int `[N, L]` (a pass's at its first token).
    """
    outcomes = trace.outcomes()
    worse = {PREFETCHED: PREDICTED_CELL, COMPUTED: CPU_CELL, MISS: STALL_CELL}
    found = np.full(outcomes.shape[:2], HIT_CELL)
    for outcome, cell in worse.items():
        found[(outcomes == outcome).any(-1)] = cell
    wasted = np.zeros((trace.n_tokens, trace.n_layers), int)
    first = np.searchsorted(trace.passes, np.arange(trace.n_passes))
    np.add.at(wasted, (first[trace.wasted_pass], trace.wasted_layer), 1)
    return found, wasted


def plot_cells(trace: RoutingTrace, tokens: slice = slice(0, 64)) -> tuple[Figure, np.ndarray]:
    """Draw, token by layer, if experts were cached, predicted or waited for. Crosses: wasted predictions.

    Returns:
        The figure, and int `[L, tokens]` of HIT_CELL, PREDICTED_CELL, CPU_CELL, STALL_CELL.
    """
    chosen = range(trace.n_tokens)[tokens]
    found, wasted = cells(trace)
    shown = found[chosen].T
    figure = new_figure(
        max(6, 0.2 * len(chosen) + 1.5),
        1.9 + 0.24 * trace.n_layers,
        "Hits, predictions and stalls, token by layer",
    )
    axes = figure.subplots()
    colours = ListedColormap(list(CELLS.values()))
    axes.imshow(shown, cmap=colours, vmin=0, vmax=STALL_CELL, aspect="auto", interpolation="none")
    layer, column = wasted[chosen].T.nonzero()
    axes.plot(column, layer, "x", color=BLACK, markersize=4, markeredgewidth=0.9)
    layer_rows(axes, trace.settings["layers"])
    axes.set_xticks(np.arange(len(chosen) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(trace.n_layers + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    _label_tokens(axes, trace, chosen)
    cells_of_run = [(*CELLS.items(),)[cell] for cell in range(4) if cell != CPU_CELL or (found == cell).any()]
    handles = [
        *patches(dict(cells_of_run), edgecolor="0.6"),
        *axes.plot([], [], "x", color=BLACK, label="wasted prediction"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=5, fontsize=8)
    return figure, shown


def plot_usage(
    usage: dict[str, np.ndarray], layers: Sequence[int] | None = None
) -> tuple[Figure, np.ndarray]:
    """Draw how each domain (or set of prompts) spreads over the experts, with the entropy per layer.

    Args:
        usage: Name -> counts `[L, E]`, as `RoutingTrace.usage` gives them.
        layers: Numbers of the layers to draw. Default: all.

    Returns:
        The figure, and shares, float64 `[L, domains, E]`.
    """
    names, counts = list(usage), np.stack(list(usage.values()), 1).astype(float)  # [L, domains, E]
    shares = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    shown = range(len(shares)) if layers is None else layers
    rows, columns = _grid(len(shown), 3)
    height = rows * (0.9 + 0.24 * len(names))
    figure = new_figure(3.1 * columns + 1.2, height, "Share of each domain's tokens by expert")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, layer in zip(grid.flat, shown):
        image = heat_map(axes, shares[layer], high=max(0.5, shares.max()), aspect="auto")
        overall = entropy(shares[layer].mean(0))
        within = entropy(shares[layer]).mean()
        axes.set_title(f"layer {layer}: {overall:.2f} bits, {within:.2f} within a domain", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
        axes.set_xticks(range(shares.shape[2]), range(shares.shape[2]), fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("expert")
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=grid, label="share", shrink=0.8)
    return figure, shares


def _grid(n_panels: int, most_columns: int) -> tuple[int, int]:
    """(rows, columns) of panels."""
    columns = min(most_columns, n_panels)
    return -(-n_panels // columns), columns


def entropy(shares: np.ndarray) -> np.ndarray:
    """Compute the entropy in bits over the last axis."""
    return -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(-1)


def plot_transitions(trace: RoutingTrace, layer: int | None = None) -> tuple[Figure, np.ndarray]:
    """Draw the chance of each expert in the next layer, given one in this layer.

    Args:
        layer: Its number. Default: all.

    Returns:
        The figure, and float64 `[L - 1, E, E]`; rows sum to the top-k.
    """
    n = trace.n_experts
    used = np.zeros((trace.n_tokens, trace.n_layers, n))
    np.put_along_axis(used, trace.experts.astype(int), 1.0, axis=2)
    joint = np.einsum("tle,tlf->lef", used[:, :-1], used[:, 1:])
    chance = joint / np.maximum(used[:, :-1].sum(0)[:, :, None], 1)
    shown = range(trace.n_layers - 1) if layer is None else [layer]
    rows, columns = _grid(len(shown), 4)
    figure = new_figure(2.4 * columns + 1.2, 2.5 * rows + 0.4, "Which expert follows which")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, number in zip(grid.flat, shown):
        image = heat_map(axes, chance[number])
        axes.set_xlabel(f"expert in layer {number + 1}", fontsize=8)
        axes.set_ylabel(f"expert in layer {number}", fontsize=8)
        axes.set_xticks(range(n), range(n), fontsize=7)
        axes.set_yticks(range(n), range(n), fontsize=7)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=grid, label="probability", shrink=0.8)
    return figure, chance
