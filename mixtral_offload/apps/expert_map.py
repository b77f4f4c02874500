"""The experts at work while an answer comes, as a small HTML table.

Reads the live cache and a recorder's newest pass, and changes neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from mixtral_offload.analysis.plots.routing import CELLS
from mixtral_offload.analysis.plots.style import GREEN, SKY
from mixtral_offload.analysis.recorder import Recorder
from mixtral_offload.core.misses import COPY
from mixtral_offload.core.trace import COMPUTED, HIT, MISS, PREFETCHED
from mixtral_offload.runtime.offload import OffloadedModel

#: an expert now: None, "cached", or of the newest token HIT, PREFETCHED, COMPUTED or MISS
State: TypeAlias = int | str | None
#: background and sign of a cell
STYLES: dict[State, tuple[str, str]] = {
    None: ("#FFFFFF", ""),
    "cached": ("#DDDDDD", ""),
    HIT: ("#0072B2", "●"),
    PREFETCHED: (SKY, "▲"),
    COMPUTED: (GREEN, "◆"),
    MISS: (CELLS["stall"], "✕"),
}
MEANINGS = (
    (HIT, "used, was in the cache"),
    (PREFETCHED, "used, a prediction had started its copy"),
    (COMPUTED, "used, computed by the CPU"),
    (MISS, "used, had to be copied"),
    ("cached", "in the cache"),
)


@contextmanager
def watch(model: OffloadedModel) -> Iterator[Recorder]:
    """Record passes for `Recorder.last_pass`, without effect on the cache and other recorders."""
    recorder = Recorder(model)
    try:
        yield recorder
    finally:
        recorder.stop()


def expert_grid(model: OffloadedModel, recorder: Recorder | None = None) -> list[list[State]]:
    """Return the state of every expert, `[layers][experts]`. Without a recorder, no token is shown."""
    cache, checkpoint = model.offload.cache, model.offload.checkpoint
    with cache.lock:
        cached = [set(cache.contents(layer)) for layer in checkpoint.layers]
        newest = recorder.last_pass() if recorder else []
    experts = range(checkpoint.n_experts)
    grid: list[list[State]] = [["cached" if expert in of else None for expert in experts] for of in cached]
    for row, uses in zip(grid, newest):
        for expert, outcome in uses.items():
            row[expert] = outcome
    return grid


def grid_html(model: OffloadedModel, recorder: Recorder | None = None) -> str:
    """Draw the grid as a table, a row for each layer, with its legend."""
    grid = expert_grid(model, recorder)
    size = 18 if len(grid) <= 12 else 9
    head = "".join(f"<th>{expert}</th>" for expert in range(len(grid[0])))
    rows = "".join(
        f"<tr><th>{layer}</th>{''.join(_cell(state, size) for state in row)}</tr>"
        for layer, row in zip(model.offload.checkpoint.layers, grid)
    )
    hidden = {COMPUTED} if model.offload.cache.misses.mode == COPY else set()
    legend = "".join(
        f"<div>{_swatch(state)} {meaning}</div>" for state, meaning in MEANINGS if state not in hidden
    )
    style = f"border-collapse:collapse;font-size:{min(11, size)}px;line-height:1;text-align:center"
    return (
        '<div class="mo-experts" style="display:flex;gap:14px;align-items:flex-start">'
        f'<table style="{style}"><tr><th></th>{head}</tr>{rows}</table>'
        '<div style="font-size:12px;line-height:1.6">experts of each layer<br>for the newest token'
        f"{legend}</div></div>"
    )


def _cell(state: State, size: int) -> str:
    colour, sign = STYLES[state]
    style = f"width:{size}px;height:{size}px;padding:0;background:{colour};color:#fff;border:1px solid #bbb"
    return f'<td style="{style}">{sign}</td>'


def _swatch(state: State) -> str:
    colour, sign = STYLES[state]
    style = (
        "display:inline-block;vertical-align:middle;width:14px;height:14px;line-height:14px;text-align:center;"
        f"background:{colour};color:#fff;border:1px solid #bbb"
    )
    return f'<span style="{style}">{sign}</span>'
