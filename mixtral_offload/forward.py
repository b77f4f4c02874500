"""What transformers calls in place of a layer's experts: route, serve, run, sum.

Knows one layer's tokens and the cache that serves it. Knows nothing of how a model is built.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .experts import ROWS


def offloaded_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """transformers' experts function: `hidden_states [T, H]`, `top_k_index, top_k_weights [T, k]` -> `[T, H]`.

    Tokens are sorted by expert once; each expert comes once and runs for all of its tokens. Results are summed in the
    order of the router's choice, whatever order the experts came in, so that no cache size changes a single bit. Padding
    costs nothing: it gets zeros (see `skip_padding`).
    """
    real = module.offload.real_tokens
    if real is None:
        return _experts(module, hidden_states, top_k_index, top_k_weights)
    y = torch.zeros_like(hidden_states)
    y[real] = _experts(module, hidden_states[real], top_k_index[real], top_k_weights[real])
    return y


def skip_padding(base_model: nn.Module, offload) -> None:
    """From now on, tokens that the attention mask `[sequences, columns]` calls padding use no experts. The host waits for
    the mask, once for each prompt of more than one sequence."""

    def find(module, arguments: tuple, named: dict) -> None:
        ids = named.get("input_ids", arguments[0] if arguments else named.get("inputs_embeds"))
        mask = named.get("attention_mask", arguments[1] if len(arguments) > 1 else None)
        offload.real_tokens = _real_tokens(ids.shape[:2], mask)

    def forget(*_) -> None:
        offload.real_tokens = None

    base_model.register_forward_pre_hook(find, with_kwargs=True)
    base_model.register_forward_hook(forget, always_call=True)


def _real_tokens(shape: tuple[int, int], mask: Tensor | None) -> Tensor | None:
    """Which of the pass's tokens, all sequences after each other, are no padding: int64 [n]; None where all are real."""
    if 1 in shape or not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    mask = mask[:, -shape[1] :].reshape(-1).bool()
    return None if mask.all() else mask.nonzero()[:, 0]


def _experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    offload, layer = module.offload, module.layer
    if offload.options.unpack:
        return _grouped(module, hidden_states, top_k_index, top_k_weights)
    serve = _serve_token if len(top_k_index) == 1 else _serve_tokens
    y = serve(offload, layer, hidden_states, top_k_index, top_k_weights)  # [T, k, H]
    return (y * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def _grouped(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Everything is on the device and as transformers has it: its own grouped product, one for all experts."""
    offload, began_s = module.offload, time.perf_counter()
    y = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden_states, top_k_index, top_k_weights)
    offload.cache.count_residents(module.layer, {*top_k_index.flatten().tolist()})
    _record(offload, module.layer, top_k_index, top_k_weights, began_s)
    return y


def _serve_token(offload, layer: int, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of one token, x `[1, H]`: nothing to sort."""
    chosen, meanwhile = _read(offload, layer, top_k_index[0], 1)
    results = {}
    began_s = time.perf_counter()
    with offload.cache.lock:
        for expert, views in offload.cache.serve(layer, sorted(chosen), meanwhile):
            results[expert] = offload.run(x, views)
        _record(offload, layer, top_k_index, top_k_weights, began_s)
    return torch.cat([results[expert] for expert in chosen]).unsqueeze(0)


def _serve_tokens(offload, layer: int, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of many tokens, x `[T, H]`, sorted by expert."""
    n_tokens, top_k = top_k_index.shape
    flat = top_k_index.reshape(-1)
    order = flat.argsort(stable=True)
    counts = flat.new_zeros(offload.checkpoint.n_experts).scatter_add_(0, flat, torch.ones_like(flat))
    counts, meanwhile = _read(offload, layer, counts, n_tokens)
    grouped = x[
        order // top_k
    ]  # [T * k, H], by expert: results take the place of the tokens that they are for
    rows = grouped.split(counts)
    began_s = time.perf_counter()
    with offload.cache.lock:
        needed = [expert for expert, n in enumerate(counts) if n]
        for expert, views in offload.cache.serve(layer, needed, meanwhile):
            for part in rows[expert].split(ROWS):
                part.copy_(offload.run(part, views))
        _record(offload, layer, top_k_index, top_k_weights, began_s)
    y = torch.empty_like(grouped)
    y[order] = grouped
    return y.view(n_tokens, top_k, -1)


def _read(offload, layer: int, numbers: Tensor, n_tokens: int) -> tuple[list[int], Callable[[], None] | None]:
    """`numbers` (int64) as a list, and what starts the guesses to be made before this layer's experts (or None).

    Here, once per layer, the host waits for the device: all of the layer up to its routing is enqueued by then. Guesses
    that the device has made since come to the host on the way.
    """
    prefetcher = offload.prefetcher
    if prefetcher is None:
        return numbers.tolist(), None
    guesses, n = prefetcher.before(layer, n_tokens), len(numbers)
    prefetcher.start_late()
    if isinstance(guesses, Tensor):
        found, shape = torch.cat((numbers, guesses.flatten())).tolist(), guesses.shape
        numbers, guesses = found[:n], [found[i : i + shape[1]] for i in range(n, len(found), shape[1])]
    else:
        numbers = numbers.tolist()
    return numbers, guesses and partial(prefetcher.start, prefetcher.number(layer), guesses)


def _record(offload, layer: int, top_k_index: Tensor, top_k_weights: Tensor, began_s: float) -> None:
    if offload.recorder is not None:
        offload.recorder.add(layer, top_k_index, top_k_weights, began_s)


ALL_EXPERTS_FUNCTIONS.register("offloaded", offloaded_experts)
