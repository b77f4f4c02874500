"""What transformers calls in place of a layer's experts: fetch them, run them, sum their results.

Knows one layer's tokens and the cache. Knows nothing of how a model is built.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mixtral_offload.errors import OptionError
from mixtral_offload.runtime.cache import OnCpu, Views
from mixtral_offload.runtime.offload import ExpertsModule, Offload
from mixtral_offload.weights.hqq import refuse_second_order
from mixtral_offload.weights.layout import ROWS
from mixtral_offload.weights.native import MOST_EXPERTS
from mixtral_offload.weights.products import Run


@torch.compiler.disable  # a compiled model keeps the answers of an eager one, and does not compile the cache
def offloaded_experts(
    module: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute the experts of one layer: the experts function that transformers calls.

    Tokens are sorted by expert, so that each expert is fetched once. Results are summed in the order of the
    router's choice, in whatever order experts arrive: no cache size changes a single bit. Padding may be left
    out, see `Passes.without_padding`.

    Args:
        hidden_states: `[T, H]`.
        top_k_index: int64 `[T, k]`.
        top_k_weights: `[T, k]`.

    Returns:
        `[T, H]`.

    Raises:
        OptionError: For a model of transformers' own.
    """
    if not hasattr(module, "offload"):
        raise OptionError(
            'experts_implementation is "offloaded", but this model was not built by mixtral_offload',
            found=type(module).__name__,
            hint='call model.set_experts_implementation("eager"), or build the model with '
            "mixtral_offload.from_pretrained",
        )
    if torch.is_grad_enabled() and hidden_states.requires_grad:
        # all tokens: gradient checkpointing runs a layer again outside of its pass
        return with_gradients(module, hidden_states, top_k_index, top_k_weights)
    current = module.offload.passes.current
    real = None if current is None else current.real_of(len(hidden_states))
    if real is None:
        return _experts(module, hidden_states, top_k_index, top_k_weights)
    y = torch.zeros_like(hidden_states)
    y[real] = _experts(module, hidden_states[real], top_k_index[real], top_k_weights[real])
    return y


def _experts(
    module: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    if module.offload.options.dequantize_on_load:
        return _grouped(module, hidden_states, top_k_index, top_k_weights)
    if len(top_k_index) == 1:
        return _run_token(module.offload, module.layer, hidden_states, top_k_index, top_k_weights)
    y = run_tokens(module.offload, module.layer, hidden_states, top_k_index, top_k_weights)
    return _sum(module.offload, y, top_k_weights)


def _sum(offload: Offload, y: Tensor, top_k_weights: Tensor) -> Tensor:
    """`_weighted_sum`, by the kernels where they compute the experts: a token alone has the same bits."""
    native = offload.computation.products.native
    if native is None or not _is_plain(y, top_k_weights):
        return _weighted_sum(y, top_k_weights)
    return native.weighted_sums(y, top_k_weights)


def _is_plain(x: Tensor, top_k_weights: Tensor) -> bool:
    """Whether the kernels may sum: a router may be trained while all before it is frozen."""
    needs_grad = torch.is_grad_enabled() and top_k_weights.requires_grad
    return not needs_grad and x.dtype == top_k_weights.dtype == torch.float32


def run_experts(module: ExpertsModule, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run the chosen experts of each token.

    Args:
        x: `[T, H]`.
        top_k_weights: Only recorded.

    Returns:
        `[T, k, H]`, without weights.
    """
    return run_tokens(module.offload, module.layer, x, top_k_index, top_k_weights)


def _weighted_sum(y: Tensor, top_k_weights: Tensor) -> Tensor:
    """`y [T, k, H]`, `top_k_weights [T, k]` -> `[T, H]` in y's dtype, in the order of the router's choice."""
    return (y * top_k_weights.unsqueeze(-1)).sum(1).to(y.dtype)


def with_gradients(
    module: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Do the same as `offloaded_experts` with exact gradients of hidden states and weights; experts are
    constants.

    Raises:
        OptionError: Under `record`, whose replay could not repeat the uses of the backward pass.
    """
    if module.offload.options.dequantize_on_load:
        return _grouped(module, hidden_states, top_k_index, top_k_weights)
    _refuse_recording(module.offload)
    y = _FrozenExperts.apply(hidden_states, module, top_k_index, top_k_weights.detach())
    return _weighted_sum(y, top_k_weights)  # which autograd follows


def _refuse_recording(offload: Offload) -> None:
    if offload.observers.is_exclusive:
        raise OptionError(
            "a pass with gradients cannot be recorded",
            found="record() around a pass that needs gradients, or its backward",
            hint="record under torch.no_grad(), or run this pass and its backward outside of record()",
        )


class _FrozenExperts(torch.autograd.Function):
    """`run_experts`, whose backward fetches each expert again: its slot may hold another one by then."""

    @staticmethod
    def forward(x: Tensor, module: ExpertsModule, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return run_experts(module, x, top_k_index, top_k_weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.module, top_k_index, _ = inputs
        ctx.device = x.device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.device), torch.get_autocast_dtype(ctx.device)
        ctx.save_for_backward(x, top_k_index)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        x, top_k_index = ctx.saved_tensors
        offload: Offload = ctx.module.offload
        _refuse_recording(offload)
        order, by_expert = _by_expert(top_k_index, offload.checkpoint.n_experts)
        counts = by_expert.tolist()
        x_of = x[order // top_k_index.shape[1]].split(counts)
        grad_of = grad_y.flatten(0, 1)[order].split(counts)
        grads = torch.empty_like(grad_y.flatten(0, 1))
        rows = order.split(counts)
        # as in forward: autograd calls this outside of the caller's autocast
        enabled, dtype = ctx.autocast
        with torch.autocast(ctx.device, dtype, enabled), offload.cache.unrecorded():
            needed = [expert for expert, of in enumerate(rows) if len(of)]
            for expert, views in offload.cache.fetch(ctx.module.layer, needed):
                for part, x_part, grad_part in zip(*(of[expert].split(ROWS) for of in (rows, x_of, grad_of))):
                    grads[part] = _grad_of_expert(offload, views, x_part, grad_part)
        # summed in the router's order, so that no cache size changes a single bit
        return grads.view_as(grad_y).sum(1).to(x.dtype), None, None, None


def _grad_of_expert(offload: Offload, views: Views, x: Tensor, grad_y: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = offload.computation.plain_run(x, views)
        return torch.autograd.grad(y, x, grad_y.to(y.dtype))[0]


def _grouped(
    module: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Use transformers' grouped product: all weights are parameters on the device."""
    offload, began_s = module.offload, time.perf_counter()
    y = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden_states, top_k_index, top_k_weights)
    offload.cache.count_residents(module.layer, {*top_k_index.flatten().tolist()})
    tell_routed(offload, module.layer, top_k_index, top_k_weights, began_s)
    return y


def _run_token(offload: Offload, layer: int, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute one token's experts and their weighted sum, x `[1, H]` -> `[1, H]`: nothing to sort.

    One call of the kernels does all of it where all experts are on the device, with the same bits.
    """
    chosen, meanwhile = read_routing(offload, layer, top_k_index[0], 1)
    results: dict[int, Tensor] = {}
    began_s, computation = time.perf_counter(), offload.computation
    at_once, needed = computation.experts, sorted(chosen)
    with offload.cache.lock:
        if at_once is not None and (rows := offload.cache.rows_here(layer, needed, meanwhile)) is not None:
            row_of = dict(zip(needed, rows))
            addresses = [row_of[expert] for expert in chosen]
            if _is_plain(x, top_k_weights) and len(addresses) <= MOST_EXPERTS:
                y = at_once.run_token(x, addresses, top_k_weights)
            else:
                y = _sum(offload, at_once.run(x, addresses).to(x.dtype).unsqueeze(0), top_k_weights)
            tell_routed(offload, layer, top_k_index, top_k_weights, began_s)
            return y
        on_cpu = None
        if computation.on_cpu is not None and offload.cache.lacks(layer, needed):
            on_cpu = _token_on_cpu(computation.on_cpu, x, needed, results)
        for expert, views in offload.cache.fetch(layer, needed, meanwhile, on_cpu):
            results[expert] = computation.run(x, views)
        tell_routed(offload, layer, top_k_index, top_k_weights, began_s)
    # under autocast results are of another dtype than the tokens, as they are in transformers' own experts
    y = torch.cat([results[expert] for expert in chosen]).to(x.dtype).unsqueeze(0)
    return _sum(offload, y, top_k_weights)


def run_tokens(offload: Offload, layer: int, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Do what `run_experts` does for many tokens, x `[T, H]`, sorted by expert."""
    n_tokens, top_k = top_k_index.shape
    order, by_expert = _by_expert(top_k_index, offload.checkpoint.n_experts)
    counts, meanwhile = read_routing(offload, layer, by_expert, n_tokens)
    grouped = x[order // top_k]  # [T * k, H], by expert: results replace the tokens that they are for
    rows = grouped.split(counts)
    began_s = time.perf_counter()
    with offload.cache.lock:
        needed = [expert for expert, n in enumerate(counts) if n]
        at_once, run = offload.computation.experts, offload.computation.run
        here = None
        if at_once is not None and len(grouped) <= ROWS:
            here = offload.cache.rows_here(layer, needed, meanwhile)
        if at_once is not None and here is not None:
            grouped = at_once.run(grouped, here, [counts[expert] for expert in needed]).to(x.dtype)
        else:
            on_cpu = None
            if offload.computation.on_cpu is not None and offload.cache.lacks(layer, needed):
                on_cpu = _tokens_on_cpu(offload.computation.on_cpu, grouped, counts, needed, rows)
            for expert, views in offload.cache.fetch(layer, needed, meanwhile, on_cpu):
                for part in rows[expert].split(ROWS):
                    part.copy_(run(part, views))
        tell_routed(offload, layer, top_k_index, top_k_weights, began_s)
    y = torch.empty_like(grouped)
    y[order] = grouped
    return y.view(n_tokens, top_k, -1)


def _token_on_cpu(run: Run, x: Tensor, needed: list[int], results: dict[int, Tensor]) -> OnCpu:
    """What computes one token's experts on the CPU. x is copied there now, before the device's work grows."""
    on_cpu = x.to("cpu")

    def compute(expert: int, views: Views) -> None:
        results[expert] = run(on_cpu, views).to(x.device)

    return OnCpu([1] * len(needed), compute)


def _tokens_on_cpu(
    run: Run, grouped: Tensor, counts: list[int], needed: list[int], rows: Sequence[Tensor]
) -> OnCpu:
    """The same for many tokens, sorted by expert.

    Args:
        rows: Of `grouped`, for each expert; its results replace them.
    """
    on_cpu = grouped.to("cpu", copy=True).split(counts)

    def compute(expert: int, views: Views) -> None:
        for part, found in zip(on_cpu[expert].split(ROWS), rows[expert].split(ROWS)):
            found.copy_(run(part, views))

    return OnCpu([counts[expert] for expert in needed], compute)


def _by_expert(top_k_index: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """(the choices `[T * k]` sorted by expert, how many each expert has: int64 `[n_experts]`)."""
    flat = top_k_index.reshape(-1)
    counts = flat.new_zeros(n_experts).scatter_add_(0, flat, torch.ones_like(flat))
    return flat.argsort(stable=True), counts


def read_routing(
    offload: Offload, layer: int, numbers: Tensor, n_tokens: int
) -> tuple[list[int], Callable[[], None] | None]:
    """Read numbers of a layer's routing on the host, with predictions that the device has made since.

    Here, once per layer, the host waits for the device: all of the layer up to its routing is enqueued by
    then.

    Args:
        numbers: int64 `[n]`.
        n_tokens: Tokens of the layer's input.

    Returns:
        The numbers, and what starts the predictions to be made before this layer's experts, or None.
    """
    prefetcher = offload.prefetcher
    current = offload.passes.current
    if prefetcher is None or current is None:
        return numbers.tolist(), None
    predictions, n = prefetcher.before(current, layer, n_tokens), len(numbers)
    prefetcher.start_late(current)
    if isinstance(predictions, Tensor):
        width, both = predictions.shape[1], torch.cat((numbers, predictions.flatten())).tolist()
        found, predictions = both[:n], [both[i : i + width] for i in range(n, len(both), width)]
    else:
        found = numbers.tolist()
    start = partial(prefetcher.start, prefetcher.number(layer), predictions) if predictions else None
    return found, start


def tell_routed(
    offload: Offload, layer: int, top_k_index: Tensor, top_k_weights: Tensor, began_s: float
) -> None:
    """Call the observers after a pass through one layer's experts; see `Observer.routed`."""
    for observer in offload.observers:
        observer.routed(layer, top_k_index, top_k_weights, began_s)


ALL_EXPERTS_FUNCTIONS.register("offloaded", offloaded_experts)
