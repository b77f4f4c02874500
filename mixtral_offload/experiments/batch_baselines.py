"""A batch with one optimization of 2211.10017 taken away: sorting by expert, pruning of ended sequences, quantization.

Knows `runtime/forward.py` and transformers' `generate` from inside, and puts everything back. Knows nothing of prompts, turns or
results.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteria

from mixtral_offload.generation.batch import Request, generate_batch
from mixtral_offload.models.experts import FUSED
from mixtral_offload.runtime import forward
from mixtral_offload.runtime.build import from_pretrained
from mixtral_offload.runtime.convert import convert_checkpoint
from mixtral_offload.weights.hqq import Quantization, QuantizedLinear, dequantize


@contextmanager
def no_end(model: PreTrainedModel) -> Iterator[None]:
    """No token ends an answer, so that each is as long as its request says."""
    configs = model.generation_config, model.config
    own = [config.eos_token_id for config in configs]
    for config in configs:
        config.eos_token_id = None
    try:
        yield
    finally:
        for config, ends in zip(configs, own):
            config.eos_token_id = ends


def continuous(model, requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """`generate_batch`: the new tokens of each request, in the order of the requests."""
    found = {answer.number: answer.ids for answer in generate_batch(model, requests, batch_size=batch_size)}
    return [found[number] for number in range(len(requests))]


def in_groups(model, requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """Ended sequences leave, and none is admitted before all of the group have ended."""
    groups = [requests[first : first + batch_size] for first in range(0, len(requests), batch_size)]
    return [answer for group in groups for answer in continuous(model, group, batch_size)]


class RowLimits(StoppingCriteria):
    """lengths: int64 [rows], columns at which each row has ended; all are computed on until the last one has."""

    def __init__(self, lengths: Tensor):
        self.lengths = lengths

    def __call__(self, input_ids: Tensor, scores, **_) -> Tensor:
        return input_ids.shape[1] >= self.lengths


@torch.inference_mode()
def static_batches(model, requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """transformers' own `generate` on batches padded on the left, in the order given: as plain PyTorch does it. What is
    computed for a row after its end is thrown away. Padding needs no experts here, as in `generate_batch`."""
    answers, has_experts = [], hasattr(model, "offload")
    for first in range(0, len(requests), batch_size):
        some = requests[first : first + batch_size]
        width, limits = max(len(of.ids) for of in some), [of.max_new_tokens for of in some]
        ids, mask = (torch.tensor(rows, device=model.device) for rows in _left_padded(some, width))
        stop = [RowLimits(torch.tensor(limits, device=model.device) + width)]
        settings = {"max_new_tokens": max(limits), "do_sample": False, "pad_token_id": 0}
        with model.offload.passes.without_padding() if has_experts else nullcontext():
            found = model.generate(ids, attention_mask=mask, stopping_criteria=stop, **settings)
        answers += [row[:limit] for row, limit in zip(found[:, width:].tolist(), limits)]
    return answers


def _left_padded(requests: Sequence[Request], width: int) -> tuple[list[list[int]], list[list[int]]]:
    padding = [width - len(of.ids) for of in requests]
    ids = [[0] * n + of.ids for n, of in zip(padding, requests)]
    return ids, [[0] * n + [1] * (width - n) for n in padding]


@contextmanager
def unsorted() -> Iterator[None]:
    """Each token's experts are served for it alone, token after token, by every model of this process."""
    own, forward.run_tokens = forward.run_tokens, _serve_one_by_one
    try:
        yield
    finally:
        forward.run_tokens = own


def _serve_one_by_one(offload, layer: int, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """In place of `forward.run_tokens`, with its arguments and result; guesses are made once, as there."""
    n_tokens, top_k = top_k_index.shape
    chosen, meanwhile = forward._read(offload, layer, top_k_index.reshape(-1), n_tokens)
    y, began_s = x.new_empty(n_tokens * top_k, x.shape[-1]), time.perf_counter()
    with offload.cache.lock:
        for token in range(n_tokens):
            places = {expert: token * top_k + i for i, expert in enumerate(chosen[token * top_k :][:top_k])}
            for expert, views in offload.cache.fetch(layer, sorted(places), meanwhile):
                y[places[expert]] = offload.run(x[token : token + 1], views)[0]
            meanwhile = None
        forward._record(offload, layer, top_k_index, top_k_weights, began_s)
    return y.view(n_tokens, top_k, -1)


@contextmanager
def unquantized(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The same model with its experts' dequantized weights at 16 bits, which are the same numbers (`dequantize` works in
    fp16), and as many slots: from a checkpoint in a temporary folder."""
    options = model.offload.options
    same = {field.name: getattr(options, field.name) for field in fields(options)}
    with tempfile.TemporaryDirectory() as folder:
        target = convert_checkpoint(model.offload.checkpoint.folder, Path(folder) / "16bit", Quantization(16))
        found = from_pretrained(target, **same | {"store": model.offload.plan.home or "auto"})
        try:
            yield found
        finally:
            found.offload.cache.close()


@torch.inference_mode()
def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary transformers model with this one's dequantized weights, all on its device, in its dtype."""
    checkpoint, dtype = model.offload.checkpoint, model.dtype
    config = copy.deepcopy(checkpoint.config)
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(model.device)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            stored = {field: getattr(module, buffer) for field, buffer in module._names.items()}
            shape = module.out_features, module.in_features
            weight = dequantize(stored, shape, module.quantization, dtype)
            plain.get_submodule(name).weight.copy_(weight)
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        theirs[name].copy_(parameter)
    _fill_experts(plain, model.offload, dtype)
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain


def _fill_experts(plain: PreTrainedModel, offload, dtype: torch.dtype) -> None:
    """transformers' stacked experts: matrices that share a parameter lie below each other."""
    checkpoint, layout = offload.checkpoint, offload.layout
    buffer = torch.empty(layout.n_bytes, dtype=torch.uint8)
    views = layout.views(buffer)
    for layer in offload.layers:
        module = plain.get_submodule(layer.name)
        for expert in range(checkpoint.n_experts):
            checkpoint.read_expert((layer.number, expert), buffer)
            for parameter, matrices in FUSED.items():
                parts = [
                    dequantize(views[of], layout.shapes[of], layout.quantization[of], dtype)
                    for of in matrices
                ]
                getattr(module, parameter)[expert].copy_(torch.cat(parts))
