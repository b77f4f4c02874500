"""Write checkpoints: one safetensors file per expert, and one of the dense part.

At most one expert, or the dense part, is held in memory.
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
from mixtral_offload.models.checkpoint import INDEX, Checkpoint, ExpertId, open_checkpoint
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
    Fields,
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
    config_extra: dict[str, Any] | None = None,
    progress: Callable[[int], object] = lambda n_done: None,
    report: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write the checkpoint `source` to `target` with other quantizations of experts and attention.

    A quantized matrix is dequantized and quantized again, unless only its packing differs
    (`Quantization.split`): then the weights stay the same. What `from_pretrained` would refuse is refused
    before any work. The work is done in `target.converting`, renamed at the end. After an interrupt, a kill
    or an error, that folder remains, and the next call with the same arguments resumes from its finished
    files; the result is the same to the byte. A fault of the source leaves nothing. At the end, all files are
    read again, compared with their checksums, and opened.

    Args:
        source: Folder of a checkpoint, or "demo" for the shipped model.
        target: Folder to write; must not exist.
        experts: How to store the experts' matrices; None keeps the stored bytes.
        attention: The same for the attention's projections.
        device: Device of the quantization.
        config_extra: Merged into config.json.
        progress: Called with 1 after each expert.
        report: Called with a sentence about what was resumed and checked.

    Returns:
        The target's absolute path.

    Raises:
        CheckpointError: `target` exists, is being written by another process or cannot be written; its name
            was taken meanwhile (the message says where the finished checkpoint is); `source` is damaged, is
            of a family that cannot be loaded, or has weights that are not finite.
        OptionError: A group size does not divide a matrix.
    """
    source = local_folder(source) or Path(source)
    target, began_s = Path(target).absolute(), time.perf_counter()
    if os.path.lexists(target) and not os.path.lexists(target / JOURNAL):
        raise target_exists(target)
    checkpoint = open_checkpoint(source)
    settings = _settings(checkpoint, experts, attention, device, config_extra)
    if os.path.lexists(target):
        if finish_renamed(target, settings):
            report("the target is there: an earlier run ended after it had written and checked all of it")
            return target
        raise target_exists(target)
    manifest = _check_before(checkpoint, experts, attention)
    small = _small_files(checkpoint, manifest, config_extra or {})
    with _write_errors(target), torch.device("cpu"), WorkFolder(target, settings, report) as work:
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
    checkpoint: Checkpoint,
    folder: str | Path,
    dense: dict[str, Tensor],
    small: dict[str, str] | None = None,
    config_extra: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint of our format: the experts of `checkpoint`, and a given dense part.

    Every file is complete before it gets its name, and the index comes last: its checksums do not fit files
    of an earlier checkpoint that an interrupt has left there.

    Args:
        checkpoint: Source of the experts.
        folder: Is made if there is none. Other files in it stay.
        dense: The tensors of `checkpoint.dense`, by the same keys, on the CPU.
        small: Other files to write: name -> text.
        config_extra: Entries of config.json in place of the checkpoint's own.

    Raises:
        CheckpointError: The folder cannot be written, an expert cannot be read, or a tensor is not finite.
    """
    for key, value in dense.items():
        if value.is_floating_point() and not is_finite(value):
            raise CheckpointError(
                "weights are not finite",
                key=key,
                expected="finite numbers",
                found="NaN or infinite",
                hint="go back to an earlier checkpoint of the training",
            )
    folder, n_files = Path(folder).absolute(), len(checkpoint.experts) + 1
    manifest = _check_before(checkpoint, None, None)
    weight_map: dict[str, str] = {}
    checksums: dict[str, str] = {}
    cpu = torch.device("cpu")
    with _write_errors(folder), cpu:
        folder.mkdir(parents=True, exist_ok=True)
        for number, expert in enumerate([*sorted(checkpoint.experts), None], 1):
            name = f"model-{number:05d}-of-{n_files:05d}.safetensors"
            tensors = dense if expert is None else expert_tensors(checkpoint, expert, None, cpu)
            checksums[name] = _save_tensors(folder / name, tensors)
            weight_map.update(dict.fromkeys(tensors, name))
        total = sum((folder / name).stat().st_size for name in checksums)
        written = _small_files(checkpoint, manifest, config_extra or {}) | (small or {})
        metadata = {"total_size": total, "checksums": as_metadata(checksums, True, written)}
        index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1) + "\n"
        for name, data in (written | {INDEX: index}).items():
            replace_file(folder / name, data)


def _settings(
    checkpoint: Checkpoint,
    experts: Quantization | None,
    attention: Quantization | None,
    device: str,
    config_extra: dict[str, Any] | None,
) -> dict[str, Any]:
    """All that determines the bytes of the target."""
    files = {path: path.stat() for path in sorted(checkpoint.folder.iterdir()) if path.is_file()}
    return {
        "source": {path.name: [of.st_size, of.st_mtime_ns] for path, of in files.items()},
        "experts": repr(experts),
        "attention": repr(attention),
        "device": str(device),
        "config_extra": config_extra,
        "versions": {name: version(name) for name in ("torch", "hqq", "safetensors")} | {"this": __version__},
    }


@contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    """Turn errors of the file system into CheckpointErrors."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        path, found = getattr(error, "filename", None) or target, getattr(error, "strerror", None) or error
        hint = resume_hint(target)
        hint = f"make room there; {hint}" if hint else "choose another folder, or make room there"
        raise CheckpointError("cannot write the checkpoint", path=path, found=found, hint=hint) from error


def _check_before(
    checkpoint: Checkpoint, experts: Quantization | None, attention: Quantization | None
) -> Manifest | None:
    """Refuse what cannot be written or loaded; return what the target will state about itself."""
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
    is_packed = bool(modules) or any(of.quantization.bits < 16 for of in matrices.values())
    config = checkpoint.folder / "config.json"
    # a plain checkpoint has none, and transformers reads it too
    manifest = Manifest(config, matrices, by_pattern(modules)) if is_packed else None
    check_loads(replace(checkpoint, manifest=manifest, dense=dense, places=places, linears=linears))
    return manifest


def _check_after(work: WorkFolder, small: dict[str, bytes | str], total: int, took_s: float) -> str:
    """Read everything again and open the result; return a report."""
    began_s = time.perf_counter()
    written = list(work.finished.items())[work.n_kept :]  # the others were checked when they were taken over
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
            "what was written cannot be read again: its checksum is wrong",
            path=path,
            expected=checksum,
            found=found,
            hint="repeat the command, which writes this file again; if it happens twice, suspect the disk or "
            "the memory of this machine, and convert elsewhere",
        )


def _write_weights(
    checkpoint: Checkpoint,
    work: WorkFolder,
    experts: Quantization | None,
    attention: Quantization | None,
    device: torch.device,
    progress: Callable[[int], object],
) -> dict[str, str]:
    """Write what is not finished yet; return key -> file name."""
    n_files = len(checkpoint.experts) + 1
    weight_map: dict[str, str] = {}

    def save(number: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        name = f"model-{number:05d}-of-{n_files:05d}.safetensors"
        path = work.path / name
        if name not in work.finished:
            try:
                made = tensors()
            except CheckpointError:  # what was written before may come from a damaged file too
                work.give_up()
                raise
            work.keep(name, _save_tensors(path, made))
        weight_map.update(dict.fromkeys(read_header(path), name))

    for number, expert in enumerate(sorted(checkpoint.experts), 1):
        save(number, partial(expert_tensors, checkpoint, expert, experts, device))
        progress(1)
    save(n_files, partial(_dense_tensors, checkpoint, attention, device))
    _check_source(checkpoint, work)
    return weight_map


def _check_source(checkpoint: Checkpoint, work: WorkFolder) -> None:
    """Check the files of the source of which this run has read a part, and an earlier run the rest."""
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
    """Write one file, completely or not at all; return its checksum."""
    with replacing(path) as part:
        save_file(made, part, metadata={"format": "pt"})
        return checksum_of_tensors(part, made)


def expert_tensors(
    checkpoint: Checkpoint, expert: ExpertId, quantization: Quantization | None, device: torch.device
) -> dict[str, Tensor]:
    """Return an expert's tensors by the keys that they are written with; None: as they are stored."""
    tensors: dict[str, Tensor] = {}
    prefixes = checkpoint.prefixes[expert]
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
    key: str,
    fields: Fields,
    shape: tuple[int, int],
    stored: Quantization,
    wanted: Quantization,
    device: torch.device,
) -> Fields:
    """A matrix's tensors in another quantization; the same bytes, or at least weights, if it has it."""
    is_wide = stored.bits == 16 and fields["weight"].dtype == torch.float32  # not 16 bits
    if stored == wanted and not is_wide:
        return fields
    # published tensors may differ in rank
    shaped = {
        name: fields[name].view(dims).to(device) for name, (_, dims) in field_specs(shape, stored).items()
    }
    if stored.bits < 16 and replace(stored, split=False) == replace(wanted, split=False):
        return {name: value.cpu() for name, value in repack(shaped, stored, wanted).items()}
    return _quantize(key, dequantize(shaped, shape, stored, torch.float32), wanted)


def _quantize(key: str, weight: Tensor, quantization: Quantization) -> Fields:
    fields = {name: value.cpu() for name, value in quantize(weight, quantization).items()}
    for name, value in fields.items():
        if not value.isfinite().all():
            raise CheckpointError(
                "a matrix cannot be quantized",
                key=key + name,
                expected="finite weights, within the range of fp16",
                found=f"weights from {weight.min():g} to {weight.max():g}",
                hint="check the source, or keep these as stored",
            )
    return fields


def _dense_tensors(
    checkpoint: Checkpoint, attention: Quantization | None, device: torch.device
) -> dict[str, Tensor]:
    """The dense part as it is stored, but for the quantization of attention."""
    dense = dict(checkpoint.dense)
    tensors: dict[str, Tensor] = {}
    if attention is not None:
        for module, fields in _modules_of(checkpoint).items():
            matrix = _stored_matrix(checkpoint, module, fields)
            read = {name: dense.pop(f"{module}.{name}").read() for name in fields}
            made = _requantized(f"{module}.", read, matrix.shape, matrix.quantization, attention, device)
            tensors |= {f"{module}.{name}": value for name, value in made.items()}
    return {key: stored.read() for key, stored in dense.items()} | tensors


def _modules_of(checkpoint: Checkpoint) -> dict[str, dict[str, StoredTensor]]:
    """Stored name of each projection of the attention and of each packed matrix -> field -> tensor."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    attention = family_of(checkpoint.config).attention
    for key, stored in checkpoint.dense.items():
        split = (key.removesuffix(".weight"), "weight") if key.endswith(attention) else split_quantized(key)
        if split is not None:
            modules.setdefault(split[0], {})[split[1]] = stored
    return modules


def _stored_matrix(checkpoint: Checkpoint, module: str, fields: dict[str, StoredTensor]) -> Matrix:
    """module: its stored name."""
    plain = fields.get("weight")
    if plain is not None:
        rows, columns = plain.shape
        return Matrix((rows, columns), Quantization(16))
    quantization, shape = checkpoint.linears[_name_in_model(checkpoint, module)]
    return Matrix(shape, quantization)


def _name_in_model(checkpoint: Checkpoint, module: str) -> str:
    """The model's name of a module with this stored name."""
    places = checkpoint.places
    if packed := places.get(f"{module}.W_q"):
        return packed.name
    return places[f"{module}.weight"].name.removesuffix(".weight")


def _small_files(
    checkpoint: Checkpoint, manifest: Manifest | None, config_extra: dict[str, Any]
) -> dict[str, bytes | str]:
    """The files that are no weights: config.json, with what the target states about itself, and copies of
    others.

    Raises:
        CheckpointError: For a device, a pipe or a file that is too large to be of a model.
    """
    files: dict[str, bytes | str] = {}
    try:
        config = json.loads(read_small(checkpoint.folder / "config.json"))
        for path in sorted(checkpoint.folder.iterdir()):
            if path.suffix in SMALL_SUFFIXES and path.name not in ("config.json", INDEX):
                files[path.name] = read_small(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "cannot copy a file",
            path=getattr(error, "filename", None) or checkpoint.folder,
            expected="a regular file, or a link to one",
            found=getattr(error, "strerror", None) or error,
            hint="remove it from the source, or replace it by a copy",
        ) from error
    ours = config.get("quantization_config") or {}
    if isinstance(ours, dict) and ours.get("quant_method") == METHOD:
        config = {name: value for name, value in config.items() if name not in OURS}
    # an entry may have a second name, which would be read in addition to the new one
    aliases = {name for name, of in type(checkpoint.config).attribute_map.items() if of in config_extra}
    config = {name: value for name, value in config.items() if name not in aliases}
    config |= config_extra | (manifest.as_config() if manifest is not None else {})
    return {"config.json": json.dumps(config, indent=2) + "\n", **files}
