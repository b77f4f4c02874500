"""Pictures of quantization: what a bit width does to one matrix.

Each function returns (figure, the array it shows). In every map dark is low and bright is high; maps of
weights and of errors in one figure share their colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from mixtral_offload.analysis.plots.style import BLACK, BLUE, RED, SKY, heat_map, new_figure, set_labels
from mixtral_offload.errors import OptionError
from mixtral_offload.models.checkpoint import Checkpoint, ExpertId, open_checkpoint
from mixtral_offload.weights.hqq import (
    PAPER,
    Fields,
    Quantization,
    dequantize,
    quantize,
    scale_of,
    values,
    zero_of,
)
from mixtral_offload.weights.layout import MATRICES
from mixtral_offload.weights.source import resolve


@dataclass(frozen=True)
class Matrix:
    """One stored matrix of shape `(N, K)`, on any device."""

    fields: Fields
    shape: tuple[int, int]
    quantization: Quantization

    @cached_property
    def levels(self) -> np.ndarray:
        """The integers as stored, uint8 `[N, K]`; none at 16 bits."""
        return values(self.fields, self.quantization).view(self.shape).cpu().numpy()

    @cached_property
    def values(self) -> np.ndarray:
        """The weights, float32 `[N, K]`."""
        return _numpy(dequantize(self.fields, self.shape, self.quantization))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


Source = Checkpoint | str | Path | None


def read_matrix(source: Source = None, expert: ExpertId = (0, 0), matrix: str = "gate") -> Matrix:
    """Read one expert's matrix as it is stored, and nothing else.

    Args:
        source: A checkpoint, its folder or repository, or None for the shipped 4-bit model.
        expert: (layer, number).
        matrix: "gate", "up" or "down".

    Raises:
        OptionError: There is no such expert or matrix.
    """
    if not isinstance(source, Checkpoint):
        source = open_checkpoint(resolve(source))
    layer, number = expert
    if (layer, number) not in source.experts or matrix not in MATRICES:
        first, last = min(source.experts), max(source.experts)
        expected = f"an expert from {first} to {last}, and one of {', '.join(MATRICES)}"
        raise OptionError("no such matrix", expected=expected, found=f"{expert}, {matrix}")
    stored = source.experts[layer, number]
    wanted = [field for field in source.layout.fields if field.matrix == matrix]
    fields = {field.name: stored[matrix, field.name].read().view(field.shape) for field in wanted}
    return Matrix(fields, source.layout.shapes[matrix], source.layout.quantization[matrix])


def plot_matrix(
    source: Source = None,
    expert: ExpertId = (0, 0),
    matrix: str = "gate",
    compare: Tensor | Source = None,
    rows: slice | None = None,
    columns: slice = slice(0, 32),
) -> tuple[Figure, np.ndarray]:
    """Draw how one matrix is stored: integers, a scale and a zero for each group, and the weights these give.

    Args:
        source, expert, matrix: As for `read_matrix`.
        compare: The weights before, `[N, K]`, or a checkpoint that has them in the same place.
        rows, columns: The part shown. Default: up to 16 rows of one group, 32 columns.

    Returns:
        The figure, and the integers shown, uint8 `[rows, columns]`; of a 16-bit matrix its values, float32.
    """
    shown = read_matrix(source, expert, matrix)
    original = _original(compare, expert, matrix, shown.shape)
    bits, corner = shown.quantization.bits, _Corner.of(shown, rows, columns)
    heights = [1.5] if original is None else [1.5, 1.5]
    above: tuple[list[float], list[float]] = ([1.5, 0.5, 0.5], [2.5]) if bits < 16 else ([], [])
    size = f"{shown.shape[0]} x {shown.shape[1]}"
    title = f"Layer {expert[0]}, expert {expert[1]}, {matrix}, {size}: {shown.quantization}"
    figure = new_figure(11, 0.6 + 1.6 * sum(heights + above[1]), title)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(2.4, 1))[0]
    maps, histograms = _column(left, above[0] + heights), _column(right, above[1] + heights)
    if bits < 16:
        _draw_stored(maps[:3], histograms[0], shown, corner)
    first, limit = -len(heights), np.abs(corner.cut(shown.values)).max()
    name = "weight = (integer - zero) x scale" if bits < 16 else "weight"
    _draw_map(maps[first], corner.cut(shown.values), corner, limit, name)
    _draw_histogram(histograms[first], f"{bits}-bit", shown.values, original)
    if original is not None:
        error = shown.values - original
        _draw_map(maps[-1], corner.cut(error), corner, limit, "error, in the same colours")
        _draw_errors(histograms[-1], error, original)
    return figure, corner.cut(shown.levels if bits < 16 else shown.values)


def _column(figure: SubFigure, heights: list[float]) -> np.ndarray:
    return figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]


def _original(
    compare: Tensor | Source, expert: ExpertId, matrix: str, shape: tuple[int, int]
) -> np.ndarray | None:
    if compare is None:
        return None
    original = _numpy(compare) if isinstance(compare, Tensor) else read_matrix(compare, expert, matrix).values
    if original.shape != shape:
        raise OptionError("the other matrix has another shape", expected=shape, found=original.shape)
    return original


def plot_quantized(
    weight: Tensor,
    quantization: Quantization = PAPER[2],
    rows: slice = slice(0, 32),
    columns: slice = slice(0, 32),
) -> tuple[Figure, np.ndarray]:
    """Draw what quantizing `weight [N, K]` would do: original, quantized, and the difference.

    Runs HQQ's solver on the weight's device: seconds for a matrix of Mixtral-8x7B on a CPU.

    Returns:
        The figure, and float32 `[3, rows, columns]`.
    """
    original, shape = _numpy(weight), (weight.shape[0], weight.shape[1])
    after = Matrix(quantize(weight, quantization), shape, quantization).values
    error, corner, name = after - original, _Corner(rows, columns, shape), f"{quantization.bits}-bit"
    maps = np.stack([corner.cut(values) for values in (original, after, error)])
    figure = new_figure(11, 6.6, f"A matrix of {shape[0]} x {shape[1]}, quantized: {quantization}")
    grid = figure.subplot_mosaic("aabbcc;dddeee", height_ratios=(1.6, 1))
    for axes, shown, title in zip("abc", maps, ("original", name, "difference, in the same colours")):
        _draw_map(grid[axes], shown, corner, np.abs(maps).max(), title, bar=axes == "c")
    _draw_histogram(grid["d"], name, after, original)
    _draw_errors(grid["e"], error, original)
    return figure, maps


class _Corner(NamedTuple):
    rows: slice
    columns: slice
    shape: tuple[int, int]

    @classmethod
    def of(cls, matrix: Matrix, rows: slice | None, columns: slice) -> _Corner:
        if rows is None:  # a group's weights are in one column, `step` rows apart, if that comes out even
            group = max(matrix.quantization.group_size, 1)
            step, rest = divmod(matrix.shape[0], group)
            n = min(16, group) if group > 1 else 16
            rows = slice(0, n) if rest or group == 1 else slice(0, n * step, step)
        return cls(rows, columns, matrix.shape)

    def cut(self, array: np.ndarray) -> np.ndarray:
        return array[self.rows, self.columns]

    def groups(self, size: int) -> np.ndarray:
        """The number of each shown weight's group, for groups of `size`: int `[rows, columns]`."""
        n, k = self.shape
        rows, columns = np.arange(n)[self.rows], np.arange(k)[self.columns]
        return (rows[:, None] * k + columns) % (n * k // size)

    def label(self, axes: Axes) -> None:
        """Label rows and columns with their numbers in the matrix."""
        for axis, chosen, size in ((axes.yaxis, self.rows, 0), (axes.xaxis, self.columns, 1)):
            numbers = range(self.shape[size])[chosen]
            at = range(0, len(numbers), max(1, len(numbers) // 8))
            axis.set_ticks(list(at), [str(numbers[i]) for i in at], fontsize=7)
        step = self.rows.step or 1
        axes.set_ylabel("row" if step == 1 else f"row, {step} apart", fontsize=8)


def _draw_stored(panels: np.ndarray, bars: Axes, matrix: Matrix, corner: _Corner) -> None:
    """Draw the integers, the scales and zeros of their groups, and how often each integer is used."""
    n, shown = 2**matrix.quantization.bits, corner.cut(matrix.levels)
    colours = ListedColormap(colormaps["cividis"](np.linspace(0, 1, n)))
    panels[0].imshow(shown, cmap=colours, vmin=-0.5, vmax=n - 0.5, aspect="auto", interpolation="none")
    if n <= 16 and shown.size <= 1024:
        for (row, column), level in np.ndenumerate(shown):
            colour = "white" if level < n / 2 else "black"
            panels[0].text(column, row, level, color=colour, fontsize=6, ha="center", va="center")
    set_labels(panels[0], f"stored: integers of {matrix.quantization.bits} bits")
    corner.label(panels[0])
    groups = corner.groups(matrix.quantization.group_size)
    _draw_groups(panels[1], _numpy(scale_of(matrix.fields)).ravel()[groups], "scale")
    _draw_groups(panels[2], _numpy(zero_of(matrix.fields)).ravel()[groups], "zero")
    shares = np.bincount(matrix.levels.ravel(), minlength=n) / matrix.levels.size
    bars.barh(range(n), shares, color=colours(range(n)), height=0.85 if n <= 16 else 1)
    bars.set_yticks(range(n) if n <= 16 else range(0, n, 32))
    bars.xaxis.set_major_locator(MaxNLocator(5))
    set_labels(bars, f"{n} integers, and how often each is used", "share of the matrix", "integer")


def _draw_groups(axes: Axes, of_weights: np.ndarray, name: str) -> None:
    """Draw a line for each row shown, or one for all if every column is of one group."""
    lines = np.unique(of_weights, axis=0)
    colour, width = (BLUE, 1.4) if len(lines) == 1 else (SKY, 0.6)
    axes.plot(lines.T, drawstyle="steps-mid", color=colour, linewidth=width)
    axes.set_xlim(-0.5, lines.shape[1] - 0.5)
    axes.set_xticks([])
    axes.margins(y=0.15)
    set_labels(axes, f"{name}: one for each column" if len(lines) == 1 else f"{name}: a line for each row")


def _draw_map(
    axes: Axes, shown: np.ndarray, corner: _Corner, limit: float, name: str, bar: bool = True
) -> None:
    image = heat_map(axes, shown, -limit, limit, aspect="auto", interpolation="none")
    set_labels(axes, name, "column")
    corner.label(axes)
    if bar:
        axes.figure.colorbar(image, ax=axes, pad=0.01).ax.tick_params(labelsize=7)


def _draw_histogram(axes: Axes, name: str, values: np.ndarray, original: np.ndarray | None) -> None:
    limit = 3.5 * (values if original is None else original).std()
    bins = np.linspace(-limit, limit, 121).tolist()
    axes.hist(values.ravel(), bins, color=SKY, label=name)
    if original is not None:
        axes.hist(original.ravel(), bins, color=BLACK, histtype="step", linewidth=0.9, label="original")
        axes.legend(fontsize=7, loc="upper left", frameon=False)
    axes.set_yticks([])
    set_labels(axes, f"all {values.size:,} weights", "weight")


def _draw_errors(axes: Axes, error: np.ndarray, original: np.ndarray) -> None:
    rms, of_weights = (float(np.sqrt(np.square(array).mean())) for array in (error, original))
    bins = (np.linspace(-3.5, 3.5, 121) * (rms or 1)).tolist()
    axes.hist(error.ravel(), bins, color=RED)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(6))
    set_labels(axes, f"error: {rms / of_weights:.1%} of the weights (rms {rms:.2g})", "error")
