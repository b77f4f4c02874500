"""`from_pretrained`: an ordinary transformers model whose experts are offloaded.

Knows transformers: its model classes, its module names, and its experts interface, through which `forward.py` is called
in place of the model's own experts.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from .cache import CacheStats, ExpertCache
from .checkpoint import DEMO, Checkpoint, ExpertId, open_checkpoint
from .checksums import finish_checks
from .errors import CheckpointError, OptionError
from .experts import ExpertLayout, dequantize_expert
from .forward import skip_padding
from .hub import resolve
from .manifest import plain_config
from .options import OffloadOptions, compile_choice, device_layout, plan_for
from .packed import PACKED_TOKENS, Run, linear, make_run
from .plan import Plan
from .policy import POLICIES
from .prefetch import Gate, Prefetcher, find_gates
from .quantization import QuantizedLinear, matmul
from .recorder import Recorder
from .store import FileStore, RamStore
from .transfer import make_engine
from .trunk import load_trunk


@dataclass
class Offload:
    """What `from_pretrained` hangs under the model as `model.offload`."""

    checkpoint: Checkpoint
    options: OffloadOptions
    plan: Plan
    cache: ExpertCache
    modules: dict[str, int]  # name of each module of experts -> its layer
    run: Run  # one expert, from its views
    compiled: tuple[bool, str]  # whether it is compiled, and why
    prefetcher: Prefetcher | None = None
    recorder: Recorder | None = None
    real_tokens: Tensor | None = (
        None  # of the pass under way: int64 [n], those that are no padding; None: all
    )
    compile_s: float = 0.0  # what compiling took while building

    @property
    def stats(self) -> CacheStats:
        return self.cache.stats

    @property
    def layout(self) -> ExpertLayout:
        return self.cache.layout

    def prefetch(self, layer: int, experts: list[int], distance: int) -> None:
        """Start copies of experts that `layer`, `distance` layers from now, will probably need."""
        with self.cache.lock:
            if self.recorder is not None:
                self.recorder.add_guess(layer, experts, distance)
            self.cache.prefetch(layer, experts, distance)

    def settings(self) -> dict:
        """What a trace keeps of how the model ran, in JSON's types."""
        checkpoint, options, plan = self.checkpoint, self.options, self.plan
        return {"model": checkpoint.folder.name, "layers": list(checkpoint.layers), "n_experts": checkpoint.n_experts,
                "expert_bytes": self.layout.n_bytes if plan.home == "ram" else self.layout.stored_bytes,
                "slots": list(plan.slots.values()), "resident": [list(of) for of in plan.resident.values()], "home": plan.home,
                "policy": options.policy, "shared_slots": options.shared_slots, "prefetch": options.prefetch,
                "look_ahead": options.look_ahead, "device": str(options.device)}  # fmt: skip


def from_pretrained(
    path_or_repo_id: str | Path | None = None, *, hub: dict | None = None, **options
) -> PreTrainedModel:
    """An ordinary transformers model whose experts are offloaded.

    path_or_repo_id: a folder, a hub repository, or None for the small model that ships with the package.
    hub: arguments for `mixtral_offload.hub.download` (revision, endpoint, token, local_dir).
    options: see `OffloadOptions`. Raises OffloadError (DownloadError, CheckpointError, CapacityError, OptionError).
    The model has `model.offload` with the plan, the cache and its counters.
    """
    options = OffloadOptions.parse(options)
    folder = DEMO if path_or_repo_id is None else resolve(path_or_repo_id, **(hub or {}))
    checkpoint = open_checkpoint(folder)
    model, modules, gates, options = build_skeleton(checkpoint, options)
    plan = plan_for(checkpoint, options)
    compiled = compile_choice(checkpoint, options)
    product = None if options.unpack else linear if compiled[0] else matmul
    load_trunk(model, checkpoint, options.device, options.dtype, product)
    finish_checks(checkpoint.trunk.values())
    with torch.cuda.device(options.device) if options.device.type == "cuda" else nullcontext():
        cache = _build_cache(checkpoint, plan, options)
    # a copy that knows nothing of the model, which would otherwise hold itself
    gated = copy.copy(model.get_submodule(next(iter(modules))))
    run = make_run(cache.layout, gated._apply_gate, compiled[0])
    model.offload = Offload(checkpoint, options, plan, cache, modules, run, compiled)
    _attach(model, gates)
    if compiled[0]:
        model.offload.compile_s = _compile_now(model)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


def _compile_now(model: PreTrainedModel) -> float:
    """Run everything compiled once, for few tokens and for many; returns the seconds it took."""
    offload, linears = model.offload, {}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            linears.setdefault((module.in_features, module.out_features, module.quantization), module)
    views = offload.layout.views(torch.zeros(offload.layout.n_bytes, dtype=torch.uint8, device=model.device))
    expert = offload.layout.shapes["gate"][1], partial(offload.run, views=views)
    calls = [expert, *((key[0], module) for key, module in linears.items())]
    began_s = time.perf_counter()
    with torch.no_grad():
        for n_in, call in tqdm(calls, desc="compile", disable=not offload.options.progress):
            for n_tokens in (1, PACKED_TOKENS + 1):
                call(torch.zeros(n_tokens, n_in, dtype=model.dtype, device=model.device))
    return time.perf_counter() - began_s


def build_skeleton(checkpoint: Checkpoint, options: OffloadOptions):
    """(model without any weights, its modules of experts by name -> layer, gates to guess by, options with the number of
    guesses). Whatever cannot be offloaded is refused here, before any weight is read."""
    model = _skeleton(checkpoint, options)
    modules = _layers(model, checkpoint)
    return model, modules, *_gates(model, modules, options)


def _skeleton(checkpoint: Checkpoint, options: OffloadOptions) -> PreTrainedModel:
    """The model without any weights, its experts' parameters gone for good."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain_config(checkpoint.config), dtype=options.dtype)
    for name, module in _experts_modules(model):
        if not has_plain_experts(module):
            raise CheckpointError(
                f"experts of {checkpoint.config.model_type} are not supported yet", key=name,
                expected="gated experts without bias or norm, as in Mixtral, Qwen-MoE or OLMoE",
            )  # fmt: skip
        for parameter in list(module._parameters):
            module.register_parameter(parameter, None)
    return model


def has_plain_experts(module: nn.Module) -> bool:
    """Whether these are gated experts as `expert_forward` runs them: no bias, no norm, transformers' usual layout."""
    plain = {"has_gate": True, "is_concatenated": True, "has_bias": False, "is_transposed": False}
    as_usual = all(getattr(module, name, None) is value for name, value in plain.items())
    return as_usual and not getattr(module, "has_post_expert_norm", False)


def _experts_modules(model: nn.Module):
    """The modules that call transformers' experts interface (its decorator leaves these attributes)."""
    for name, module in model.named_modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate"):
            yield name, module


def _build_cache(checkpoint: Checkpoint, plan: Plan, options: OffloadOptions) -> ExpertCache:
    layout, device = device_layout(checkpoint, options), options.device
    roaming = [expert for expert in sorted(checkpoint.experts) if expert[1] not in plan.resident[expert[0]]]
    bar = tqdm(
        total=len(checkpoint.experts) * layout.n_bytes, unit="B", unit_scale=True, desc="experts",
        disable=not options.progress or plan.home == "disk",
    )  # fmt: skip
    store = None
    if plan.home == "ram":
        store = RamStore(checkpoint, roaming, pin=device.type == "cuda", progress=bar.update)
    elif plan.home == "disk":
        store = FileStore(checkpoint, roaming)
    engine = make_engine(device, store.pinned, layout.n_bytes, options.link) if store else None
    layers = {layer: (plan.slots[layer], plan.resident[layer]) for layer in checkpoint.layers}
    cache = ExpertCache(
        layout, layers, store, engine, device, policy=POLICIES[options.policy], shared=options.shared_slots,
        n_staging=options.n_staging,
    )  # fmt: skip
    for _ in _fill_residents(checkpoint, cache, device):
        bar.update(layout.n_bytes)
    bar.close()
    return cache


def _fill_residents(checkpoint: Checkpoint, cache: ExpertCache, device: torch.device) -> Iterator[ExpertId]:
    """Read the resident experts, on CUDA through a buffer of one expert; yields each once it is there."""
    stored = checkpoint.layout
    if device.type == "cpu" and cache.layout is stored:
        yield from checkpoint.read_experts(cache.resident_slots())
        return
    buffer = torch.empty(stored.n_bytes, dtype=torch.uint8)
    for expert, slot in cache.resident_slots():
        checkpoint.read_expert(expert, buffer)
        if cache.layout is stored:
            slot.copy_(buffer)
        else:
            dequantize_expert(buffer.to(device), stored, slot, cache.layout)
        yield expert


def _layers(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, int]:
    """Name of each module of experts -> its layer."""
    layers = {name: int(re.search(r"\.layers\.(\d+)\.", name)[1]) for name, _ in _experts_modules(model)}
    if tuple(layers.values()) != checkpoint.layers:
        raise CheckpointError(
            "the checkpoint's expert layers are not the model's", path=checkpoint.folder,
            expected=f"layers {list(layers.values())}", found=f"layers {list(checkpoint.layers)}",
            hint="download the checkpoint's index and config again",
        )  # fmt: skip
    return layers


def _gates(
    model: PreTrainedModel, modules: dict[str, int], options: OffloadOptions
) -> tuple[list[Gate], OffloadOptions]:
    """The gates to guess by, and the options with their number of guesses. A family that has none is refused only if
    guesses were asked for."""
    if options.prefetch == 0:
        return [], options
    try:
        return find_gates(model, modules), options.with_prefetch()
    except OptionError:
        if options.prefetch:
            raise
        return [], options.with_prefetch(possible=False)


def _attach(model: PreTrainedModel, gates: list[Gate]) -> None:
    """Put `offloaded_experts` in place of the model's own experts, and the guesses under its layers."""
    offload, options = model.offload, model.offload.options
    for name, layer in offload.modules.items():
        module = model.get_submodule(name)
        module.offload, module.layer = offload, layer
        if options.unpack:
            _lend_weights(module, offload.cache, layer)
    model.set_experts_implementation("offloaded")
    skip_padding(model.base_model, offload)
    if options.prefetch and offload.plan.home:
        offload.prefetcher = Prefetcher(model, gates, offload.prefetch, options.prefetch, options.look_ahead)


def _lend_weights(module: nn.Module, cache: ExpertCache, layer: int) -> None:
    """The cache's memory of one layer, every expert resident and dequantized, as transformers' parameters
    `gate_up_proj [experts, 2 * intermediate, hidden]` and `down_proj [experts, hidden, intermediate]`."""
    rows = cache.resident_rows(layer)  # uint8 [experts, n_bytes]
    gate, up, down = cache.layout.fields
    for name, first, shape in (
        ("gate_up_proj", gate, (gate.shape[0] + up.shape[0], gate.shape[1])), ("down_proj", down, down.shape),
    ):  # fmt: skip
        n_bytes = prod(shape) * first.dtype.itemsize
        weights = rows[:, first.offset : first.offset + n_bytes].view(first.dtype).unflatten(1, shape)
        setattr(module, name, nn.Parameter(weights, requires_grad=False))
