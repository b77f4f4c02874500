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
    order of the router's choice, whatever order the experts came in, so that no cache size changes a single bit.
    """
    offload, layer = module.offload, module.layer
    serve = _serve_token if len(top_k_index) == 1 else _serve_tokens
    y = serve(offload, layer, hidden_states, top_k_index, top_k_weights)  # [T, k, H]
    return (y * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


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
    rows = dict(enumerate(order.split(counts)))  # expert -> where its results go
    y = x.new_empty(n_tokens * top_k, x.shape[-1])
    began_s = time.perf_counter()
    with offload.cache.lock:
        needed = [expert for expert, n in enumerate(counts) if n]
        for expert, views in offload.cache.serve(layer, needed, meanwhile):
            for part in rows[expert].split(ROWS):
                y[part] = offload.run(x[part // top_k], views)
        _record(offload, layer, top_k_index, top_k_weights, began_s)
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
