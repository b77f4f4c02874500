"""The model before its weights: its modules, its experts' places, and what cannot be offloaded refused.

Knows transformers' modules on the meta device. Knows nothing of caches or files.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from mixtral_offload.errors import OptionError
from mixtral_offload.models.checkpoint import Checkpoint
from mixtral_offload.models.skeleton import build_meta, check_experts
from mixtral_offload.runtime.absent import remove_weights
from mixtral_offload.runtime.options import OffloadOptions
from mixtral_offload.runtime.prefetch import Gate, find_gates


def build_skeleton(checkpoint: Checkpoint, options: OffloadOptions):
    """(model without any weights, its modules of experts by name -> layer, gates to guess by, options with the number of
    guesses). Whatever cannot be offloaded is refused here, before any weight is read."""
    options = options.for_checkpoint(checkpoint)
    model, modules = _skeleton(checkpoint, options)
    return model, modules, *_gates(model, modules, options)


def _skeleton(checkpoint: Checkpoint, options: OffloadOptions) -> tuple[PreTrainedModel, dict[str, int]]:
    """The model without any weights, its experts' parameters gone for good; and its modules of experts -> their layers."""
    model = build_meta(checkpoint.config, options.dtype, options.attn_implementation)
    layers, _ = check_experts(model)
    for name in layers:
        remove_weights(model.get_submodule(name))
    return model, layers


def _gates(
    model: PreTrainedModel, modules: dict[str, int], options: OffloadOptions
) -> tuple[list[Gate], OffloadOptions]:
    """The gates to guess by, and the options with their number of guesses. A family that has none is refused only if
    guesses were asked for."""
    if options.prefetch == 0:
        return [], options
    try:
        return find_gates(model, modules), options.with_prefetch()
    except OptionError:
        if options.prefetch:
            raise
        return [], options.with_prefetch(possible=False)
