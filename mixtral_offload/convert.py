"""Write checkpoints: one file per expert plus a trunk, readable by anyone with safetensors.

Knows how to read a checkpoint tensor by tensor and quantize it. One expert at most is held in memory.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import INDEX, Checkpoint, open_checkpoint
from .errors import CheckpointError
from .quantization import Quantization, dequantize, field_specs, quantize, repack
from .trunk import split_quantized

ATTENTION = (
    ".self_attn.q_proj.weight",
    ".self_attn.k_proj.weight",
    ".self_attn.v_proj.weight",
    ".self_attn.o_proj.weight",
)


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    experts: Quantization | None = None,
    attention: Quantization | None = None,
    *,
    device: str = "cpu",
    config_extra: dict | None = None,
    progress: Callable[[int], None] = lambda n_done: None,
) -> Path:
    """Read the checkpoint `source`, write it to `target` with experts and attention quantized as asked.

    None keeps the bytes as they are stored. A quantized matrix is dequantized first, then quantized anew, unless only its
    packing differs (`Quantization.split`): then the weights stay the same. config_extra is merged
    into config.json. progress is called with 1 after each expert. The work is done in a new folder beside `target`,
    renamed at the end: an interruption leaves no half-made checkpoint. Raises CheckpointError if `target` exists, cannot
    be written, or if weights are not finite.
    """
    source, target = Path(source), Path(target).absolute()
    if target.exists():
        raise CheckpointError("target exists", path=target, hint="choose another folder or remove this one")
    checkpoint = open_checkpoint(source)
    with _new_folder(target) as partial:
        weight_map = _write_weights(checkpoint, partial, experts, attention, torch.device(device), progress)
        total = sum((partial / name).stat().st_size for name in set(weight_map.values()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        _copy_small_files(checkpoint.folder, partial, config_extra or {})
    return target


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to work in, renamed to `target` at the end, removed with all that is in it if that is not reached."""
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent))
        yield partial
        partial.chmod(target.parent.stat().st_mode & 0o777)  # mkdtemp's is for its owner alone
        partial.rename(target)
        partial = None
    except (OSError, SafetensorError) as error:
        path, found = getattr(error, "filename", None) or target, getattr(error, "strerror", None) or error
        hint = "choose another folder, or make room there"
        raise CheckpointError("cannot write the checkpoint", path=path, found=found, hint=hint) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _write_weights(checkpoint: Checkpoint, folder, experts, attention, device, progress) -> dict[str, str]:
    n_files = len(checkpoint.experts) + 1
    weight_map: dict[str, str] = {}

    def save(number: int, tensors: dict[str, Tensor]) -> None:
        name = f"model-{number:05d}-of-{n_files:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    for number, expert in enumerate(sorted(checkpoint.experts), 1):
        save(number, _expert_tensors(checkpoint, expert, checkpoint.prefixes[expert], experts, device))
        progress(1)
    save(n_files, _trunk_tensors(checkpoint, attention, device))
    return weight_map


def _expert_tensors(checkpoint, expert, prefixes, quantization, device) -> dict[str, Tensor]:
    tensors = {}
    for matrix, shape in checkpoint.layout.shapes.items():
        fields = {
            field: stored.read() for (m, field), stored in checkpoint.experts[expert].items() if m == matrix
        }
        if quantization is not None:
            stored = checkpoint.layout.quantization[matrix]
            fields = _requantized(prefixes[matrix], fields, shape, stored, quantization, device)
        tensors |= {prefixes[matrix] + field: value for field, value in fields.items()}
    return tensors


def _requantized(
    key: str, fields, shape, stored: Quantization, wanted: Quantization, device
) -> dict[str, Tensor]:
    """The matrix's tensors as wanted; the same bytes, or at least the same weights, where they are so already."""
    is_wide = stored.bits == 16 and fields["weight"].dtype == torch.float32  # what "16 bits" is not
    if stored == wanted and not is_wide:
        return fields
    # published tensors may differ in rank
    shaped = {
        name: fields[name].view(dims).to(device) for name, (_, dims) in field_specs(shape, stored).items()
    }
    if stored.bits < 16 and replace(stored, split=False) == replace(wanted, split=False):
        return {name: value.cpu() for name, value in repack(shaped, stored, wanted).items()}
    return _quantize(key, dequantize(shaped, shape, stored, torch.float32), wanted)


def _quantize(key: str, weight: Tensor, quantization: Quantization) -> dict[str, Tensor]:
    fields = {name: value.cpu() for name, value in quantize(weight, quantization).items()}
    for name, value in fields.items():
        if not value.isfinite().all():
            raise CheckpointError(
                "a matrix cannot be quantized", key=key + name, expected="finite weights, within the range of fp16",
                found=f"weights from {weight.min():g} to {weight.max():g}", hint="check the source, or keep these as stored",
            )  # fmt: skip
    return fields


def _trunk_tensors(checkpoint: Checkpoint, attention: Quantization | None, device) -> dict[str, Tensor]:
    """The trunk as it is stored, attention matrices quantized where asked."""
    tensors, modules = {}, {}
    for key, stored in checkpoint.trunk.items():
        split = (key.removesuffix(".weight"), "weight") if key.endswith(ATTENTION) else split_quantized(key)
        if attention is None or split is None:
            tensors[key] = stored.read()
        else:
            modules.setdefault(split[0], {})[split[1]] = stored.read()
    for module, fields in modules.items():
        fields = _attention_fields(checkpoint, module, fields, attention, device)
        tensors |= {f"{module}.{name}": value for name, value in fields.items()}
    return tensors


def _attention_fields(
    checkpoint: Checkpoint, module: str, fields: dict[str, Tensor], wanted: Quantization, device: torch.device
) -> dict[str, Tensor]:
    """module: as stored. fields: of its weight, plain or quantized."""
    if "weight" in fields:
        stored, shape = Quantization(16), tuple(fields["weight"].shape)
    else:
        stored, shape = checkpoint.linears[checkpoint.places[f"{module}.W_q"].name]
    return _requantized(f"{module}.", fields, shape, stored, wanted, device)


def _copy_small_files(source: Path, target: Path, config_extra: dict) -> None:
    config = json.loads((source / "config.json").read_text()) | config_extra
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in sorted(source.iterdir()):
        if path.suffix in (".json", ".model", ".jinja", ".txt") and path.name not in ("config.json", INDEX):
            shutil.copy2(path, target / path.name)
