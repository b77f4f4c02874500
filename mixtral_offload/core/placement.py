"""What lives where: from free memory on device and host to slots per layer, with a reason for each choice.

Sizes and counts only: no tensors, no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixtral_offload.errors import CapacityError, OptionError
from mixtral_offload.units import gb

#: measured by benchmarks/in_place.py
READ_INTO_SLOTS = "experts on disk are read into slots: from a mapping of the file, new ones come slower"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that a plan depends on.

    Attributes:
        layers: Numbers of the MoE layers.
        n_experts: Per layer.
        top_k: Experts per token and layer.
        expert_bytes: Per expert.
    """

    layers: Sequence[int]
    n_experts: int
    top_k: int
    expert_bytes: int

    @property
    def total(self) -> int:
        """Experts of the model."""
        return len(self.layers) * self.n_experts


@dataclass(frozen=True)
class Plan:
    """slots: layer -> cache slots. resident: layer -> experts permanently on the device. store: where all
    other experts are, "ram", "disk", or None where every expert is resident. reasons: one sentence for each
    choice."""

    sizes: Sizes
    slots: dict[int, int]
    resident: dict[int, tuple[int, ...]]
    store: str | None
    reasons: tuple[str, ...]

    @property
    def n_resident(self) -> int:
        """Experts permanently on the device."""
        return sum(map(len, self.resident.values()))

    @property
    def n_stored(self) -> int:
        """Experts in the store."""
        return self.sizes.total - self.n_resident

    @property
    def device_bytes(self) -> int:
        """Device memory of resident experts and slots."""
        return (self.n_resident + sum(self.slots.values())) * self.sizes.expert_bytes

    @property
    def ram_bytes(self) -> int:
        """RAM of the store."""
        return self.n_stored * self.sizes.expert_bytes if self.store == "ram" else 0

    def __str__(self) -> str:
        where = {"ram": "in RAM", "disk": "on disk", None: ""}[self.store]
        stored = f", {self.n_stored} {where}" if self.store else ""
        counts = sorted(set(self.slots.values()) - {0})
        ends = "-".join(map(str, (counts[0], counts[-1])[: len(counts)])) if counts else ""
        slots = f", {ends} cache slots per layer" if counts else ""
        experts = f"{self.sizes.total} experts of {gb(self.sizes.expert_bytes)}"
        head = f"{experts}: {self.n_resident} resident{stored}{slots}"
        memory = f"device {gb(self.device_bytes)}, RAM {gb(self.ram_bytes)}"
        return "\n".join([f"{head} ({memory})", *(f"  - {reason}" for reason in self.reasons)])


def make_plan(
    sizes: Sizes,
    device_bytes: int,
    ram_bytes: int,
    *,
    cache_size: int | str | Sequence[int] = "auto",
    store: str = "auto",
    shared_memory: bool = False,
    why: str = "as asked",
) -> Plan:
    """Make the plan that keeps most experts on the device.

    Args:
        device_bytes: Device memory that is free for experts.
        ram_bytes: RAM that is free for experts.
        cache_size: Experts of a layer on the device: one number, one for each layer, or "auto" for all that
            fit.
        store: Where the other experts are: "ram", "disk" or "auto".
        shared_memory: The device is the CPU, and the two budgets are one.
        why: The reason for a given cache_size.

    Raises:
        CapacityError: If this does not fit; it names the largest cache that does.
        OptionError: For unknown values.
    """
    room = min(device_bytes // sizes.expert_bytes, sizes.total)
    if isinstance(cache_size, Sequence) and not isinstance(cache_size, str):
        return _plan_by_layer(sizes, device_bytes, ram_bytes, list(cache_size), store, shared_memory, why)
    wanted = _check(sizes, cache_size, store, room // len(sizes.layers), device_bytes)
    if cache_size == sizes.n_experts or (cache_size == "auto" and room == sizes.total):
        reason = f"all {sizes.total} experts fit on the device: none is ever copied"
        return _plan(sizes, sizes.total, {}, None, [reason])
    reason = f"cache of {wanted} of {sizes.n_experts} experts per layer: {why}"
    if cache_size == "auto":
        held = f"all that {gb(device_bytes)} of device memory holds"
        reason = f"cache of {room} experts over {len(sizes.layers)} layers: {held}"
    slots = _slots(sizes, 0, room, wanted)
    assert slots is not None  # _check: each layer has room for top_k
    if store == "disk":
        return _plan(sizes, 0, slots, "disk", [reason, *_why_on_disk("as asked", shared_memory)])
    must_stay = 0
    if shared_memory:
        ram_bytes = device_bytes - sum(slots.values()) * sizes.expert_bytes
    else:
        must_stay = max(0, sizes.total - ram_bytes // sizes.expert_bytes)
    fits = must_stay > 0 or sizes.total * sizes.expert_bytes <= ram_bytes
    if fits and (with_residents := _slots(sizes, must_stay, room, wanted)) is not None:
        return _in_ram(sizes, must_stay, with_residents, ram_bytes, [reason])
    return _on_disk(sizes, slots, device_bytes, ram_bytes, store, shared_memory, [reason])


def _in_ram(sizes: Sizes, must_stay: int, slots: dict[int, int], ram_bytes: int, reasons: list[str]) -> Plan:
    stored = sizes.total - must_stay
    if must_stay:
        held = f"{gb(ram_bytes)} of RAM holds {stored} of {sizes.total}"
        reasons = [*reasons, f"{must_stay} experts are resident: {held}"]
    if not stored:
        return _plan(sizes, must_stay, {}, None, reasons)
    held = f"the other experts are in RAM: {gb(stored * sizes.expert_bytes)} of {gb(ram_bytes)} free"
    return _plan(sizes, must_stay, slots, "ram", [*reasons, held])


def _on_disk(
    sizes: Sizes,
    slots: dict[int, int],
    device_bytes: int,
    ram_bytes: int,
    store: str,
    shared_memory: bool,
    reasons: list[str],
) -> Plan:
    """The plan if RAM is too small; raise CapacityError if RAM is required."""
    if store == "ram":
        raise CapacityError(
            "RAM cannot hold the experts that do not fit on the device",
            expected=gb(sizes.total * sizes.expert_bytes),
            found=f"{gb(ram_bytes)} of RAM, {gb(device_bytes)} on the device",
            hint='use store="disk" or store="auto"',
        )
    which = "in addition to the cache" if shared_memory else "that do not fit on the device"
    reason = f"{gb(ram_bytes)} of RAM cannot hold the experts {which}"
    return _plan(sizes, 0, slots, "disk", reasons + _why_on_disk(reason, shared_memory))


def _why_on_disk(reason: str, shared_memory: bool) -> list[str]:
    in_slots = [READ_INTO_SLOTS] if shared_memory else []
    return [f"the other experts are on disk: {reason}", *in_slots]


def _plan_by_layer(
    sizes: Sizes,
    device_bytes: int,
    ram_bytes: int,
    wanted: list[int],
    store: str,
    shared_memory: bool,
    why: str,
) -> Plan:
    """One cache size for each layer, such as `replay.best_allocation` finds."""
    if len(wanted) != len(sizes.layers) or not all(type(n) is int for n in wanted):
        expected = f"{len(sizes.layers)} numbers, one for each layer"
        raise OptionError("unknown cache_size", expected=expected, found=wanted)
    for n in wanted:
        _check(sizes, n, store, sizes.n_experts, device_bytes)
    used = sum(wanted) * sizes.expert_bytes
    if used > device_bytes:
        raise CapacityError(
            "the device has too little memory for this cache",
            found=f"{gb(device_bytes)} free for experts",
            expected=gb(used),
            hint=f"{device_bytes // sizes.expert_bytes} experts fit in all",
        )
    ram_bytes = device_bytes - used if shared_memory else ram_bytes
    reasons = [f"cache of {sum(wanted)} experts, by layer {wanted}: {why}"]
    slots = dict(zip(sizes.layers, wanted))
    if store == "disk":
        return _plan(sizes, 0, slots, "disk", reasons + _why_on_disk("as asked", shared_memory))
    if sizes.total * sizes.expert_bytes <= ram_bytes:
        return _in_ram(sizes, 0, slots, ram_bytes, reasons)
    return _on_disk(sizes, slots, device_bytes, ram_bytes, store, shared_memory, reasons)


def _check(sizes: Sizes, cache_size: int | str, store: str, largest: int, device_bytes: int) -> int:
    """Refuse impossible values; return the most experts of a layer that the cache may hold."""
    if store not in ("auto", "ram", "disk"):
        raise OptionError("unknown store", expected="auto, ram or disk", found=store)
    if cache_size == "auto":
        wanted, least = sizes.n_experts, sizes.top_k
    elif isinstance(cache_size, bool) or not isinstance(cache_size, int):
        expected = '"auto" or a number of experts per layer'
        raise OptionError("unknown cache_size", expected=expected, found=cache_size)
    else:
        wanted = least = cache_size
    if not sizes.top_k <= wanted <= sizes.n_experts:
        least_why = f"each token uses {sizes.top_k} experts of a layer"
        expected = f"{sizes.top_k} ({least_why}) to {sizes.n_experts} (all of them)"
        raise CapacityError("impossible cache_size", found=cache_size, expected=expected)
    if largest < least:
        fits = f"the largest cache_size that fits is {largest}" if largest >= sizes.top_k else "no cache fits"
        raise CapacityError(
            "the device has too little memory for this cache",
            found=f"{gb(device_bytes)} free for experts",
            expected=gb(least * len(sizes.layers) * sizes.expert_bytes),
            hint=f"{fits}; fewer bits per expert or a shorter context_length make room",
        )
    return wanted


def _resident(sizes: Sizes, n: int) -> dict[int, tuple[int, ...]]:
    """The first n experts, layer by layer: no earlier layer can predict what the first ones need."""
    return {
        layer: tuple(range(min(max(n - i * sizes.n_experts, 0), sizes.n_experts)))
        for i, layer in enumerate(sizes.layers)
    }


def _slots(sizes: Sizes, n_resident: int, room: int, wanted: int) -> dict[int, int] | None:
    """Even slots per layer for at most `wanted` experts of a layer on the device; None if they do not fit."""
    most = {}
    for layer, resident in _resident(sizes, n_resident).items():
        others = sizes.n_experts - len(resident)
        most[layer] = min(max(wanted - len(resident), sizes.top_k), others)
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
