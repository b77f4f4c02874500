"""A model without weights, on the meta device: its names, shapes and dtypes.

Knows transformers' model classes and the modules of their experts interface. Knows no files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mixtral_offload.errors import CheckpointError, OptionError
from mixtral_offload.weights.manifest import plain_config

#: `model.layers.3.mlp.experts` -> the list of layers, and the layer's number
LAYER = re.compile(r"^(?P<list>.*?\blayers)\.(?P<number>\d+)\.")


@dataclass(frozen=True)
class ExpertsShape:
    """The experts of one module: how many there are, and the sizes of their matrices."""

    n_experts: int
    hidden: int
    intermediate: int


def build_meta(
    config: PretrainedConfig,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    path: Path | None = None,
) -> PreTrainedModel:
    """Build the language model of a configuration on the meta device.

    Args:
        config: transformers' configuration. It is not changed.
        dtype: Of the parameters, except those that the model's class always keeps in another one.
        attn_implementation: As in transformers' `from_pretrained`; None: the class's default.
        path: The configuration's file, for errors.

    Raises:
        OptionError: If this attention cannot be used here.
        CheckpointError: If transformers cannot build the model.
    """
    config = plain_config(config)
    if hasattr(config, "quantization_config"):  # says how the weights are stored, not what the model is
        del config.quantization_config
    asked = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, **asked)
    except Exception as error:  # transformers raises many kinds for numbers that make no model
        text = " ".join(str(error).split())[:300]
        if asked:
            raise OptionError(
                "this attention cannot be used", key="attn_implementation", expected='"sdpa", "eager", or one that is installed',
                found=f"{attn_implementation!r}: {text}",
            ) from error  # fmt: skip
        raise CheckpointError(
            f"transformers cannot build a {config.model_type} language model of this configuration", path=path,
            found=f"{type(error).__name__}: {text}", hint="check config.json, or install a newer transformers",
        ) from error  # fmt: skip


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the modules that call transformers' experts interface (its decorator leaves these
    attributes)."""
    for name, module in model.named_modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate"):
            yield name, module


def has_plain_experts(module: nn.Module) -> bool:
    """Whether these are gated experts as `expert_forward` runs them: no bias, no norm, transformers' usual layout."""
    plain = {"has_gate": True, "is_concatenated": True, "has_bias": False, "is_transposed": False}
    as_usual = all(getattr(module, name, None) is value for name, value in plain.items())
    return as_usual and not getattr(module, "has_post_expert_norm", False)


def check_experts(model: PreTrainedModel, path: Path | None = None) -> tuple[dict[str, int], ExpertsShape]:
    """The modules of experts of a model that holds their parameters.

    Args:
        model: On the meta device.
        path: Its configuration's file, for errors.

    Returns:
        The number of the layer of each module, by the module's name in the model; and the shape that they share.

    Raises:
        CheckpointError: For experts that this package cannot run.
    """
    layers: dict[str, int] = {}
    shapes: dict[str, ExpertsShape] = {}
    for name, module in experts_modules(model):
        match = LAYER.match(name)
        parameters = {of: tuple(parameter.shape) for of, parameter in module.named_parameters()}
        if not has_plain_experts(module) or parameters.keys() != {"gate_up_proj", "down_proj"} or not match:
            raise CheckpointError(
                f"experts of {model.config.model_type} are not supported yet", path=path, key=name,
                expected="gated experts without bias or norm, as in Mixtral, Qwen-MoE or OLMoE",
                found=", ".join(f"{of} {list(shape)}" for of, shape in parameters.items()),
            )  # fmt: skip
        n_experts, hidden, intermediate = parameters["down_proj"]
        layers[name], shapes[name] = int(match["number"]), ExpertsShape(n_experts, hidden, intermediate)
    if not layers:
        raise CheckpointError(
            f"experts of {model.config.model_type} are not supported yet", path=path, expected="modules on transformers' experts interface",
            found="none",
        )  # fmt: skip
    if len(set(layers.values())) < len(layers) or len(set(shapes.values())) > 1:
        raise CheckpointError(
            f"{model.config.model_type} has experts of several kinds, which is not supported yet",
            path=path, expected="one module of experts in a layer, all of one shape",
            found="; ".join(f"{name}: {shape}" for name, shape in list(shapes.items())[:4]),
        )  # fmt: skip
    return layers, next(iter(shapes.values()))


def kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Names of the parameters and buffers that transformers keeps in fp32 when a model is loaded in `dtype`.

    Args:
        model: Built in a 16-bit dtype: what is fp32 there is so in its class's own code.
        dtype: The one to load in.
    """
    held = model.state_dict(keep_vars=True)
    floating = {name: tensor.dtype for name, tensor in held.items() if tensor.dtype.is_floating_point}
    plan = [_as_pattern(name) for name, kept in model._get_dtype_plan(dtype).items() if kept == torch.float32]
    return {name for name, of in floating.items() if of == torch.float32 or any(p.search(name) for p in plan)}


def _as_pattern(name: str) -> re.Pattern:
    """As transformers matches its lists of what to keep: anywhere in the name, `*` for anything."""
    return re.compile(name.replace("*", r".*"))
