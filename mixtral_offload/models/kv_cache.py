"""The size of the KV cache, for planning and for loading."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedConfig

from mixtral_offload.models.config_check import layer_configs
from mixtral_offload.models.family import LAYER, MoELayer, first_attribute


def kv_bytes(kv: Iterable[tuple[int, int | None]], context: int, item: int) -> int:
    """Compute the bytes of the KV cache for `context` tokens.

    Args:
        kv: From `kv_layout`.
        item: Bytes of one element.
    """
    return item * sum(n * min(context, window or context) for n, window in kv)


def kv_layout(
    model: nn.Module, config: PreTrainedConfig, moe: Iterable[MoELayer]
) -> tuple[tuple[tuple[int, int | None], ...], tuple[str, ...]]:
    """Find what the layers of a model keep of each token.

    Args:
        model: On any device, including meta.
        config: Of its text model.
        moe: Its MoE layers.

    Returns:
        For each layer of transformers' own cache that grows (elements per token, sliding window or None); and
        what is not exact, one sentence each.
    """
    layers = DynamicCache(config=config).layers
    configs = layer_configs(config)
    kv: list[tuple[int, int | None]] = []
    notes: list[str] = []
    lists = tuple({f"{layer.in_list}." for layer in moe})  # not an image encoder's
    elements = {
        int(match["number"]): n
        for name, module in model.named_modules()
        if name.startswith(lists) and (match := LAYER.match(name)) and (n := _kv_elements(module)) is not None
    }
    for number, layer in enumerate(layers):
        if type(layer).__name__.startswith("LinearAttention"):
            notes.append("the fixed state of linear-attention layers is not counted")
            continue
        if number not in elements:
            notes.append("KV cache: an upper bound, from the configuration's numbers of heads")
            heads = first_attribute(configs[number], "num_key_value_heads", "num_attention_heads")
            of_head = first_attribute(configs[number], "head_dim")
            elements[number] = 2 * heads * (of_head or config.hidden_size // config.num_attention_heads)
        kv.append((elements[number], getattr(layer, "sliding_window", None)))
    return tuple(kv), tuple(dict.fromkeys(notes))


def _kv_elements(module: Any) -> int | None:  # torch types a module's attributes as modules
    """Elements that one token adds to the KV cache of this attention; None for any other module."""
    if hasattr(module, "kv_lora_rank") and hasattr(module, "v_head_dim"):  # multi-head latent attention
        if hasattr(module, "expand_kv"):  # kept compressed
            return module.kv_lora_rank + module.qk_rope_head_dim
        return module.num_heads * (module.qk_head_dim + module.v_head_dim)
    projections = [getattr(module, name, None) for name in ("k_proj", "v_proj")]
    linears = [projection for projection in projections if isinstance(projection, nn.Linear)]
    return sum(linear.out_features for linear in linears) if len(linears) == 2 else None
