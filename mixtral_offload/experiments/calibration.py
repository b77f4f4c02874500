"""Measure `DeviceCosts` on a live offloaded model: the times of one copy, one layer and one expert.

Knows no replays; `experiments/baselines.py` switches caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from transformers import LogitsProcessorList

from mixtral_offload.core.costs import DeviceCosts
from mixtral_offload.experiments.baselines import (
    check_can_switch,
    copy_seconds,
    device_time,
    smallest_cache,
    switched,
)
from mixtral_offload.runtime.offload import OffloadedModel
from mixtral_offload.units import check_whole

LAYERS, EXPERTS, EXPERTS_END, LAYERS_END = range(4)


@torch.inference_mode()
def measure_costs(model: OffloadedModel, n_passes: int = 24) -> DeviceCosts:
    """Measure the device that this model runs on: `copy_seconds`, and one token's compute by parts.

    The model generates the same token repeatedly, so that all its experts are on the device after the first
    pass. The context is short: on a long one, attention takes longer. Only passes of one token are measured:
    what more tokens add is 0. host_s is 0, too: time in which the device waits for the host is in
    attention_s.

    Raises:
        OptionError: Every expert is resident, the model is being recorded, or n_passes is less than 4.
    """
    offload = model.offload
    check_can_switch(model, "measure", "it copies nothing")
    check_whole("n_passes", n_passes, 4)
    n_layers = len(offload.checkpoint.layers)
    with switched(model, smallest_cache(model)):
        parts = token_parts(mark_parts(model, n_passes), n_layers)
        # marks inside a token delay it (on CUDA, the host waits for the device each time): scale to one
        # without
        begins = [at for what, at in mark_parts(model, n_passes, inside=False) if what == LAYERS]
    scale = statistics.median(b - a for a, b in pairwise(begins[2:])) / sum(parts)
    token_s, attention_s, experts_s = (scale * part for part in parts)
    assert offload.cache.engine is not None  # see `check_can_switch`
    return DeviceCosts(
        copy_s=copy_seconds(model),
        attention_s=attention_s / n_layers,
        expert_s=experts_s / n_layers / offload.checkpoint.top_k,
        token_s=token_s,
        chunks=offload.cache.engine.n_chunks,
        predict_s=predict_seconds(model),
    )


@torch.inference_mode()
def predict_seconds(model: OffloadedModel, n_predictions: int = 40) -> float:
    """Measure how long the model's prefetcher takes after the first layer, in seconds; 0 without one."""
    prefetcher, times = model.offload.prefetcher, []
    if prefetcher is None:
        return 0.0
    hidden = torch.zeros(1, 1, model.config.hidden_size, dtype=model.dtype, device=model.device)
    for _ in range(n_predictions):
        begin = device_time(model)
        ranked = prefetcher.rank(0, hidden)
        _ = ranked is None or ranked.tolist()
        times.append(device_time(model) - begin)
    return statistics.median(times)


def token_parts(marks: list[tuple[int, float]], n_layers: int) -> tuple[float, float, float]:
    """Return medians of a token's seconds (outside the layers, in the layers but not in experts, in experts).

    Args:
        marks: Of `mark_parts`.
    """
    of_token = 2 * n_layers + 2
    passes = [marks[i : i + of_token] for i in range(0, len(marks), of_token)][2:]  # the first ones warm up
    outside = [after[0][1] - now[-1][1] for now, after in pairwise(passes)]
    experts = [sum(end - begin for (_, begin), (_, end) in zip(of[1:-1:2], of[2:-1:2])) for of in passes]
    layers = [of[-1][1] - of[0][1] for of in passes]
    experts_s = statistics.median(experts)
    return statistics.median(outside), statistics.median(layers) - experts_s, experts_s


def mark_parts(model: OffloadedModel, n_passes: int, inside: bool = True) -> list[tuple[int, float]]:
    """Generate, and return what begins or ends, and when, in order.

    Args:
        inside: Mark all of LAYERS, EXPERTS, EXPERTS_END and LAYERS_END; False: only where the layers begin.
    """
    marks: list[tuple[int, float]] = []
    modules = [model.get_submodule(layer.name) for layer in model.offload.layers]
    blocks = [block for layer in model.offload.layers if (block := layer.block()) is not None]
    hooks = [blocks[0].register_forward_pre_hook(_marker(model, marks, LAYERS, wait=inside))]
    if inside:
        hooks += [module.register_forward_pre_hook(_marker(model, marks, EXPERTS)) for module in modules]
        hooks += [module.register_forward_hook(_marker(model, marks, EXPERTS_END)) for module in modules]
        hooks.append(blocks[-1].register_forward_hook(_marker(model, marks, LAYERS_END)))
    try:
        _repeat_token(model, n_passes)
    finally:
        for hook in hooks:
            hook.remove()
    return marks


def _marker(
    model: OffloadedModel, marks: list[tuple[int, float]], what: int, wait: bool = True
) -> Callable[..., None]:
    def hook(*arguments: Any) -> None:
        marks.append((what, device_time(model) if wait else time.perf_counter()))

    return hook


def _repeat_token(model: OffloadedModel, n_passes: int) -> None:
    """Generate the same token repeatedly, so that every pass does identical work."""
    end = model.generation_config.eos_token_id  # one, several or None
    ends = end if isinstance(end, list) else [end]
    token = next(token for token in range(len(ends) + 1) if token not in ends)

    def only_this(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, token] = torch.inf
        return scores

    ids = torch.full((1, 1), token, device=model.device)
    length = {"max_new_tokens": n_passes, "min_new_tokens": n_passes, "do_sample": False, "pad_token_id": 0}
    mask, processors = torch.ones_like(ids), LogitsProcessorList([only_this])
    model.generate(ids, attention_mask=mask, logits_processor=processors, **length)
