"""transformers' own Mixtral on the same, dequantized weights: nothing of this package runs in it."""

import copy

import torch
from transformers import MixtralForCausalLM, PreTrainedModel

from mixtral_offload.runtime.build import from_pretrained
from mixtral_offload.weights.native import find_native


def twin(*source, **options) -> PreTrainedModel:
    """Build the twin of `from_pretrained(*source, **options)`, with transformers' eager experts."""
    unpacked = from_pretrained(*source, device="cpu", dequantize_on_load=True, **options)
    config = copy.deepcopy(unpacked.config)
    config._experts_implementation = None
    model = MixtralForCausalLM(config).to(unpacked.dtype)
    missing, unexpected = model.load_state_dict(unpacked.state_dict(), strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    model.set_experts_implementation("eager")
    model.generation_config = unpacked.generation_config
    return model.eval()


def limit(of_torch: float, of_kernels: float = 5e-3) -> float:
    """The largest error that may be: with torch's products, or with kernels of this package.

    Those round activations to 16 bits, and scales not to fp16 as dequantizing does. `.ci/run` runs the tests
    that call this, marked `both_products`, with both.

    Args:
        of_kernels: Default: relative, of logits; 0.003 was measured.
    """
    return of_torch if find_native()[0] is None else of_kernels


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
