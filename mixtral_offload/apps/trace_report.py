"""`mixtral-offload trace`: the trace of a file of prompts, its table, and every picture, in a folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from mixtral_offload.analysis.plots import cache as plots_cache
from mixtral_offload.analysis.plots import routing as plots
from mixtral_offload.analysis.plots.timeline import plot_recorded_pass
from mixtral_offload.analysis.recall import collect_states, measure_recall
from mixtral_offload.analysis.recorder import record
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import ConversationError, OptionError
from mixtral_offload.generation.batch import GenerationRequest, generate_batch
from mixtral_offload.runtime.offload import OffloadedModel
from mixtral_offload.runtime.settings import check_sampling
from mixtral_offload.system.files import replacing


def read_prompts(path: str | Path) -> list[tuple[str, str]]:
    """Read (set, prompt) of each line; a line is `prompt`, or `set<TAB>prompt` to compare sets of prompts.

    Raises:
        OptionError: The file cannot be read, has no prompts, or is for `generate --input` (JSON Lines).
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError("cannot read the prompts", path=path, found=error) from error
    # not `splitlines`: the other characters at which it splits may be part of a prompt
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise OptionError("no prompts in this file", path=path, expected="one prompt on each line")
    if Path(path).suffix.lower() == ".jsonl" or all(_is_request(line) for line in lines):
        raise OptionError(
            "this is a file of JSON Lines, as `mixtral-offload generate --input` takes it",
            path=path,
            expected="plain text, one prompt on each line, or set<TAB>prompt",
            found=lines[0].partition("\t")[0][:80],
            hint="write the prompts alone into a text file",
        )
    parts = (line.partition("\t") for line in lines)
    return [(before, after) if tab else ("prompts", before) for before, tab, after in parts]


def _is_request(line: str) -> bool:
    """Tell whether this is a line of a job: a JSON object with a prompt or messages."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and not found.keys().isdisjoint(("prompt", "messages"))


def trace_prompts(
    model: OffloadedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[str, str]],
    max_new_tokens: int = 64,
) -> tuple[RoutingTrace, list[list[int]], dict[str, np.ndarray]]:
    """Answer every prompt, greedily, each as a conversation of its own.

    Returns:
        The trace; the token ids of each text (prompt and answer); each set's tokens, by number.

    Raises:
        OptionError: A prompt is too long.
    """
    requests = [_request(number, tokenizer, of[1], max_new_tokens) for number, of in enumerate(prompts, 1)]
    texts: list[list[int]] = []
    sets: dict[str, list[int]] = {}
    before = 0
    with record(model, tokenizer) as recording:
        answers = generate_batch(model, requests, batch_size=1)
        for (name, _), request, answer in zip(prompts, requests, answers):
            texts.append([*request.ids, *answer.ids])
            sets.setdefault(name, []).extend(range(before, recording.n_tokens))
            before = recording.n_tokens
    trace = recording.trace
    assert trace is not None  # it is there at the end of `record`
    return trace, texts, {name: np.array(numbers) for name, numbers in sets.items()}


def _request(
    number: int, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int
) -> GenerationRequest:
    try:
        return GenerationRequest.chat(tokenizer, prompt, max_new_tokens=max_new_tokens)
    except ConversationError as error:
        raise ConversationError(f"prompt {number}: {error}") from error


def pictures(
    model: OffloadedModel, trace: RoutingTrace, texts: Sequence[list[int]], sets: dict[str, np.ndarray]
) -> Iterator[tuple[str, Figure, np.ndarray]]:
    """Draw every picture that this trace can show: (name, figure, the array that it shows).

    Args:
        texts, sets: As `trace_prompts` returns them.
    """
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
    model: OffloadedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[str, str]],
    folder: str | Path,
    max_new_tokens: int = 64,
) -> tuple[RoutingTrace, list[Path]]:
    """Write trace.safetensors, trace.csv, and a .png and .npy for each picture.

    Returns:
        The trace and the paths.

    Raises:
        OptionError: An option is impossible, or the folder cannot be written.
    """
    check_sampling(max_new_tokens, 0.0, 1.0, None)
    folder = Path(folder)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    trace, texts, sets = trace_prompts(model, tokenizer, prompts, max_new_tokens)
    written = [folder / "trace.safetensors", folder / "trace.csv"]
    with _writing(written[0]):
        trace.save(written[0])
    with _writing(written[1]):
        _write_table(trace, written[1])
    for name, figure, array in pictures(model, trace, texts, sets):
        image, numbers = folder / f"{name}.png", folder / f"{name}.npy"
        with _writing(image):
            with replacing(image) as part:
                figure.savefig(part, dpi=130, format="png")
            with replacing(numbers) as part, part.open("wb") as file:
                np.save(file, array)
        written += [image, numbers]
    return trace, written


def _write_table(trace: RoutingTrace, path: Path) -> None:
    rows = trace.rows()
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(rows)
        table.writerows(zip(*(column.tolist() for column in rows.values())))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Report a disk that is full or gone in one message."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = getattr(error, "strerror", None) or str(error)[:300]
        hint = "make room, or name another folder"
        raise OptionError("cannot write the report", path=path, found=found, hint=hint) from error
