"""Compares one pass of a batch, everything on the device, with transformers' own experts."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from mixtral_offload.errors import OptionError
from mixtral_offload.experiments.batching import BATCH_SIZES
from mixtral_offload.generation.batch import GenerationRequest
from mixtral_offload.models.experts import FUSED
from mixtral_offload.weights.hqq import QuantizedLinear, dequantize

#: transformers' own ways to run experts
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
PACKED, DEQUANTIZED = "packed", "dequantized"
#: passes in a turn; the first one finds another model's weights in the processor's cache, and is not counted
TURN = 4


@dataclass(frozen=True)
class Passes:
    """One decode pass with everything on the device.

    Attributes:
        seconds: Batch size -> PACKED, DEQUANTIZED or transformers' implementation -> seconds of each turn.
        difference: The largest difference of any logit from the packed model's, by the same names.
    """

    seconds: dict[int, dict[str, list[float]]]
    difference: dict[str, float]

    def over_best(self, ours: str, batch_size: int) -> float:
        """Return how many times as fast `ours` is as the fastest of transformers' implementations."""
        median = {name: statistics.median(of) for name, of in self.seconds[batch_size].items()}
        return min(median[name] for name in IMPLEMENTATIONS) / median[ours]


@torch.inference_mode()
def compare_passes(
    packed: PreTrainedModel, dequantized: PreTrainedModel, requests: Sequence[GenerationRequest],
    batch_sizes: Sequence[int] = BATCH_SIZES, repeats: int = 15, context: int = 32,
) -> Passes:  # fmt: skip
    """Time our experts, packed and dequantized, against transformers' own, taking turns.

    Args:
        packed: A model with every expert on the device.
        dequantized: The same model, with `dequantize_on_load`.
        context: Tokens of the requests before the passes, each of which adds one token to each row.

    Raises:
        OptionError: The models are not such.
    """
    if (
        packed.offload.plan.store is not None
        or packed.offload.options.dequantize_on_load
        or not dequantized.offload.options.dequantize_on_load
    ):
        raise OptionError("these models cannot be compared",
                          expected="every expert on the device, packed and dequantized",
                          found=f"{packed.offload.plan}\n{dequantized.offload.plan}")  # fmt: skip
    model, plain = packed, plain_model(packed)
    text = [token for of in requests for token in of.ids]
    width = context + TURN * repeats
    needed = max(batch_sizes) * width
    ids = torch.tensor((text * -(-needed // len(text)))[:needed], device=model.device).view(-1, width)
    seconds, difference = {}, dict.fromkeys((PACKED, DEQUANTIZED, *IMPLEMENTATIONS), 0.0)
    for n in batch_sizes:
        ours = {PACKED: packed, DEQUANTIZED: dequantized}
        seconds[n] = _pass_turns(ours, plain, ids[:n], context, difference)
    return Passes(seconds, difference)


def _pass_turns(ours: dict, plain, ids, context: int, difference: dict[str, float]) -> dict[str, list[float]]:
    pasts = {name: DynamicCache(config=plain.config) for name in (*ours, *IMPLEMENTATIONS)}
    seconds, first = {name: [] for name in pasts}, None
    for at in (0, *range(context, ids.shape[1], TURN)):
        for name, past in pasts.items():
            if name not in ours:
                plain.set_experts_implementation(name)
            parts = [ids[:, :context]] if at == 0 else ids[:, at : at + TURN].split(1, dim=1)
            taken = []
            for part in parts:
                began_s = time.perf_counter()
                output = ours.get(name, plain)(part, past_key_values=past, logits_to_keep=1)
                logits = output.logits.cpu()  # waits for the device
                taken.append(time.perf_counter() - began_s)
            seconds[name] += taken[1:]
            first = logits if name == PACKED else first
            difference[name] = max(difference[name], (logits - first).abs().max().item())
    return seconds


@torch.inference_mode()
def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """Build transformers' own model with this one's dequantized weights, device and dtype."""
    checkpoint, dtype = model.offload.checkpoint, model.dtype
    config = copy.deepcopy(checkpoint.config)
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(model.device)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            shape = module.out_features, module.in_features
            weight = dequantize(module.fields, shape, module.quantization, dtype)
            plain.get_submodule(name).weight.copy_(weight)
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        theirs[name].copy_(parameter)
    _fill_experts(plain, model.offload, dtype)
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain


def _fill_experts(plain: PreTrainedModel, offload, dtype: torch.dtype) -> None:
    """Copy the experts; matrices that share a parameter of transformers are stacked."""
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
