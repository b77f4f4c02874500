"""`from_pretrained`: an ordinary transformers model whose experts are offloaded.

Knows transformers: its model classes and its experts interface, through which `runtime/forward.py` is called
in place of the model's own experts.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from mixtral_offload.core.counters import CacheStats
from mixtral_offload.core.placement import Plan
from mixtral_offload.core.policies import POLICIES
from mixtral_offload.errors import OptionError
from mixtral_offload.models.checkpoint import Checkpoint, ExpertId, open_checkpoint
from mixtral_offload.models.experts import FUSED, activation
from mixtral_offload.models.family import MoELayer
from mixtral_offload.runtime import forward as _registers_the_experts_function  # noqa: F401
from mixtral_offload.runtime.arguments import split_arguments
from mixtral_offload.runtime.cache import ExpertCache
from mixtral_offload.runtime.dense import load_trunk
from mixtral_offload.runtime.engines import make_engine
from mixtral_offload.runtime.observer import Observers
from mixtral_offload.runtime.options import OffloadOptions, compile_choice, device_layout, plan_for
from mixtral_offload.runtime.pass_state import Pass, Passes, track_passes
from mixtral_offload.runtime.prefetch import Prefetcher
from mixtral_offload.runtime.prepare import build_skeleton
from mixtral_offload.runtime.save import save_whole
from mixtral_offload.runtime.settings import read_generation_config
from mixtral_offload.runtime.store import FileStore, RamStore
from mixtral_offload.weights.checksums import finish_checks
from mixtral_offload.weights.hqq import QuantizedLinear, matmul
from mixtral_offload.weights.kernels import PACKED_TOKENS, Run, linear, make_run
from mixtral_offload.weights.layout import ExpertLayout, dequantize_expert
from mixtral_offload.weights.source import resolve


class _Counters:
    """The counters of an `Offload`, which it refers to weakly: it is held by it."""

    def __init__(self, offload: Offload):
        self._offload = weakref.ref(offload)

    def __call__(self) -> CacheStats:
        return replace(self._offload().stats)


@dataclass(eq=False)
class Offload:
    """What `from_pretrained` hangs under the model as `model.offload`."""

    checkpoint: Checkpoint
    options: OffloadOptions
    plan: Plan
    cache: ExpertCache
    layers: list[MoELayer]  # those with experts
    run: Run  # one expert, from its views
    plain_run: Run  # the same without torch.compile, for autograd
    compiled: tuple[bool, str]  # whether it is compiled, and why
    prefetcher: Prefetcher | None = None
    compile_s: float = 0.0  # what compiling took while building
    passes: Passes = field(init=False)

    def __post_init__(self):
        self.passes = Passes(_Counters(self))
        self.passes.on_begin.append(_tell(self.observers))
        _built.add(self)

    def __reduce_ex__(self, protocol):
        _refuse_copy(protocol)

    def after_fork(self) -> None:
        """In a forked child: run on, with an empty cache; on CUDA, which does not survive a fork, refuse to."""
        on_cuda = self.options.device.type == "cuda"
        self.passes.after_fork("a model on CUDA cannot run in a forked process" if on_cuda else None)
        if not on_cuda:
            self.cache.after_fork()

    @property
    def stats(self) -> CacheStats:
        return self.cache.stats

    @property
    def observers(self) -> Observers:
        """Who watches the model run."""
        return self.cache.observers

    @property
    def layout(self) -> ExpertLayout:
        return self.cache.layout

    def prefetch(self, layer: int, experts: list[int], distance: int) -> None:
        """Start copies of experts that `layer`, `distance` layers from now, will probably need."""
        with self.cache.lock:
            for observer in self.observers:
                observer.predicted(layer, experts, distance)
            self.cache.prefetch(layer, experts, distance)

    def settings(self) -> dict:
        """What a trace keeps of how the model ran, in JSON's types."""
        checkpoint, options, plan = self.checkpoint, self.options, self.plan
        return {"model": checkpoint.folder.name, "layers": list(checkpoint.layers), "n_experts": checkpoint.n_experts,
                "expert_bytes": self.layout.n_bytes if plan.home == "ram" else self.layout.stored_bytes,
                "slots": list(plan.slots.values()), "resident": [list(of) for of in plan.resident.values()], "home": plan.home,
                "policy": options.policy, "shared_slots": options.shared_slots, "prefetch": options.prefetch,
                "look_ahead": options.look_ahead, "device": str(options.device)}  # fmt: skip


def _tell(observers: Observers) -> Callable[[Pass], None]:
    def tell(current: Pass) -> None:
        for observer in observers:
            observer.pass_began(current)

    return tell


def _refuse_copy(protocol) -> NoReturn:
    """Stand in for `__reduce_ex__`, which `copy` and `pickle` call."""
    raise OptionError(
        "a model with offloaded experts cannot be copied or pickled", found="copy.deepcopy, pickle or torch.save",
        hint="build another one with from_pretrained; save_pretrained writes it to a folder",
    )  # fmt: skip


_built: weakref.WeakSet[Offload] = weakref.WeakSet()


def _after_fork() -> None:
    for offload in _built:
        offload.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def from_pretrained(
    path_or_repo_id: str | Path | None = None, *, hub: dict | None = None, **options
) -> PreTrainedModel:
    """An ordinary transformers model whose experts are offloaded.

    path_or_repo_id: a folder, a hub repository, or "demo" or None for the small model that ships with the package.
    hub: arguments for `mixtral_offload.weights.hub.download` (revision, endpoint, token, local_dir, cache_dir).
    options: see `OffloadOptions`. Arguments of transformers' own `from_pretrained` are understood where they make sense
    here (torch_dtype, device_map for one device, attn_implementation, token, revision, cache_dir, local_files_only), and
    otherwise refused with what to do instead. Raises OffloadError (DownloadError, CheckpointError, CapacityError, OptionError).
    The model has `model.offload` with the plan, the cache and its counters.
    """
    options, hub = split_arguments(options, hub)
    # whatever default device the caller has set: each tensor's own is in the options. What is made in inference_mode
    # could never be trained, nor be seen to change
    with torch.device("cpu"), torch.inference_mode(False):
        return _build(path_or_repo_id, hub, OffloadOptions.parse(options))


def _build(path_or_repo_id: str | Path | None, hub: dict, options: OffloadOptions) -> PreTrainedModel:
    folder = resolve(path_or_repo_id, **hub)
    checkpoint = open_checkpoint(folder)
    generation = read_generation_config(folder)
    model, layers, options = build_skeleton(checkpoint, options)
    plan = plan_for(checkpoint, options)
    compiled = compile_choice(checkpoint, options)
    product = None if options.unpack else linear if compiled[0] else matmul
    load_trunk(model, checkpoint, options.device, options.dtype, product)
    finish_checks(checkpoint.trunk.values())
    with torch.cuda.device(options.device) if options.device.type == "cuda" else nullcontext():
        cache = _build_cache(checkpoint, plan, options)
    activate = activation(model.get_submodule(layers[0].name))
    run, plain_run = (make_run(cache.layout, activate, compile) for compile in (compiled[0], False))
    model.offload = Offload(checkpoint, options, plan, cache, layers, run, plain_run, compiled)
    _attach(model)
    if compiled[0]:
        model.offload.compile_s = _compile_now(model)
    if generation is not None:
        model.generation_config = generation
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


def _attach(model: PreTrainedModel) -> None:
    """Put `offloaded_experts` in place of the model's own experts, and the guesses under its layers."""
    offload, options = model.offload, model.offload.options
    for layer in offload.layers:
        module = model.get_submodule(layer.name)
        module.offload, module.layer = offload, layer.number
        if options.unpack:
            _lend_weights(module, offload.cache, layer.number)
    model.set_experts_implementation("offloaded")
    save_whole(model)
    for module in (model, model.base_model):
        module.__reduce_ex__ = _refuse_copy  # before a hook is met, which cannot be pickled either
    track_passes(model.base_model, offload.passes)
    if not options.unpack:  # then they are parameters
        offload.passes.on_begin.append(_refuse_untrainable(model))
    if options.prefetch and offload.plan.home:
        offload.prefetcher = Prefetcher(
            model, offload.layers, offload.prefetch, options.prefetch, options.look_ahead,
            passes=offload.passes,
        )  # fmt: skip


def _refuse_untrainable(model: PreTrainedModel) -> Callable[[Pass], None]:
    """An observer of passes that raises OptionError where peft was asked to train what are no parameters here.

    peft leaves that part out, with a warning at most. It writes the configuration that it has followed on the model.
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
                            "this adapter changes experts, whose weights are no parameters here", key=f"adapter {name}", found=target,
                            hint="train or load adapters of other layers (attention, router, head), or use unpack=True",
                        )  # fmt: skip
                for target in getattr(config, "modules_to_save", None) or ():
                    if target.rpartition(".")[2] in packed:
                        raise OptionError(
                            "this adapter trains a layer as a whole, whose weight is quantized", key=f"adapter {name}", found=target,
                            hint="give it LoRA (target_modules) in place of modules_to_save, or use unpack=True",
                        )  # fmt: skip

    return check


def _lend_weights(module: nn.Module, cache: ExpertCache, layer: int) -> None:
    """Make transformers' parameters `[experts, N, K]` of the cache's memory of one layer, all of it resident and
    dequantized. Matrices that share a parameter lie below each other in it."""
    rows = cache.resident_rows(layer)  # uint8 [experts, n_bytes]
    fields = {field.matrix: field for field in cache.layout.fields}
    for name, matrices in FUSED.items():
        first, shape = fields[matrices[0]], (sum(fields[of].shape[0] for of in matrices), -1)
        n_bytes = sum(fields[of].n_bytes for of in matrices)
        weights = rows[:, first.offset : first.offset + n_bytes].view(first.dtype).unflatten(1, shape)
        setattr(module, name, nn.Parameter(weights, requires_grad=False))
