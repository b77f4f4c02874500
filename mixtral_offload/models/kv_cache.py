"""The one formula for the size of the KV cache, for planning and for loading.

Knows transformers' attention modules and its `DynamicCache`. Knows nothing of experts.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import DynamicCache, PreTrainedConfig

from mixtral_offload.models.config_check import layer_configs
from mixtral_offload.models.family import LAYER, MoELayer, first_attribute


def kv_bytes(kv: Iterable[tuple[int, int | None]], context: int, item: int) -> int:
    """Bytes of the KV cache for `context` tokens. kv: of `kv_layout`. item: bytes of one element."""
    return item * sum(n * min(context, window or context) for n, window in kv)


def kv_layout(
    model: nn.Module, config: PreTrainedConfig, moe: Iterable[MoELayer]
) -> tuple[tuple[tuple[int, int | None], ...], tuple[str, ...]]:
    """Find what the layers of a model keep of each token.

    Args:
        model: On any device, the meta device too.
        config: Of its text model.
        moe: Its layers with experts.

    Returns:
        For each layer of transformers' own cache that grows (elements per token, sliding window or None); and
        what is not exact, one sentence each.
    """
    layers = DynamicCache(config=config).layers
    configs = layer_configs(config)
    kv, notes = [], []
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


def _kv_elements(module: nn.Module) -> int | None:
    """What one token leaves in the KV cache of this attention, or None for any other module."""
    if hasattr(module, "kv_lora_rank") and hasattr(module, "v_head_dim"):  # multi-head latent attention
        if hasattr(module, "expand_kv"):  # kept compressed
            return module.kv_lora_rank + module.qk_rope_head_dim
        return module.num_heads * (module.qk_head_dim + module.v_head_dim)
    projections = [getattr(module, name, None) for name in ("k_proj", "v_proj")]
    if all(isinstance(projection, nn.Linear) for projection in projections):
        return sum(projection.out_features for projection in projections)
    return None
