"""What the experts do while an answer comes, as a small HTML table.

Knows the live cache and a recorder's newest pass. Reads only: whoever looks changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mixtral_offload.analysis.plots.routing import CELLS
from mixtral_offload.analysis.plots.style import SKY
from mixtral_offload.analysis.recorder import Recorder
from mixtral_offload.core.trace import HIT, MISS, PREFETCHED

#: how a cell looks: background, sign
LOOKS = {
    None: ("#FFFFFF", ""),
    "held": ("#DDDDDD", ""),
    HIT: ("#0072B2", "●"),
    PREFETCHED: (SKY, "▲"),
    MISS: (CELLS["stall"], "✕"),
}
MEANINGS = (
    (HIT, "used, was in the cache"),
    (PREFETCHED, "used, a guess had started its copy"),
    (MISS, "used, had to be copied"),
    ("held", "in the cache"),
)


@contextmanager
def watch(model) -> Iterator[Recorder]:
    """A recorder for `Recorder.last_pass`, which leaves the cache and other recorders alone."""
    recorder = Recorder(model)
    try:
        yield recorder
    finally:
        recorder.stop()


def expert_grid(model, recorder: Recorder | None = None) -> list[list]:
    """`[layers][experts]` of None, "held" (in the cache), or for the newest token's experts HIT, PREFETCHED or MISS."""
    cache, checkpoint = model.offload.cache, model.offload.checkpoint
    with cache.lock:
        held = [set(cache.contents(layer)) for layer in checkpoint.layers]
        newest = recorder.last_pass() if recorder else []
    grid = [["held" if expert in of else None for expert in range(checkpoint.n_experts)] for of in held]
    for row, uses in zip(grid, newest):
        for expert, outcome in uses.items():
            row[expert] = outcome
    return grid


def grid_html(model, recorder: Recorder | None = None) -> str:
    """The grid as a table, a row for each layer, with its legend."""
    grid = expert_grid(model, recorder)
    size = 18 if len(grid) <= 12 else 9
    head = "".join(f"<th>{expert}</th>" for expert in range(len(grid[0])))
    rows = "".join(
        f"<tr><th>{layer}</th>{''.join(_cell(look, size) for look in row)}</tr>"
        for layer, row in zip(model.offload.checkpoint.layers, grid)
    )
    legend = "".join(f"<div>{_swatch(look)} {meaning}</div>" for look, meaning in MEANINGS)
    style = f"border-collapse:collapse;font-size:{min(11, size)}px;line-height:1;text-align:center"
    return (
        '<div class="mo-experts" style="display:flex;gap:14px;align-items:flex-start">'
        f'<table style="{style}"><tr><th></th>{head}</tr>{rows}</table>'
        f'<div style="font-size:12px;line-height:1.6">experts of each layer<br>for the newest token{legend}</div></div>'
    )


def _cell(look, size: int) -> str:
    colour, sign = LOOKS[look]
    style = f"background:{colour};color:#fff;border:1px solid #bbb;width:{size}px;height:{size}px;padding:0"
    return f'<td style="{style}">{sign}</td>'


def _swatch(look) -> str:
    colour, sign = LOOKS[look]
    style = f"display:inline-block;vertical-align:middle;width:14px;height:14px;line-height:14px;text-align:center;background:{colour};color:#fff;border:1px solid #bbb"
    return f'<span style="{style}">{sign}</span>'
