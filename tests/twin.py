"""transformers' own Mixtral on the same, dequantized weights: nothing of this package runs in it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import MixtralForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from mixtral_offload.runtime.build import from_pretrained
from mixtral_offload.weights.hqq import QuantizedLinear, values
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


def unrounded(fields, shape, quantization):
    """The matrix in fp64, without fp16's rounding of its scales and zeros."""
    of = {name: value.double() for name, value in fields.items()}
    scale, zero = of.get("meta.scale"), of.get("meta.zero")
    if scale is None:
        scale = (of["meta.scale_q"] - of["meta.meta_scale.zero"]) * of["meta.meta_scale.scale"]
    if zero is None:
        zero = (of["meta.zero_q"] - of["meta.meta_zero.zero"]) * of["meta.meta_zero.scale"]
    q = values(fields, quantization).double()
    return ((q - zero.view(1, -1)) * scale.view(1, -1)).view(shape)


def unrounded_twin(*source) -> PreTrainedModel:
    """A twin whose scales are not rounded to fp16, as the kernels do not round them either."""
    plain, packed = twin(*source), from_pretrained(*source, device="cpu", cache_size=8)
    for name, module in packed.named_modules():
        if isinstance(module, QuantizedLinear):
            shape = module.out_features, module.in_features
            weight = unrounded(module.fields, shape, module.quantization)
            plain.get_submodule(name).weight.data.copy_(weight)
    layout = packed.offload.layout
    for (layer, expert), row in packed.offload.cache.resident_slots():
        of = {
            name: unrounded(fields, layout.shapes[name], layout.quantization[name])
            for name, fields in layout.views(row).items()
        }
        experts = plain.model.layers[layer].mlp.experts
        experts.gate_up_proj.data[expert].copy_(torch.cat((of["gate"], of["up"])))
        experts.down_proj.data[expert].copy_(of["down"])
    return plain


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


@contextmanager
def same_experts(model: PreTrainedModel, plain: PreTrainedModel) -> Iterator[None]:
    """Let the routers of `plain` choose what those of `model` chose in its pass just before.

    A router that is undecided by .00003, as one of the shipped model is for one prompt of the tests, falls
    otherwise with products that are rounded otherwise. The logits then differ by 1 %: no error of a product.
    Scores stay those of `plain`.
    """
    chosen: dict[str, torch.Tensor] = {}

    def keep(name):
        return lambda router, arguments, outputs: chosen.__setitem__(name, outputs[2])

    def give(name):
        def hook(router, arguments, outputs):
            scores = outputs[0].float().softmax(-1).gather(-1, chosen[name])
            return outputs[0], scores / scores.sum(-1, keepdim=True), chosen[name]

        return hook

    hooks = [
        router.register_forward_hook(hook(name))
        for of, hook in ((model, keep), (plain, give))
        for name, router in of.named_modules()
        if isinstance(router, MixtralTopKRouter)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
