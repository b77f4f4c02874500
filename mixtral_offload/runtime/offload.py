"""What `from_pretrained` adds to a model as `model.offload`: checkpoint, options, plan, cache, passes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

from torch import nn
from transformers import PreTrainedModel

from mixtral_offload.core.counters import CacheStats
from mixtral_offload.core.misses import MissRule
from mixtral_offload.core.placement import Plan
from mixtral_offload.errors import OptionError
from mixtral_offload.models.checkpoint import Checkpoint
from mixtral_offload.models.family import MoELayer
from mixtral_offload.runtime.cache import ExpertCache
from mixtral_offload.runtime.observer import Observers
from mixtral_offload.runtime.options import CheckedOptions
from mixtral_offload.runtime.pass_state import Pass, Passes
from mixtral_offload.runtime.prefetch import Prefetcher
from mixtral_offload.weights.layout import ExpertLayout
from mixtral_offload.weights.native import NativeExperts
from mixtral_offload.weights.products import Products, Run


class _Counters:
    """Reads the counters of an `Offload`. The reference is weak: the `Offload` holds this object."""

    def __init__(self, offload: Offload):
        self._offload = weakref.ref(offload)

    def __call__(self) -> CacheStats:
        offload = self._offload()
        assert offload is not None
        return replace(offload.stats)


@dataclass(frozen=True)
class Computation:
    """How experts are computed.

    Attributes:
        products: The code that multiplies packed matrices.
        run: Computes one expert from its views.
        plain_run: The same by torch's own operations, for autograd.
        experts: Computes many experts in one call; None: there is no such kernel.
        on_cpu: Computes one expert on the CPU, from its views in the store; None: all misses are copied.
    """

    products: Products
    run: Run
    plain_run: Run
    experts: NativeExperts | None
    on_cpu: Run | None = None


@dataclass(eq=False)
class Offload:
    """The value of `model.offload`.

    Attributes:
        layers: The MoE layers.
        computation: How experts are computed.
        prefetcher: None if nothing is predicted.
        compile_s: Seconds that compiling took.
        passes: The passes of the model, which take turns.
    """

    checkpoint: Checkpoint
    options: CheckedOptions
    plan: Plan
    cache: ExpertCache
    layers: list[MoELayer]
    computation: Computation
    prefetcher: Prefetcher | None = None
    compile_s: float = 0.0
    passes: Passes = field(init=False)

    def __post_init__(self) -> None:
        self.passes = Passes(_Counters(self))
        self.passes.on_begin.append(_tell(self.observers))
        _built.add(self)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        refuse_copy(protocol)

    def after_fork(self) -> None:
        """In a forked child: continue with an empty cache; on CUDA, which no fork survives, refuse passes."""
        on_cuda = self.options.device.type == "cuda"
        self.passes.after_fork("a model on CUDA cannot run in a forked process" if on_cuda else None)
        if not on_cuda:
            self.cache.after_fork()

    @property
    def stats(self) -> CacheStats:
        """The cache's counters."""
        return self.cache.stats

    @property
    def observers(self) -> Observers:
        """The observers of the model's passes."""
        return self.cache.observers

    @property
    def layout(self) -> ExpertLayout:
        """The layout of an expert on the device."""
        return self.cache.layout

    def close(self) -> None:
        """Wait for copies, end all threads, and release the store; the model must not be used afterwards."""
        with self.passes.lock:
            self.passes.refuse("this model was closed", "load it again with from_pretrained")
            if self.prefetcher is not None:
                self.prefetcher.close()
                self.prefetcher = None
            self.cache.close()
            if self.cache.store is not None:
                self.cache.store.close()

    def prefetch(self, layer: int, experts: list[int], distance: int) -> None:
        """Start copies of experts that `layer`, `distance` layers from now, will probably need."""
        with self.cache.lock:
            for observer in self.observers:
                observer.predicted(layer, experts, distance)
            self.cache.prefetch(layer, experts, distance)

    def settings(self) -> dict[str, Any]:
        """Return what a trace keeps of how the model ran, in JSON's types."""
        checkpoint, options, plan = self.checkpoint, self.options, self.plan
        return {
            "model": checkpoint.folder.name,
            "layers": list(checkpoint.layers),
            "n_experts": checkpoint.n_experts,
            "expert_bytes": self.layout.n_bytes if plan.store == "ram" else self.layout.stored_bytes,
            "slots": list(plan.slots.values()),
            "resident": [list(of) for of in plan.resident.values()],
            "store": plan.store,
            "policy": options.policy,
            "shared_slots": options.shared_slots,
            "prefetch": options.prefetch,
            "look_ahead": options.look_ahead,
            "misses": asdict(self.cache.misses if self.computation.on_cpu else MissRule()),
            "device": str(options.device),
        }


def _tell(observers: Observers) -> Callable[[Pass], None]:
    def tell(current: Pass) -> None:
        for observer in observers:
            observer.pass_began(current)

    return tell


def refuse_copy(protocol: SupportsIndex) -> NoReturn:
    """Stand in for `__reduce_ex__`, which `copy` and `pickle` call."""
    raise OptionError(
        "a model with offloaded experts cannot be copied or pickled",
        found="copy.deepcopy, pickle or torch.save",
        hint="build another one with from_pretrained; save_pretrained writes it to a folder",
    )


_built: weakref.WeakSet[Offload] = weakref.WeakSet()


def _after_fork() -> None:
    for offload in _built:
        offload.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


if TYPE_CHECKING:

    class OffloadedModel(PreTrainedModel):
        """What `from_pretrained` returns: transformers' own model, with `offload`."""

        offload: Offload
        generate: Callable[..., Any]  # its mixin types self as a protocol that no model satisfies

    class ExpertsModule(nn.Module):
        """The module of experts of one MoE layer of an offloaded model."""

        offload: Offload
        layer: int
else:
    OffloadedModel, ExpertsModule = PreTrainedModel, nn.Module
