"""Find, validate and read checkpoints on disk. All knowledge of formats is here and in `keys.py`. No devices,
no caches.

Reads the published format (one file per expert, keys inside without prefix), this package's own (with whole
keys) and plain checkpoints in 16 or 32 bits, with one tensor for each matrix of an expert or with all experts
of a layer in one.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mixtral_offload.errors import CheckpointError
from mixtral_offload.models.config_check import (
    MOST_INDEX_BYTES,
    check_config,
    check_file,
    check_index,
    check_size,
    readable,
    stated_experts,
    text_config,
)
from mixtral_offload.models.experts import FUSED, ExpertsShape
from mixtral_offload.models.family import GENERIC, ExpertPlace
from mixtral_offload.models.keys import DensePlace, FusedPlace, KeyMap
from mixtral_offload.models.registry import family_of
from mixtral_offload.models.skeleton import build_meta, check_experts, kept_in_fp32
from mixtral_offload.weights.checksums import with_checks
from mixtral_offload.weights.foreign import refuse_keys, refuse_method
from mixtral_offload.weights.hqq import Quantization, check_replaceable, split_quantized
from mixtral_offload.weights.layout import MATRICES, ExpertLayout, Field, Sizes
from mixtral_offload.weights.manifest import Manifest, check_modules, read_manifest, recognise
from mixtral_offload.weights.manifest import check_experts as check_stated_experts
from mixtral_offload.weights.safetensors_io import StoredTensor, in_threads, read_header, read_headers

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WRONG_CONFIG = "check that config.json belongs to these files"
ExpertId = tuple[int, int]  # (layer, expert)


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint: only its headers have been read, and every tensor has its place in the model.

    Attributes:
        experts: (layer, expert) -> (matrix, field) -> StoredTensor.
        prefixes: (layer, expert) -> matrix -> its stored key without field; if the experts of a layer are in
            one tensor, the key that is written for it.
        dense: Key -> StoredTensor.
        places: Key of the dense part -> its place in the model.
        linears: Name of a quantized linear layer in the model -> how its weight is stored, and its shape (N,
            K).
        kept: Dtype to load in -> keys of the dense part that stay in fp32.
        ignored: Keys without a place.
        keys: All keys as stored.
        manifest: What config.json states of the matrices; None for the published format and plain
            checkpoints.
    """

    folder: Path
    config: PretrainedConfig
    layout: ExpertLayout
    experts: dict[ExpertId, dict[tuple[str, str], StoredTensor]]
    prefixes: dict[ExpertId, dict[str, str]]
    dense: dict[str, StoredTensor]
    places: dict[str, DensePlace]
    linears: dict[str, tuple[Quantization, tuple[int, int]]]
    kept: dict[torch.dtype, frozenset[str]]
    ignored: tuple[str, ...]
    keys: tuple[str, ...]
    manifest: Manifest | None = None

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the MoE layers, in order."""
        return tuple(sorted({layer for layer, _ in self.experts}))

    @property
    def n_experts(self) -> int:
        """Experts per layer."""
        return len(self.experts) // len(self.layers)

    @property
    def top_k(self) -> int:
        """Experts per token and layer."""
        family = family_of(self.config)
        top_k = family.top_k(self.config)
        if type(top_k) is not int or top_k < 1:
            raise CheckpointError(
                f"{self.config.model_type} does not say how many experts a token uses",
                path=self.folder / "config.json",
                key=" or ".join(family.top_ks),
                expected=f"1 to {self.n_experts}",
                found=top_k,
            )
        return top_k

    @property
    def recommended_cache_size(self) -> int | str:
        """The cache size that config.json recommends, or "auto"."""
        stated = getattr(self.config, "offload", None)
        return stated.get("cache_size", "auto") if isinstance(stated, dict) else "auto"

    @property
    def dense_bytes(self) -> int:
        """Size of the dense part as stored."""
        return sum(tensor.n_bytes for tensor in self.dense.values())

    def read_expert(self, expert: ExpertId, buffer: Tensor) -> None:
        """Read one expert's bytes into `buffer` (uint8 `[layout.n_bytes]`, CPU) in the layout's order."""
        stored = self.experts[expert]
        by_path: dict[Path, list[Field]] = {}
        for field in self.layout.fields:
            by_path.setdefault(stored[field.matrix, field.name].path, []).append(field)
        for path, fields in by_path.items():
            with open(path, "rb", buffering=0) as file:
                for field in fields:
                    stored[field.matrix, field.name].read_into(file, buffer[field.offset :][: field.n_bytes])

    def read_experts(self, targets: Iterable[tuple[ExpertId, Tensor]]) -> Iterator[ExpertId]:
        """Read each (expert, buffer), several at a time; yield each expert once it is there."""
        targets = list(targets)
        tasks = ((self.read_expert, expert, buffer) for expert, buffer in targets)
        for (expert, _), _ in zip(targets, in_threads(tasks), strict=True):
            yield expert


@readable
def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open and check a checkpoint folder. Reads headers, no weights.

    Tensors that belong to no part of the model are ignored, with one warning that names them.

    Raises:
        CheckpointError: For every problem; it names the file, the key and the next step.
    """
    folder = Path(folder)
    config = read_config(folder)
    refuse_method(folder, config)
    weight_map = _weight_map(folder)
    refuse_keys(folder, config, weight_map)
    model = build_meta(config, torch.float16, path=folder / "config.json")
    layers, shape = check_experts(model, folder / "config.json")
    headers = read_headers(sorted({folder / name for name in weight_map.values()}))
    headers = with_checks(folder / INDEX, headers)
    manifest = read_manifest(config, folder / "config.json")
    names = {layer.name: layer.number for layer in layers}
    found = _Found(folder, KeyMap(model, names, family_of(config)), names, shape, manifest)
    for key in weight_map:
        found.add(key, folder / weight_map[key], headers[folder / weight_map[key]])
    ignored = found.ignore()
    layout = _check_experts(folder, names, shape, found.experts, manifest)
    linears = found.check_dense()
    check_modules(manifest, {split[0] for key in found.dense if (split := split_quantized(key)) is not None})
    if ignored:
        some, name = ", ".join(ignored[:3]) + (", ..." if len(ignored) > 3 else ""), type(model).__name__
        what = f"{len(ignored)} tensors in {folder} belong to no part of {name} and are ignored"
        warnings.warn(f"{what}: {some[:300]}", stacklevel=2)
    return Checkpoint(
        folder=folder,
        config=config,
        layout=layout,
        experts=found.experts,
        prefixes=found.prefixes,
        dense=found.dense,
        places=found.places,
        linears=linears,
        kept={dtype: _kept(model, found.places, dtype) for dtype in (torch.float16, torch.bfloat16)},
        ignored=tuple(ignored),
        keys=tuple(weight_map),
        manifest=manifest,
    )


def _kept(model: PreTrainedModel, places: dict[str, DensePlace], dtype: torch.dtype) -> frozenset[str]:
    """Keys of what stays in fp32 when the model is loaded in `dtype`."""
    names = kept_in_fp32(model, dtype)
    return frozenset(key for key, of in places.items() if of.field is None and of.name in names)


class _Found:
    """The tensors of a checkpoint, each in its place."""

    def __init__(
        self,
        folder: Path,
        key_map: KeyMap,
        layers: dict[str, int],
        shape: ExpertsShape,
        manifest: Manifest | None,
    ):
        self.folder, self.key_map, self.layers, self.shape = folder, key_map, layers, shape
        self.manifest = manifest
        self.experts: dict[ExpertId, dict[tuple[str, str], StoredTensor]] = {}
        self.prefixes: dict[ExpertId, dict[str, str]] = {}
        self.dense: dict[str, StoredTensor] = {}
        self.places: dict[str, DensePlace] = {}
        self._placeless: dict[str, Path] = {}
        self._owners: dict[Path, ExpertPlace] = {}  # of files of the published format
        self._filled: dict[object, str] = {}  # what a tensor is -> its key

    def add(self, key: str, path: Path, header: dict[str, StoredTensor]) -> None:
        """Find the place of one tensor."""
        place = self.key_map.place(key, path)
        if isinstance(place, ExpertPlace):
            self._add_expert(place, key, path, header)
        elif key not in header:
            raise _absent(path, key)
        elif isinstance(place, FusedPlace):
            self._add_fused(place, key, header[key])
        elif place is None:
            self._placeless[key] = path
        else:
            self._fill(place, key, path)
            self.dense[key], self.places[key] = header[key], place

    def _fill(self, what: object, key: str, path: Path) -> None:
        if (other := self._filled.setdefault(what, key)) != key:
            raise _twice(key, path, other)

    def _add_expert(self, place: ExpertPlace, key: str, path: Path, header: dict[str, StoredTensor]) -> None:
        if place.expert >= self.shape.n_experts:
            raise self._no_place(key, path, f"{self.shape.n_experts} experts in each layer")
        expert = self.layers[place.module], place.expert
        stored = header.get(key)
        if stored is None:  # the published format: keys without prefix, so each file is of one expert
            stored = header.get(place.short)
            if stored is None:
                raise _absent(path, f"{key} (or {place.short})")
            owner = self._owners.setdefault(path, place)
            if (owner.module, owner.expert) != (place.module, place.expert):
                raise CheckpointError(
                    "the index gives one expert's file to another expert too",
                    path=path,
                    key=key,
                    expected=f"a file of expert {expert[1]} of layer {expert[0]}",
                    found=f"the file of expert {owner.expert} of layer {self.layers[owner.module]}",
                    hint=f"download {INDEX} again",
                )
        self._add_field(expert, place.matrix, place.field, place.stem, key, stored)

    def _add_fused(self, place: FusedPlace, key: str, stored: StoredTensor) -> None:
        """Add each expert's part of a tensor `[experts, rows, columns]`; its matrices are stacked."""
        expected = tuple(self.key_map.tensors[place.name].shape)
        if stored.shape != expected:
            raise _does_not_fit(stored, key, expected, torch.float16)
        n_experts, rows, columns = expected
        n = rows // len(place.matrices)
        for expert in range(n_experts):
            for i, matrix in enumerate(place.matrices):
                part = stored.rows(expert * rows + i * n, n, columns)
                stem = f"{place.module}.{expert}.{self.key_map.family.written[matrix]}."
                self._add_field((self.layers[place.module], expert), matrix, "weight", stem, key, part)

    def _add_field(
        self, expert: ExpertId, matrix: str, field: str, stem: str, key: str, stored: StoredTensor
    ) -> None:
        self._fill((expert, matrix, field), key, stored.path)
        self.experts.setdefault(expert, {})[matrix, field] = stored
        self.prefixes.setdefault(expert, {})[matrix] = stem

    def ignore(self) -> list[str]:
        """Return the keys that have no place and need none; raise CheckpointError for any other one."""
        ignored = self.key_map.ignores(self._placeless)
        if rest := self._placeless.keys() - set(ignored):
            key = min(rest)
            raise self._no_place(key, self._placeless[key], None)
        return ignored

    def _no_place(self, key: str, path: Path, expected: str | None) -> CheckpointError:
        name = type(self.key_map.model).__name__
        return CheckpointError(
            f"{name} has no place for this tensor", path=path, key=key, expected=expected, hint=WRONG_CONFIG
        )

    def check_dense(self) -> dict[str, tuple[Quantization, tuple[int, int]]]:
        """Compare the dense part with the model; return its quantized linear layers, see `Checkpoint`."""
        packed: dict[str, dict[str, StoredTensor]] = {}
        stored_names: dict[str, str] = {}
        for key, place in self.places.items():
            if place.field is None:
                self._check_plain(key, self.dense[key], self.key_map.tensors[place.name])
            else:
                packed.setdefault(place.name, {})[place.field] = self.dense[key]
                stored_names[place.name] = (split_quantized(key) or (key,))[0]
        linears = {name: self._check_packed(name, stored_names[name], of) for name, of in packed.items()}
        tensors = self.key_map.tensors
        there = {id(tensors[place.parameter]) for place in self.places.values()}
        missing = {
            id(tensor): name
            for name, tensor in reversed(tensors.items())  # of a tied one, its first name
            if id(tensor) not in there and name.rpartition(".")[0] not in self.layers
        }
        if missing:
            raise CheckpointError(
                f"{len(missing)} parameters have no value in the checkpoint",
                path=self.folder,
                key=min(missing.values()),
                found="no such tensor",
                hint=f"download the index again, or {WRONG_CONFIG}",
            )
        return linears

    def _check_plain(self, key: str, stored: StoredTensor, target: Tensor) -> None:
        is_float = target.dtype.is_floating_point
        fits = stored.dtype in FLOATS if is_float else stored.dtype == target.dtype
        if stored.shape != tuple(target.shape) or not fits:
            raise _does_not_fit(stored, key, tuple(target.shape), target.dtype)

    def _check_packed(
        self, name: str, stored_name: str, fields: dict[str, StoredTensor]
    ) -> tuple[Quantization, tuple[int, int]]:
        path = next(iter(fields.values())).path
        if other := self._filled.get(DensePlace(f"{name}.weight")):
            raise _twice(name, path, other)
        check_replaceable(self.key_map.model.get_submodule(name), path, name)
        n, k = self.key_map.tensors[f"{name}.weight"].shape
        shape = n, k
        sizes = {field: (stored.dtype, stored.n_elements) for field, stored in fields.items()}
        return recognise(self.manifest, path, stored_name, shape, sizes), shape


def _twice(key: str, path: Path, other: str) -> CheckpointError:
    return CheckpointError(
        "two tensors are for one place in the model",
        path=path,
        key=key,
        expected="one of them",
        found=other,
        hint="remove the wrong one from the index",
    )


def _does_not_fit(
    stored: StoredTensor, key: str, expected: tuple[int, ...], dtype: torch.dtype
) -> CheckpointError:
    kind = "float16, bfloat16 or float32" if dtype.is_floating_point else dtype
    return CheckpointError(
        "a tensor does not fit the model",
        path=stored.path,
        key=key,
        expected=f"{expected} of {kind}",
        found=f"{stored.shape} of {stored.dtype}",
        hint=WRONG_CONFIG,
    )


@readable
def read_config(folder: Path) -> PretrainedConfig:
    """Read transformers' configuration of the checkpoint.

    Raises:
        CheckpointError: For a folder without one, a dense model or an unknown kind of mixture.
    """
    if not folder.is_dir():
        raise CheckpointError(
            "no such folder", path=folder, hint="check the path, or give a hub repository as owner/name"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "not a checkpoint folder",
            path=folder / "config.json",
            expected="config.json",
            found="no such file",
        )
    config = load_config(folder / "config.json")
    if family_of(config).n_experts(config):
        return config
    if family_of(inner := text_config(config)).n_experts(inner):
        raise CheckpointError(
            f"{config.model_type} holds its language model inside another one: not supported yet",
            path=folder / "config.json",
            found=f"experts in {inner.model_type}",
        )
    counts = "{}, {} or {}".format(*GENERIC.expert_counts)
    if stated := stated_experts(config.to_dict()):
        raise CheckpointError(
            f"{config.model_type} is a mixture of experts of a family that is not supported",
            path=folder / "config.json",
            key=stated[0],
            expected=f"{counts}, as in Mixtral, Qwen-MoE or DeepSeek",
            found=stated[1],
            hint="load it with transformers as it is, or take a model of a supported family",
        )
    raise CheckpointError(
        f"{config.model_type} is a dense model: it has no experts to offload",
        path=folder / "config.json",
        expected=counts,
        hint="load it with transformers as it is",
    )


@readable
def load_config(path: Path) -> PretrainedConfig:
    """Read transformers' configuration in this file, of any model that this version supports."""
    from transformers import AutoConfig

    check_file(path)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds on a damaged file
        raise CheckpointError(
            "cannot read the configuration",
            path=path,
            expected="a transformers configuration",
            found=f"{type(error).__name__}: {str(error)[:300]}",
            hint="download this file again",
        ) from error
    check_config(config, path)
    return config


def _absent(path: Path, key: str) -> CheckpointError:
    return CheckpointError(
        "the index names a tensor that its file does not hold",
        path=path,
        key=key,
        found="no such tensor",
        hint=f"download this file and {INDEX} again; they belong together",
    )


def _weight_map(folder: Path) -> dict[str, str]:
    """Key -> file name, from the index or from the single file."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise CheckpointError(
                "no weights found", path=folder, expected=f"{INDEX} or {SINGLE}", found="neither"
            )
        weight_map = dict.fromkeys(read_header(folder / SINGLE), SINGLE)
        check_index(weight_map, folder / SINGLE)
        return weight_map
    check_size(index, MOST_INDEX_BYTES)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        check_index(weight_map, index)
        outside = [name for name in weight_map.values() if Path(name).name != name]
    except CheckpointError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            "cannot read the index",
            path=index,
            expected="JSON with weight_map: key to file name",
            found=f"{type(error).__name__}: {error}",
            hint="download this file again",
        ) from error
    if outside:
        raise CheckpointError(
            "the index names a file outside the folder",
            path=index,
            expected="plain file names",
            found=outside[0],
        )
    missing = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(set(weight_map.values()))} files are missing",
            path=folder / missing[0],
            found="no such file",
            hint="download the checkpoint again; finished files are kept",
        )
    return weight_map


def _check_experts(
    folder: Path,
    modules: dict[str, int],
    shape: ExpertsShape,
    experts: dict[ExpertId, dict[tuple[str, str], StoredTensor]],
    manifest: Manifest | None,
) -> ExpertLayout:
    """The one layout of all experts; refuse a missing tensor or an expert of another layout."""
    _check_complete(folder, modules, shape.n_experts, experts)
    first, *_ = ordered = sorted(experts.items())
    reference = _sizes(first[1])
    layout = _layout(_path_of(first[1]), first[0], shape, reference, manifest)
    for (layer, number), tensors in ordered:
        if (sizes := _sizes(tensors)) != reference:
            names = sizes.keys() | reference.keys()
            wrong = min((name for name in names if sizes.get(name) != reference.get(name)), key=str)
            raise CheckpointError(
                f"expert {number} of layer {layer} has another layout than the first one",
                path=_path_of(tensors),
                key=".".join(wrong),
                expected=reference.get(wrong, "no such tensor"),
                found=sizes.get(wrong, "no such tensor"),
                hint="all experts must share bits and group size",
            )
        for (matrix, field), stored in tensors.items():
            if field == "weight" and stored.shape != layout.shapes[matrix]:
                key = f"{stored.key} ({matrix} of expert {number} of layer {layer})"
                raise _does_not_fit(stored, key, layout.shapes[matrix], stored.dtype)
    return layout


def _check_complete(
    folder: Path, modules: dict[str, int], n_experts: int, experts: Collection[ExpertId]
) -> None:
    """Refuse a missing expert."""
    if not experts:
        name = next(iter(modules))
        keys = f"{name}.0.{GENERIC.written['gate']}.weight or {name}.{next(iter(FUSED))}"
        raise CheckpointError(
            "no expert weights found",
            path=folder,
            expected=f"keys like {keys}",
            hint="other formats of experts are not supported",
        )
    layers = {layer for layer, _ in experts}
    if layers != set(modules.values()):
        raise CheckpointError(
            "the checkpoint's expert layers are not the model's",
            path=folder,
            expected=f"layers {list(modules.values())}",
            found=f"layers {sorted(layers)}",
            hint="download the checkpoint's index and config again",
        )
    for layer in sorted(layers):
        for expert in range(n_experts):
            if (layer, expert) not in experts:
                raise CheckpointError(
                    "an expert is missing from the index",
                    path=folder / INDEX,
                    key=f"layer {layer}, expert {expert}",
                    expected=f"{n_experts} experts in each layer",
                    found="no entry",
                    hint="download the index again",
                )


def _sizes(tensors: dict[tuple[str, str], StoredTensor]) -> Sizes:
    return {name: (tensor.dtype, tensor.n_elements) for name, tensor in tensors.items()}


def _path_of(tensors: dict[tuple[str, str], StoredTensor]) -> Path:
    return next(iter(tensors.values())).path


def _layout(
    path: Path, expert: ExpertId, shape: ExpertsShape, sizes: Sizes, manifest: Manifest | None
) -> ExpertLayout:
    shapes = dict(zip(MATRICES, shape.matrices))
    by_matrix = {
        matrix: {field: size for (m, field), size in sizes.items() if m == matrix} for matrix in shapes
    }
    name = f"expert {expert[1]} of layer {expert[0]}"
    check_stated_experts(manifest, path, name, shapes, by_matrix)
    intermediate, hidden = shapes["gate"]
    return ExpertLayout.build(hidden, intermediate, sizes, path, name)
