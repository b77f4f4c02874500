"""`model.save_pretrained`: an offloaded model as a checkpoint of our format.

transformers' own method would write a model without experts.
"""

from __future__ import annotations

import json
import os
import warnings
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mixtral_offload.errors import OffloadError, OptionError
from mixtral_offload.models.checkpoint import Checkpoint
from mixtral_offload.models.config_check import check_config
from mixtral_offload.models.skeleton import build_meta
from mixtral_offload.runtime.convert import save_checkpoint
from mixtral_offload.runtime.offload import OffloadedModel
from mixtral_offload.weights.hqq import Fields, QuantizedLinear
from mixtral_offload.weights.manifest import OURS


def save_whole(model: OffloadedModel) -> None:
    """Let `save_pretrained` (and `push_to_hub`, which calls it) write our format, and `state_dict` warn."""
    weak = weakref.ref(model)  # a model that held itself would not free its memory at once
    stamps, config = _stamps(model), described(model.config)

    def save_pretrained(save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        model = weak()
        if model is None:
            raise OptionError(
                "the whole model that this base model is a part of has been freed",
                found="a base model alone",
                hint="keep what from_pretrained has returned, not its base model alone",
            )
        if model.offload.options.dequantize_on_load:
            return _save_dequantized(model, save_directory, *args, **kwargs)
        if _stamps(model) != stamps:
            raise OptionError(
                "the files that this model was built from have changed since",
                found=model.offload.checkpoint.folder,
                expected="the same files, from which the experts are copied",
                hint="build the model again, and save that",
            )
        save_model(model, save_directory, *args, config_as_built=config, **kwargs)

    model.save_pretrained = save_pretrained  # type: ignore[method-assign]  # of this object alone
    if model.offload.options.dequantize_on_load:
        return

    def save_base(
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the whole model; transformers' own method would write a part of it, without experts."""
        given = state_dict and {f"{prefix}.{name}": tensor for name, tensor in state_dict.items()}
        save_pretrained(save_directory, is_main_process, given, **kwargs)

    prefix = model.base_model_prefix
    if model.base_model is not model:
        model.base_model.save_pretrained = save_base  # type: ignore[assignment]  # stubs: an nn.Module
    model.register_state_dict_post_hook(_StateDictNotice())


def _stamps(model: OffloadedModel) -> dict[Path, tuple[int, ...] | None]:
    """What distinguishes a file of experts from another one of the same name; None if there is no file."""
    paths = {
        stored.path for fields in model.offload.checkpoint.experts.values() for stored in fields.values()
    }
    return {path: _stamp(path) for path in paths}


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _save_dequantized(
    model: OffloadedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **others: Any,
) -> None:
    """Save a model that was dequantized on load as transformers does: all weights are its parameters.

    They have gaps in the cache's memory and must be copied: transformers saves only contiguous ones.
    """
    if state_dict is None:
        state_dict = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in model.state_dict().items()
        }
    type(model).save_pretrained(model, save_directory, is_main_process, state_dict, **others)


def save_model(
    model: OffloadedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    *,
    config_as_built: dict[str, Any],
    **others: Any,
) -> None:
    """Write a model to a folder as a checkpoint of our format, which transformers alone cannot load.

    Experts are copied from the checkpoint that the model was built from. Everything else is written as it is
    now, in the checkpoint's dtype if that holds the values exactly, else in the model's.

    Args:
        model: From `from_pretrained`, not dequantized on load.
        save_directory: Is made if there is none; must not be the folder that the model reads.
        is_main_process: False writes nothing, as in transformers.
        state_dict: Values in place of the model's own, by its names.
        config_as_built: The model's original configuration, see `described`. Changes are written.
        others: transformers' other arguments; those that would change what is written are refused.

    Raises:
        OptionError: For a model with other tensors than its checkpoint, a changed configuration that these
            tensors do not fit, or an argument that is not supported.
        CheckpointError: For a folder that cannot be written, or experts that cannot be read.
    """
    _check_arguments(others)
    if not is_main_process:
        return
    checkpoint, folder = model.offload.checkpoint, Path(save_directory)
    if folder.exists() and folder.samefile(checkpoint.folder):
        raise OptionError(
            "a model cannot be saved into the folder that it reads its experts from",
            found=folder,
            hint="choose another folder",
        )
    try:
        small = {"generation_config.json": model.generation_config.to_json_string()}
    except (TypeError, ValueError) as error:
        raise OptionError("model.generation_config cannot be written", found=str(error)[:200]) from None
    now = described(model.config)
    changed = {
        name: now.get(name)
        for name in sorted(config_as_built.keys() | now.keys())
        if now.get(name) != config_as_built.get(name)
    }
    if changed:
        _check_changes(checkpoint, model.config, changed)
    with model.offload.passes.lock:  # a training step of another thread may be under way
        dense = _dense_of(model, state_dict or {})
    save_checkpoint(checkpoint, folder, dense, small, changed)


def _check_arguments(others: dict[str, Any]) -> None:
    """Refuse transformers' arguments that would change what is written."""
    usual = {"safe_serialization": True, "variant": None, "push_to_hub": False, "save_peft_format": True}
    for name, harmless in usual.items():
        if others.get(name, harmless) not in (harmless, None):
            hint = "call model.push_to_hub(repo_id)" if name == "push_to_hub" else "leave it out"
            raise OptionError(f"{name} is not supported", found=others[name], hint=hint)


#: settings of how a model is run or how its weights are stored
_NOT_THE_MODEL = {
    "transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype",
    "experts_implementation", "attn_implementation", *OURS,
}  # fmt: skip


def described(config: PretrainedConfig) -> dict[str, Any]:
    """Return the settings that describe the model itself, in JSON's types."""
    text = json.loads(config.to_json_string(use_diff=False))
    return {
        name: value
        for name, value in text.items()
        if name not in _NOT_THE_MODEL and not name.endswith("_implementation")
    }


def _check_changes(checkpoint: Checkpoint, config: PretrainedConfig, changed: dict[str, Any]) -> None:
    """Refuse a configuration that the model's tensors do not fit."""
    key, found = None, f"changed since it was built: {', '.join(changed)}"
    try:
        read = type(config).from_dict(described(config))
        check_config(read, checkpoint.folder / "config.json")
        now, built = _shapes(read), _shapes(checkpoint.config)
        if now == built:
            return
        key = min(name for name in now.keys() | built.keys() if now.get(name) != built.get(name))
    except OffloadError as error:
        found = str(error)
    raise OptionError(
        "this model's configuration was changed to that of another model",
        key=key,
        found=found[:300],
        expected="a configuration that its weights fit",
        hint="undo these changes of model.config",
    )


def _shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(of.shape) for name, of in build_meta(config, torch.float16).named_parameters()}


@torch.no_grad()
def _dense_of(model: OffloadedModel, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything but the experts, by the checkpoint's keys, on the CPU and in memory of its own."""
    checkpoint = model.offload.checkpoint
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    packed = {
        name: module.fields for name, module in model.named_modules() if isinstance(module, QuantizedLinear)
    }
    _check_same_places(model)
    _check_same_tensors(model, tensors, packed)
    dense: dict[str, Tensor] = {}
    left = dict(given)
    for key, place in checkpoint.places.items():
        stored = checkpoint.dense[key]
        value = tensors[place.name] if place.field is None else packed[place.name][place.field]
        name = place.name if place.field is None else f"{place.name}.{place.field.replace('.', '__')}"
        if name in left:
            value = _of_this_shape(name, left.pop(name), value)
        if value.numel() != stored.n_elements:
            raise OptionError(
                "a tensor has another shape than in the checkpoint that the model was built from",
                key=place.name,
                expected=tuple(stored.shape),
                found=tuple(value.shape),
                hint="resize the original model, and convert it",
            )
        value = value.detach().cpu()
        exact = value.to(stored.dtype)
        same = exact.dtype == value.dtype or torch.equal(exact.to(value.dtype), value)
        dense[key] = (exact if same else value).reshape(stored.shape).clone().contiguous()
    for name, value in left.items():  # allowed if it is the model's own, such as a tied tensor's second name
        own = tensors.get(name)
        if own is None or own.shape != value.shape or not torch.equal(own.cpu(), value.cpu()):
            raise OptionError(
                "state_dict has a tensor that would not be saved",
                key=name,
                expected="names of model.state_dict()",
                hint="experts are copied from the checkpoint; load other tensors into the model first",
            )
    return dense


def _of_this_shape(name: str, value: Tensor, own: Tensor) -> Tensor:
    if value.shape != own.shape or value.dtype.is_floating_point != own.dtype.is_floating_point:
        raise OptionError(
            "state_dict has a tensor of another kind than the model's",
            key=name,
            expected=f"{tuple(own.shape)}, {own.dtype}",
            found=f"{tuple(value.shape)}, {value.dtype}",
        )
    return value


def _check_same_places(model: OffloadedModel) -> None:
    """Refuse a model whose layers were moved: experts would be saved at their old places."""
    for name, layer in ((of.name, of.number) for of in model.offload.layers):
        found: torch.nn.Module | None = None
        with suppress(AttributeError):
            found = model.get_submodule(name)
        there = getattr(found, "layer", None)
        if getattr(found, "offload", None) is not model.offload or there != layer:
            raise OptionError(
                "experts of this model are not where its checkpoint has them",
                key=name,
                expected=f"the experts of layer {layer}",
                found=type(found).__name__ if there is None else f"those of layer {there}",
                hint="put the layers back, or change and convert the original model",
            )


def _check_same_tensors(model: OffloadedModel, tensors: dict[str, Tensor], packed: dict[str, Fields]) -> None:
    """Refuse a model whose tensors are not those of its checkpoint (adapters, replaced layers)."""
    places = model.offload.checkpoint.places.values()
    expected = {place.parameter for place in places} | {place.name for place in places}
    buffers = {f"{name}.{field.replace('.', '__')}" for name, fields in packed.items() for field in fields}
    computed = {
        f"{name}.{buffer}".removeprefix(".")
        for name, module in model.named_modules() for buffer in module._non_persistent_buffers_set
    }  # fmt: skip
    known = {id(tensors[name]) for name in expected & tensors.keys()}  # a tied tensor has a second name
    added = sorted(
        name
        for name, tensor in tensors.items()
        if name not in expected | buffers | computed and id(tensor) not in known
    )
    lost = sorted(
        place.name for place in places if place.name not in (tensors if place.field is None else packed)
    )
    if added or lost:
        raise OptionError(
            "this model has other tensors than the checkpoint that it was built from",
            key=(added or lost)[0],
            expected="the checkpoint's tensors",
            found=f"{len(added)} more, {len(lost)} missing",
            hint="save adapters with their own save_pretrained (peft), or remove them first",
        )


class _StateDictNotice:
    """Warns once, when the state of the whole model is read, that it has no experts."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, module: torch.nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
        if prefix or self._said:  # a prefix: part of another module's state, such as a peft model's
            return
        self._said = True
        warnings.warn(
            "state_dict() holds no experts: they stay in the checkpoint. model.save_pretrained(folder) "
            "writes the whole model, `mixtral-offload convert` a checkpoint of other bits",
            stacklevel=3,
        )
