"""Put a checkpoint's dense part into a transformers model on the meta device. Knows nothing of experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtral_offload.errors import CheckpointError
from mixtral_offload.models.checkpoint import Checkpoint
from mixtral_offload.weights.hqq import Fields, Quantization, QuantizedLinear, dequantize, field_specs, matmul
from mixtral_offload.weights.safetensors_io import StoredTensor, in_threads


def load_dense(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    product: Callable[..., Tensor] | None = matmul,
) -> None:
    """Fill a model tensor by tensor; quantized linear layers stay quantized.

    One thread decides what goes where before anything is read; the others only read.

    Args:
        model: On the meta device, without its experts' parameters.
        checkpoint: Checked against this model's class.
        device: Device of the parameters.
        dtype: Type of all floating-point parameters but those that transformers keeps in fp32.
        product: Multiplies with the quantized layers, see `QuantizedLinear`; None: dequantize them once.

    Raises:
        CheckpointError: For a file that cannot be read, or a parameter left without a value.
    """
    missing = set(model.state_dict()) - {place.parameter for place in checkpoint.places.values()}
    _fill_buffers(model, device)
    kept = checkpoint.kept.get(dtype, frozenset())
    packed: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    reads: list[tuple[Callable[[], Tensor]]] = []
    puts: list[Callable[[Tensor], None]] = []
    for key, stored in checkpoint.dense.items():
        place = checkpoint.places[key]
        if place.field is not None:
            packed[place.name][place.field] = stored
            continue
        wanted = torch.float32 if key in kept else dtype
        reads.append((partial(stored.read, wanted if stored.dtype.is_floating_point else None, device),))
        puts.append(partial(_put, model, place.name))
    for name, fields in packed.items():
        quantization, shape = checkpoint.linears[name]
        if product is None:
            reads.append((partial(_read_dequantized, fields, shape, quantization, dtype, device),))
            puts.append(partial(_put, model, f"{name}.weight"))
            continue
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        layer = QuantizedLinear.replacing(getattr(owner, child), quantization, product)
        setattr(owner, child, layer)
        for field, stored in fields.items():
            reads.append((partial(stored.read, None, device),))
            puts.append(partial(layer.set_field, field))
    for put, value in zip(puts, in_threads(reads), strict=True):
        put(value)
    model.tie_weights(missing_keys=missing)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise CheckpointError(
            f"{len(left)} parameters have no value in the checkpoint",
            path=checkpoint.folder,
            key=left[0],
            found="no such tensor",
            hint="download the index again, or check that config.json belongs to these files",
        )


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _read_dequantized(
    fields: dict[str, StoredTensor],
    shape: tuple[int, int],
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    specs = field_specs(shape, quantization)
    read: Fields = {name: stored.read(device=device).view(specs[name][1]) for name, stored in fields.items()}
    return dequantize(read, shape, quantization, dtype)


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no checkpoint has (rotary frequencies) with transformers' own initialisation.

    Parameters and other buffers are on the meta device, where it has no effect: what a checkpoint lacks stays
    missing.
    """
    for module in model.modules():
        computed = {
            name: buffer
            for name, buffer in module._buffers.items()
            if isinstance(buffer, Tensor) and buffer.is_meta and name in module._non_persistent_buffers_set
        }
        for name, buffer in computed.items():
            module._buffers[name] = torch.empty_like(buffer, device=device)
        if computed:
            model._init_weights(module)
