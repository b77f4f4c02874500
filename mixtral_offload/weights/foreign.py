"""Refuse quantized checkpoints of other formats, by name. No models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from transformers import PretrainedConfig

from mixtral_offload.errors import CheckpointError
from mixtral_offload.weights.manifest import METHOD

#: `quantization_config.quant_method` of checkpoints that this package writes
#: keys that identify a format, for checkpoints whose config.json does not name it; the first match counts
FOREIGN_KEYS = (
    (re.compile(r"\.g_idx$"), "gptq"),
    (re.compile(r"\.(qweight|qzeros)$"), "awq or gptq"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors"),
    (re.compile(r"\.weight\.(absmax|quant_map|quant_state\..+)$"), "bitsandbytes"),
    (re.compile(r"\.weight_scale_inv$"), "fp8"),
    (re.compile(r"_proj_(blocks|scales)$"), "mxfp4"),
    (re.compile(r"\.(weight_scale|weight_scale_2|input_scale)$"), "fp8 or nvfp4"),
)


def refuse_method(folder: Path, config: PretrainedConfig) -> None:
    """Raise a CheckpointError if config.json names a format that this package does not read."""
    method = quant_method(config)
    if method not in (None, METHOD, "hqq"):  # of hqq, one form is read: see `refuse_keys`
        raise _refused(folder, method, "quantization_config.quant_method")


def refuse_keys(folder: Path, config: PretrainedConfig, keys: Iterable[str]) -> None:
    """Raise a CheckpointError if the keys of the tensors are those of another format."""
    keys = list(keys)
    if quant_method(config) == "hqq" and not any(
        ".meta." in key for key in keys
    ):  # the published Mixtral's form
        raise _refused(folder, "hqq", "quantization_config.quant_method")
    for pattern, name in FOREIGN_KEYS:
        if key := next(filter(pattern.search, keys), None):
            raise _refused(folder, name, key)


def quant_method(config: PretrainedConfig) -> str | None:
    """Return the `quant_method` of a configuration; None if it has no `quantization_config`."""
    of = getattr(config, "quantization_config", None)
    if of is None:
        return None
    method = of.get("quant_method") if isinstance(of, dict) else getattr(of, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown")


def _refused(folder: Path, method: str, key: str) -> CheckpointError:
    return CheckpointError(
        f"the weights are quantized in another format ({method[:60]}), which is not supported",
        path=folder / "config.json",
        key=key,
        expected="weights in 16 or 32 bits, or a checkpoint that mixtral-offload convert wrote",
        found=method[:60],
        hint="take the model's unquantized checkpoint; mixtral-offload convert makes any bit width of it",
    )
