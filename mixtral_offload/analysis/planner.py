"""What goes where on a stated card, how fast that can be, and what would help most: for a model that is not here.

Knows how to ask: sizes from a configuration, the plan from memory, a projection from rates and routing. Copies nothing,
measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from mixtral_offload.analysis.projection import HOST_S, Projection, project
from mixtral_offload.analysis.replay import best_allocation, replay
from mixtral_offload.analysis.synthetic import CURVES, MIXTRAL_RECALL, recall_by_layer, sticky_trace
from mixtral_offload.core.placement import Plan
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import CapacityError, OptionError
from mixtral_offload.models.sizes import ModelSizes
from mixtral_offload.runtime.options import MARGIN_BYTES, CheckedOptions, plan_within, scratch_bytes
from mixtral_offload.units import check_whole, gb, listed, parse_size
from mixtral_offload.weights.hqq import PAPER

T4_BYTES_PER_S = 320e9
DISK_BYTES_PER_S = 1e9
BIT_WIDTHS = sorted(PAPER)
#: dynamic programming over layers, slots and sizes: more steps than this take longer than a minute
MOST_STEPS = 3_000_000


@dataclass(frozen=True)
class PlanRequest:
    """A model (its bit widths among its sizes), a card, and the routing to expect: a recorded trace or a curve of
    `synthetic.CURVES`. vram, ram: bytes; link, bandwidth, disk: bytes per second; host_s: the host's seconds
    for a layer; the rest as in `OffloadOptions`."""

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

    @classmethod
    def parse(cls, sizes: ModelSizes, **given) -> PlanRequest:
        """Sizes and rates may be text, like "15GB" or "12GB/s"; None is the default. Raises OptionError."""
        given = {name: value for name, value in given.items() if value is not None}
        for name in {"vram", "ram", "link", "bandwidth", "disk"} & given.keys():
            given[name] = parse_size(given[name])
            if given[name] <= 0:
                raise OptionError(f"impossible {name}", expected="more than 0, like 12GB", found=given[name])
        request = cls(sizes, **given)
        for name, least in (("prefetch", 0), ("look_ahead", 1), ("context_length", 1)):
            check_whole(name, getattr(request, name), least)
        if request.prefetch > sizes.n_experts or request.look_ahead >= len(sizes.layers):
            raise OptionError(
                "impossible predictions", found=f"prefetch {request.prefetch}, look_ahead {request.look_ahead}",
                expected=f"at most {sizes.n_experts} experts, less than {len(sizes.layers)} layers ahead",
            )  # fmt: skip
        if request.curve not in CURVES:
            raise OptionError("unknown curve", expected=", ".join(CURVES), found=request.curve)
        return request

    @property
    def context(self) -> int:
        return min(self.context_length, self.sizes.max_context)

    @property
    def needs(self) -> dict[str, int]:
        """Device bytes beside experts and guesses, by name, as `options.device_needs` has them."""
        sizes = self.sizes
        activations = scratch_bytes(self.context, sizes.item, sizes.top_k, sizes.hidden, sizes.intermediate)
        return {"dense part": sizes.dense_bytes, "KV cache": sizes.kv_bytes(self.context),
                "scratch": activations + sizes.dequantized_bytes}  # fmt: skip

    @property
    def options(self) -> CheckedOptions:
        return CheckedOptions(
            device=torch.device("cuda"), dtype=torch.float16, vram=self.vram, ram=self.ram, prefetch=self.prefetch,
            look_ahead=self.look_ahead, context_length=self.context_length,
        )  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """routing: where the expected routing and guesses come from, in words."""

    request: PlanRequest
    plan: Plan
    projection: Projection
    routing: tuple[str, ...]


def answer(request: PlanRequest) -> Answer:
    """Plan and projection. Raises CapacityError, saying what would fit."""
    plan, routing = _plan(request), []
    trace = request.trace
    if trace is None:
        trace, routing = _expected_trace(request), _curve_words(request)
    else:
        request, routing = _within_trace(request)
        plan, words = _by_layer(request, plan)
        routing += words
    projection = project(
        request.sizes, plan, trace, link_bytes_per_s=request.link, bandwidth_bytes_per_s=request.bandwidth,
        disk_bytes_per_s=request.disk, context=request.context, prefetch=request.prefetch, look_ahead=request.look_ahead,
        host_s=request.host_s,
    )  # fmt: skip
    return Answer(request, plan, projection, tuple(routing))


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
    sizes, needs = request.sizes, request.needs
    beside = {**needs, "margin": MARGIN_BYTES, "predictions": request.options.n_staging * sizes.expert_bytes,
              f"{sizes.top_k} experts per layer": sizes.top_k * len(sizes.layers) * sizes.expert_bytes}  # fmt: skip
    least = sum(beside.values())
    return CapacityError(
        f"{sizes.model_type} with {sizes.bits}-bit experts does not fit on this device", found=gb(request.vram),
        expected=f"{gb(least)}: {listed(beside)}",
        hint=f"what fits: {', or '.join([*_what_fits(request), f'--vram {-(-least // 10**8) / 10}GB'])}",
    )  # fmt: skip


def _what_fits(request: PlanRequest) -> list[str]:
    """Single options that make room enough."""

    def fits(**changed) -> bool:
        try:
            other = replace(request, **changed)
            needs = sum(other.needs.values())
            return bool(
                plan_within(other.sizes.for_plan, other.vram, other.ram, needs, other.options, "auto")
            )
        except CapacityError:
            return False

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


def _expected_trace(request: PlanRequest) -> RoutingTrace:
    """Routing of the request's curve, long enough for a cache to warm up, short enough to be played in a second."""
    sizes = request.sizes
    n_layers, k = len(sizes.layers), sizes.top_k
    n_tokens = max(48, min(max(128, 8 * sizes.n_experts // k), 100_000 // (n_layers * k)))
    numbers = n_tokens, n_layers, sizes.n_experts, k, CURVES[request.curve].stay
    return _made_up(numbers, request.prefetch, request.look_ahead)


@lru_cache(maxsize=4)
def _made_up(numbers: tuple, prefetch: int, look_ahead: int) -> RoutingTrace:
    _, n_layers, _, k, _ = numbers
    if not prefetch:
        return sticky_trace(*numbers)
    each = min(1, prefetch / k)  # where there are fewer guesses than needed experts, each is right as often
    recall = recall_by_layer(n_layers, look_ahead) * each
    return sticky_trace(*numbers, recall=recall, n_guesses=prefetch, look_aheads=look_ahead)


def _curve_words(request: PlanRequest) -> list[str]:
    curve = CURVES[request.curve]
    words = [
        f'routing like "{request.curve}": a token keeps each expert of the one before with probability '
        f"{curve.stay:.2f} ({curve.source})"
    ]
    if request.prefetch:
        *first, rest = map(str, MIXTRAL_RECALL[1:])
        words.append(
            f"{request.prefetch} guesses per layer, each right with probability {', '.join(first)} in layers 1 to "
            f"{len(first)}, then {rest} (AdapMoE's accuracies on Mixtral-8x7B)"
        )
    return words


def _within_trace(request: PlanRequest) -> tuple[PlanRequest, list[str]]:
    """The request with as many guesses as its trace has, and what was changed."""
    trace = request.trace
    words = [f"routing as recorded: {trace.n_tokens} tokens of {trace.settings.get('model', 'a model')}"]
    prefetch = min(request.prefetch, int(trace.predicted_rank.max(initial=-1)) + 1)
    look_ahead = min(
        request.look_ahead, max(1, int((trace.predicted_layer - trace.predicted_from).max(initial=0)))
    )
    if (prefetch, look_ahead) != (request.prefetch, request.look_ahead):
        words.append(f"prefetch {prefetch}, look-ahead {look_ahead}: the trace has no more guesses")
    return replace(request, prefetch=prefetch, look_ahead=look_ahead), words


def _by_layer(request: PlanRequest, plan: Plan) -> tuple[Plan, list[str]]:
    """The plan with another number of slots in each layer, where the trace says that this gives more hits."""
    trace, sizes = request.trace, request.sizes
    n_layers, n_experts = len(sizes.layers), sizes.n_experts
    if request.cache_size != "auto" or plan.store is None or trace.n_layers != n_layers:
        return plan, []
    if plan.n_resident:
        return plan, ["slots even over the layers: some experts are resident"]
    if n_layers**2 * n_experts * (n_experts - sizes.top_k) > MOST_STEPS:
        return plan, [
            "slots even over the layers: too many experts to search for the best number for each layer"
        ]
    best = best_allocation(trace, sum(plan.slots.values()))
    even, uneven = (replay(trace, slots).hit_rate for slots in (list(plan.slots.values()), best))
    if uneven <= even:
        return plan, ["slots even over the layers: the trace asks for no others"]
    why = f"{uneven:.1%} hits on the trace, {even:.1%} with even ones"
    return _plan(request, best, why), []


def knobs(request: PlanRequest) -> list[tuple[str, PlanRequest]]:
    """Changes of one thing each: (as it is written on the command line, the changed request)."""
    sizes, found = request.sizes, []
    lower = [bits for bits in BIT_WIDTHS if bits < sizes.bits]
    if lower:
        found.append((f"--bits {lower[-1]} (answers get worse)", replace(request, sizes=sizes.at(lower[-1]))))
    half = request.context // 2
    found += [(f"--context-length {half}", replace(request, context_length=half))] if half else []
    for name, more in (("vram", request.vram + 2e9), ("ram", request.ram + 4e9), ("link", 2 * request.link)):
        text = f"--{name} {more / 1e9:g}GB{'/s' if name == 'link' else ''}"
        found.append((text, replace(request, **{name: int(more)})))
    other = 0 if request.prefetch else 2
    found.append((f"--prefetch {other}", replace(request, prefetch=other)))
    if request.prefetch and request.look_ahead + 1 < len(sizes.layers):
        further = request.look_ahead + 1
        found.append((f"--look-ahead {further}", replace(request, look_ahead=further)))
    return found


def best_knobs(base: Answer, n: int = 3) -> list[tuple[str, Answer]]:
    """The n changes that gain most tokens/s, of those that gain at least 1 %; best first."""
    gained = []
    for text, request in knobs(base.request):
        try:
            changed = answer(request)
        except CapacityError:
            continue
        if changed.projection.tokens_per_s > 1.01 * base.projection.tokens_per_s:
            gained.append((text, changed))
    return sorted(gained, key=lambda pair: -pair[1].projection.tokens_per_s)[:n]
