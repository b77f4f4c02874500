"""Shared by all pictures: colours, figures, curves, heat maps, bars, legends.

Colours differ in lightness too, so that a picture can be read in grey; the hues are Okabe and Ito's, for
colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, RED = "#F0E442", "#0072B2", "#D55E00"
Range = tuple[float, float]


def new_figure(width: float, height: float, title: str) -> Figure:
    """Make a figure of this size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)  # names may hold a $
    return figure


def finish_curves(
    axes: Axes,
    across: str,
    up: str,
    ticks: Sequence[int],
    most: float = 1.02,
    legend: Literal["best", "lower right"] = "best",
) -> None:
    """Label curves over whole numbers, from 0 to `most`, with a grid and a legend at `legend`."""
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_xticks(ticks)
    axes.set_ylim(0, most)
    axes.grid(color="0.9")
    axes.legend(fontsize=8, loc=legend)


def heat_map(
    axes: Axes, values: ArrayLike, low: float | None = 0, high: float | None = 1, **settings: Any
) -> AxesImage:
    """Draw a map in which dark is low and bright is high; `imshow` takes the settings."""
    return axes.imshow(values, cmap="cividis", vmin=low, vmax=high, **settings)


def layer_rows(axes: Axes, layers: Sequence[int]) -> None:
    """Label the rows of a map with the numbers of the layers."""
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
    axes.set_ylabel("layer")


def spans(axes: Axes, row: float, height: float, of: Iterable[Range], colour: str, line: float) -> None:
    """Draw bars of (begin, length) on one row of a timeline, with white edges of width `line`."""
    axes.broken_barh([*of], (row - height / 2, height), facecolors=colour, edgecolor="white", linewidth=line)


def mark_layers(axes: Axes, begins: Iterable[tuple[float, int]], row: float, colour: str, align: str) -> None:
    """Draw a line where each layer of a timeline begins, with the layer's number at `row`."""
    for begin, layer in begins:
        axes.axvline(begin, color=colour, linewidth=0.6, zorder=0)
        axes.text(begin, row, str(layer), fontsize=7, ha=align)


def ahead(layers: int) -> str:
    """Name a curve of predictions made this many layers ahead."""
    return f"{layers} layer{'s' if layers > 1 else ''} ahead"


def patches(colours: Mapping[str, str | tuple[float, float, float]], **settings: Any) -> list[Patch]:
    """Make legend entries of name -> colour."""
    return [Patch(facecolor=colour, label=name, **settings) for name, colour in colours.items()]


def legend_below(figure: Figure, handles: Sequence[Artist], n_columns: int, fontsize: float = 8) -> None:
    """Put a legend below all axes."""
    figure.legend(handles=handles, loc="outside lower center", ncols=n_columns, fontsize=fontsize)


def plain(axes: Axes) -> None:
    """Remove the lines above and at the right."""
    axes.spines[["top", "right"]].set_visible(False)


def set_labels(axes: Axes, title: str, across: str = "", up: str = "") -> None:
    """Set title and axis labels in small type."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(across, fontsize=8)
    axes.set_ylabel(up, fontsize=8)
    axes.tick_params(labelsize=7)
