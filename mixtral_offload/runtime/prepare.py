"""The model before its weights: its modules, its experts' places, and what cannot be offloaded refused.

Knows transformers' modules on the meta device. Knows nothing of caches or files.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from mixtral_offload.models.checkpoint import Checkpoint
from mixtral_offload.models.family import MoELayer, check_routers
from mixtral_offload.models.skeleton import build_meta, check_experts
from mixtral_offload.runtime.absent import remove_weights
from mixtral_offload.runtime.options import OffloadOptions


def build_skeleton(
    checkpoint: Checkpoint, options: OffloadOptions
) -> tuple[PreTrainedModel, list[MoELayer], OffloadOptions]:
    """Build a checkpoint's model without any weights; its experts' parameters are gone for good.

    Returns:
        The model, its layers with experts, and the options with the number of predictions.

    Raises:
        OffloadError: For whatever cannot be offloaded, before any weight is read. A family whose experts cannot be
            predicted is refused only if predictions were asked for.
    """
    options = options.for_checkpoint(checkpoint)
    model = build_meta(checkpoint.config, options.dtype, options.attn_implementation)
    layers, _ = check_experts(model)
    for layer in layers:
        remove_weights(model.get_submodule(layer.name))
    if options.prefetch:
        check_routers(layers)
    return model, layers, options.with_prefetch(possible=all(layer.router for layer in layers))
