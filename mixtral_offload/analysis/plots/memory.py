"""The memory plan as a picture: what would be on the device, in RAM and on disk, and what is free.

Colours differ in lightness too, and what is read only once is an empty outline: the picture can be read in
grey.
"""

from __future__ import annotations

import textwrap
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from mixtral_offload.analysis.plots.style import BLACK, GREEN, ORANGE, SKY, YELLOW, new_figure, plain
from mixtral_offload.errors import OptionError
from mixtral_offload.runtime.memory import DEVICE_PARTS, DISK_PARTS, RAM_PARTS, MemoryUse
from mixtral_offload.units import gb

ROWS = ("device", "RAM", "disk")
#: columns of the array: (row, part)
COLUMNS = tuple(zip(
    [row for row, parts in zip(ROWS, (DEVICE_PARTS, RAM_PARTS, DISK_PARTS)) for _ in parts],
    DEVICE_PARTS + RAM_PARTS + DISK_PARTS,
))  # fmt: skip
STORED, ONCE = RAM_PARTS[0], "on disk, read at the start only"
LOOKS = {  # face, line and hatch; in each bar, light parts are next to dark ones
    "dense part": ("0.3", "white", ""),
    "KV cache": (YELLOW, "white", ""),
    "scratch": ("0.74", "white", ".."),
    "resident experts": (GREEN, "white", ""),
    "cache slots": (ORANGE, "white", ""),
    "staging": ("#FBE3B5", ORANGE, "xxxx"),
    STORED: (SKY, "white", "//"),
    ONCE: ("white", "0.7", "\\\\"),
}
FRAME: dict[str, Any] = {"fill": False, "edgecolor": BLACK, "linestyle": (0, (4, 2)), "linewidth": 1.1}
FRAME_AT_MOST = 2.5  # times the longest bar; a frame around more would leave bars too short to read
WIDTH, BARS_WIDTH = 10.5, 7.2  # inches, of the figure and of its axes; the rest is for words
LETTER = 0.06  # inches, about a letter's width in the labels' 7.5 points


class Piece(NamedTuple):
    """One part of a bar, in bytes. look: its name in LOOKS."""

    row: int
    part: str
    left: int
    n_bytes: int
    look: str


def plot_memory(uses: MemoryUse | dict[str, MemoryUse]) -> tuple[Figure, np.ndarray]:
    """Draw three bars for each use, all on one scale, with the plan's reasons below.

    A dashed frame is the memory that is free to use, if it is not far larger than the bars. Where device and
    RAM are one memory, there is one frame around both, and RAM's bar begins where the device's ends.

    Args:
        uses: Of `memory_use`, or name -> such, to compare.

    Returns:
        The figure, and int64 `[uses, parts]`, bytes, parts as in COLUMNS.

    Raises:
        OptionError: There is no use.
    """
    named = uses if isinstance(uses, dict) else {"": uses}
    if not named:
        raise OptionError("no memory to show", expected="at least one MemoryUse", found=uses)
    pieces = [_pieces(use) for use in named.values()]
    longest = max(piece.left + piece.n_bytes for of in pieces for piece in of)
    frames = [
        [frame for frame in _frames(use) if frame[2] <= FRAME_AT_MOST * longest] for use in named.values()
    ]
    limit = 1.02 * max([longest, *(width for of in frames for _, _, width in of)])
    reasons = [_reasons(use) for use in named.values()]
    height = 0.8 + sum(2.1 + 0.2 * bool(name) + 0.13 * text.count("\n") for name, text in zip(named, reasons))
    figure = new_figure(WIDTH, height, "Memory: what is where")
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)  # see `new_figure`
    engine.set(rect=(0, 0, (BARS_WIDTH + 0.75) / WIDTH, 1), hspace=0.06)
    grid = figure.subplots(len(named), squeeze=False)[:, 0]
    for axes, (name, use), of, framed, text in zip(grid, named.items(), pieces, frames, reasons):
        _scale(axes, name, use, limit, text)
        _sums(axes, use, [piece for piece in of if not _draw(axes, piece, limit)])
        for first, n_rows, width in framed:
            axes.add_patch(Rectangle((0, first - 0.43), width, n_rows - 0.14, **FRAME))
    _legend(figure, {piece.look for of in pieces for piece in of}, any(frames))
    return figure, np.array([_numbers(use) for use in named.values()], np.int64)


def _numbers(use: MemoryUse) -> list[int]:
    by_row = dict(zip(ROWS, (use.device, use.ram, use.disk)))
    return [by_row[row].get(part, 0) for row, part in COLUMNS]


def _pieces(use: MemoryUse) -> list[Piece]:
    ends = [0, 0, 0]
    if use.shared_memory:
        ends[1] = use.device_bytes  # one memory: RAM's bar begins where the device's ends
    pieces = []
    for (name, part), n_bytes in zip(COLUMNS, _numbers(use)):
        row, look = ROWS.index(name), part
        if name == "disk":
            look = STORED if part == "experts" and use.runs_from_disk else ONCE
        if n_bytes:
            pieces.append(Piece(row, part, ends[row], n_bytes, look))
            ends[row] += n_bytes
    return pieces


def _frames(use: MemoryUse) -> list[tuple[int, int, int]]:
    """(first row, rows, bytes) of each memory that has a budget."""
    if use.shared_memory:
        return [(0, 2, use.device_budget)]
    return [(0, 1, use.device_budget), (1, 1, use.ram_budget)]


def _reasons(use: MemoryUse) -> str:
    bullet, indent = "• ", "   "
    fill = partial(textwrap.fill, width=150, initial_indent=bullet, subsequent_indent=indent)
    return "\n".join(map(fill, use.plan.reasons))


def _scale(axes: Axes, name: str, use: MemoryUse, limit: float, reasons: str) -> None:
    """Label an empty group and its axis, in kB, MB, GB or TB."""
    head = (
        str(use.plan).split("\n")[0].rpartition(" (")[0]
    )  # without its sums, which are of the experts alone
    above: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(head, (0, 1), (0, 5), fontsize=8.5, parse_math=False, **above)
    axes.set_title(name, loc="left", pad=19, fontsize=10, fontweight="bold", parse_math=False)
    power = min(max(int(np.log10(limit)) // 3, 1), 4)
    unit = {1: "kB", 2: "MB", 3: "GB", 4: "TB"}[power]
    axes.xaxis.set_major_formatter(lambda n_bytes, _: f"{n_bytes / 1000**power:g} {unit}")
    axes.tick_params(axis="x", labelsize=7.5)
    axes.set_xlim(0, limit)
    axes.set_ylim(2.5, -0.55)
    axes.set_yticks(range(3), ROWS, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(reasons, loc="left", fontsize=7.5, color="0.25", parse_math=False)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    plain(axes)


def _draw(axes: Axes, piece: Piece, limit: float) -> bool:
    """Draw one part of a bar, with as much of its name and size as fits; False if neither does."""
    face, line, hatch = LOOKS[piece.look]
    bar: dict[str, Any] = {"color": face, "edgecolor": line, "hatch": hatch, "linewidth": 0.8}
    axes.barh(piece.row, piece.n_bytes, 0.7, piece.left, **bar)
    size = gb(piece.n_bytes)
    n_letters = BARS_WIDTH * piece.n_bytes / limit / LETTER - 1
    if len(size) > n_letters:
        return False
    axes.text(
        piece.left + piece.n_bytes / 2,
        piece.row,
        f"{piece.part}\n{size}" if len(piece.part) <= n_letters else size,
        ha="center",
        va="center",
        fontsize=7.5,
        color="white" if piece.look == "dense part" else BLACK,
        path_effects=[withStroke(linewidth=2.5, foreground=face)] if hatch else None,
    )
    return True


def _sums(axes: Axes, use: MemoryUse, unlabelled: list[Piece]) -> None:
    """Write at each bar its sum, what is free, and the parts that were too small for a label."""
    device, ram = (f" of {gb(n_bytes)} free" for n_bytes in (use.device_budget, use.ram_budget))
    if use.shared_memory:
        device = ram = ""
        both = gb(use.device_bytes + use.ram_bytes)
        _note(axes, 1.2, f"one memory: {both} of {gb(use.device_budget)} free", fontweight="bold")
        if use.ram:
            axes.plot([use.device_bytes] * 2, [0.35, 0.65], color="0.4", linewidth=0.8)
    disk = ", experts read while running" if use.runs_from_disk else ", read at the start only"
    sums = (use.device_bytes, device), (use.ram_bytes, ram), (use.disk_bytes, disk)
    for row, (n_bytes, more) in enumerate(sums):
        parts = [f"{piece.part} {gb(piece.n_bytes)}" for piece in unlabelled if piece.row == row]
        # not broken within a part
        whole = ", ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)
        lines = [(gb(n_bytes) if n_bytes else "0") + more, *textwrap.wrap(whole, 42)]
        _note(axes, 0.8 if row == 1 and use.shared_memory else row, "\n".join(lines))


def _note(axes: Axes, row: float, text: str, **settings: Any) -> None:
    where = axes.get_yaxis_transform()
    axes.text(1.012, row, text, transform=where, va="center", fontsize=7.5, in_layout=False, **settings)


def _legend(figure: Figure, looks: set[str], framed: bool) -> None:
    handles = [
        Patch(facecolor=face, edgecolor=line, hatch=hatch, label=name)
        for name, (face, line, hatch) in LOOKS.items()
        if name in looks
    ]
    if framed:
        handles.append(Patch(**FRAME, label="free to use"))
    n_columns = len(handles) if len(handles) <= 6 else -(-len(handles) // 2)
    figure.legend(handles=handles, loc="outside lower left", ncols=n_columns, fontsize=8, frameon=False)
