"""Reports on a checkpoint that is here (`inspect`) and on a model for another device (`plan`).

Reads headers and configurations, never weights. The numbers are computed elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from mixtral_offload.analysis.planner import PlanAnswer, PlanRequest, answer, best_knobs
from mixtral_offload.analysis.projection import BANDWIDTH_SHARE, PROMPT_TOKENS, Projection
from mixtral_offload.core.misses import COPY
from mixtral_offload.core.options import OffloadOptions
from mixtral_offload.core.placement import Plan
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import CapacityError, CheckpointError, DownloadError
from mixtral_offload.models.checkpoint import Checkpoint, load_config, open_checkpoint
from mixtral_offload.models.sizes import model_sizes
from mixtral_offload.runtime.options import MARGIN_BYTES, dense_bytes, for_checkpoint, parse_options, plan_for
from mixtral_offload.units import gb, listed
from mixtral_offload.weights.hub import DownloadPlan, fetch_file, plan_download
from mixtral_offload.weights.source import local_folder, resolve


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds and needs, and whether it fits here; `str` of it is a report.

    Attributes:
        options: For the plan.
        download: What is to be fetched first; None if the checkpoint is here.
        checkpoint: None if it is not here.
        plan: What would go where; None where it does not fit.
        refusal: Why it does not fit.
    """

    options: OffloadOptions
    download: DownloadPlan | None = None
    checkpoint: Checkpoint | None = None
    plan: Plan | None = None
    refusal: CapacityError | None = None

    def __str__(self) -> str:
        if self.checkpoint is None:
            of = self.download
            assert of is not None  # `inspect` sets one of the two
            return (
                f"{of.repo_id}: {len(of.files)} files, {gb(of.total_bytes)}; "
                f"{gb(of.remaining_bytes)} not here yet\n"
                f"disk: {gb(of.free_bytes)} free in {of.folder}\n"
                f"next step: mixtral-offload download {of.repo_id}"
            )
        fits = "does not fit" if self.plan is None else "fits"
        fit = [f"{fits} here, on {self.options.device}:", str(self.plan or self.refusal)]
        return "\n".join([*_contents(self.checkpoint), "", *_needs(self.checkpoint, self.options), "", *fit])


def inspect(source: str | Path | None = "demo", *, revision: str | None = None, **options: Any) -> Inspection:
    """Inspect what a checkpoint holds and needs, and whether it fits here. Downloads no weights.

    Args:
        source: A folder, a hub repository, or "demo" for the small model that ships with the package.
        revision: Branch, tag or commit of a hub repository.
        options: As `from_pretrained` takes them.

    Raises:
        OffloadError: There is no such model, or an option is impossible.
    """
    parsed = parse_options(options)
    folder = local_folder(source)
    if folder is None:
        try:
            download = plan_download(str(source), revision=revision)
        except DownloadError:
            download = None  # `resolve` reports it, unless a complete copy is here
        if download and download.remaining_bytes:
            return Inspection(parsed, download)
        folder = resolve(source, revision=revision)
    checkpoint = open_checkpoint(folder)
    try:
        return Inspection(
            parsed, checkpoint=checkpoint, plan=plan_for(checkpoint, for_checkpoint(parsed, checkpoint))
        )
    except CapacityError as error:
        return Inspection(parsed, checkpoint=checkpoint, refusal=error)


@dataclass(frozen=True)
class PlanReport:
    """A plan for a stated device, its projected speed, and what would help; `str` of it is a report.

    Attributes:
        answer: The request, the plan, the projection and the expected routing.
        improvements: The single changes that gain most: (as it is written on the command line, what comes of
            it).
    """

    answer: PlanAnswer
    improvements: list[tuple[str, PlanAnswer]]

    @property
    def plan(self) -> Plan:
        return self.answer.plan

    @property
    def projection(self) -> Projection:
        return self.answer.projection

    def __str__(self) -> str:
        base = self.answer
        parts = _model(base), _plan(base), _speed(base), _help(base, self.improvements)
        return "\n\n".join("\n".join(part) for part in parts)


def plan(
    source: str | Path | None = "demo",
    *,
    vram: int | str,
    ram: int | str,
    link_bandwidth: int | str,
    bandwidth: int | str | None = None,
    disk: int | str | None = None,
    bits: int = 2,
    attention_bits: int = 4,
    context_length: int | None = None,
    cache_size: int | str | None = None,
    prefetch: int | None = None,
    look_ahead: int | None = None,
    misses: str | None = None,
    cpu_bandwidth: int | str | None = None,
    trace: RoutingTrace | str | Path | None = None,
    curve: str | None = None,
    revision: str | None = None,
) -> PlanReport:
    """Plan for a stated device, project its speed, and say what would help. Reads a config.json only.

    Args:
        source: A folder, a config.json, a hub repository, or "demo".
        vram, ram: Memory that is free, in bytes or like "15GB".
        link_bandwidth: Bytes per second from host to device, like "12GB/s".
        bandwidth: The device memory's bytes per second. Default: 320GB/s, a T4's.
        disk: Bytes per second from disk, where RAM is too small. Default: 1GB/s.
        bits, attention_bits: Of the experts' and of the attention's weights: 16, 8, 4, 3 or 2.
        context_length, cache_size, prefetch, look_ahead: As `from_pretrained` takes them; prefetch is 2 by
            default.
        misses: As `from_pretrained` takes it. Default: copy.
        cpu_bandwidth: Bytes of packed experts per second that the CPU computes, for `misses`.
        trace: Expect this routing, recorded or a file of `RoutingTrace.save`.
        curve: Expect routing like "chance", "mixtral" (default) or "demo".
        revision: Branch, tag or commit of a hub repository.

    Raises:
        OffloadError: There is no such model, it does not fit, or an option is impossible.
    """
    sizes = model_sizes(read_model_config(source, revision)).at(bits, attention_bits)
    request = PlanRequest.parse(
        sizes,
        vram=vram,
        ram=ram,
        link=link_bandwidth,
        bandwidth=bandwidth,
        disk=disk,
        context_length=context_length,
        cache_size=cache_size,
        prefetch=prefetch,
        look_ahead=look_ahead,
        misses=misses,
        cpu=cpu_bandwidth,
        curve=curve,
        trace=trace if trace is None or isinstance(trace, RoutingTrace) else RoutingTrace.load(trace),
    )
    base = answer(request)
    return PlanReport(base, best_knobs(base))


def read_model_config(source: str | Path | None, revision: str | None = None) -> PretrainedConfig:
    """Read the configuration of a folder, a config.json, "demo", or a hub repository (fetch that one file).

    Raises:
        CheckpointError: There is none.
        DownloadError: It cannot be fetched.
    """
    path = None if source is None else Path(source).expanduser()
    if path is not None and path.is_file():
        return load_config(path)
    folder = local_folder(source)
    if folder is None:
        path = fetch_file(str(source), "config.json", revision=revision)
    else:
        path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            "no configuration here", path=path, expected="config.json", found="no such file"
        )
    return load_config(path)


def _contents(checkpoint: Checkpoint) -> list[str]:
    layout, family = checkpoint.layout, getattr(checkpoint.config, "model_type", "")
    files = {stored.path for fields in checkpoint.experts.values() for stored in fields.values()}
    n_parameters = sum(n * k for n, k in layout.shapes.values())
    return [
        f"{checkpoint.folder}: {family}, {len(checkpoint.layers)} layers x "
        f"{checkpoint.n_experts} experts, {checkpoint.top_k} per token",
        f"  expert: {n_parameters:,} parameters, {'; '.join(layout.kinds)}, {gb(layout.stored_bytes)}"
        f" ({8 * layout.stored_bytes / n_parameters:.2f} bits per weight)",
        f"  experts: {gb(len(checkpoint.experts) * layout.stored_bytes)} in {len(files)} files;"
        f" dense part: {gb(checkpoint.dense_bytes)}",
    ]


def _needs(checkpoint: Checkpoint, options: OffloadOptions) -> list[str]:
    """Device memory for the smallest cache and for everything resident."""
    dense = dense_bytes(checkpoint, for_checkpoint(options, checkpoint))
    smallest = len(checkpoint.layers) * checkpoint.top_k * checkpoint.layout.n_bytes
    everything = len(checkpoint.experts) * checkpoint.layout.n_bytes
    return [
        f"needs on the device ({str(options.dtype).removeprefix('torch.')}): {gb(dense)} for the dense part, "
        "context and scratch, and",
        f"  from {gb(smallest)} ({checkpoint.top_k} experts per layer) to {gb(everything)} (all of them) "
        "for experts",
    ]


def _model(base: PlanAnswer) -> list[str]:
    sizes = base.request.sizes
    bits = 8 * sizes.expert_bytes / sizes.expert_parameters
    return [
        f"{sizes.model_type}: {len(sizes.layers)} layers x {sizes.n_experts} experts, {sizes.top_k} per token"
        f"; {sizes.n_parameters / 1e9:.1f} billion parameters, {sizes.active_parameters / 1e9:.1f} per token",
        f"  expert: {sizes.expert_parameters:,} parameters, {gb(sizes.expert_bytes)} at {sizes.bits} bits"
        f" ({bits:.2f} per weight, with scales)",
        f"  dense part: {gb(sizes.dense_bytes)}, attention at {sizes.attention_bits} bits, all else at 16",
        *(f"  note: {note}" for note in sizes.notes),
    ]


def _plan(base: PlanAnswer) -> list[str]:
    request, plan = base.request, base.plan
    staging = request.options.n_staging * request.sizes.expert_bytes if plan.store else 0
    parts = {**request.needs, "margin": MARGIN_BYTES, "predictions": staging, "experts": plan.device_bytes}
    here = plan.n_resident + sum(plan.slots.values())
    return [
        f"plan for {gb(request.vram)} on the device and {gb(request.ram)} of RAM, "
        f"{request.context} tokens of context:",
        str(plan),
        f"  {here / len(plan.sizes.layers):.1f} of {plan.sizes.n_experts} experts per layer on the device",
        f"  device: {gb(sum(parts.values()))} of {gb(request.vram)}: {listed(parts)}",
    ]


def _speed(base: PlanAnswer) -> list[str]:
    request, found = base.request, base.projection
    costs, rate = found.costs, min(request.link, request.disk) if found.disk else request.link
    slow = " (the disk)" if found.disk else ""
    copies = f"a copy of an expert takes {_time(costs.copy_s)} at {rate / 1e9:g} GB/s{slow}"
    if found.computed_per_token:
        copies = (
            f"{found.computed_per_token:.1f} of them by the CPU in {_time(costs.cpu_expert_s)} each; {copies}"
        )
    kind = "copies" if request.misses == COPY else "misses"
    lines = [
        "projection (computed from rates and expected routing, not measured):",
        f"  {found.tokens_per_s:.1f} tokens/s: {_time(found.time_per_token_s)} per token, of them "
        f"{_time(found.compute_s)} computing",
        f"  {found.hit_rate:.0%} hits, {found.misses_per_token:.1f} {kind} per token; {copies}",
        f"  first token of a {PROMPT_TOKENS}-token prompt after {_time(found.first_token_s)}, "
        "on a cold cache",
    ]
    if base.plan.store is None:
        del lines[2]
    words = [
        *base.routing,
        f"computing: {BANDWIDTH_SHARE:.0%} of {request.bandwidth / 1e9:g} GB/s, and {_time(costs.host_s)} "
        "or more per layer for the host (both assumed)",
    ]
    if found.disk:
        words.append("not counted: parts of the files that the system has cached in RAM are read faster")
    return [*lines, *(f"  - {line}" for line in words)]


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _help(base: PlanAnswer, found: list[tuple[str, PlanAnswer]]) -> list[str]:
    now = base.projection.tokens_per_s
    if not found:
        return ["what would help: no single change gains 1 %"]
    lines = [f"  {text}: {now:.1f} -> {of.projection.tokens_per_s:.1f} tokens/s" for text, of in found]
    return ["what would help most, one change at a time:", *lines]
