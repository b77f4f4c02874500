"""Write checkpoints: one file per expert plus a dense, readable by anyone with safetensors.

Knows how to read a checkpoint tensor by tensor and quantize it. One expert at most, or the dense, is held in memory.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mixtral_offload import __version__
from mixtral_offload.errors import CheckpointError
from mixtral_offload.models.checkpoint import INDEX, Checkpoint, open_checkpoint
from mixtral_offload.models.keys import DensePlace
from mixtral_offload.models.registry import family_of
from mixtral_offload.runtime.preflight import check_loads
from mixtral_offload.system.files import SMALL_SUFFIXES, read_small, replace_file, replacing, write_new
from mixtral_offload.units import gb
from mixtral_offload.weights.checksums import (
    Ledger,
    as_metadata,
    checksum_of,
    checksum_of_bytes,
    checksum_of_small,
    checksum_of_tensors,
)
from mixtral_offload.weights.hqq import (
    Quantization,
    dequantize,
    field_specs,
    quantize,
    repack,
    split_quantized,
)
from mixtral_offload.weights.manifest import METHOD, OURS, Manifest, Matrix, by_pattern
from mixtral_offload.weights.safetensors_io import StoredTensor, in_threads, is_finite, read_header
from mixtral_offload.weights.source import local_folder
from mixtral_offload.weights.work_folder import (
    JOURNAL,
    WorkFolder,
    finish_renamed,
    resume_hint,
    target_exists,
)


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    experts: Quantization | None = None,
    attention: Quantization | None = None,
    *,
    device: str = "cpu",
    config_extra: dict | None = None,
    progress: Callable[[int], object] = lambda n_done: None,
    report: Callable[[str], None] = lambda text: None,
) -> Path:
    """Read the checkpoint `source`, write it to `target` with experts and attention quantized as asked.

    A quantized matrix is dequantized first, then quantized anew, unless only its packing differs (`Quantization.split`):
    then the weights stay the same. What `from_pretrained` would refuse afterwards is refused before any work. The work is
    done in `target.converting`, renamed at the end. Interrupted, killed or ended by an error, it leaves that folder, and
    the next call with the same arguments goes on from its finished files; the result is byte for byte the same. Only
    after a fault of the source nothing is left. At the end everything that was written is read again and compared with
    its checksums, and the structure is opened.

    Args:
        source: folder of a checkpoint, or "demo" for the model that ships with the package.
        target: folder to write; must not exist.
        experts: how to store the experts' matrices; None keeps the bytes as they are stored.
        attention: the same for the attention's projections.
        device: where to solve.
        config_extra: merged into config.json.
        progress: called with 1 after each expert.
        report: called with a sentence about what was resumed and checked.

    Returns:
        The target's absolute path.

    Raises:
        CheckpointError: `target` exists, is being written by another process or cannot be written; its name was taken
            meanwhile (it says where the finished checkpoint is); `source` is damaged, is of a family that cannot be
            loaded, or has weights that are not finite.
        OptionError: a group size that does not divide a matrix.
    """
    source = local_folder(source) or Path(source)
    target, began_s = Path(target).absolute(), time.perf_counter()
    if os.path.lexists(target) and not os.path.lexists(target / JOURNAL):
        raise target_exists(target)
    checkpoint = open_checkpoint(source)
    settings = _settings(checkpoint, experts, attention, device, config_extra)
    if os.path.lexists(target):
        if finish_renamed(target, settings):
            report("the target is there: an earlier run was ended when all of it was written and checked")
            return target
        raise target_exists(target)
    manifest = _check_before(checkpoint, experts, attention)
    small = _small_files(checkpoint, manifest, config_extra or {})
    with _told(target), WorkFolder(target, settings, report) as work:
        weight_map = _write_weights(checkpoint, work, experts, attention, torch.device(device), progress)
        total = sum((work.path / name).stat().st_size for name in work.finished)
        metadata = {"total_size": total, "checksums": as_metadata(work.finished, True, small)}
        small[INDEX] = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1) + "\n"
        for name, data in small.items():
            write_new(work.path / name, data)
        took_s = time.perf_counter() - began_s
        report(_check_after(work, small, total, took_s))
        work.finish()
    return target


def save_checkpoint(
    checkpoint: Checkpoint, folder: str | Path, dense: dict[str, Tensor], small: dict[str, str] | None = None,
    config_extra: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write a checkpoint of our format into a folder that may exist: experts as `checkpoint` has them, the rest as given.

    Every file is made whole before it takes its name, and the index comes last: with its checksums, it does not fit files
    of an earlier checkpoint that an interruption has left there.

    Args:
        checkpoint: Where the experts are read.
        folder: Is made where there is none. Other files in it stay.
        dense: The tensors of `checkpoint.dense`, by the same keys, on the CPU.
        small: Other files to write: name -> text.
        config_extra: Entries of config.json in place of the checkpoint's own.

    Raises:
        CheckpointError: The folder cannot be written, an expert cannot be read, or a tensor is not finite.
    """
    for key, value in dense.items():
        if value.is_floating_point() and not is_finite(value):
            raise CheckpointError(
                "weights are not finite", key=key, expected="finite numbers", found="NaN or infinite",
                hint="go back to an earlier checkpoint of the training",
            )  # fmt: skip
    folder, n_files = Path(folder).absolute(), len(checkpoint.experts) + 1
    manifest = _check_before(checkpoint, None, None)
    weight_map: dict[str, str] = {}
    checksums: dict[str, str] = {}
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number, expert in enumerate([*sorted(checkpoint.experts), None], 1):
            name = f"model-{number:05d}-of-{n_files:05d}.safetensors"
            prefixes = None if expert is None else checkpoint.prefixes[expert]
            tensors = dense if expert is None else _expert_tensors(checkpoint, expert, prefixes, None, None)
            checksums[name] = _save_tensors(folder / name, tensors)
            weight_map.update(dict.fromkeys(tensors, name))
        total = sum((folder / name).stat().st_size for name in checksums)
        written = _small_files(checkpoint, manifest, config_extra or {}) | (small or {})
        metadata = {"total_size": total, "checksums": as_metadata(checksums, True, written)}
        index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1) + "\n"
        for name, data in (written | {INDEX: index}).items():
            replace_file(folder / name, data)


def _settings(checkpoint: Checkpoint, experts, attention, device, config_extra) -> dict:
    """All that decides the bytes which are written."""
    files = {path: path.stat() for path in sorted(checkpoint.folder.iterdir()) if path.is_file()}
    return {
        "source": {path.name: [of.st_size, of.st_mtime_ns] for path, of in files.items()},
        "experts": repr(experts), "attention": repr(attention), "device": str(device), "config_extra": config_extra,
        "versions": {name: version(name) for name in ("torch", "hqq", "safetensors")} | {"this": __version__},
    }  # fmt: skip


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """Errors of the file system as one message."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        path, found = getattr(error, "filename", None) or target, getattr(error, "strerror", None) or error
        hint = resume_hint(target)
        hint = f"make room there; {hint}" if hint else "choose another folder, or make room there"
        raise CheckpointError("cannot write the checkpoint", path=path, found=found, hint=hint) from error


def _check_before(checkpoint: Checkpoint, experts, attention) -> Manifest | None:
    """Refuse, before any work, what cannot be written or loaded; what the target will state about itself."""
    layout = checkpoint.layout
    matrices = {
        name: Matrix(shape, layout.quantization[name] if experts is None else experts)
        for name, shape in layout.shapes.items()
    }
    for matrix in matrices.values():
        field_specs(matrix.shape, matrix.quantization)  # the groups must divide it
    dense, places, linears = dict(checkpoint.dense), dict(checkpoint.places), dict(checkpoint.linears)
    modules = {}
    for module, fields in _modules_of(checkpoint).items():
        stored = _stored_matrix(checkpoint, module, fields)
        wanted = stored if attention is None else Matrix(stored.shape, attention)
        if wanted.quantization.bits < 16:
            modules[module] = wanted
        if wanted == stored:
            continue
        name, path = _name_in_model(checkpoint, module), next(iter(fields.values())).path
        for field in fields:
            del dense[f"{module}.{field}"], places[f"{module}.{field}"]
        linears.pop(name, None)
        is_plain = wanted.quantization.bits == 16
        if not is_plain:
            linears[name] = wanted.quantization, wanted.shape
        for field, (dtype, dims) in field_specs(wanted.shape, wanted.quantization).items():
            key = f"{module}.{field}"
            dense[key] = StoredTensor(path, dtype, dims, 0, math.prod(dims) * dtype.itemsize, key)
            places[key] = DensePlace(f"{name}.weight") if is_plain else DensePlace(name, field)
    config = checkpoint.folder / "config.json"
    manifest = Manifest(config, matrices, by_pattern(modules))
    is_packed = bool(modules) or any(of.quantization.bits < 16 for of in matrices.values())
    manifest = manifest if is_packed else None  # else it is a plain checkpoint, which transformers reads too
    check_loads(replace(checkpoint, manifest=manifest, dense=dense, places=places, linears=linears))
    return manifest


def _check_after(work: WorkFolder, small: dict[str, bytes | str], total: int, took_s: float) -> str:
    """Read everything again and open the result; says what that took."""
    began_s = time.perf_counter()
    written = list(work.finished.items())[work.n_kept :]  # the others were proven when they were taken over
    for _ in in_threads((_check_file, work.path / name, checksum) for name, checksum in written):
        pass
    for name, data in small.items():
        _compare(work.path / name, checksum_of_bytes(data), checksum_of_small(work.path / name))
    check_loads(open_checkpoint(work.path))
    check_s = time.perf_counter() - began_s
    return (
        f"checked: {gb(total)} read again in {check_s:.1f} s ({check_s / max(took_s, 1e-9):.0%} of the "
        f"{took_s:.1f} s before), checksums and structure are right"
    )


def _check_file(path: Path, checksum: str) -> None:
    _compare(path, checksum, checksum_of(path))


def _compare(path: Path, checksum: str, found: str) -> None:
    if found != checksum:
        raise CheckpointError(
            "what was written cannot be read again: its checksum is wrong", path=path, expected=checksum, found=found,
            hint="give the same command again: it writes this file anew; if it happens twice, suspect the disk or the "
            "memory of this machine, and convert elsewhere",
        )  # fmt: skip


def _write_weights(
    checkpoint: Checkpoint, work: WorkFolder, experts, attention, device, progress
) -> dict[str, str]:
    """Write what is not finished yet; returns key -> file name."""
    n_files = len(checkpoint.experts) + 1
    weight_map: dict[str, str] = {}

    def save(number: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        name = f"model-{number:05d}-of-{n_files:05d}.safetensors"
        path = work.path / name
        if name not in work.finished:
            try:
                made = tensors()
            except CheckpointError:  # and what is written may come from a damaged file, too
                work.give_up()
                raise
            work.keep(name, _save_tensors(path, made))
        weight_map.update(dict.fromkeys(read_header(path), name))

    for number, expert in enumerate(sorted(checkpoint.experts), 1):
        save(
            number, partial(_expert_tensors, checkpoint, expert, checkpoint.prefixes[expert], experts, device)
        )
        progress(1)
    save(n_files, partial(_trunk_tensors, checkpoint, attention, device))
    _prove_source(checkpoint, work)
    return weight_map


def _prove_source(checkpoint: Checkpoint, work: WorkFolder) -> None:
    """Prove the files of the source of which this run has read a part: an earlier one has read the rest."""
    experts = (of for fields in checkpoint.experts.values() for of in fields.values())
    ledgers = {id(of.check): of.check for of in (*experts, *checkpoint.dense.values())}
    for ledger in ledgers.values():
        if isinstance(ledger, Ledger) and ledger.digests and not ledger.is_done:
            try:
                ledger.finish()
            except CheckpointError:
                work.give_up()
                raise


def _save_tensors(path: Path, made: dict[str, Tensor]) -> str:
    """Write one file, whole or not at all; returns its checksum."""
    with replacing(path) as part:
        save_file(made, part, metadata={"format": "pt"})
        return checksum_of_tensors(part, made)


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
    """The dense part as it is stored, attention matrices quantized where asked."""
    dense = dict(checkpoint.dense)
    tensors = {}
    for module, fields in _modules_of(checkpoint).items() if attention is not None else ():
        matrix = _stored_matrix(checkpoint, module, fields)
        read = {name: dense.pop(f"{module}.{name}").read() for name in fields}
        made = _requantized(f"{module}.", read, matrix.shape, matrix.quantization, attention, device)
        tensors |= {f"{module}.{name}": value for name, value in made.items()}
    return {key: stored.read() for key, stored in dense.items()} | tensors


def _modules_of(checkpoint: Checkpoint) -> dict[str, dict[str, StoredTensor]]:
    """Name of each projection of the attention, and of each packed matrix -> field -> tensor."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    attention = family_of(checkpoint.config).attention
    for key, stored in checkpoint.dense.items():
        split = (key.removesuffix(".weight"), "weight") if key.endswith(attention) else split_quantized(key)
        if split is not None:
            modules.setdefault(split[0], {})[split[1]] = stored
    return modules


def _stored_matrix(checkpoint: Checkpoint, module: str, fields: dict[str, StoredTensor]) -> Matrix:
    """module: as in the stored keys."""
    plain = fields.get("weight")
    if plain is not None:
        return Matrix(tuple(plain.shape), Quantization(16))
    quantization, shape = checkpoint.linears[_name_in_model(checkpoint, module)]
    return Matrix(shape, quantization)


def _name_in_model(checkpoint: Checkpoint, module: str) -> str:
    """The model's name of a module that has this name in the stored keys."""
    places = checkpoint.places
    packed, plain = places.get(f"{module}.W_q"), places.get(f"{module}.weight")
    return plain.name.removesuffix(".weight") if packed is None else packed.name


def _small_files(
    checkpoint: Checkpoint, manifest: Manifest | None, config_extra: dict
) -> dict[str, bytes | str]:
    """The files beside the weights: config.json, with what the target states about itself, and copies of the others.

    Raises CheckpointError for a device, a pipe or a file that is too large to be of a model.
    """
    files: dict[str, bytes | str] = {}
    try:
        config = json.loads(read_small(checkpoint.folder / "config.json"))
        for path in sorted(checkpoint.folder.iterdir()):
            if path.suffix in SMALL_SUFFIXES and path.name not in ("config.json", INDEX):
                files[path.name] = read_small(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "cannot copy a file", path=getattr(error, "filename", None) or checkpoint.folder,
            expected="a regular file, or a link to one", found=getattr(error, "strerror", None) or error,
            hint="remove it from the source, or replace it by a copy",
        ) from error  # fmt: skip
    ours = config.get("quantization_config") or {}
    if isinstance(ours, dict) and ours.get("quant_method") == METHOD:
        config = {name: value for name, value in config.items() if name not in OURS}
    # an entry may have a second name, which would be read beside the new one
    aliases = {name for name, of in type(checkpoint.config).attribute_map.items() if of in config_extra}
    config = {name: value for name, value in config.items() if name not in aliases}
    config |= config_extra | (manifest.as_config() if manifest is not None else {})
    return {"config.json": json.dumps(config, indent=2) + "\n", **files}
