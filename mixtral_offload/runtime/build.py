"""`from_pretrained`: an ordinary transformers model whose experts are offloaded.

Knows transformers' model classes, and its experts interface, which calls `runtime/forward.py`.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from mixtral_offload.core.misses import COPY, MissRule
from mixtral_offload.core.options import OffloadOptions, declared
from mixtral_offload.core.placement import Plan
from mixtral_offload.core.policies import make_policy
from mixtral_offload.errors import OptionError
from mixtral_offload.models.checkpoint import Checkpoint, ExpertId, open_checkpoint
from mixtral_offload.models.experts import FUSED, activation
from mixtral_offload.models.family import MoELayer
from mixtral_offload.models.norms import replace_norms
from mixtral_offload.runtime import forward as _registers_the_experts_function  # noqa: F401
from mixtral_offload.runtime.arguments import split_arguments
from mixtral_offload.runtime.cache import ExpertCache
from mixtral_offload.runtime.dense import load_dense
from mixtral_offload.runtime.engines import make_engine
from mixtral_offload.runtime.miss_costs import measure_miss_costs
from mixtral_offload.runtime.offload import Computation, ExpertsModule, Offload, OffloadedModel, refuse_copy
from mixtral_offload.runtime.options import (
    CheckedOptions,
    device_layout,
    parse_options,
    plan_for,
    products_for,
)
from mixtral_offload.runtime.pass_state import Pass, track_passes
from mixtral_offload.runtime.prefetch import Prefetcher
from mixtral_offload.runtime.prepare import build_skeleton
from mixtral_offload.runtime.save import save_whole
from mixtral_offload.runtime.settings import read_generation_config
from mixtral_offload.runtime.store import FileStore, RamStore, Store
from mixtral_offload.weights.checksums import finish_checks
from mixtral_offload.weights.hqq import QuantizedLinear
from mixtral_offload.weights.kernels import PACKED_TOKENS
from mixtral_offload.weights.layout import dequantize_expert
from mixtral_offload.weights.products import PLAIN, Kind, Products, choose_products
from mixtral_offload.weights.source import resolve


def from_pretrained(
    source: str | Path | None = "demo",
    *,
    # options: written by docs/options.py
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    cache_size: int | str | Sequence[int] | None = None,
    store: str = "auto",
    vram: int | str | None = None,
    ram: int | str | None = None,
    context_length: int = 4096,
    batch_size: int = 1,
    prefetch: int | None = None,
    look_ahead: int = 1,
    policy: str = "lru",
    shared_slots: bool = False,
    misses: str = "copy",
    compile: bool | str = "auto",
    precision: str = "exact",
    dequantize_on_load: bool = False,
    throttle: float | str | None = None,
    progress: bool = False,
    # end of options
    hub: dict[str, Any] | None = None,
    **others: Any,
) -> OffloadedModel:
    """Load an ordinary transformers model whose experts are offloaded.

    Args:
        source: A folder, a hub repository, or "demo" (also None) for the small model that ships with the
            package.
        device: Where experts run: "cpu", "cuda", "cuda:1", ... Default: cuda where there is one.
        dtype: Type of activations and of the dense part: float16, bfloat16, float32, or "auto" for the
            checkpoint's own. Default: float16 on CUDA, float32 on the CPU.
        attn_implementation: As in transformers.
        cache_size: Experts of each layer on the device: one number, one for each layer, or "auto" for all
            that fit. Default: what the checkpoint recommends, or "auto".
        store: Where the other experts are: "ram", "disk", or "auto" for RAM where it is large enough.
            Default: auto.
        vram: Device memory to use, in bytes or like "15GB". Default: what is free. On the CPU, vram and ram
            are one memory, and the smaller of those given counts.
        ram: Host memory to use, in bytes or like "12GB". Default: what is free.
        context_length: Tokens to reserve memory for; the limit of a chat. Default: 4096.
        batch_size: Number of contexts to reserve memory for; `generate_batch` shares them among its
            sequences. Default: 1.
        prefetch: Number of experts to predict and copy early for each coming layer. Default: 2 on CUDA or
            with `throttle`, else 0.
        look_ahead: Number of layers to predict ahead. Default: 1.
        policy: Expert to evict: "lru" (least recently used), "lfu" (least often used) or "lrfu" (between the
            two). Default: lru.
        shared_slots: One pool of slots for all layers in place of one for each.
        misses: What happens to an expert in RAM that a layer needs and the device lacks: "copy" it; let the
            "cpu" compute it there, once the slots are full (answers then depend on the cache in their last
            bits); "auto": link and CPU share them, as their measured speeds say. Default: copy.
        compile: Compute from packed weights with torch.compile: True, False, or "auto": where the package has
            no kernels of its own (on CUDA), if experts are large enough and there is a compiler. Default:
            auto.
        precision: Products on the CPU: "exact" (relative error below 0.001), or "fast" (activations in 8
            bits). Default: exact.
        dequantize_on_load: Dequantize all experts once at load time: the speed and size of an unquantized
            model. All experts must fit on the device.
        throttle: Limit copies to the device to this rate (bytes/s, or like "12GB"), to emulate a slower link.
        progress: Show progress bars.
        hub: Arguments for `mixtral_offload.weights.hub.download` (revision, endpoint, token, local_dir,
            cache_dir).
        others: Arguments of transformers' own `from_pretrained` that make sense here (torch_dtype, device_map
            for one device, token, revision, cache_dir, local_files_only). All others raise OptionError.

    Returns:
        The model. `model.offload` has the plan, the cache, its counters (`stats`) and `close()`.

    Raises:
        OffloadError: DownloadError, CheckpointError, CapacityError or OptionError.
    """
    given = locals()
    options, hub = split_arguments({name: given[name] for name in declared()} | others, hub)
    # whatever default device the caller has set: the options have each tensor's. Tensors made in
    # inference_mode could never be trained, and their changes would not be tracked
    with torch.device("cpu"), torch.inference_mode(False):
        return _build(source, hub, parse_options(options))


def _build(source: str | Path | None, hub: dict[str, Any], given: OffloadOptions) -> OffloadedModel:
    folder = resolve(source, **hub)
    checkpoint = open_checkpoint(folder)
    generation = read_generation_config(folder)
    skeleton, layers, options = build_skeleton(checkpoint, given)
    model = cast(OffloadedModel, skeleton)  # transformers' class: it gets its `offload` below
    plan = plan_for(checkpoint, options)
    products = products_for(checkpoint, options)
    product = None if options.dequantize_on_load else products.linear
    load_dense(model, checkpoint, options.device, options.dtype, product)
    finish_checks(checkpoint.dense.values())
    with torch.cuda.device(options.device) if options.device.type == "cuda" else nullcontext():
        cache = _build_cache(checkpoint, plan, options)
        computation = _computation(model, layers, cache, products, options, plan)
        if computation.on_cpu is not None:
            stored = [key for key in sorted(checkpoint.experts) if cache.store and key in cache.store]
            costs = measure_miss_costs(cache, computation.on_cpu, stored)
            cache.misses = MissRule(options.misses, costs)
    model.offload = Offload(checkpoint, options, plan, cache, layers, computation)
    _attach(model)
    if products.native is not None:
        replace_norms(model, products.native)
    if products.kind is Kind.COMPILED:
        model.offload.compile_s = _compile_now(model)
    if generation is not None:
        model.generation_config = generation
    return model.eval()


def _computation(
    model: PreTrainedModel,
    layers: list[MoELayer],
    cache: ExpertCache,
    products: Products,
    options: CheckedOptions,
    plan: Plan,
) -> Computation:
    experts = model.get_submodule(layers[0].name)
    activate, layout = activation(experts), cache.layout
    at_once = products.make_experts(layout, activate)
    run, plain_run = products.make_run(layout, activate, at_once), PLAIN.make_run(layout, activate)
    on_cpu = None
    if options.misses != COPY and plan.store == "ram":
        on_cpu = run  # the same bits, whatever computes them
        if options.device.type != "cpu":
            of_cpu = choose_products("auto", "exact", layout, torch.device("cpu"))
            on_cpu = of_cpu.make_run(layout, activate, of_cpu.make_experts(layout, activate))
    return Computation(products, run, plain_run, at_once, on_cpu)


def _compile_now(model: OffloadedModel) -> float:
    """Run everything compiled once, for few tokens and for many; return the seconds it took."""
    offload = model.offload
    linears: dict[tuple[Any, ...], QuantizedLinear] = {}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            linears.setdefault((module.in_features, module.out_features, module.quantization), module)
    views = offload.layout.views(torch.zeros(offload.layout.n_bytes, dtype=torch.uint8, device=model.device))
    expert = offload.layout.shapes["gate"][1], lambda x: offload.computation.run(x, views)
    calls: list[tuple[int, Callable[[Tensor], Tensor]]] = [
        expert,
        *((module.in_features, module) for module in linears.values()),
    ]
    began_s = time.perf_counter()
    with torch.no_grad():
        for n_in, call in tqdm(calls, desc="compile", disable=not offload.options.progress):
            for n_tokens in (1, PACKED_TOKENS + 1):
                call(torch.zeros(n_tokens, n_in, dtype=model.dtype, device=model.device))
    return time.perf_counter() - began_s


def _build_cache(checkpoint: Checkpoint, plan: Plan, options: CheckedOptions) -> ExpertCache:
    layout, device = device_layout(checkpoint, options), options.device
    stored = [expert for expert in sorted(checkpoint.experts) if expert[1] not in plan.resident[expert[0]]]
    n_bytes, is_quiet = len(checkpoint.experts) * layout.n_bytes, not options.progress or plan.store == "disk"
    bar = tqdm(total=n_bytes, unit="B", unit_scale=True, desc="experts", disable=is_quiet)
    store: Store | None = None
    if plan.store == "ram":
        store = RamStore(checkpoint, stored, pin=device.type == "cuda", progress=bar.update)
    elif plan.store == "disk":
        store = FileStore(checkpoint, stored)
    engine = make_engine(device, store.pinned, layout.n_bytes, options.throttle) if store else None
    layers = {layer: (plan.slots[layer], plan.resident[layer]) for layer in checkpoint.layers}
    cache = ExpertCache(
        layout,
        layers,
        store,
        engine,
        device,
        policy=partial(make_policy, options.policy),
        shared=options.shared_slots,
        n_staging=options.n_staging,
    )
    for _ in _fill_residents(checkpoint, cache, device):
        bar.update(layout.n_bytes)
    bar.close()
    return cache


def _fill_residents(checkpoint: Checkpoint, cache: ExpertCache, device: torch.device) -> Iterator[ExpertId]:
    """Read the resident experts, on CUDA through a buffer of one expert; yield each when it is there."""
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


def _attach(model: OffloadedModel) -> None:
    """Replace the model's own experts by `offloaded_experts`, and track its passes."""
    offload, options = model.offload, model.offload.options
    for layer in offload.layers:
        module = cast(ExpertsModule, model.get_submodule(layer.name))  # by the next line
        module.offload, module.layer = offload, layer.number
        if options.dequantize_on_load:
            _lend_weights(module, offload.cache, layer.number)
    model.set_experts_implementation("offloaded")
    save_whole(model)
    for part in (model, model.base_model):  # otherwise pickle fails at a hook, with another message
        part.__reduce_ex__ = refuse_copy  # type: ignore[method-assign]  # of this object alone
    track_passes(model.base_model, offload.passes)
    if not options.dequantize_on_load:  # then they are parameters
        offload.passes.on_begin.append(_refuse_untrainable(model))
    if options.prefetch and offload.plan.store:
        how = options.prefetch, options.look_ahead
        offload.prefetcher = Prefetcher(model, offload.layers, offload.prefetch, *how, passes=offload.passes)


def _refuse_untrainable(model: OffloadedModel) -> Callable[[Pass], None]:
    """Return what raises OptionError at a pass if peft was to train what are no parameters here.

    peft skips that part, with a warning at most, and writes its configuration on the model.
    """
    of = [weakref.ref(part) for part in (model, model.base_model)]
    packed = {
        name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, QuantizedLinear)
    }

    def check(current: Pass) -> None:
        for part in of:
            for name, config in (getattr(part(), "peft_config", None) or {}).items():
                for target in getattr(config, "target_parameters", None) or ():
                    if target.rpartition(".")[2] in FUSED:
                        raise OptionError(
                            "this adapter changes experts, whose weights are no parameters here",
                            key=f"adapter {name}",
                            found=target,
                            hint="train or load adapters of other layers (attention, router, head), or use "
                            "dequantize_on_load=True",
                        )
                for target in getattr(config, "modules_to_save", None) or ():
                    if target.rpartition(".")[2] in packed:
                        raise OptionError(
                            "this adapter trains a layer as a whole, whose weight is quantized",
                            key=f"adapter {name}",
                            found=target,
                            hint="give it LoRA (target_modules) in place of modules_to_save, or use "
                            "dequantize_on_load=True",
                        )

    return check


def _lend_weights(module: nn.Module, cache: ExpertCache, layer: int) -> None:
    """Make transformers' parameters `[experts, N, K]` of one layer's residents, all dequantized.

    Matrices that share a parameter lie below each other in it.
    """
    rows = cache.resident_rows(layer)  # uint8 [experts, n_bytes]
    fields = {field.matrix: field for field in cache.layout.fields}
    for name, matrices in FUSED.items():
        first, shape = fields[matrices[0]], (sum(fields[of].shape[0] for of in matrices), -1)
        n_bytes = sum(fields[of].n_bytes for of in matrices)
        weights = rows[:, first.offset : first.offset + n_bytes].view(first.dtype).unflatten(1, shape)
        setattr(module, name, nn.Parameter(weights, requires_grad=False))
