"""Find, validate and read checkpoints on disk. All format mess lives here and nowhere else.

Knows configurations, index files and key names. Knows nothing of devices, caches or how an expert is run.

Reads the published format (`lavawolfiee/Mixtral-8x7B-Instruct-v0.1-offloading-demo`: one file per expert, keys inside
without prefix), our own (the same with whole keys) and plain 16-bit transformers checkpoints of Mixtral-like families.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from .checksums import with_checks
from .errors import CheckpointError
from .experts import MATRICES, ExpertLayout, Field
from .headers import StoredTensor, in_threads, read_header
from .manifest import Manifest, check_experts, check_modules, read_manifest
from .quantization import split_quantized

#: the small model that ships with the package
DEMO = Path(__file__).parent / "demo" / "4bit"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EXPERT_KEY = re.compile(
    r"^(?P<prefix>.*\.layers\.(?P<layer>\d+)\..*experts)\.(?P<expert>\d+)\."
    r"(?P<matrix>w1|w2|w3|gate_proj|up_proj|down_proj)\.(?P<field>.+)$"
)
MATRIX_NAMES = {
    "w1": "gate",
    "gate_proj": "gate",
    "w3": "up",
    "up_proj": "up",
    "w2": "down",
    "down_proj": "down",
}
ExpertId = tuple[int, int]  # (layer, expert)


def first_attribute(config, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint: nothing but its headers has been read.

    experts: (layer, expert) -> (matrix, field) -> StoredTensor. trunk: key -> StoredTensor. keys: all keys as stored.
    manifest: what config.json states of the matrices; None for the published format and plain checkpoints.
    """

    folder: Path
    config: object
    layout: ExpertLayout
    experts: dict[ExpertId, dict[tuple[str, str], StoredTensor]]
    trunk: dict[str, StoredTensor]
    keys: tuple[str, ...]
    manifest: Manifest | None = None

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers that have experts, in order."""
        return tuple(sorted({layer for layer, _ in self.experts}))

    @property
    def n_experts(self) -> int:
        """Experts per layer."""
        return len(self.experts) // len(self.layers)

    @property
    def top_k(self) -> int:
        return first_attribute(self.config, "num_experts_per_tok", "moe_topk", "top_k")

    @property
    def recommended_cache_size(self) -> int | str:
        """What the checkpoint's makers ask for in config.json, or "auto"."""
        asked = getattr(self.config, "offload", None)
        return asked.get("cache_size", "auto") if isinstance(asked, dict) else "auto"

    @property
    def trunk_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.trunk.values())

    def read_expert(self, expert: ExpertId, buffer: Tensor) -> None:
        """Read one expert's bytes into `buffer` (uint8 [layout.n_bytes], CPU) in the layout's order."""
        stored = self.experts[expert]
        by_path: dict[Path, list[Field]] = {}
        for field in self.layout.fields:
            by_path.setdefault(stored[field.matrix, field.name].path, []).append(field)
        for path, fields in by_path.items():
            with open(path, "rb", buffering=0) as file:
                for field in fields:
                    stored[field.matrix, field.name].read_into(file, buffer[field.offset :][: field.n_bytes])

    def read_experts(self, targets: Iterable[tuple[ExpertId, Tensor]]) -> Iterator[ExpertId]:
        """`read_expert` for each (expert, buffer), several at a time; yields each expert once it is there."""
        targets = list(targets)
        tasks = ((self.read_expert, expert, buffer) for expert, buffer in targets)
        for (expert, _), _ in zip(targets, in_threads(tasks), strict=True):
            yield expert


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open and check a checkpoint folder; every problem is a CheckpointError that names file, key and next step."""
    folder = Path(folder)
    config = read_config(folder)
    weight_map = _weight_map(folder)
    headers = {path: read_header(path) for path in sorted({folder / name for name in weight_map.values()})}
    headers = with_checks(folder / INDEX, headers)
    experts: dict[ExpertId, dict[tuple[str, str], StoredTensor]] = {}
    trunk: dict[str, StoredTensor] = {}
    owners: dict[str, ExpertId] = {}
    for key, name in weight_map.items():
        header, match = headers[folder / name], EXPERT_KEY.match(key)
        if match is None:
            if key not in header:
                raise _absent(folder / name, key)
            trunk[key] = header[key]
            continue
        expert = int(match["layer"]), int(match["expert"])
        stored = header.get(key)
        if stored is None:  # the published format: keys without prefix, so each file is of one expert
            short = f"{match['matrix']}.{match['field']}"
            stored = header.get(short)
            if stored is None:
                raise _absent(folder / name, f"{key} (or {short})")
            if owners.setdefault(name, expert) != expert:
                raise CheckpointError(
                    "the index gives one expert's file to another expert too", path=folder / name, key=key,
                    expected=f"a file of expert {expert[1]} of layer {expert[0]}",
                    found=f"the file of expert {owners[name][1]} of layer {owners[name][0]}", hint=f"download {INDEX} again",
                )  # fmt: skip
        experts.setdefault(expert, {})[MATRIX_NAMES[match["matrix"]], match["field"]] = stored
    manifest = read_manifest(config, folder / "config.json")
    layout = _check_experts(folder, config, experts, manifest)
    check_modules(manifest, {split[0] for key in trunk if (split := split_quantized(key)) is not None})
    return Checkpoint(folder, config, layout, experts, trunk, tuple(weight_map), manifest)


def read_config(folder: Path):
    """transformers' configuration of the checkpoint; refuses folders without one and dense models."""
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
    if n_experts_of(config):
        return config
    if n_experts_of(config.get_text_config()):
        raise CheckpointError(
            f"{config.model_type} holds its language model inside another one: not supported yet",
            path=folder / "config.json", found=f"experts in {config.get_text_config().model_type}",
        )  # fmt: skip
    raise CheckpointError(
        f"{config.model_type} is a dense model: it has no experts to offload", path=folder / "config.json",
        expected="num_local_experts, num_experts or n_routed_experts", hint="load it with transformers as it is",
    )  # fmt: skip


def load_config(path: Path):
    """transformers' configuration in this file, of any model that this transformers knows."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds on a damaged file
        raise CheckpointError(
            "cannot read the configuration", path=path, expected="a transformers configuration",
            found=f"{type(error).__name__}: {error}", hint="download this file again",
        ) from error  # fmt: skip


def n_experts_of(config) -> int | None:
    return first_attribute(config, "num_local_experts", "num_experts", "n_routed_experts")


def _absent(path: Path, key: str) -> CheckpointError:
    return CheckpointError(
        "the index names a tensor that its file does not hold", path=path, key=key, found="no such tensor",
        hint=f"download this file and {INDEX} again; they belong together",
    )  # fmt: skip


def _weight_map(folder: Path) -> dict[str, str]:
    """key -> file name, from the index or from the single file."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise CheckpointError(
                "no weights found", path=folder, expected=f"{INDEX} or {SINGLE}", found="neither"
            )
        return dict.fromkeys(read_header(folder / SINGLE), SINGLE)
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        outside = [name for name in weight_map.values() if Path(name).name != name]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            "cannot read the index", path=index, expected="JSON with weight_map: key to file name", found=repr(error),
            hint="download this file again",
        ) from error  # fmt: skip
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
            f"{len(missing)} of {len(set(weight_map.values()))} files are missing", path=folder / missing[0],
            found="no such file", hint="download the checkpoint again; finished files are kept",
        )  # fmt: skip
    return weight_map


def _check_experts(folder: Path, config, experts, manifest: Manifest | None) -> ExpertLayout:
    """The one layout of all experts; refuses a missing expert, a missing tensor, or an expert of another layout."""
    if not experts:
        raise CheckpointError(
            "no expert weights found", path=folder, expected="keys like model.layers.0.block_sparse_moe.experts.0.w1.W_q",
            hint="fused or other expert formats are not supported: convert from one matrix per expert",
        )  # fmt: skip
    layers = {layer for layer, _ in experts}
    for layer in sorted(layers):
        for expert in range(n_experts_of(config)):
            if (layer, expert) not in experts:
                raise CheckpointError(
                    "an expert is missing from the index", path=folder / INDEX, key=f"layer {layer}, expert {expert}",
                    expected=f"{n_experts_of(config)} experts in each layer", found="no entry", hint="download the index again",
                )  # fmt: skip
    hidden = config.hidden_size
    intermediate = first_attribute(
        config, "moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"
    )
    layout = None
    for expert, tensors in sorted(experts.items()):
        sizes = {name: (tensor.dtype, tensor.n_elements) for name, tensor in tensors.items()}
        path = next(iter(tensors.values())).path
        if layout is None:
            reference, layout = sizes, _layout(path, expert, hidden, intermediate, sizes, manifest)
            _check_plain_shapes(layout, experts)
        elif sizes != reference:
            wrong = min(
                (n for n in sizes.keys() | reference.keys() if sizes.get(n) != reference.get(n)), key=str
            )
            raise CheckpointError(
                f"expert {expert[1]} of layer {expert[0]} has another layout than the first one", path=path,
                key=".".join(wrong), expected=reference.get(wrong, "no such tensor"),
                found=sizes.get(wrong, "no such tensor"), hint="all experts must share bits and group size",
            )  # fmt: skip
    return layout


def _layout(path, expert, hidden, intermediate, sizes, manifest: Manifest | None) -> ExpertLayout:
    shapes = dict.fromkeys(MATRICES, (intermediate, hidden)) | {"down": (hidden, intermediate)}
    by_matrix = {
        matrix: {field: size for (m, field), size in sizes.items() if m == matrix} for matrix in shapes
    }
    check_experts(manifest, path, f"expert {expert[1]} of layer {expert[0]}", shapes, by_matrix)
    try:
        return ExpertLayout.build(hidden, intermediate, sizes)
    except CheckpointError as error:
        raise CheckpointError(f"expert {expert[1]} of layer {expert[0]}: {error}", path=path) from error


def _check_plain_shapes(layout: ExpertLayout, experts) -> None:
    """Refuse plain matrices of another shape than config.json's sizes give, though as many elements."""
    for expert, tensors in experts.items():
        for (matrix, field), stored in tensors.items():
            if field == "weight" and stored.shape != layout.shapes.get(matrix):
                raise CheckpointError(
                    f"a matrix of expert {expert[1]} of layer {expert[0]} has another shape than config.json gives",
                    path=stored.path, key=stored.key, expected=layout.shapes.get(matrix), found=stored.shape,
                    hint="check that config.json belongs to these files",
                )  # fmt: skip
