"""accelerate's offload of the same weights in 16 bits: a few layers, scaled to all.

A layer's experts of Mixtral-8x7B are 2.8 GB in 16 bits; 32 layers do not fit most disks. So n layers are
written (`dequantized.py`) and each is measured by itself. The time of a token is

    what is not in a layer + resident * (a resident layer) + (all - resident) * (an offloaded layer)

with as many resident layers as the memory budget allows. accelerate gets the better of every choice: only
experts are offloaded; the pages of memory-mapped files need no budget; the fastest of transformers' experts
implementations and, on the CPU, the faster 16-bit dtype are found by trying.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import psutil
import torch
from contestants import MemoryPeak, Task, drop_page_cache, log, timed_generate
from dequantized import dense_bytes_16bit
from forced_routing import ForcedRouting, sticky_experts

from mixtral_offload.models.checkpoint import Checkpoint, open_checkpoint
from mixtral_offload.units import parse_size


class LayerTimes:
    """Measures seconds in each decoder layer, loading of weights included: [passes][layers]."""

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
    """Load the 16-bit model.

    All but the experts, and the first layer's experts, stay where they run; the other layers' experts are on
    disk (CPU) or in RAM (CUDA), moved by accelerate when their layer runs.
    """
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
            task.prompt + task.tokens,
            task.scaled_layers,
            config.num_local_experts,
            config.num_experts_per_tok,
            task.stay,
            task.seed,
        )
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
    """Find and set the fastest of transformers' experts implementations for the first token."""
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
        2 * sum(n * k for n, k in source.layout.shapes.values()),
    )
    layer_bytes = source.n_experts * expert_bytes
    room = memory_budget(task) - dense_bytes_16bit(source)
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
        "full_size_bytes": dense_bytes_16bit(source) + n_resident * layer_bytes,
    }  # fmt: skip


def memory_budget(task: Task) -> int:
    """Return the bytes for what is not offloaded: RAM on the CPU, the GPU's memory (or `vram`) on CUDA."""
    if torch.device(task.device).type == "cpu":
        return task.ram
    vram = task.options.get("vram")
    return torch.cuda.mem_get_info(task.device)[1] if vram is None else parse_size(vram)
