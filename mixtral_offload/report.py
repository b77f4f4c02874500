"""`mixtral-offload trace`: one trace of a file of prompts, its table, and every picture, in a folder."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from . import plots, plots_cache
from .errors import OptionError
from .files import replacing
from .prefetch import find_gates
from .recorder import record
from .speculation import collect_states, measure_recall
from .trace import RoutingTrace


def read_prompts(path: str | Path) -> list[tuple[str, str]]:
    """(set, prompt) of each line; a line is `prompt`, or `set<TAB>prompt` to compare sets of prompts."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError("cannot read the prompts", path=path, found=error) from error
    parts = [line.partition("\t") for line in lines if line.strip()]
    if not parts:
        raise OptionError("no prompts in this file", path=path, expected="one prompt on each line")
    return [(before, after) if tab else ("prompts", before) for before, tab, after in parts]


def trace_prompts(model, tokenizer, prompts: Sequence[tuple[str, str]], max_new_tokens: int = 64):
    """Answer every prompt, greedily, each as a conversation of its own.

    Returns the trace, the token ids of each text (prompt and answer), and each set's tokens: name -> numbers in the trace.
    """
    texts, sets = [], {}
    with record(model, tokenizer) as recording:
        for name, prompt in prompts:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            ).to(model.device)
            before = recording.n_tokens
            with torch.inference_mode():
                out = model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
            texts.append(out[0].tolist())
            sets.setdefault(name, []).extend(range(before, recording.n_tokens))
    return recording.trace, texts, {name: np.array(numbers) for name, numbers in sets.items()}


def pictures(model, trace: RoutingTrace, texts: Sequence[list[int]], sets: dict[str, np.ndarray]):
    """Yields (name, figure, array) of every picture that this trace can show."""
    yield "activations", *plots.plot_activations(trace)
    yield "cells", *plots.plot_cells(trace)
    yield "usage", *plots.plot_usage({name: trace.usage(tokens) for name, tokens in sets.items()})
    yield "transitions", *plots.plot_transitions(trace)
    yield "hit_rates", *plots_cache.plot_hit_rates(trace)
    yield "hit_rates_shared", *plots_cache.plot_hit_rates(trace, shared=True)
    yield "hit_heatmap", *plots_cache.plot_hit_heatmap(trace)
    yield "reuse", *plots_cache.plot_reuse(trace)
    if trace.settings["prefetch"]:
        yield "speculation", *plots_cache.plot_speculation(trace)
    if trace.n_passes > 1:
        yield "timeline", *plots_cache.plot_timeline(trace)
    gates = find_gates(model, model.offload.modules)
    recall = measure_recall(gates, collect_states(model, gates, texts))
    yield "recall", *plots_cache.plot_recall(recall)


def write_report(
    model, tokenizer, prompts: Sequence[tuple[str, str]], folder: str | Path, max_new_tokens: int = 64
):
    """Writes trace.safetensors, trace.csv, and a .png and .npy for each picture; returns the trace and the paths."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError("cannot write there", path=folder, found=error) from error
    trace, texts, sets = trace_prompts(model, tokenizer, prompts, max_new_tokens)
    written = [folder / "trace.safetensors", folder / "trace.csv"]
    trace.save(written[0])
    rows = trace.rows()
    with replacing(written[1]) as part, part.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(rows)
        table.writerows(zip(*(column.tolist() for column in rows.values())))
    for name, figure, array in pictures(model, trace, texts, sets):
        with replacing(folder / f"{name}.png") as part:
            figure.savefig(part, dpi=130, format="png")
        with replacing(folder / f"{name}.npy") as part, part.open("wb") as file:
            np.save(file, array)
        written += [folder / f"{name}.png", folder / f"{name}.npy"]
    return trace, written
