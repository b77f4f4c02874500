"""Find, validate and read checkpoints on disk. All format mess lives here and nowhere else.

Knows safetensors files, index files and key names. Knows nothing of devices, caches or how an expert is run.

Reads the published format (`lavawolfiee/Mixtral-8x7B-Instruct-v0.1-offloading-demo`: one file per expert, keys inside
without prefix), our own (the same with whole keys) and plain 16-bit transformers checkpoints of Mixtral-like families.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError
from .experts import ExpertLayout, Field

#: the small model that ships with the package
DEMO = Path(__file__).parent / "demo" / "4bit"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
N_READERS = 4
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
DTYPES = {
    "U8": torch.uint8, "I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "I8": torch.int8, "I16": torch.int16, "I64": torch.int64, "F64": torch.float64, "BOOL": torch.bool,
}  # fmt: skip

ExpertId = tuple[int, int]  # (layer, expert)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie: file, absolute byte offset, number of bytes."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def n_elements(self) -> int:
        return self.n_bytes // self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, on the CPU, in memory of its own."""
        data = torch.empty(self.n_bytes, dtype=torch.uint8)
        with open(self.path, "rb") as file:
            read_into(file, self, data)
        return data.view(self.dtype).view(self.shape)


def read_into(file, stored: StoredTensor, data: Tensor) -> None:
    """Fill `data` (uint8, contiguous, CPU) with a stored tensor's bytes, without a copy in between."""
    file.seek(stored.offset)
    if stored.n_bytes and file.readinto(memoryview(data.numpy())) != stored.n_bytes:
        raise CheckpointError(
            "file ends too early", path=stored.path, expected=f"{stored.offset + stored.n_bytes} bytes or more",
            hint="download or copy this file again",
        )  # fmt: skip


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by key; refuses a file that is missing, truncated or of another format."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(n_header)) if 0 < n_header <= size - 8 else None
        assert isinstance(header, dict)
    except FileNotFoundError:
        raise CheckpointError(
            "file is missing", path=path, hint="download the checkpoint again; finished files are kept"
        ) from None
    except (AssertionError, ValueError):
        raise CheckpointError(
            "not a whole safetensors file", path=path, found=f"{size} bytes without a readable header",
            hint="delete this file and download it again",
        ) from None  # fmt: skip
    tensors = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                "unknown dtype", path=path, key=key, expected=", ".join(DTYPES), found=entry["dtype"]
            )
        begin, end = entry["data_offsets"]
        tensors[key] = StoredTensor(
            path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + n_header + begin, end - begin
        )
    needed = max((tensor.offset + tensor.n_bytes for tensor in tensors.values()), default=0)
    if size < needed:
        raise CheckpointError(
            "file is truncated", path=path, expected=f"{needed} bytes", found=f"{size} bytes",
            hint="delete this file and download it again",
        )  # fmt: skip
    return tensors


def first_attribute(config, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint: nothing but its headers has been read.

    experts: (layer, expert) -> (matrix, field) -> StoredTensor. trunk: key -> StoredTensor. keys: all keys as stored.
    """

    folder: Path
    config: object
    layout: ExpertLayout
    experts: dict[ExpertId, dict[tuple[str, str], StoredTensor]]
    trunk: dict[str, StoredTensor]
    keys: tuple[str, ...]

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
                    read_into(file, stored[field.matrix, field.name], buffer[field.offset :][: field.n_bytes])

    def read_experts(self, targets: Iterable[tuple[ExpertId, Tensor]]) -> Iterator[ExpertId]:
        """`read_expert` for each (expert, buffer), several at a time; yields each expert once it is there."""
        pool = ThreadPoolExecutor(N_READERS)
        try:
            tasks = [(expert, pool.submit(self.read_expert, expert, buffer)) for expert, buffer in targets]
            for expert, task in tasks:
                task.result()
                yield expert
        finally:
            pool.shutdown(cancel_futures=True)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open and check a checkpoint folder; every problem is a CheckpointError that names file, key and next step."""
    folder = Path(folder)
    config = read_config(folder)
    weight_map = _weight_map(folder)
    headers = {path: read_header(path) for path in sorted({folder / name for name in weight_map.values()})}
    experts: dict[ExpertId, dict[tuple[str, str], StoredTensor]] = {}
    trunk = {}
    for key, name in weight_map.items():
        header, match = headers[folder / name], EXPERT_KEY.match(key)
        if match is None:
            if key not in header:
                raise _absent(folder / name, key)
            trunk[key] = header[key]
            continue
        short = f"{match['matrix']}.{match['field']}"
        stored = header.get(key) or header.get(short)
        if stored is None:
            raise _absent(folder / name, f"{key} (or {short})")
        expert = int(match["layer"]), int(match["expert"])
        experts.setdefault(expert, {})[MATRIX_NAMES[match["matrix"]], match["field"]] = stored
    layout = _check_experts(folder, config, experts)
    return Checkpoint(folder, config, layout, experts, trunk, tuple(weight_map))


def read_config(folder: Path):
    """transformers' configuration of the checkpoint; refuses folders without one and dense models."""
    from transformers import AutoConfig

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
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            "cannot read the configuration", path=folder / "config.json", found=error
        ) from error
    if not n_experts_of(config):
        raise CheckpointError(
            f"{config.model_type} is a dense model: it has no experts to offload", path=folder / "config.json",
            expected="num_local_experts, num_experts or n_routed_experts", hint="load it with transformers as it is",
        )  # fmt: skip
    return config


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
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            "cannot read the index", path=index, expected="JSON with weight_map", found=repr(error)
        ) from error
    missing = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(set(weight_map.values()))} files are missing", path=folder / missing[0],
            found="no such file", hint="download the checkpoint again; finished files are kept",
        )  # fmt: skip
    return weight_map


def _check_experts(folder: Path, config, experts) -> ExpertLayout:
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
            reference, layout = sizes, _layout(path, expert, hidden, intermediate, sizes)
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


def _layout(path, expert, hidden, intermediate, sizes) -> ExpertLayout:
    try:
        return ExpertLayout.build(hidden, intermediate, sizes)
    except CheckpointError as error:
        raise CheckpointError(f"expert {expert[1]} of layer {expert[0]}: {error}", path=path) from error
