"""Everything but the experts: put a checkpoint's trunk into a transformers model without weights.

Knows parameter names and modules of a model on the meta device. Knows nothing of experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .headers import StoredTensor, in_threads
from .manifest import Manifest, recognise
from .quantization import (
    Fields,
    Quantization,
    QuantizedLinear,
    dequantize,
    field_specs,
    matmul,
    split_quantized,
)


def parameter_name(key: str) -> str:
    """A stored key -> transformers' name; checkpoints of Mixtral keep the block's first name."""
    return key.replace(".block_sparse_moe.", ".mlp.")


def load_trunk(
    model: nn.Module, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, product=matmul
) -> None:
    """Fill `model` (meta device) tensor by tensor; quantized linear layers stay quantized.

    product: multiplies with them (see `QuantizedLinear`); None: they are dequantized once. Raises CheckpointError for a key that the model does not have, a wrong shape, or a parameter left without value.
    """
    tasks, quantized = [], {}
    for key, stored in checkpoint.trunk.items():
        if split := split_quantized(parameter_name(key)):
            quantized.setdefault(split[0], {})[split[1]] = stored
        else:
            tasks.append((_set_parameter, model, key, stored, device, dtype))
    rest = device, product, checkpoint.manifest
    tasks += [(_set_quantized, model, name, tensors, *rest) for name, tensors in quantized.items()]
    for _ in in_threads(tasks):
        pass
    model.tie_weights()
    _fill_buffers(model, device)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise CheckpointError(
            f"{len(left)} parameters have no value in the checkpoint", path=checkpoint.folder, key=left[0],
            found="no such tensor", hint="download the index again, or check that config.json belongs to these files",
        )  # fmt: skip


def _module(model: nn.Module, name: str, key: str, stored: StoredTensor) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"{type(model).__name__} has no place for this tensor", path=stored.path, key=key,
            hint="check that config.json belongs to these files",
        ) from None  # fmt: skip


def _set_parameter(model: nn.Module, key: str, stored: StoredTensor, device, dtype) -> None:
    owner, _, name = parameter_name(key).rpartition(".")
    module = _module(model, owner, key, stored)
    is_buffer = name in module._buffers
    target = module._buffers.get(name) if is_buffer else module._parameters.get(name)
    expected = None if target is None else tuple(target.shape)
    if expected != stored.shape or (stored.dtype.is_floating_point != target.dtype.is_floating_point):
        raise CheckpointError(
            "a tensor does not fit the model", path=stored.path, key=key,
            expected="no such tensor" if target is None else f"{expected} of {target.dtype}",
            found=f"{stored.shape} of {stored.dtype}", hint="check that config.json belongs to these files",
        )  # fmt: skip
    value = stored.read(dtype if stored.dtype.is_floating_point else None, device)
    if is_buffer:
        module._buffers[name] = value
    else:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)


def _set_quantized(
    model: nn.Module,
    name: str,
    tensors: dict[str, StoredTensor],
    device: torch.device,
    product,
    manifest: Manifest | None,
) -> None:
    first = next(iter(tensors.values()))
    linear = _module(model, name, name, first)
    shape = (linear.out_features, linear.in_features)
    sizes = {field: (stored.dtype, stored.n_elements) for field, stored in tensors.items()}
    stored_name = split_quantized(first.key)[0]
    quantization = recognise(manifest, first.path, stored_name, shape, sizes)
    fields = {field: stored.read(device=device) for field, stored in tensors.items()}
    if product is None:
        linear._parameters["weight"] = nn.Parameter(
            _plain(fields, shape, quantization, linear.weight.dtype), False
        )
        return
    layer = QuantizedLinear(shape, quantization, product)
    for field, value in fields.items():
        layer.set_field(field, value)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _plain(fields: Fields, shape: tuple[int, int], quantization: Quantization, dtype: torch.dtype) -> Tensor:
    specs = field_specs(shape, quantization)
    return dequantize(
        {name: value.view(specs[name][1]) for name, value in fields.items()}, shape, quantization, dtype
    )


def _fill_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers that no checkpoint holds (rotary frequencies) are computed by transformers' own initialisation."""
    for module in model.modules():
        meta = {
            name: buffer
            for name, buffer in module._buffers.items()
            if isinstance(buffer, Tensor) and buffer.is_meta
        }
        for name, buffer in meta.items():
            module._buffers[name] = torch.empty_like(buffer, device=device)
        if meta:
            model._init_weights(module)
