"""Sizes of any MoE model from its configuration alone: experts, dense part, KV cache, at any bit width.

transformers' modules on the meta device only: no devices, plans or speeds.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from mixtral_offload.core.placement import Sizes
from mixtral_offload.errors import OptionError
from mixtral_offload.models.config_check import stated_experts
from mixtral_offload.models.experts import ExpertsShape, Shape, experts_shape, has_plain_experts
from mixtral_offload.models.family import MoELayer, first_attribute
from mixtral_offload.models.kv_cache import kv_bytes, kv_layout
from mixtral_offload.models.registry import FAMILIES, family_of
from mixtral_offload.models.skeleton import from_config
from mixtral_offload.weights.hqq import PAPER, Quantization, field_specs
from mixtral_offload.weights.kernels import dequantized_bytes
from mixtral_offload.weights.layout import ALIGNMENT


@dataclass(frozen=True)
class ModelSizes:
    """Shapes and counts of a model; its bytes at given bit widths, in the published format.

    Attributes:
        layers: Numbers of the MoE layers, of `n_layers`.
        expert_matrices: (N, K) of each matrix of one expert.
        expert_vectors: Number of its other parameters (biases).
        attention: Shape -> number of the dense part's attention projections.
        linear: The same for shared experts and dense MLPs.
        embedding: Number of parameters.
        head: Number of parameters; 0 if tied.
        rest: Number of all other parameters.
        kv: For each layer with a KV cache (elements per token, sliding window or None).
        notes: What is only approximate.
        bits: Of the experts.
        attention_bits: Of the attention projections.
        item: Bytes of an activation and of an unquantized weight.
    """

    model_type: str
    n_layers: int
    layers: tuple[int, ...]
    n_experts: int
    top_k: int
    hidden: int
    max_context: int
    expert_matrices: tuple[Shape, ...]
    expert_vectors: int
    attention: dict[Shape, int]
    linear: dict[Shape, int]
    embedding: int
    head: int
    rest: int
    kv: tuple[tuple[int, int | None], ...]
    notes: tuple[str, ...] = ()
    bits: int = 2
    attention_bits: int = 4
    item: int = 2

    def at(self, bits: int | None = None, attention_bits: int | None = None) -> ModelSizes:
        """Return the same model at other bit widths: 16, 8, 4, 3 or 2; None keeps them."""
        bits, attention_bits = bits or self.bits, attention_bits or self.attention_bits
        for found in (bits, attention_bits):
            if found not in PAPER:
                raise OptionError("unknown bit width", expected="16, 8, 4, 3 or 2", found=found)
        return replace(self, bits=bits, attention_bits=attention_bits)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return sum(n * k for n, k in self.expert_matrices) + self.expert_vectors

    @property
    def n_parameters(self) -> int:
        """Parameters of the model."""
        return self._dense_parameters + len(self.layers) * self.n_experts * self.expert_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses, including embeddings."""
        return self._dense_parameters + len(self.layers) * self.top_k * self.expert_parameters

    @property
    def _dense_parameters(self) -> int:
        packed = sum(prod(shape) * n for of in (self.attention, self.linear) for shape, n in of.items())
        return packed + self.embedding + self.head + self.rest

    @property
    def expert_bytes(self) -> int:
        """Size of one expert's buffer in the layout of `ExpertLayout`."""
        matrices = sum(matrix_bytes(shape, self.bits, ALIGNMENT) for shape in self.expert_matrices)
        return matrices + -(-self.expert_vectors * 2 // ALIGNMENT) * ALIGNMENT

    @property
    def layer_bytes(self) -> int:
        """Size of the dense part's layers: attention packed, as `convert` does; all others in 16 bits."""
        attention = sum(matrix_bytes(shape, self.attention_bits) * n for shape, n in self.attention.items())
        return attention + self.item * (sum(prod(shape) * n for shape, n in self.linear.items()) + self.rest)

    @property
    def dense_bytes(self) -> int:
        """Size of the dense part."""
        return self.layer_bytes + self.item * (self.embedding + self.head)

    def kv_bytes(self, context: int) -> int:
        """Compute the bytes of the KV cache for `context` tokens."""
        return kv_bytes(self.kv, context, self.item)

    @property
    def dequantized_bytes(self) -> int:
        """Memory that compiled products need in addition to an expert that many tokens use."""
        return max(
            dequantized_bytes(shape, PAPER[self.bits], self.item, True) for shape in self.expert_matrices
        )

    @property
    def intermediate(self) -> int:
        """Intermediate size of an expert."""
        return max(
            n for shape in self.expert_matrices for n in shape if n != self.hidden or shape[0] == shape[1]
        )

    @property
    def for_plan(self) -> Sizes:
        """The sizes that a plan depends on."""
        return Sizes(self.layers, self.n_experts, self.top_k, self.expert_bytes)


def fitting(shape: Shape, bits: int) -> Quantization:
    """Return the published settings for a bit width, with smaller groups if theirs do not fit the matrix."""
    wanted = PAPER[bits]
    if bits == 16:
        return wanted
    group = gcd(prod(shape), wanted.group_size)
    scales = wanted.scale_group_size and gcd(prod(shape) // group, wanted.scale_group_size)
    return Quantization(bits, group, scales, wanted.quantize_zero, wanted.split and group % 8 == 0)


def matrix_bytes(shape: Shape, bits: int, alignment: int = 1) -> int:
    """Add up the tensors of one quantized matrix, each rounded up to a multiple of `alignment`."""
    sizes = (prod(dims) * dtype.itemsize for dtype, dims in field_specs(shape, fitting(shape, bits)).values())
    return sum(-(-size // alignment) * alignment for size in sizes)


def model_sizes(config: PreTrainedConfig) -> ModelSizes:
    """Compute the sizes from transformers' configuration.

    Raises:
        OptionError: For a dense model, or for one without a module of experts.
    """
    model = _on_meta(config)
    text = config.get_text_config()
    layers = family_of(text).layers(model)
    if not layers:
        raise _no_experts(config)
    shape = _one_shape(config, model, layers)
    attention, linear = _linears(model, layers, shape.n_experts)
    embedding = cast(nn.Embedding, model.get_input_embeddings())  # transformers states a module only
    head = cast("nn.Linear | None", model.get_output_embeddings())
    n_embedding, n_head = embedding.weight.numel(), 0
    if head is not None and head.weight is not embedding.weight:
        n_head = head.weight.numel()
    in_experts = len(layers) * shape.n_experts * (sum(map(prod, shape.matrices)) + shape.vectors)
    packed = sum(prod(of) * n for counts in (attention, linear) for of, n in counts.items())
    total = sum(parameter.numel() for parameter in model.parameters())
    kv, kv_notes = kv_layout(model, text, layers)
    return ModelSizes(
        model_type=config.model_type,
        n_layers=text.num_hidden_layers,
        layers=tuple(layer.number for layer in layers),
        n_experts=shape.n_experts,
        top_k=_top_k(text, shape.n_experts),
        hidden=text.hidden_size,
        max_context=first_attribute(text, "max_position_embeddings") or 2**31,
        expert_matrices=shape.matrices,
        expert_vectors=shape.vectors,
        attention=attention,
        linear=linear,
        embedding=n_embedding,
        head=n_head,
        rest=total - in_experts - packed - n_embedding - n_head,
        kv=kv,
        notes=(*_runs(config, model.get_submodule(layers[0].name)), *kv_notes),
    )


def _no_experts(config: PreTrainedConfig) -> OptionError:
    place = "its experts where transformers' experts interface does not reach"
    expected = "configuration such as Mixtral's, Qwen3-MoE's or gpt-oss's"
    if stated := stated_experts(config.to_dict()):
        mixture = f"{config.model_type} is a mixture of experts of a family that is not supported"
        return OptionError(
            f"{mixture}: it keeps {place}",
            key=stated[0],
            found=stated[1],
            expected=f"a {expected}",
        )
    return OptionError(
        f"{config.model_type} is a dense model, or keeps {place}",
        expected=f"a Mixture-of-Experts {expected}",
        found="no layer with experts",
        hint="a dense model has nothing to offload: load it with transformers as it is",
    )


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    config = copy.deepcopy(config)
    config.quantization_config = None  # the shapes of the plain weights count
    try:
        try:
            return from_config(AutoModelForCausalLM, config, torch.float16)
        except ValueError:  # a language model inside another one
            return from_config(AutoModelForImageTextToText, config, torch.float16)
    except Exception as error:  # transformers raises many kinds for numbers that make no model
        raise OptionError(
            f"transformers cannot build a {config.model_type} language model of this configuration",
            found=f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
            hint="check config.json, or install a newer transformers",
        ) from error


def _one_shape(config: PreTrainedConfig, model: nn.Module, layers: list[MoELayer]) -> ExpertsShape:
    """The shape of the experts of all layers; refuse mixed layers."""
    first, *others = ((of.name, experts_shape(model.get_submodule(of.name))) for of in layers)
    for name, shape in others:
        if shape != first[1]:
            raise OptionError(
                f"{config.model_type}: the layers have different experts, which one plan cannot hold",
                expected=f"{first[1]} as in {first[0]}",
                found=f"{shape} in {name}",
            )
    return first[1]


def _linears(
    model: PreTrainedModel, layers: list[MoELayer], n_experts: int
) -> tuple[dict[Shape, int], dict[Shape, int]]:
    """Shapes of the dense part's projections, by kind: attention; shared experts and dense MLPs."""
    attention: Counter[Shape] = Counter()
    linear: Counter[Shape] = Counter()
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{of.name}.") for of in layers) if "experts" in name else False
        if not isinstance(module, nn.Linear) or module is head or inside:
            continue
        if module.out_features in (1, n_experts) and name.rpartition(".")[2].endswith(("gate", "router")):
            continue
        of_attention = any(part.endswith(("attn", "attention")) for part in name.split("."))
        n, k = module.weight.shape
        (attention if of_attention else linear)[n, k] += 1
    return dict(attention), dict(linear)


def _top_k(config: PreTrainedConfig, n_experts: int) -> int:
    family = family_of(config)
    top_k = family.top_k(config)
    if type(top_k) is not int or not 1 <= top_k <= n_experts:
        raise OptionError(
            f"{config.model_type} does not say how many experts a token uses",
            key=" or ".join(family.top_ks),
            expected=f"1 to {n_experts}",
            found=top_k,
        )
    return top_k


def _runs(config: PreTrainedConfig, experts: nn.Module) -> list[str]:
    """What prevents `from_pretrained` from running this model, in sentences."""
    if not has_plain_experts(experts):
        why = "biases or another layout"
        return [f"a plan only: from_pretrained does not run {config.model_type}'s experts yet ({why})"]
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        return [f"from_pretrained has not been tried with {config.model_type} (only with {known})"]
    return []
