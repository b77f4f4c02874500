"""The model before its weights are read. Knows transformers' modules on the meta device, no caches."""

from __future__ import annotations

from transformers import PreTrainedModel

from mixtral_offload.core.options import OffloadOptions
from mixtral_offload.models.checkpoint import Checkpoint
from mixtral_offload.models.family import MoELayer, check_routers
from mixtral_offload.models.skeleton import build_meta, check_experts
from mixtral_offload.runtime.absent import remove_weights
from mixtral_offload.runtime.options import CheckedOptions, for_checkpoint


def build_skeleton(
    checkpoint: Checkpoint, options: OffloadOptions
) -> tuple[PreTrainedModel, list[MoELayer], CheckedOptions]:
    """Build a checkpoint's model without weights, and without its experts' parameters.

    Returns:
        The model, its MoE layers, and the options with the checkpoint's dtype and a number for `prefetch`.

    Raises:
        OffloadError: For whatever cannot be offloaded. A family whose experts cannot be predicted is refused
            only if the options demand predictions.
    """
    checked = for_checkpoint(options, checkpoint)
    model = build_meta(checkpoint.config, checked.dtype, checked.attn_implementation)
    layers, _ = check_experts(model)
    for layer in layers:
        remove_weights(model.get_submodule(layer.name))
    if checked.prefetch:
        check_routers(layers)
    return model, layers, checked.with_prefetch(possible=all(layer.router for layer in layers))
