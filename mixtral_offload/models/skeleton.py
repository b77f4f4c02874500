"""A model without weights, on the meta device: its names, shapes and dtypes. No files."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mixtral_offload.errors import CheckpointError, OptionError
from mixtral_offload.models.experts import FUSED, ExpertsShape, experts_shape, has_plain_experts
from mixtral_offload.models.family import MoELayer
from mixtral_offload.models.registry import family_of
from mixtral_offload.weights.manifest import plain_config

#: transformers changes torch's default dtype while it builds, for all threads, and then restores what it
#: found: two at once would leave the other's
_building = threading.Lock()


def from_config(kind: type, config: PretrainedConfig, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Call transformers' `kind.from_config` on the meta device, one thread at a time."""
    with _building, torch.device("meta"):
        return kind.from_config(config, dtype=dtype, **options)  # type: ignore[attr-defined]


def build_meta(
    config: PretrainedConfig,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    path: Path | None = None,
) -> PreTrainedModel:
    """Build the language model of a configuration on the meta device.

    Args:
        config: transformers' configuration. It is not changed.
        dtype: Type of the parameters, except those that the model's class always keeps in another one.
        attn_implementation: As in transformers' `from_pretrained`; None: the class's default.
        path: The configuration's file, for errors.

    Raises:
        OptionError: If this attention cannot be used here.
        CheckpointError: If transformers cannot build the model.
    """
    config = plain_config(config)
    if hasattr(config, "quantization_config"):  # says how the weights are stored, not what the model is
        del config.quantization_config
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        return from_config(AutoModelForCausalLM, config, dtype, **options)
    except Exception as error:  # transformers raises many kinds for numbers that make no model
        text = " ".join(str(error).split())[:300]
        if options:
            raise OptionError(
                "this attention cannot be used",
                key="attn_implementation",
                expected='"sdpa", "eager", or one that is installed',
                found=f"{attn_implementation!r}: {text}",
            ) from error
        raise CheckpointError(
            f"transformers cannot build a {config.model_type} language model of this configuration",
            path=path,
            found=f"{type(error).__name__}: {text}",
            hint="check config.json, or install a newer transformers",
        ) from error


def check_experts(model: PreTrainedModel, path: Path | None = None) -> tuple[list[MoELayer], ExpertsShape]:
    """Find the MoE layers of a model that holds their parameters.

    Args:
        model: On the meta device.
        path: Its configuration's file, for errors.

    Returns:
        The layers, and the shape that their experts share.

    Raises:
        CheckpointError: For experts that this package cannot run.
    """
    layers = family_of(model.config).layers(model)
    unsupported = f"experts of {model.config.model_type} are not supported yet"
    shapes: dict[str, ExpertsShape] = {}
    for layer in layers:
        module = model.get_submodule(layer.name)
        parameters = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
        known = has_plain_experts(module) and parameters.keys() == FUSED.keys()
        if not known or not layer.in_list.endswith("layers"):
            raise CheckpointError(
                unsupported,
                path=path,
                key=layer.name,
                expected="gated experts without bias or norm, as in Mixtral, Qwen-MoE or OLMoE",
                found=", ".join(f"{name} {shape}" for name, shape in parameters.items()),
            )
        shapes[layer.name] = experts_shape(module)
    if not layers:
        raise CheckpointError(
            unsupported, path=path, expected="modules on transformers' experts interface", found="none"
        )
    if len({layer.number for layer in layers}) < len(layers) or len(set(shapes.values())) > 1:
        raise CheckpointError(
            f"{model.config.model_type} has experts of several kinds, which is not supported yet",
            path=path,
            expected="one module of experts in a layer, all of one shape",
            found="; ".join(f"{name}: {shape}" for name, shape in list(shapes.items())[:4]),
        )
    return layers, next(iter(shapes.values()))


def kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Return the parameters and buffers that transformers keeps in fp32 when a model is loaded in `dtype`.

    Args:
        model: Built in a 16-bit dtype: what is fp32 there is so because of its class's own code.
    """
    held = model.state_dict(keep_vars=True)
    floating = {name: tensor.dtype for name, tensor in held.items() if tensor.dtype.is_floating_point}
    plan = [_as_pattern(name) for name, kept in model._get_dtype_plan(dtype).items() if kept == torch.float32]
    return {name for name, of in floating.items() if of == torch.float32 or any(p.search(name) for p in plan)}


def _as_pattern(name: str) -> re.Pattern:
    """Match as transformers matches its lists of what to keep: anywhere in the name, `*` for anything."""
    return re.compile(name.replace("*", r".*"))
