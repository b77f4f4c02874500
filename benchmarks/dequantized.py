"""The first layers of a packed checkpoint as an ordinary 16-bit one; one matrix in memory at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from contestants import Task, log
from torch import Tensor
from torch.nn.functional import linear

from mixtral_offload.models.checkpoint import INDEX, Checkpoint, open_checkpoint
from mixtral_offload.weights.hqq import dequantize, infer

SAFETENSORS_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16"}
Tensors = dict[
    str, tuple[tuple[int, ...], Callable[[], Iterable[Tensor]]]
]  # name -> shape, its parts in order


def write_16bit(task: Task) -> dict:
    """Write the first `scaled_layers` layers of the packed checkpoint as a transformers checkpoint."""
    torch.set_num_threads(task.threads)
    source, folder = open_checkpoint(task.checkpoint), Path(task.files)
    dtype = faster_dtype(source, task.device) if task.dtype == "auto" else getattr(torch, task.dtype)
    folder.mkdir(parents=True)
    config = json.loads((source.folder / "config.json").read_text())
    config |= {"num_hidden_layers": task.scaled_layers, "torch_dtype": str(dtype).removeprefix("torch.")}
    files = {"dense.safetensors": dense_tensors(source, task.scaled_layers, dtype)}
    files |= {
        f"layer-{layer}.safetensors": expert_tensors(source, layer, dtype)
        for layer in range(task.scaled_layers)
    }
    for name, tensors in files.items():
        write_safetensors(folder / name, tensors, dtype)
        log(f"{name} written")
    weight_map = {key: name for name, tensors in files.items() for key in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))  # last: a folder without it is not finished
    return {"dtype": config["torch_dtype"], "bytes": sum(path.stat().st_size for path in folder.iterdir())}


def faster_dtype(checkpoint: Checkpoint, device: str) -> torch.dtype:
    """Return float16 on CUDA; on the CPU, the 16-bit dtype that multiplies a token by a matrix faster."""
    if torch.device(device).type == "cuda":
        return torch.float16
    times = {}
    for dtype in SAFETENSORS_DTYPES:
        weight = torch.ones(checkpoint.layout.shapes["gate"], dtype=dtype)
        x = torch.ones(1, weight.shape[1], dtype=dtype)
        linear(x, weight)
        began = time.perf_counter()
        for _ in range(3):
            linear(x, weight)
        times[dtype] = time.perf_counter() - began
    return min(times, key=times.__getitem__)


def dense_tensors(source: Checkpoint, n_layers: int, dtype: torch.dtype) -> Tensors:
    """Everything but the experts, attention dequantized, of the first layers."""
    plain, quantized = {}, {}
    for key, stored in source.dense.items():
        place = source.places[key]
        name = place.name
        if ".layers." in name and int(name.split(".layers.")[1].split(".")[0]) >= n_layers:
            continue
        if place.field is not None:
            quantized.setdefault(name, {})[place.field] = stored
        else:
            plain[name] = stored.shape, (lambda stored=stored: [stored.read(dtype)])
    head = source.config.hidden_size // source.config.num_attention_heads
    kv = source.config.num_key_value_heads * head
    for name, tensors in quantized.items():
        rows = kv if name.endswith(("k_proj", "v_proj")) else source.config.hidden_size
        shape = (rows, source.config.hidden_size)
        plain[f"{name}.weight"] = (
            shape,
            lambda shape=shape, tensors=tensors: [dequantized(shape, tensors, dtype)],
        )
    return plain


def dequantized(shape: tuple[int, int], tensors: dict, dtype: torch.dtype) -> Tensor:
    quantization = infer(
        shape, {field: (stored.dtype, stored.n_elements) for field, stored in tensors.items()}
    )
    return dequantize({field: stored.read() for field, stored in tensors.items()}, shape, quantization, dtype)


def expert_tensors(source: Checkpoint, layer: int, dtype: torch.dtype) -> Tensors:
    """A layer's experts as transformers 5 holds them: gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""
    layout, n = source.layout, source.n_experts
    (intermediate, hidden), prefix = layout.shapes["gate"], f"model.layers.{layer}.mlp.experts"

    def parts(*matrices: str) -> Iterator[Tensor]:
        buffer = torch.empty(layout.n_bytes, dtype=torch.uint8)
        for expert in range(n):
            source.read_expert((source.layers[layer], expert), buffer)
            views = layout.views(buffer)
            for matrix in matrices:
                yield dequantize(views[matrix], layout.shapes[matrix], layout.quantization[matrix], dtype)

    return {
        f"{prefix}.gate_up_proj": ((n, 2 * intermediate, hidden), lambda: parts("gate", "up")),
        f"{prefix}.down_proj": ((n, hidden, intermediate), lambda: parts("down")),
    }


def write_safetensors(path: Path, tensors: Tensors, dtype: torch.dtype) -> None:
    """One file, part by part: safetensors' own `save_file` wants every tensor in memory at once."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, _) in tensors.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, parts in tensors.values():
            for part in parts():
                part.contiguous().view(-1).view(torch.uint8).numpy().tofile(file)
        if file.tell() != 8 + len(text) + offset:
            raise RuntimeError(
                f"{path}: {file.tell() - 8 - len(text)} bytes of data written, {offset} expected"
            )


def dense_bytes_16bit(source: Checkpoint) -> int:
    """All layers' attention, norms and routers, the embeddings and the head, in 16 bits."""
    return sum(
        2 * torch.Size(shape).numel()
        for shape, _ in dense_tensors(source, len(source.layers), torch.float16).values()
    )
