"""Bytes of each part of the device's memory, of RAM and of the disk, before anything is built.

Knows options, plans and a checkpoint's headers; reads no weights. `analysis/plots/memory.py` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixtral_offload.core.placement import Plan
from mixtral_offload.models.checkpoint import Checkpoint, open_checkpoint
from mixtral_offload.runtime.arguments import split_arguments
from mixtral_offload.runtime.options import (
    MARGIN_BYTES,
    CheckedOptions,
    budgets,
    device_needs,
    parse_options,
    plan_for,
)
from mixtral_offload.runtime.prepare import build_skeleton
from mixtral_offload.units import gb, listed
from mixtral_offload.weights.source import resolve

DEVICE_PARTS = ("dense part", "KV cache", "scratch", "resident experts", "cache slots", "staging")
RAM_PARTS = ("experts in RAM",)
DISK_PARTS = ("experts", "dense part")


@dataclass(frozen=True)
class MemoryUse:
    """Bytes by part. Not counted: the process itself, and pages of files that the system keeps.

    Attributes:
        device: By the names of DEVICE_PARTS. "scratch" is for activations, one dequantized matrix and, on
            CUDA, a margin.
        ram: By those of RAM_PARTS; empty if no expert is in RAM.
        disk: The checkpoint's files, by the names of DISK_PARTS.
        device_budget: What may be used of the device's memory.
        ram_budget: The same of RAM.
        shared_memory: The device is the CPU: both are one memory and one budget.
    """

    plan: Plan
    device: dict[str, int]
    ram: dict[str, int]
    disk: dict[str, int]
    device_budget: int
    ram_budget: int
    shared_memory: bool = False

    @property
    def device_bytes(self) -> int:
        """Sum of the parts of the device's memory."""
        return sum(self.device.values())

    @property
    def ram_bytes(self) -> int:
        """Sum of the parts of RAM."""
        return sum(self.ram.values())

    @property
    def disk_bytes(self) -> int:
        """Sum of the parts of the disk."""
        return sum(self.disk.values())

    @property
    def runs_from_disk(self) -> bool:
        """Whether experts are read from the files while the model runs, not only while it is built."""
        return self.plan.store == "disk"

    def __str__(self) -> str:
        device, ram = f" of {gb(self.device_budget)} free", f" of {gb(self.ram_budget)} free"
        if self.shared_memory:
            device = ram = ""
        reading = "experts are read while running" if self.runs_from_disk else "read at the start only"
        rows = {
            f"device {gb(self.device_bytes)}{device}": self.device,
            f"RAM {gb(self.ram_bytes)}{ram}": self.ram,
            f"disk {gb(self.disk_bytes)}, {reading}": self.disk,
        }
        lines = [str(self.plan), *(": ".join(filter(None, (row, listed(of)))) for row, of in rows.items())]
        if self.shared_memory:
            both = gb(self.device_bytes + self.ram_bytes)
            lines.append(f"device and RAM are one memory: {both} of {gb(self.device_budget)} free")
        return "\n".join(lines)


def memory_use(
    path_or_repo_id: str | Path | None = None, *, hub: dict[str, Any] | None = None, **options: Any
) -> MemoryUse:
    """Compute what `from_pretrained` with the same arguments would use; read headers, never weights.

    A hub repository that is not here yet is downloaded, as by `from_pretrained`.

    Raises:
        OffloadError: As `from_pretrained` does.
    """
    options, hub = split_arguments(options, hub)
    parsed = parse_options(options)
    checkpoint = open_checkpoint(resolve(path_or_repo_id, **hub))
    # what from_pretrained refuses is refused here too
    return memory_of(checkpoint, build_skeleton(checkpoint, parsed)[2])


def memory_of(checkpoint: Checkpoint, options: CheckedOptions) -> MemoryUse:
    """Compute what a model with these options would use."""
    on_cpu = options.device.type == "cpu"
    device, ram = budgets(options)
    plan = plan_for(checkpoint, replace(options, vram=device, ram=ram))  # free memory is read once
    needs = device_needs(checkpoint, options)
    needs["scratch"] += 0 if on_cpu else MARGIN_BYTES
    disk = (len(checkpoint.experts) * checkpoint.layout.stored_bytes, checkpoint.dense_bytes)
    return MemoryUse(
        plan=plan,
        device={**needs, **_experts(plan, options.n_staging if plan.store else 0)},
        ram={RAM_PARTS[0]: plan.ram_bytes} if plan.store == "ram" else {},
        disk=dict(zip(DISK_PARTS, disk)),
        device_budget=device,
        ram_budget=ram,
        shared_memory=on_cpu,
    )


def _experts(plan: Plan, n_staging: int) -> dict[str, int]:
    """Rows of the cache's slab, in bytes by what they are for."""
    rows = plan.n_resident, sum(plan.slots.values()), n_staging
    return dict(zip(DEVICE_PARTS[3:], (n * plan.sizes.expert_bytes for n in rows)))
