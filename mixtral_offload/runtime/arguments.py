"""Arguments of transformers' own `from_pretrained`: understood, harmless, or refused with a next step."""

from __future__ import annotations

from typing import Any

import torch

from mixtral_offload.errors import OptionError
from mixtral_offload.runtime.options import parse_device

#: arguments of `mixtral_offload.weights.hub.download`
HUB = ("token", "revision", "cache_dir", "local_files_only")
CONVERT = "convert the checkpoint first: mixtral-offload convert SOURCE TARGET --bits 4"
BUDGETS = "give vram= and ram=, or cache_size=, which decide what is offloaded"
EDIT = "edit the checkpoint's config.json, or change model.config afterwards"
#: argument -> values that change nothing, and the next step for all others; None changes nothing anywhere
OTHERS: dict[str, tuple[tuple, str]] = {
    "trust_remote_code": ((False,), "only transformers' own classes are run: leave it out"),
    "low_cpu_mem_usage": ((True, False), ""),
    "use_safetensors": ((True,), "only safetensors files are read: leave it out"),
    "output_loading_info": ((False,), "a model alone is returned: leave it out"),
    "ignore_mismatched_sizes": ((False,), "a tensor of another shape is always an error: leave it out"),
    "force_download": ((False,), "delete the folder that is to be fetched again"),
    "resume_download": ((True, False), ""),
    "subfolder": (("",), "give the folder itself"),
    "weights_only": ((True,), "safetensors files hold nothing but weights: leave it out"),
    "load_in_4bit": ((False,), CONVERT),
    "load_in_8bit": ((False,), CONVERT),
    "quantization_config": ((), CONVERT),
    "gguf_file": ((), "take the model's safetensors files"),
    "variant": ((), "take a folder whose files are called model*.safetensors"),
    "max_memory": ((), BUDGETS),
    "offload_folder": ((), 'store="disk" reads experts from the checkpoint\'s own files'),
    "offload_state_dict": ((False,), BUDGETS),
    "offload_buffers": ((False,), BUDGETS),
    "config": ((), EDIT),
    "generation_config": ((), "set model.generation_config afterwards"),
    "state_dict": ((), "save the weights to a folder, and give that"),
    "key_mapping": ((), "rename the keys in the checkpoint's files"),
    "adapter_kwargs": ((), "load the adapter afterwards, with peft"),
    "use_auth_token": ((), "it is called token now"),
    "proxies": ((), "set HTTPS_PROXY"),
    "mirror": ((), "set HF_ENDPOINT"),
    "tp_plan": ((), "one device is used"),
    "tp_size": ((), "one device is used"),
    "device_mesh": ((), "one device is used"),
    "distributed_config": ((), "one device is used"),
    "experts_implementation": (("offloaded",), "offloaded experts are this package's own: leave it out"),
    "use_kernels": ((False,), "leave it out"),
    "kernel_config": ((), "leave it out"),
    "from_tf": ((False,), "only safetensors files are read: leave it out"),
    "from_flax": ((False,), "only safetensors files are read: leave it out"),
}
WHOLE_DEVICES = ("auto", "balanced", "balanced_low_0", "sequential")


def split_arguments(
    arguments: dict[str, Any], hub: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sort arguments of `from_pretrained` into options of this package and arguments of the download.

    Args:
        arguments: Named as in this package or in transformers.
        hub: Arguments of the download that were given as such.

    Returns:
        Arguments for `parse_options`, and for `mixtral_offload.weights.hub.download`.

    Raises:
        OptionError: For an argument of transformers that is not supported, or two that contradict each other.
    """
    options, hub = dict(arguments), dict(hub or {})
    for name in OTHERS.keys() & options.keys():
        value, (harmless, hint) = options.pop(name), OTHERS[name]
        # of the same type: 1 == True
        if value is not None and not any(type(value) is type(of) and value == of for of in harmless):
            raise OptionError(f"{name} is not supported", found=_shown(value), hint=hint or None)
    for name in HUB:
        if name in options:
            _same(name, hub, name, options.pop(name))
    if "torch_dtype" in options:
        _same("dtype", options, "torch_dtype", options.pop("torch_dtype"))
    if "device_map" in options:
        _same("device", options, "device_map", _one_device(options.pop("device_map")))
    return options, hub


def _same(name: str, where: dict[str, Any], alias: str, value: Any) -> None:
    """Set an argument that may be there already, with the same meaning."""
    if value is None:
        return
    before = where.get(name)
    if before is not None and _canonical(name, before) != _canonical(name, value):
        raise OptionError(
            f"two values for {name}", expected=f"one of {name} and {alias}, or the same value for both",
            found="two tokens" if name == "token" else f"{_shown(before)} and {_shown(value)}",
        )  # fmt: skip
    where[name] = value


def _canonical(name: str, value: Any) -> Any:
    if name == "device":
        return parse_device(value)
    return str(value).removeprefix("torch.") if name == "dtype" else value


def _one_device(device_map: Any) -> str | torch.device | None:
    """The one device of a `device_map`; None: this package's own choice."""
    if device_map is None or (isinstance(device_map, str) and device_map in WHOLE_DEVICES):
        return None
    places = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    devices = {f"cuda:{of}" if type(of) is int else str(of) for of in places}
    if len(devices) != 1 or not all(isinstance(of, (int, str, torch.device)) for of in places):
        raise OptionError(
            "device_map is supported for one device only", expected='a device, {"": a device}, or "auto"',
            found=_shown(device_map), hint=BUDGETS,
        )  # fmt: skip
    return devices.pop()


def _shown(value: Any) -> str:
    is_plain = isinstance(value, (int, float, str, dict, list, tuple))
    text = repr(value) if is_plain else type(value).__name__
    return text if len(text) <= 100 else text[:97] + "..."
