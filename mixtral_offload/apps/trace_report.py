"""`mixtral-offload trace`: one trace of a file of prompts, its table, and every picture, in a folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from mixtral_offload.analysis.plots import cache as plots_cache
from mixtral_offload.analysis.plots import routing as plots
from mixtral_offload.analysis.plots.timeline import plot_recorded_pass
from mixtral_offload.analysis.recall import collect_states, measure_recall
from mixtral_offload.analysis.recorder import record
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import ConversationError, OptionError
from mixtral_offload.generation.batch import Request, generate_batch
from mixtral_offload.runtime.settings import check_sampling
from mixtral_offload.system.files import replacing


def read_prompts(path: str | Path) -> list[tuple[str, str]]:
    """(set, prompt) of each line; a line is `prompt`, or `set<TAB>prompt` to compare sets of prompts.

    Lines end at newlines only: the other characters at which `str.splitlines` splits may be part of a prompt.

    Raises OptionError for a file that cannot be read, has no prompts, or is for `generate --input` (JSON Lines).
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError("cannot read the prompts", path=path, found=error) from error
    parts = [line.partition("\t") for line in text.split("\n") if line.strip()]
    if not parts:
        raise OptionError("no prompts in this file", path=path, expected="one prompt on each line")
    if Path(path).suffix.lower() == ".jsonl" or all(
        _is_request(line) for line in text.split("\n") if line.strip()
    ):
        raise OptionError(
            "this is a file of JSON Lines, as `mixtral-offload generate --input` takes it", path=path,
            expected="plain text, one prompt on each line, or set<TAB>prompt", found=parts[0][0][:80],
            hint="write the prompts alone into a text file",
        )  # fmt: skip
    return [(before, after) if tab else ("prompts", before) for before, tab, after in parts]


def _is_request(line: str) -> bool:
    """Whether this is a line of a job: a JSON object with a prompt or messages."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and not found.keys().isdisjoint(("prompt", "messages"))


def trace_prompts(model, tokenizer, prompts: Sequence[tuple[str, str]], max_new_tokens: int = 64):
    """Answer every prompt, greedily, each as a conversation of its own. Raises OptionError for one that is too long.

    Returns the trace, the token ids of each text (prompt and answer), and each set's tokens: name -> numbers in the trace.
    """
    requests = [_request(number, tokenizer, of[1], max_new_tokens) for number, of in enumerate(prompts, 1)]
    texts, sets, before = [], {}, 0
    with record(model, tokenizer) as recording:
        for (name, _), request, answer in zip(
            prompts, requests, generate_batch(model, requests, batch_size=1)
        ):
            texts.append([*request.ids, *answer.ids])
            sets.setdefault(name, []).extend(range(before, recording.n_tokens))
            before = recording.n_tokens
    return recording.trace, texts, {name: np.array(numbers) for name, numbers in sets.items()}


def _request(number: int, tokenizer, prompt: str, max_new_tokens: int) -> Request:
    try:
        return Request.chat(tokenizer, prompt, max_new_tokens=max_new_tokens)
    except ConversationError as error:
        raise ConversationError(f"prompt {number}: {error}") from error


def pictures(model, trace: RoutingTrace, texts: Sequence[list[int]], sets: dict[str, np.ndarray]):
    """Yields (name, figure, array) of every picture that this trace can show."""
    yield "activations", *plots.plot_activations(trace)
    yield "cells", *plots.plot_cells(trace)
    yield "usage", *plots.plot_usage({name: trace.usage(tokens) for name, tokens in sets.items()})
    if trace.n_layers > 1:
        yield "transitions", *plots.plot_transitions(trace)
    yield "hit_rates", *plots_cache.plot_hit_rates(trace)
    yield "hit_rates_shared", *plots_cache.plot_hit_rates(trace, shared=True)
    yield "hit_heatmap", *plots_cache.plot_hit_heatmap(trace)
    yield "reuse", *plots_cache.plot_reuse(trace)
    if trace.settings["prefetch"]:
        yield "speculation", *plots_cache.plot_speculation(trace)
    if trace.n_passes > 1:
        yield "timeline", *plot_recorded_pass(trace)
    layers = model.offload.layers
    if trace.n_layers > 1 and all(layer.router for layer in layers):
        recall = measure_recall(layers, collect_states(model, layers, texts))
        yield "recall", *plots_cache.plot_recall(recall)


def write_report(
    model, tokenizer, prompts: Sequence[tuple[str, str]], folder: str | Path, max_new_tokens: int = 64
):
    """Writes trace.safetensors, trace.csv, and a .png and .npy for each picture; returns the trace and the paths.

    Raises OptionError for impossible options, and where the folder cannot be written.
    """
    check_sampling(max_new_tokens, 0.0, 1.0, None)
    folder = Path(folder)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    trace, texts, sets = trace_prompts(model, tokenizer, prompts, max_new_tokens)
    written = [folder / "trace.safetensors", folder / "trace.csv"]
    with _writing(written[0]):
        trace.save(written[0])
    rows = trace.rows()
    with (
        _writing(written[1]),
        replacing(written[1]) as part,
        part.open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.writer(file)
        table.writerow(rows)
        table.writerows(zip(*(column.tolist() for column in rows.values())))
    for name, figure, array in pictures(model, trace, texts, sets):
        with _writing(folder / f"{name}.png"):
            with replacing(folder / f"{name}.png") as part:
                figure.savefig(part, dpi=130, format="png")
            with replacing(folder / f"{name}.npy") as part, part.open("wb") as file:
                np.save(file, array)
        written += [folder / f"{name}.png", folder / f"{name}.npy"]
    return trace, written


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A disk that is full or gone, said in one message."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = getattr(error, "strerror", None) or str(error)[:300]
        hint = "make room, or name another folder"
        raise OptionError("cannot write the report", path=path, found=found, hint=hint) from error
