"""What lives where: from the device's and the host's free memory to slots per layer, each choice with its reason.

Knows sizes and counts. Knows nothing of tensors, files or transformers' modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixtral_offload.errors import CapacityError, OptionError
from mixtral_offload.units import gb


@dataclass(frozen=True)
class Sizes:
    """What a plan needs to know of a model: its MoE layers, experts per layer, experts per token, bytes per expert."""

    layers: Sequence[int]
    n_experts: int
    top_k: int
    expert_bytes: int

    @property
    def total(self) -> int:
        return len(self.layers) * self.n_experts


@dataclass(frozen=True)
class Plan:
    """slots: layer -> cache slots. resident: layer -> experts permanently on the device. store: where all other experts are,
    "ram", "disk", or None where every expert is resident. reasons: one sentence for each choice."""

    sizes: Sizes
    slots: dict[int, int]
    resident: dict[int, tuple[int, ...]]
    store: str | None
    reasons: tuple[str, ...]

    @property
    def n_resident(self) -> int:
        return sum(map(len, self.resident.values()))

    @property
    def n_stored(self) -> int:
        return self.sizes.total - self.n_resident

    @property
    def device_bytes(self) -> int:
        return (self.n_resident + sum(self.slots.values())) * self.sizes.expert_bytes

    @property
    def ram_bytes(self) -> int:
        return self.n_stored * self.sizes.expert_bytes if self.store == "ram" else 0

    def __str__(self) -> str:
        where = {"ram": "in RAM", "disk": "on disk", None: ""}[self.store]
        stored = f", {self.n_stored} {where}" if self.store else ""
        counts = sorted(set(self.slots.values()) - {0})
        slots = (
            f", {'-'.join(map(str, (counts[0], counts[-1])[: len(counts)]))} cache slots per layer"
            if counts
            else ""
        )
        head = f"{self.sizes.total} experts of {gb(self.sizes.expert_bytes)}: {self.n_resident} resident{stored}{slots}"
        memory = f"device {gb(self.device_bytes)}, RAM {gb(self.ram_bytes)}"
        return "\n".join([f"{head} ({memory})", *(f"  - {reason}" for reason in self.reasons)])


def make_plan(
    sizes: Sizes, device_bytes: int, ram_bytes: int, *, cache_size: int | str | Sequence[int] = "auto", store: str = "auto",
    shared_memory: bool = False, why: str = "as asked",
) -> Plan:  # fmt: skip
    """The plan that keeps most experts on the device.

    device_bytes, ram_bytes: free for experts. cache_size: experts of a layer on the device, one number for all layers
    or one for each, or "auto" for as many as fit. store: where the other experts are, "ram", "disk" or "auto".
    shared_memory: the device is the CPU, and the two budgets are one. why: the reason for a given cache_size. Raises
    CapacityError (naming the largest cache that fits) or OptionError.
    """
    room = min(device_bytes // sizes.expert_bytes, sizes.total)
    if isinstance(cache_size, Sequence) and not isinstance(cache_size, str):
        return _plan_by_layer(sizes, device_bytes, ram_bytes, list(cache_size), store, shared_memory, why)
    _check(sizes, cache_size, store, room // len(sizes.layers), device_bytes)
    if cache_size == sizes.n_experts or (cache_size == "auto" and room == sizes.total):
        reason = f"all {sizes.total} experts fit on the device: none is ever copied"
        return _plan(sizes, sizes.total, {}, None, [reason])
    wanted = sizes.n_experts if cache_size == "auto" else cache_size
    reason = f"cache of {wanted} of {sizes.n_experts} experts per layer: {why}"
    if cache_size == "auto":
        reason = f"cache of {room} experts over {len(sizes.layers)} layers: all that {gb(device_bytes)} of device memory holds"
    if store == "disk":
        return _plan(
            sizes,
            0,
            _slots(sizes, 0, room, wanted),
            "disk",
            [reason, "the other experts are on disk: as asked"],
        )
    must_stay = 0
    if shared_memory:
        ram_bytes = device_bytes - sum(_slots(sizes, 0, room, wanted).values()) * sizes.expert_bytes
    else:
        must_stay = max(0, sizes.total - ram_bytes // sizes.expert_bytes)
    fits = must_stay > 0 or sizes.total * sizes.expert_bytes <= ram_bytes
    slots = _slots(sizes, must_stay, room, wanted) if fits else None
    if slots is not None:
        return _in_ram(sizes, must_stay, slots, ram_bytes, [reason])
    return _on_disk(
        sizes, _slots(sizes, 0, room, wanted), device_bytes, ram_bytes, store, shared_memory, [reason]
    )


def _in_ram(sizes: Sizes, must_stay: int, slots: dict[int, int], ram_bytes: int, reasons: list[str]) -> Plan:
    stored = sizes.total - must_stay
    if must_stay:
        held = f"{gb(ram_bytes)} of RAM holds {stored} of {sizes.total}"
        reasons = [*reasons, f"{must_stay} experts are resident: {held}"]
    if not stored:
        return _plan(sizes, must_stay, {}, None, reasons)
    held = f"the other experts are in RAM: {gb(stored * sizes.expert_bytes)} of {gb(ram_bytes)} free"
    return _plan(sizes, must_stay, slots, "ram", [*reasons, held])


def _on_disk(sizes, slots, device_bytes, ram_bytes, store, shared_memory, reasons) -> Plan:
    """Where RAM is too small; raises CapacityError if RAM was asked for."""
    if store == "ram":
        raise CapacityError(
            "RAM cannot hold the experts that do not fit on the device", expected=gb(sizes.total * sizes.expert_bytes),
            found=f"{gb(ram_bytes)} of RAM beside {gb(device_bytes)} on the device", hint='use store="disk" or store="auto"',
        )  # fmt: skip
    beside = "beside the cache" if shared_memory else "that do not fit on the device"
    reason = f"the other experts are on disk: {gb(ram_bytes)} of RAM cannot hold the experts {beside}"
    return _plan(sizes, 0, slots, "disk", [*reasons, reason])


def _plan_by_layer(
    sizes: Sizes, device_bytes, ram_bytes, wanted: list[int], store, shared_memory, why
) -> Plan:
    """One cache size for each layer, as a trace may say is best (`replay.best_allocation`)."""
    if len(wanted) != len(sizes.layers) or not all(type(n) is int for n in wanted):
        raise OptionError(
            "unknown cache_size", expected=f"{len(sizes.layers)} numbers, one for each layer", found=wanted
        )
    for n in wanted:
        _check(sizes, n, store, sizes.n_experts, device_bytes)
    used = sum(wanted) * sizes.expert_bytes
    if used > device_bytes:
        raise CapacityError(
            "the device has too little memory for this cache", found=f"{gb(device_bytes)} free for experts",
            expected=gb(used), hint=f"{device_bytes // sizes.expert_bytes} experts fit in all",
        )  # fmt: skip
    ram_bytes = device_bytes - used if shared_memory else ram_bytes
    reasons = [f"cache of {sum(wanted)} experts, by layer {wanted}: {why}"]
    slots = dict(zip(sizes.layers, wanted))
    if store == "disk":
        return _plan(sizes, 0, slots, "disk", [*reasons, "the other experts are on disk: as asked"])
    if sizes.total * sizes.expert_bytes <= ram_bytes:
        return _in_ram(sizes, 0, slots, ram_bytes, reasons)
    return _on_disk(sizes, slots, device_bytes, ram_bytes, store, shared_memory, reasons)


def _check(sizes: Sizes, cache_size, store: str, largest: int, device_bytes: int) -> None:
    if store not in ("auto", "ram", "disk"):
        raise OptionError("unknown store", expected="auto, ram or disk", found=store)
    if cache_size != "auto" and (isinstance(cache_size, bool) or not isinstance(cache_size, int)):
        raise OptionError(
            "unknown cache_size", expected='"auto" or a number of experts per layer', found=cache_size
        )
    if cache_size != "auto" and not sizes.top_k <= cache_size <= sizes.n_experts:
        raise CapacityError(
            "impossible cache_size", found=cache_size,
            expected=f"{sizes.top_k} (each token uses {sizes.top_k} experts of a layer) to {sizes.n_experts} (all of them)",
        )  # fmt: skip
    if largest < (sizes.top_k if cache_size == "auto" else cache_size):
        fits = f"the largest cache_size that fits is {largest}" if largest >= sizes.top_k else "no cache fits"
        raise CapacityError(
            "the device has too little memory for this cache", found=f"{gb(device_bytes)} free for experts",
            expected=f"{gb(max(sizes.top_k, 0 if cache_size == 'auto' else cache_size) * len(sizes.layers) * sizes.expert_bytes)}",
            hint=f"{fits}; fewer bits per expert or a shorter context_length make room",
        )  # fmt: skip


def _resident(sizes: Sizes, n: int) -> dict[int, tuple[int, ...]]:
    """The first n experts, layer by layer: no earlier layer can predict what the first ones need."""
    return {
        layer: tuple(range(min(max(n - i * sizes.n_experts, 0), sizes.n_experts)))
        for i, layer in enumerate(sizes.layers)
    }


def _slots(sizes: Sizes, n_resident: int, room: int, wanted: int) -> dict[int, int] | None:
    """Slots per layer, as even as can be, at most `wanted` experts of a layer on the device; None if they do not fit."""
    resident = _resident(sizes, n_resident)
    most = {
        layer: min(
            max(wanted - len(of), min(sizes.top_k, sizes.n_experts - len(of))), sizes.n_experts - len(of)
        )
        for layer, of in resident.items()
    }
    least = {layer: min(sizes.top_k, n) for layer, n in most.items()}
    left = room - n_resident - sum(least.values())
    if left < 0:
        return None
    slots = dict(least)
    while left > 0 and (growing := [layer for layer in slots if slots[layer] < most[layer]]):
        fewest = min(slots[layer] for layer in growing)
        for layer in [layer for layer in growing if slots[layer] == fewest][:left]:
            slots[layer] += 1
            left -= 1
    return slots


def _plan(
    sizes: Sizes, n_resident: int, slots: dict[int, int], store: str | None, reasons: list[str]
) -> Plan:
    slots = {layer: slots.get(layer, 0) for layer in sizes.layers}
    return Plan(sizes, slots, _resident(sizes, n_resident), store, tuple(reasons))
