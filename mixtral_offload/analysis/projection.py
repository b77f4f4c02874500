"""Projected speed of a plan: device costs from bytes and rates, and a timed replay with them.

Knows no configurations. A projection is no measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixtral_offload.analysis.synthetic import as_prompt, with_plan
from mixtral_offload.analysis.timed_replay import timed_replay
from mixtral_offload.core.costs import DeviceCosts
from mixtral_offload.core.misses import COPY
from mixtral_offload.core.placement import Plan
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import OptionError
from mixtral_offload.models.sizes import ModelSizes

#: share of the device's bandwidth that reading packed weights one token at a time gets; assumed, not measured
BANDWIDTH_SHARE = 0.5
#: fp16 operations of a GPU while it moves one byte, the limit of a prompt: T4 203, A100 201, RTX 4090 164,
#: RTX 3060 142
OPERATIONS_PER_BYTE = 140
#: the host's own time for one layer (Python, about 50 kernel launches): a layer of the shipped model, which
#: is little else, takes about 1 ms on 2 CPU cores
HOST_S = 1e-3
#: what each further token adds to an expert's time on the CPU, as a share of the first one's: 0.30, 0.38 and
#: 0.36 at 2, 3 and 4 bits (128 tokens and one, benchmarks/results/kernels-avx2.json; two AVX2 cores)
CPU_TOKEN_SHARE = 0.35
PROMPT_TOKENS = 500


@dataclass(frozen=True)
class Projection:
    """What a plan would do with this trace, its caches filled.

    Attributes:
        hit_rate: Of the expert uses.
        compute_s: The compute in time_per_token_s.
        misses_per_token: Experts that are copied, predicted or not, or computed by the CPU.
        computed_per_token: Of these, experts that the CPU computes.
        link_use: Share of the whole replay in which the link is busy.
        over_floor: Time per token over the larger of its compute and its needed copies.
        first_token_s: Of a prompt of PROMPT_TOKENS, with an empty cache.
        disk: Whether copies come from a disk.
    """

    costs: DeviceCosts
    hit_rate: float
    time_per_token_s: float
    compute_s: float
    misses_per_token: float
    computed_per_token: float
    link_use: float
    over_floor: float
    first_token_s: float
    disk: bool

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed of one sequence."""
        return 1 / self.time_per_token_s


def project(
    sizes: ModelSizes,
    plan: Plan,
    trace: RoutingTrace,
    *,
    link_bytes_per_s: float,
    bandwidth_bytes_per_s: float,
    host_s: float = HOST_S,
    context: int = 4096,
    prefetch: int = 0,
    look_ahead: int = 1,
    disk_bytes_per_s: float | None = None,
    misses: str = COPY,
    cpu_bytes_per_s: float = 0.0,
) -> Projection:
    """Project the speed of a plan.

    Args:
        trace: Of single tokens; its first half fills the cache and is not counted.
        link_bytes_per_s: From the store to the device.
        bandwidth_bytes_per_s: Of the device's memory.
        host_s: The host's own seconds for a layer.
        context: Tokens in the KV cache.
        prefetch, look_ahead: As for `timed_replay`.
        disk_bytes_per_s: Limits copies where the plan's store is on disk.
        misses: As in `OffloadOptions`.
        cpu_bytes_per_s: Packed bytes of experts that the CPU's kernels read for one token, where it computes
            misses (`benchmarks/products.py` measures it).

    Raises:
        OptionError: A rate is not more than 0, or the trace is of another model.
    """
    if (trace.n_layers, trace.n_experts, trace.top_k) != (len(sizes.layers), sizes.n_experts, sizes.top_k):
        expected = _shape(len(sizes.layers), sizes.n_experts, sizes.top_k)
        found = _shape(trace.n_layers, trace.n_experts, trace.top_k)
        raise OptionError("the trace is of another model", expected=expected, found=found)
    on_disk = plan.store == "disk"
    rates = {"link": link_bytes_per_s, "bandwidth": bandwidth_bytes_per_s}
    if on_disk and disk_bytes_per_s is not None:
        rates["disk"] = disk_bytes_per_s
    for name, rate in rates.items():
        if not rate > 0:
            raise OptionError(f"impossible {name}", expected="more than 0 bytes per second", found=rate)
    link = min(rate for name, rate in rates.items() if name != "bandwidth")
    costs = estimate_costs(sizes, link, bandwidth_bytes_per_s, host_s, context, cpu_bytes_per_s)
    trace = with_plan(trace, plan)
    timed = timed_replay(
        trace, costs, prefetch=prefetch if plan.store else 0, look_ahead=look_ahead, misses=misses
    )
    warm = timed.decoding & (np.arange(trace.n_passes) >= trace.n_passes // 2)
    if not warm.any():
        what = "the trace has no tokens that were generated one by one"
        raise OptionError(what, found=f"{trace.n_passes} passes")
    n_missed = float(timed.pass_misses[warm].mean())
    n_computed = float(timed.pass_computed[warm].mean())
    time_s, compute_s = float(timed.pass_s[warm].mean()), float(timed.pass_compute_s[warm].mean())
    return Projection(
        costs=costs,
        hit_rate=1 - n_missed / (trace.n_layers * trace.top_k),
        time_per_token_s=time_s,
        compute_s=compute_s,
        misses_per_token=n_missed,
        computed_per_token=n_computed,
        link_use=timed.link_use,
        over_floor=time_s / max(compute_s, (n_missed - n_computed) * costs.copy_s),
        first_token_s=_first_token_s(trace, costs, misses),
        disk=on_disk,
    )


def _shape(n_layers: int, n_experts: int, top_k: int) -> str:
    return f"{n_layers} layers x {n_experts} experts, {top_k} per token"


def estimate_costs(
    sizes: ModelSizes, link: float, bandwidth: float, host_s: float, context: int, cpu: float = 0.0
) -> DeviceCosts:
    """Estimate the costs of one token: all bytes that it reads, at a share of the bandwidth.

    Layers without experts count with the others. In a prompt, each further token of a layer or of an expert
    adds its arithmetic.

    Args:
        link, bandwidth: Bytes per second.
        host_s: The host's own seconds for a layer.
        context: Tokens in the KV cache.
        cpu: Packed bytes of experts per second that the CPU's kernels read; 0: it computes none.
    """
    rate, n_layers = BANDWIDTH_SHARE * bandwidth, len(sizes.layers)
    operations = OPERATIONS_PER_BYTE * rate
    dense = sizes.attention, sizes.linear
    in_layers = sum(n * k * times for of in dense for (n, k), times in of.items()) / n_layers
    return DeviceCosts(
        copy_s=sizes.expert_bytes / link,
        attention_s=(sizes.layer_bytes + sizes.kv_bytes(context)) / n_layers / rate,
        expert_s=sizes.expert_bytes / rate,
        token_s=sizes.item * (sizes.head or sizes.embedding) / rate,
        prompt_attention_s=2 * in_layers / operations,
        prompt_expert_s=2 * sizes.expert_parameters / operations,
        host_s=host_s,
        cpu_expert_s=sizes.expert_bytes / cpu if cpu else 0.0,
        prompt_cpu_expert_s=CPU_TOKEN_SHARE * sizes.expert_bytes / cpu if cpu else 0.0,
    )


def _first_token_s(trace: RoutingTrace, costs: DeviceCosts, misses: str) -> float:
    """Time of a prompt of PROMPT_TOKENS, the trace's repeated, with an empty cache and no predictions."""
    prompt = as_prompt(_repeat(trace, PROMPT_TOKENS))
    return float(timed_replay(prompt, costs, misses=misses).pass_s[0])


def _repeat(trace: RoutingTrace, n: int) -> RoutingTrace:
    rows = np.resize(np.arange(trace.n_tokens), n)
    again = RoutingTrace.from_routing(trace.experts[rows], trace.weights[rows], trace.n_experts)
    again.settings.update(trace.settings)
    return again
