"""Everything but the experts: put a checkpoint's trunk into a transformers model without weights.

Knows parameter names and modules of a model on the meta device. Knows nothing of experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtral_offload.errors import CheckpointError
from mixtral_offload.models.checkpoint import Checkpoint
from mixtral_offload.weights.hqq import Fields, Quantization, QuantizedLinear, dequantize, field_specs, matmul
from mixtral_offload.weights.safetensors_io import StoredTensor, in_threads


def load_trunk(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    product: Callable[..., Tensor] | None = matmul,
) -> None:
    """Fill a model tensor by tensor; quantized linear layers stay quantized.

    What is put where is decided before anything is read, by one thread; the others only read.

    Args:
        model: On the meta device, without its experts' parameters.
        checkpoint: Checked against this model's class.
        device: Of the parameters.
        dtype: Of all floating ones but those that transformers keeps in fp32.
        product: Multiplies with the quantized layers, see `QuantizedLinear`; None: they are dequantized once.

    Raises:
        CheckpointError: For a file that cannot be read, or a parameter left without value.
    """
    missing = set(model.state_dict()) - {place.parameter for place in checkpoint.places.values()}
    _fill_buffers(model, device)
    kept, places = checkpoint.kept.get(dtype, frozenset()), checkpoint.places
    packed: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    plain: dict[str, tuple[StoredTensor, torch.dtype | None]] = {}
    for key, stored in checkpoint.trunk.items():
        if places[key].field is not None:
            packed[places[key].name][places[key].field] = stored
        else:
            wanted = torch.float32 if key in kept else dtype
            plain[places[key].name] = stored, wanted if stored.dtype.is_floating_point else None
    tasks, homes = [], []
    for name, (stored, wanted) in plain.items():
        tasks.append((stored.read, wanted, device))
        homes.append(name)
    for name, fields in packed.items():
        quantization, shape = checkpoint.linears[name]
        if product is None:
            tasks.append((_read_dequantized, fields, shape, quantization, dtype, device))
            homes.append(f"{name}.weight")
            continue
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, QuantizedLinear.replacing(getattr(owner, child), quantization, product))
        for field, stored in fields.items():
            tasks.append((stored.read, None, device))
            homes.append((name, field))
    for home, value in zip(homes, in_threads(tasks), strict=True):
        if isinstance(home, tuple):
            model.get_submodule(home[0]).set_field(home[1], value)
        else:
            _put(model, home, value)
    model.tie_weights(missing_keys=missing)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise CheckpointError(
            f"{len(left)} parameters have no value in the checkpoint", path=checkpoint.folder, key=left[0],
            found="no such tensor", hint="download the index again, or check that config.json belongs to these files",
        )  # fmt: skip


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
    """Let transformers' own initialisation compute the buffers that no checkpoint holds (rotary frequencies).

    Parameters and the other buffers are still on the meta device, where it does nothing to them: what a checkpoint lacks
    is found missing later, not made up here.
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
