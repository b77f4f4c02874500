"""`from_pretrained`: an ordinary transformers model whose experts are offloaded.

Knows transformers: its model classes, its module names, and its experts interface, through which the function
`offloaded_experts` is called in place of the model's own experts. Nothing else in the package knows them.
"""

from __future__ import annotations

import copy
import difflib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .cache import CacheStats, ExpertCache
from .checkpoint import DEMO, Checkpoint, ExpertId, open_checkpoint
from .errors import CheckpointError, OptionError
from .experts import ExpertLayout, expert_forward
from .hub import resolve
from .plan import Plan, Sizes, make_plan, parse_size
from .policy import POLICIES, make_policy
from .prefetch import Prefetcher, find_gates
from .recorder import Recorder
from .store import FileStore, RamStore
from .transfer import make_engine
from .trunk import load_trunk

MARGIN_BYTES = 600_000_000  # CUDA context, allocator rounding, activations


@dataclass(frozen=True)
class OffloadOptions:
    """How to offload.

    device: "cpu", "cuda", "cuda:1" ...; default: cuda where there is one. dtype: of activations and of the trunk;
    default: float16 on CUDA, float32 on the CPU. cache_size: experts per layer on the device, or "auto" for all that
    fit; default: what the checkpoint asks for, or "auto". store: home of the other experts, "ram", "disk" or "auto".
    vram, ram: bytes (or text like "15GB") that may be used; default: what is free. context_length: tokens to leave
    room for. link: slow copies down to so many bytes (or "12GB") per second, for experiments. prefetch: experts of
    each coming layer to copy ahead, guessed from the hidden state of now; default: 2 where there is a link to hide (CUDA, or
    `link`), else 0. look_ahead: how many layers ahead to guess. policy: which expert leaves, "lru", "lfu" or "lrfu".
    shared_slots: one pool of slots for all layers instead of one for each.
    """

    device: str | torch.device | None = None
    dtype: torch.dtype | str | None = None
    cache_size: int | str | None = None
    store: str = "auto"
    vram: int | str | None = None
    ram: int | str | None = None
    context_length: int = 4096
    link: float | str | None = None
    prefetch: int | None = None
    look_ahead: int = 1
    policy: str = "lru"
    shared_slots: bool = False
    progress: bool = False

    @classmethod
    def parse(cls, options: dict) -> OffloadOptions:
        """Refuses unknown names, with the nearest known one; fills in device and dtype."""
        known = [option.name for option in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else None
                raise OptionError("unknown option", found=name, expected=", ".join(known), hint=hint)
        device = _device(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = options.get("dtype") or (torch.float16 if device.type == "cuda" else torch.float32)
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise OptionError(
                "unknown dtype", expected="float16, bfloat16 or float32", found=options["dtype"]
            )
        prefetch = options.get("prefetch")
        if prefetch is None:
            prefetch = 2 if device.type == "cuda" or options.get("link") is not None else 0
        options = {**options, "device": device, "dtype": dtype, "prefetch": prefetch}
        for name, least in (("prefetch", 0), ("look_ahead", 1)):
            value = options.get(name, least)
            if not isinstance(value, int) or value < least:
                raise OptionError(f"impossible {name}", expected=f"a whole number from {least}", found=value)
        make_policy(options.get("policy", cls.policy))
        return cls(**options)

    @property
    def n_staging(self) -> int:
        """Rows for guesses: one more than can be useful at a time, for one whose copy is still being stopped."""
        return self.prefetch * self.look_ahead + 1 if self.prefetch else 0


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except RuntimeError:
        raise OptionError("unknown device", expected="cpu, cuda, cuda:1, ...", found=name) from None
    if device.type == "cpu":
        return device
    if (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices"
        raise OptionError("no such device", expected=name, found=found, hint='use device="cpu"')
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


@dataclass
class Offload:
    """What `from_pretrained` hangs under the model as `model.offload`."""

    checkpoint: Checkpoint
    options: OffloadOptions
    plan: Plan
    cache: ExpertCache
    modules: dict[str, int]  # name of each module of experts -> its layer
    prefetcher: Prefetcher | None = None
    recorder: Recorder | None = None

    @property
    def stats(self) -> CacheStats:
        return self.cache.stats

    @property
    def layout(self) -> ExpertLayout:
        return self.checkpoint.layout

    def prefetch(self, layer: int, experts: list[int], distance: int) -> None:
        """Start copies of experts that `layer`, `distance` layers from now, will probably need."""
        with self.cache.lock:
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
    plan = plan_for(checkpoint, options)
    model = _skeleton(checkpoint, options)
    load_trunk(model, checkpoint, options.device, options.dtype)
    model.offload = Offload(
        checkpoint, options, plan, _build_cache(checkpoint, plan, options), _layers(model)
    )
    _attach(model)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


def plan_for(checkpoint: Checkpoint, options: OffloadOptions) -> Plan:
    """The plan for a checkpoint on this machine, as it is now."""
    sizes = Sizes(checkpoint.layers, checkpoint.n_experts, checkpoint.top_k, checkpoint.layout.n_bytes)
    recommended = (getattr(checkpoint.config, "offload", None) or {}).get("cache_size", "auto")
    cache_size = recommended if options.cache_size is None else options.cache_size
    why = "the checkpoint recommends it" if options.cache_size is None else "as asked"
    on_cpu = options.device.type == "cpu"
    memory = psutil.virtual_memory()
    ram = parse_size(options.ram) if options.ram is not None else int(0.9 * memory.available)
    if options.vram is not None:
        device = parse_size(options.vram)
    else:
        device = ram if on_cpu else torch.cuda.mem_get_info(options.device)[0]
    device -= options.n_staging * sizes.expert_bytes
    device -= trunk_bytes(checkpoint, options) + (0 if on_cpu else MARGIN_BYTES)
    return make_plan(
        sizes, max(device, 0), ram, cache_size=cache_size, store=options.store, shared_memory=on_cpu, why=why
    )


def trunk_bytes(checkpoint: Checkpoint, options: OffloadOptions) -> int:
    """Device bytes beside the experts: trunk, KV cache for the context, scratch for one dequantized matrix."""
    config, item = checkpoint.config, options.dtype.itemsize
    trunk = sum(
        tensor.n_elements * item if tensor.dtype.is_floating_point and ".meta." not in key else tensor.n_bytes
        for key, tensor in checkpoint.trunk.items()
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    context = min(options.context_length, config.max_position_embeddings)
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * context * item
    return trunk + kv + checkpoint.layout.scratch_bytes


def _skeleton(checkpoint: Checkpoint, options: OffloadOptions) -> PreTrainedModel:
    """The model without any weights, its experts' parameters gone for good."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(checkpoint.config), dtype=options.dtype)
    for name, module in _experts_modules(model):
        if module.has_bias or module.is_transposed or not module.has_gate or not module.is_concatenated:
            raise CheckpointError(
                f"experts of {checkpoint.config.model_type} are not supported yet", key=name,
                expected="gated experts without bias, as in Mixtral, Qwen-MoE or OLMoE",
            )  # fmt: skip
        for parameter in list(module._parameters):
            module.register_parameter(parameter, None)
    return model


def _experts_modules(model: nn.Module):
    """The modules that call transformers' experts interface (its decorator leaves these attributes)."""
    for name, module in model.named_modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate"):
            yield name, module


def _build_cache(checkpoint: Checkpoint, plan: Plan, options: OffloadOptions) -> ExpertCache:
    layout, device = checkpoint.layout, options.device
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
    link = None if options.link is None else float(parse_size(options.link))
    engine = make_engine(device, store.pinned, layout.n_bytes, link) if store else None
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
    if device.type == "cpu":
        yield from checkpoint.read_experts(cache.resident_slots())
        return
    buffer = torch.empty(checkpoint.layout.n_bytes, dtype=torch.uint8)
    for expert, slot in cache.resident_slots():
        checkpoint.read_expert(expert, buffer)
        slot.copy_(buffer)
        yield expert


def _layers(model: PreTrainedModel) -> dict[str, int]:
    """Name of each module of experts -> its layer."""
    return {name: int(re.search(r"\.layers\.(\d+)\.", name)[1]) for name, _ in _experts_modules(model)}


def _attach(model: PreTrainedModel) -> None:
    """Put `offloaded_experts` in place of the model's own experts."""
    offload = model.offload
    if tuple(offload.modules.values()) != offload.checkpoint.layers:
        raise CheckpointError(
            "the checkpoint's expert layers are not the model's", path=offload.checkpoint.folder,
            expected=f"layers {list(offload.modules.values())}", found=f"layers {list(offload.checkpoint.layers)}",
            hint="download the checkpoint's index and config again",
        )  # fmt: skip
    for name, layer in offload.modules.items():
        module = model.get_submodule(name)
        module.offload, module.layer = offload, layer
    model.set_experts_implementation("offloaded")
    if offload.options.prefetch and offload.plan.home:
        gates = find_gates(model, offload.modules)
        options = offload.options
        offload.prefetcher = Prefetcher(model, gates, offload.prefetch, options.prefetch, options.look_ahead)


def offloaded_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """transformers' experts function: `hidden_states [T, H]`, `top_k_index, top_k_weights [T, k]` -> `[T, H]`.

    Tokens are sorted by expert once; each expert runs once for all of its tokens. Results are summed in the order of
    the router's choice, whatever order the experts came in, so that no cache size changes a single bit.
    """
    offload, cache = module.offload, module.offload.cache
    n_tokens, top_k = top_k_index.shape
    order = top_k_index.reshape(-1).argsort(stable=True)
    counts, prefetch = _read_routing(offload, module.layer, top_k_index)
    ends = torch.tensor(counts).cumsum(0).tolist()
    x = hidden_states[order // top_k]  # [T * k, H], sorted by expert
    y = torch.empty_like(x)
    began_s = time.perf_counter()
    with cache.lock:
        needed = [expert for expert, n in enumerate(counts) if n]
        for expert, views in cache.serve(module.layer, needed, meanwhile=prefetch):
            rows = slice(ends[expert] - counts[expert], ends[expert])
            y[rows] = expert_forward(x[rows], views, offload.layout, module._apply_gate)
        if offload.recorder is not None:
            offload.recorder.add(module.layer, top_k_index, top_k_weights, began_s)
    unsorted = torch.empty_like(y)
    unsorted[order] = y
    weighted = unsorted.view(n_tokens, top_k, -1) * top_k_weights.unsqueeze(-1)
    return weighted.sum(1).to(hidden_states.dtype)


def _read_routing(offload: Offload, layer: int, top_k_index: Tensor):
    """Tokens per expert, as a list, and a function that starts the guesses for later layers (or None).

    The guesses are computed before, and come to the host with the counts: it waits for the device once per layer.
    """
    counts = torch.bincount(top_k_index.reshape(-1), minlength=offload.checkpoint.n_experts)
    layers, ranked = offload.prefetcher.rank_before(layer) if offload.prefetcher else ([], None)
    if not layers:
        return counts.tolist(), None
    numbers = torch.cat((counts, ranked.flatten())).tolist()  # the host waits here
    guesses = torch.tensor(numbers[len(counts) :]).view(len(layers), -1).tolist()
    return numbers[: len(counts)], partial(offload.prefetcher.start, layers, guesses)


ALL_EXPERTS_FUNCTIONS.register("offloaded", offloaded_experts)
