"""accelerate's offload of the same weights in 16 bits, a few layers of them, scaled to all.

Knows transformers' fused experts and accelerate's device maps. A layer's experts of Mixtral-8x7B are 2.8 GB in 16 bits:
32 layers do not fit most disks, so n layers are written and measured, each layer by itself, and the time of a token is

    what is not in a layer + resident * (a layer held where it runs) + (all - resident) * (an offloaded layer)

with as many resident layers as the memory budget holds. Whatever favours accelerate is given to it: only experts are
offloaded, the rest stays where it runs; the files' own memory-mapped pages need no budget; the fastest of transformers'
experts implementations and, on the CPU, the faster 16-bit dtype are found by trying.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import torch
from contestants import MemoryPeak, Task, drop_page_cache, log, timed_generate
from forced_routing import ForcedRouting, sticky_experts
from torch import Tensor
from torch.nn.functional import linear

from mixtral_offload.checkpoint import INDEX, Checkpoint, open_checkpoint
from mixtral_offload.quantization import dequantize, infer
from mixtral_offload.trunk import parameter_name, split_quantized

SAFETENSORS_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16"}
Tensors = dict[
    str, tuple[tuple[int, ...], Callable[[], Iterable[Tensor]]]
]  # name -> shape, its parts in order


def write_16bit(task: Task) -> dict:
    """The first `scaled_layers` layers of the packed checkpoint as an ordinary transformers checkpoint, with one matrix
    in memory at a time."""
    torch.set_num_threads(task.threads)
    source, folder = open_checkpoint(task.checkpoint), Path(task.files)
    dtype = faster_dtype(source, task.device) if task.dtype == "auto" else getattr(torch, task.dtype)
    folder.mkdir(parents=True)
    config = json.loads((source.folder / "config.json").read_text())
    config |= {"num_hidden_layers": task.scaled_layers, "torch_dtype": str(dtype).removeprefix("torch.")}
    files = {"trunk.safetensors": trunk_tensors(source, task.scaled_layers, dtype)}
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
    """float16 on CUDA; on the CPU, whichever 16-bit dtype multiplies one token by an expert's matrix faster."""
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


def trunk_tensors(source: Checkpoint, n_layers: int, dtype: torch.dtype) -> Tensors:
    """Everything but the experts, attention dequantized, of the first layers."""
    plain, quantized = {}, {}
    for key, stored in source.trunk.items():
        name = parameter_name(key)
        if ".layers." in name and int(name.split(".layers.")[1].split(".")[0]) >= n_layers:
            continue
        if split := split_quantized(name):
            quantized.setdefault(split[0], {})[split[1]] = stored
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


class LayerTimes:
    """Seconds spent in each decoder layer, a row for each pass: [passes][layers]; loading its weights included."""

    def __init__(self, model):
        self.rows: list[list[float]] = []
        self._device = model.get_input_embeddings().weight.device
        for layer, block in enumerate(model.model.layers):
            block.register_forward_pre_hook(self._before(layer))
            block.register_forward_hook(self._after)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _before(self, layer: int):
        def hook(module, arguments) -> None:
            if layer == 0:
                self.rows.append([])
            self._began_s = self._now()

        return hook

    def _after(self, module, arguments, output) -> None:
        self.rows[-1].append(self._now() - self._began_s)


def load_offloaded(task: Task, offload_folder: Path):
    """The 16-bit model: all but the experts, and the first layer's experts, where they run; the other layers' experts
    on disk (CPU) or in RAM (CUDA), moved by accelerate when their layer runs."""
    from transformers import AutoModelForCausalLM

    on_cpu = torch.device(task.device).type == "cpu"
    near, far = ("cpu", "disk") if on_cpu else (torch.device(task.device).index or 0, "cpu")
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    place = dict.fromkeys(names, near)
    for layer in range(task.scaled_layers):
        of = ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate")
        place |= dict.fromkeys([f"model.layers.{layer}.{name}" for name in of], near)
        place[f"model.layers.{layer}.mlp.experts"] = near if layer == 0 else far
    return AutoModelForCausalLM.from_pretrained(
        task.files, device_map=place, offload_folder=str(offload_folder), dtype="auto"
    ).eval()


def run_accelerate(task: Task) -> dict:
    """Decode with accelerate's offload, routing forced; per-layer times scaled to the whole model."""
    import accelerate

    torch.set_num_threads(task.threads)
    if task.scaled_layers < 2:
        raise ValueError("accelerate needs 2 layers or more: one held where it runs, the others offloaded")
    source = open_checkpoint(task.checkpoint)
    with MemoryPeak() as memory:
        model = load_offloaded(task, Path(task.files) / "offloaded")
        config = model.config
        experts = sticky_experts(
            task.prompt + task.tokens, task.scaled_layers, config.num_local_experts, config.num_experts_per_tok,
            task.stay, task.seed,
        )  # fmt: skip
        routing, times = ForcedRouting(model, experts), LayerTimes(model)
        implementation = fastest_implementation(model, routing)
        runs = {}
        for page_cache in ("kept", "dropped before each token"):
            routing.reset()
            times.rows.clear()
            drop = None if page_cache == "kept" else (lambda n: drop_page_cache(task.files))
            seconds = timed_generate(model, task.prompt, task.tokens, *([drop] if drop else []))
            runs[page_cache] = scaled(task, source, seconds, times.rows)
            if torch.device(task.device).type == "cuda":
                break  # its weights are in RAM: no files
    fits = runs["kept"]["offloaded_bytes"] < psutil.virtual_memory().total - task.ram
    headline = "kept" if fits or len(runs) == 1 else "dropped before each token"
    versions = {"accelerate": accelerate.__version__, "experts": implementation, "dtype": str(model.dtype)}
    return (
        runs[headline]
        | memory.result()
        | versions
        | {"page_cache": headline, "by_page_cache": runs, "layers_measured": task.scaled_layers}
    )


def fastest_implementation(model, routing: ForcedRouting) -> str:
    """The fastest of transformers' experts implementations for the first token, each tried twice; set from now on."""
    times = {}
    for name in ("eager", "grouped_mm", "batched_mm"):
        try:
            model.set_experts_implementation(name)
            for _ in range(2):
                routing.reset()
                times[name] = timed_generate(model, 1, 0)[0]  # the second time counts
        except (RuntimeError, NotImplementedError, ValueError) as error:
            log(f"experts implementation {name} does not run here: {error}")
            times.pop(name, None)
    best = min(times, key=times.__getitem__)
    model.set_experts_implementation(best)
    log(f"seconds for a token by experts implementation: {times}; {best} it is")
    return best


def scaled(task: Task, source: Checkpoint, seconds: list[float], rows: list[list[float]]) -> dict:
    """Times of the whole model from those of a few layers, the first resident, the others offloaded.

    seconds: of each pass. rows: of each pass, the seconds of each layer.
    """
    if len(rows) != len(seconds) or any(len(row) != task.scaled_layers for row in rows):
        raise RuntimeError(f"{len(seconds)} passes, but {[len(row) for row in rows]} layers were timed")
    n_layers, expert_bytes = (
        len(source.layers),
        2 * sum(map(lambda s: s[0] * s[1], source.layout.shapes.values())),
    )
    layer_bytes = source.n_experts * expert_bytes
    room = memory_budget(task) - trunk_bytes_16bit(source)
    if torch.device(task.device).type == "cuda":
        room -= layer_bytes  # the layer that runs is copied there whole
    n_resident = max(0, min(room // layer_bytes, n_layers))
    full = [
        total - sum(row) + n_resident * row[0] + (n_layers - n_resident) * statistics.mean(row[1:])
        for total, row in zip(seconds, rows)
    ]
    first, *rest = full
    middle = [statistics.median(column) for column in zip(*rows[1:])]
    return {
        "tokens_per_s": len(rest) / sum(rest), "seconds_per_token": rest, "first_token_s": first,
        "prompt_tokens": task.prompt, "measured_seconds_per_token": seconds[1:],
        "resident_layers": n_resident, "layer_s": {"resident": middle[0], "offloaded": middle[1:]},
        "offloaded_bytes": (n_layers - n_resident) * layer_bytes,
        "full_size_bytes": trunk_bytes_16bit(source) + n_resident * layer_bytes,
    }  # fmt: skip


def memory_budget(task: Task) -> int:
    """Bytes for what is not offloaded: RAM on the CPU, the card's memory (or the `vram` option) on CUDA."""
    from mixtral_offload.plan import parse_size

    if torch.device(task.device).type == "cpu":
        return task.ram
    vram = task.options.get("vram")
    return torch.cuda.mem_get_info(task.device)[1] if vram is None else parse_size(vram)


def trunk_bytes_16bit(source: Checkpoint) -> int:
    """All layers' attention, norms and routers, the embeddings and the head, in 16 bits."""
    return sum(
        2 * torch.Size(shape).numel()
        for shape, _ in trunk_tensors(source, len(source.layers), torch.float16).values()
    )
