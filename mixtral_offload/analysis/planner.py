"""Plan for a stated device, its projected speed and the options that help most, from a configuration alone.

Copies nothing, measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from mixtral_offload.analysis.projection import HOST_S, Projection, project
from mixtral_offload.analysis.replay import best_allocation, replay
from mixtral_offload.analysis.synthetic import CURVES, MIXTRAL_RECALL, recall_by_layer, sticky_trace
from mixtral_offload.core.misses import AUTO, COPY, MISSES
from mixtral_offload.core.placement import Plan
from mixtral_offload.core.policies import check_predictions
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import CapacityError, OptionError
from mixtral_offload.models.sizes import ModelSizes
from mixtral_offload.runtime.options import MARGIN_BYTES, CheckedOptions, plan_within, scratch_bytes
from mixtral_offload.units import check_whole, gb, listed, parse_size
from mixtral_offload.weights.hqq import PAPER

T4_BYTES_PER_S = 320e9
DISK_BYTES_PER_S = 1e9
BIT_WIDTHS = sorted(PAPER)
#: of `best_allocation`: more steps than this take longer than a minute
MOST_STEPS = 3_000_000


@dataclass(frozen=True)
class PlanRequest:
    """A model, a device, and the routing to expect.

    Attributes:
        sizes: Of the model, with its bit widths.
        vram, ram: Bytes.
        link: Bytes per second from the store to the device.
        bandwidth: Of the device's memory, bytes per second.
        disk: Bytes per second.
        context_length, cache_size, prefetch, look_ahead: As in `OffloadOptions`.
        curve: Expected routing, of `synthetic.CURVES`.
        trace: Expected routing, recorded; it goes before the curve.
        host_s: Seconds of the host for a layer.
        misses: As in `OffloadOptions`.
        cpu: Bytes of packed experts per second that the CPU's kernels read; 0: it computes none.
    """

    sizes: ModelSizes
    vram: int
    ram: int
    link: int
    bandwidth: float = T4_BYTES_PER_S
    disk: float = DISK_BYTES_PER_S
    context_length: int = 4096
    cache_size: int | str = "auto"
    prefetch: int = 2
    look_ahead: int = 1
    curve: str = "mixtral"
    trace: RoutingTrace | None = None
    host_s: float = HOST_S
    misses: str = COPY
    cpu: int = 0

    @classmethod
    def parse(cls, sizes: ModelSizes, **given: Any) -> PlanRequest:
        """Make a request of options as a user gives them.

        Args:
            given: By name. Sizes and rates may be text, like "15GB" or "12GB/s"; None is the default.

        Raises:
            OptionError: For impossible values.
        """
        given = {name: value for name, value in given.items() if value is not None}
        for name in {"vram", "ram", "link", "bandwidth", "disk", "cpu"} & given.keys():
            given[name] = parse_size(given[name])
            if given[name] <= 0:
                raise OptionError(f"impossible {name}", expected="more than 0, like 12GB", found=given[name])
        request = cls(sizes, **given)
        for name, least in (("prefetch", 0), ("look_ahead", 1), ("context_length", 1)):
            check_whole(name, getattr(request, name), least)
        check_predictions(request.prefetch, request.look_ahead, sizes.n_experts, len(sizes.layers))
        if request.misses not in MISSES or (request.misses != COPY and not request.cpu):
            raise OptionError(
                "impossible misses",
                expected=f"{', '.join(MISSES)}; and for cpu and auto the CPU's rate",
                found=f"misses={request.misses!r}, cpu={request.cpu}",
                hint="--cpu 8GB/s: packed bytes per second, as benchmarks/products.py measures them",
            )
        if request.curve not in CURVES:
            raise OptionError("unknown curve", expected=", ".join(CURVES), found=request.curve)
        return request

    @property
    def context(self) -> int:
        """Tokens of context, as far as the model goes."""
        return min(self.context_length, self.sizes.max_context)

    @property
    def needs(self) -> dict[str, int]:
        """Device bytes of all but experts and predictions, by name, as in `options.device_needs`."""
        sizes = self.sizes
        activations = scratch_bytes(self.context, sizes.item, sizes.top_k, sizes.hidden, sizes.intermediate)
        return {
            "dense part": sizes.dense_bytes,
            "KV cache": sizes.kv_bytes(self.context),
            "scratch": activations + sizes.dequantized_bytes,
        }

    @property
    def options(self) -> CheckedOptions:
        """The same as checked options of `from_pretrained`."""
        return CheckedOptions(
            device=torch.device("cuda"),
            dtype=torch.float16,
            vram=self.vram,
            ram=self.ram,
            prefetch=self.prefetch,
            look_ahead=self.look_ahead,
            context_length=self.context_length,
        )


@dataclass(frozen=True)
class PlanAnswer:
    """What comes of a request.

    Attributes:
        request: With no more predictions than its trace has.
        routing: Where the expected routing and predictions come from, in words.
    """

    request: PlanRequest
    plan: Plan
    projection: Projection
    routing: tuple[str, ...]


def answer(request: PlanRequest) -> PlanAnswer:
    """Compute plan and projection.

    Raises:
        CapacityError: It does not fit; the error says what would.
    """
    plan, trace = _plan(request), request.trace
    if plan.store == "disk" and request.misses != COPY:
        raise CapacityError(
            f"misses={request.misses!r} needs the experts in RAM",
            found="; ".join(plan.reasons),
            hint="more --ram, fewer --bits, or --misses copy",
        )
    if trace is None:
        trace, routing = expected_trace(request), _curve_words(request)
    else:
        request, routing = _within_trace(request, trace)
        plan, words = _by_layer(request, plan, trace)
        routing += words
    projection = project(
        request.sizes,
        plan,
        trace,
        link_bytes_per_s=request.link,
        bandwidth_bytes_per_s=request.bandwidth,
        disk_bytes_per_s=request.disk,
        context=request.context,
        prefetch=request.prefetch,
        look_ahead=request.look_ahead,
        host_s=request.host_s,
        misses=request.misses,
        cpu_bytes_per_s=request.cpu,
    )
    return PlanAnswer(request, plan, projection, tuple(routing))


def _plan(
    request: PlanRequest, cache_size: int | str | Sequence[int] | None = None, why: str = "as asked"
) -> Plan:
    needs, sizes = sum(request.needs.values()), request.sizes
    cache_size = request.cache_size if cache_size is None else cache_size
    try:
        return plan_within(sizes.for_plan, request.vram, request.ram, needs, request.options, cache_size, why)
    except CapacityError as error:
        if cache_size != "auto":  # its message names the largest one that fits
            raise
        raise _too_small(request) from error


def _too_small(request: PlanRequest) -> CapacityError:
    sizes, expert_bytes = request.sizes, request.sizes.expert_bytes
    parts = {
        **request.needs,
        "margin": MARGIN_BYTES,
        "predictions": request.options.n_staging * expert_bytes,
        f"{sizes.top_k} experts per layer": sizes.top_k * len(sizes.layers) * expert_bytes,
    }
    least = sum(parts.values())
    return CapacityError(
        f"{sizes.model_type} with {sizes.bits}-bit experts does not fit on this device",
        expected=f"{gb(least)}: {listed(parts)}",
        found=gb(request.vram),
        hint=f"what fits: {', or '.join([*_what_fits(request), f'--vram {-(-least // 10**8) / 10}GB'])}",
    )


def _what_fits(request: PlanRequest) -> list[str]:
    """Single options that make enough room."""

    def fits(**changed: Any) -> bool:
        other = replace(request, **changed)
        needs = sum(other.needs.values())
        try:
            plan_within(other.sizes.for_plan, other.vram, other.ram, needs, other.options, "auto")
        except CapacityError:
            return False
        return True

    found = []
    for bits in (b for b in reversed(BIT_WIDTHS) if b < request.sizes.bits):
        if fits(sizes=request.sizes.at(bits)):
            found.append(f"--bits {bits}")
            break
    context = request.context // 2
    while context >= 256 and not fits(context_length=context):
        context //= 2
    if context >= 256:
        found.append(f"--context-length {context}")
    return [*found, "--prefetch 0"] if request.prefetch and fits(prefetch=0) else found


def expected_trace(request: PlanRequest) -> RoutingTrace:
    """Make routing of the request's curve, long enough to fill a cache, and replayed in a second."""
    sizes = request.sizes
    n_layers, k = len(sizes.layers), sizes.top_k
    n_tokens = max(48, min(max(128, 8 * sizes.n_experts // k), 100_000 // (n_layers * k)))
    numbers = n_tokens, n_layers, sizes.n_experts, k, CURVES[request.curve].stay
    return _synthetic_trace(numbers, request.prefetch, request.look_ahead)


@lru_cache(maxsize=4)
def _synthetic_trace(
    numbers: tuple[int, int, int, int, float], prefetch: int, look_ahead: int
) -> RoutingTrace:
    _, n_layers, _, k, _ = numbers
    if not prefetch:
        return sticky_trace(*numbers)
    each = min(
        1, prefetch / k
    )  # where there are fewer predictions than needed experts, each is right as often
    recall = recall_by_layer(n_layers, look_ahead) * each
    return sticky_trace(*numbers, recall=recall, n_predictions=prefetch, look_aheads=look_ahead)


def _curve_words(request: PlanRequest) -> list[str]:
    curve = CURVES[request.curve]
    words = [
        f'routing like "{request.curve}": a token keeps each expert of the one before with probability '
        f"{curve.stay:.2f} ({curve.source})"
    ]
    if request.prefetch:
        *first, rest = map(str, MIXTRAL_RECALL[1:])
        words.append(
            f"{request.prefetch} predictions per layer, each right with probability {', '.join(first)} in "
            f"layers 1 to {len(first)}, then {rest} (AdapMoE's accuracies on Mixtral-8x7B)"
        )
    return words


def _within_trace(request: PlanRequest, trace: RoutingTrace) -> tuple[PlanRequest, list[str]]:
    """The request with no more predictions than its trace has, and what was changed."""
    words = [f"routing as recorded: {trace.n_tokens} tokens of {trace.settings.get('model', 'a model')}"]
    prefetch = min(request.prefetch, int(trace.predicted_rank.max(initial=-1)) + 1)
    farthest = int((trace.predicted_layer - trace.predicted_from).max(initial=1))
    look_ahead = min(request.look_ahead, farthest)
    if (prefetch, look_ahead) != (request.prefetch, request.look_ahead):
        words.append(f"prefetch {prefetch}, look-ahead {look_ahead}: the trace has no more predictions")
    return replace(request, prefetch=prefetch, look_ahead=look_ahead), words


def _by_layer(request: PlanRequest, plan: Plan, trace: RoutingTrace) -> tuple[Plan, list[str]]:
    """The plan with other numbers of slots, if these give more hits on the trace; and why not."""
    sizes = request.sizes
    n_layers, n_experts = len(sizes.layers), sizes.n_experts
    if request.cache_size != "auto" or plan.store is None or trace.n_layers != n_layers:
        return plan, []
    if plan.n_resident:
        return plan, ["equal slots in all layers: some experts are resident"]
    if n_layers**2 * n_experts * (n_experts - sizes.top_k) > MOST_STEPS:
        return plan, ["equal slots in all layers: too many experts to search for the best number of each"]
    best = best_allocation(trace, sum(plan.slots.values()))
    even, uneven = (replay(trace, slots).hit_rate for slots in (list(plan.slots.values()), best))
    if uneven <= even:
        return plan, ["equal slots in all layers: no other numbers give more hits on the trace"]
    why = f"{uneven:.1%} hits on the trace, {even:.1%} with equal ones"
    return _plan(request, best, why), []


def knobs(request: PlanRequest) -> list[tuple[str, PlanRequest]]:
    """List changes of one option each: (as it is written on the command line, the changed request)."""
    sizes = request.sizes
    found: list[tuple[str, PlanRequest]] = []
    lower = [bits for bits in BIT_WIDTHS if bits < sizes.bits]
    if lower:
        found.append((f"--bits {lower[-1]} (answers get worse)", replace(request, sizes=sizes.at(lower[-1]))))
    half = request.context // 2
    found += [(f"--context-length {half}", replace(request, context_length=half))] if half else []
    vram, ram, link = request.vram + 2 * 10**9, request.ram + 4 * 10**9, 2 * request.link
    found += [
        (f"--vram {vram / 1e9:g}GB", replace(request, vram=vram)),
        (f"--ram {ram / 1e9:g}GB", replace(request, ram=ram)),
        (f"--link {link / 1e9:g}GB/s", replace(request, link=link)),
    ]
    other = 0 if request.prefetch else 2
    found.append((f"--prefetch {other}", replace(request, prefetch=other)))
    if request.cpu and request.misses != AUTO:
        found.append(("--misses auto", replace(request, misses=AUTO)))
    if request.prefetch and request.look_ahead + 1 < len(sizes.layers):
        further = request.look_ahead + 1
        found.append((f"--look-ahead {further}", replace(request, look_ahead=further)))
    return found


def best_knobs(base: PlanAnswer, n: int = 3) -> list[tuple[str, PlanAnswer]]:
    """Return the n changes that gain most tokens/s, of those that gain at least 1 %; best first."""
    gained = []
    for text, request in knobs(base.request):
        try:
            changed = answer(request)
        except CapacityError:
            continue
        if changed.projection.tokens_per_s > 1.01 * base.projection.tokens_per_s:
            gained.append((text, changed))
    return sorted(gained, key=lambda pair: -pair[1].projection.tokens_per_s)[:n]
