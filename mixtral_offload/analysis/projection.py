"""How fast a plan can be: a card's times from bytes and rates, and a trace played on it.

Knows rates, sizes and the replay with a clock. Knows no configurations; what comes out is a projection, no measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixtral_offload.analysis.synthetic import as_prompt, with_plan
from mixtral_offload.analysis.timed_replay import timed_replay
from mixtral_offload.core.costs import DeviceCosts
from mixtral_offload.core.placement import Plan
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import OptionError
from mixtral_offload.models.sizes import ModelSizes

#: of the device's bandwidth that reading packed weights one token at a time gets; assumed, no costs has been measured
BANDWIDTH_SHARE = 0.5
#: fp16 operations that cards do while they move one byte: T4 203, A100 201, RTX 4090 164, RTX 3060 142; a prompt's limit
OPERATIONS_PER_BYTE = 140
#: the host's own work for one layer (Python, some fifty kernel launches): the shipped model's layer, which is little
#: else, takes about 1 ms on 2 CPU cores
HOST_S = 1e-3
PROMPT_TOKENS = 500


@dataclass(frozen=True)
class Projection:
    """What a plan would do on a costs with this trace, its caches warm.

    hit_rate: of the expert uses; misses_per_token: copies, guessed in time or not. compute_s: of
    time_per_token_s. link_use: busy share of the whole replay; over_floor: time per token over the larger of compute and
    needed copies. first_token_s: of a prompt of PROMPT_TOKENS, on a cold cache. disk: copies come from a disk.
    """

    costs: DeviceCosts
    hit_rate: float
    time_per_token_s: float
    compute_s: float
    misses_per_token: float
    link_use: float
    over_floor: float
    first_token_s: float
    disk: bool

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.time_per_token_s


def project(
    sizes: ModelSizes, plan: Plan, trace: RoutingTrace, *, link_bytes_per_s: float, bandwidth_bytes_per_s: float,
    host_s: float = HOST_S, context: int = 4096, prefetch: int = 0, look_ahead: int = 1,
    disk_bytes_per_s: float | None = None,
) -> Projection:  # fmt: skip
    """trace: of single tokens; its first half warms the cache up, and is not counted. context: tokens in the KV cache.
    disk_bytes_per_s: where experts' home is the disk, copies are no faster. Raises OptionError for rates that are not
    more than 0, or a trace of another model."""
    if (trace.n_layers, trace.n_experts, trace.top_k) != (len(sizes.layers), sizes.n_experts, sizes.top_k):
        raise OptionError(
            "the trace is of another model", expected=_shape(len(sizes.layers), sizes.n_experts, sizes.top_k),
            found=_shape(trace.n_layers, trace.n_experts, trace.top_k),
        )  # fmt: skip
    on_disk = plan.home == "disk"
    rates = {"link": link_bytes_per_s, "bandwidth": bandwidth_bytes_per_s}
    if on_disk and disk_bytes_per_s is not None:
        rates["disk"] = disk_bytes_per_s
    for name, rate in rates.items():
        if not rate > 0:
            raise OptionError(f"impossible {name}", expected="more than 0 bytes per second", found=rate)
    link = min(rate for name, rate in rates.items() if name != "bandwidth")
    costs = estimate_costs(sizes, link, bandwidth_bytes_per_s, host_s, context)
    trace = with_plan(trace, plan)
    played = timed_replay(trace, costs, prefetch=prefetch if plan.home else 0, look_ahead=look_ahead)
    warm = played.decoding & (np.arange(trace.n_passes) >= trace.n_passes // 2)
    if not warm.any():
        raise OptionError(
            "the trace has no tokens that were generated one by one", found=f"{trace.n_passes} passes"
        )
    misses = float(played.pass_misses[warm].mean())
    time_s, compute_s = float(played.pass_s[warm].mean()), float(played.pass_compute_s[warm].mean())
    return Projection(
        costs, 1 - misses / (trace.n_layers * trace.top_k), time_s, compute_s, misses, played.link_use,
        time_s / max(compute_s, misses * costs.copy_s), _first_token_s(trace, costs), on_disk,
    )  # fmt: skip


def _shape(n_layers: int, n_experts: int, top_k: int) -> str:
    return f"{n_layers} layers x {n_experts} experts, {top_k} per token"


def estimate_costs(
    sizes: ModelSizes, link: float, bandwidth: float, host_s: float, context: int
) -> DeviceCosts:
    """Times of one token: all bytes that it reads, at a share of the bandwidth; layers without experts count with the
    others. Of a prompt, each further token of an expert or layer adds its arithmetic. link, bandwidth: bytes/s."""
    rate, n_layers = BANDWIDTH_SHARE * bandwidth, len(sizes.layers)
    operations = OPERATIONS_PER_BYTE * rate
    beside = sizes.attention, sizes.linear
    in_layers = sum(n * k * times for of in beside for (n, k), times in of.items()) / n_layers
    return DeviceCosts(
        copy_s=sizes.expert_bytes / link,
        attention_s=(sizes.layer_bytes + sizes.kv_bytes(context)) / n_layers / rate,
        expert_s=sizes.expert_bytes / rate,
        token_s=sizes.item * (sizes.head or sizes.embedding) / rate,
        prompt_attention_s=2 * in_layers / operations,
        prompt_expert_s=2 * sizes.expert_parameters / operations,
        host_s=host_s,
    )


def _first_token_s(trace: RoutingTrace, costs: DeviceCosts) -> float:
    """A prompt of the trace's tokens, again and again until it has PROMPT_TOKENS: on a cold cache, without guesses."""
    return float(timed_replay(as_prompt(_repeat(trace, PROMPT_TOKENS)), costs).pass_s[0])


def _repeat(trace: RoutingTrace, n: int) -> RoutingTrace:
    rows = np.resize(np.arange(trace.n_tokens), n)
    again = RoutingTrace.from_routing(trace.experts[rows], trace.weights[rows], trace.n_experts)
    again.settings.update(trace.settings)
    return again
