"""The texts of `mixtral-offload info` and `mixtral-offload plan`.

Knows where a checkpoint or a configuration comes from, and how people read numbers. Computes none of them;
reads headers and configurations, never weights.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from mixtral_offload.analysis.planner import Answer, Request, answer, best_knobs
from mixtral_offload.analysis.projection import BANDWIDTH_SHARE, PROMPT_TOKENS
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import CapacityError, CheckpointError, DownloadError
from mixtral_offload.models.checkpoint import Checkpoint, load_config, open_checkpoint
from mixtral_offload.models.sizes import model_sizes
from mixtral_offload.runtime.options import MARGIN_BYTES, OffloadOptions, plan_for, trunk_bytes
from mixtral_offload.units import gb, listed
from mixtral_offload.weights.hub import fetch_file, plan_download
from mixtral_offload.weights.source import local_folder, resolve


def describe_checkpoint(model: str, revision: str | None, options: dict) -> str:
    """Say what a checkpoint holds and needs, and whether it fits here; download nothing.

    Args:
        options: As `from_pretrained` takes them.

    Raises:
        OffloadError: There is no such model, or an option is impossible.
    """
    parsed = OffloadOptions.parse(options)
    folder = local_folder(model)
    if folder is None:
        try:
            plan = plan_download(model, revision=revision)
        except DownloadError:
            plan = None  # said by `resolve`, unless a complete copy is here
        if plan and plan.remaining_bytes:
            return (
                f"{plan.repo_id}: {len(plan.files)} files, {gb(plan.total_bytes)}; "
                f"{gb(plan.remaining_bytes)} not here yet\n"
                f"disk: {gb(plan.free_bytes)} free in {plan.folder}\n"
                f"next step: mixtral-offload download {plan.repo_id}"
            )
        folder = resolve(model, revision=revision)
    checkpoint = open_checkpoint(folder)
    try:
        fit = [f"fits here, on {parsed.device}:", str(plan_for(checkpoint, parsed))]
    except CapacityError as error:
        fit = [f"does not fit here, on {parsed.device}:", str(error)]
    return "\n".join([*_contents(checkpoint), "", *_needs(checkpoint, parsed), "", *fit])


def describe_plan(
    model: str, revision: str | None = None, *, bits: int, attention_bits: int, trace: str | None = None,
    **given: object,
) -> str:  # fmt: skip
    """Plan for a stated device, project its speed, and say what would help.

    Args:
        bits: Of experts.
        trace: A file of `RoutingTrace.save`.
        given: As `Request.parse` takes them.

    Raises:
        OffloadError: There is no such model, it does not fit, or an option is impossible.
    """
    sizes = model_sizes(read_model_config(model, revision)).at(bits, attention_bits)
    recorded = None if trace is None else RoutingTrace.load(trace)
    base = answer(Request.parse(sizes, trace=recorded, **given))
    return "\n".join([*_model(base), "", *_plan(base), "", *_speed(base), "", *_help(base)])


def read_model_config(model: str, revision: str | None = None) -> PretrainedConfig:
    """Read the configuration of a folder, a config.json, "demo", or a hub repository (fetch that one file).

    Raises:
        CheckpointError: There is none.
        DownloadError: It cannot be fetched.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return load_config(path)
    folder = local_folder(model)
    path = fetch_file(model, "config.json", revision=revision) if folder is None else folder / "config.json"
    if not path.is_file():
        what, expected = "no configuration here", "config.json"
        raise CheckpointError(what, path=path, expected=expected, found="no such file")
    return load_config(path)


def _contents(checkpoint: Checkpoint) -> list[str]:
    layout, config = checkpoint.layout, checkpoint.config
    files = {stored.path for fields in checkpoint.experts.values() for stored in fields.values()}
    n_parameters = sum(n * k for n, k in layout.shapes.values())
    return [
        f"{checkpoint.folder}: {config.model_type}, {len(checkpoint.layers)} layers x "
        f"{checkpoint.n_experts} experts, {checkpoint.top_k} per token",
        f"  expert: {n_parameters:,} parameters, {'; '.join(layout.kinds)}, {gb(layout.stored_bytes)}"
        f" ({8 * layout.stored_bytes / n_parameters:.2f} bits per weight)",
        f"  experts: {gb(len(checkpoint.experts) * layout.stored_bytes)} in {len(files)} files;"
        f" trunk: {gb(checkpoint.trunk_bytes)}",
    ]


def _needs(checkpoint: Checkpoint, options: OffloadOptions) -> list[str]:
    """Device memory for the smallest cache and for everything resident."""
    trunk = trunk_bytes(checkpoint, options)
    smallest = len(checkpoint.layers) * checkpoint.top_k * checkpoint.layout.n_bytes
    everything = len(checkpoint.experts) * checkpoint.layout.n_bytes
    return [
        f"needs on the device ({str(options.dtype).removeprefix('torch.')}): {gb(trunk)} for trunk, "
        "context and scratch, and",
        f"  from {gb(smallest)} ({checkpoint.top_k} experts per layer) to {gb(everything)} (all of them) "
        "for experts",
    ]


def _model(base: Answer) -> list[str]:
    sizes = base.request.sizes
    bits = 8 * sizes.expert_bytes / sizes.expert_parameters
    return [
        f"{sizes.model_type}: {len(sizes.layers)} layers x {sizes.n_experts} experts, {sizes.top_k} per token"
        f"; {sizes.n_parameters / 1e9:.1f} billion parameters, {sizes.active_parameters / 1e9:.1f} per token",
        f"  expert: {sizes.expert_parameters:,} parameters, {gb(sizes.expert_bytes)} at {sizes.bits} bits"
        f" ({bits:.2f} per weight, with scales)",
        f"  trunk: {gb(sizes.trunk_bytes)}, attention at {sizes.attention_bits} bits, all else at 16",
        *(f"  note: {note}" for note in sizes.notes),
    ]


def _plan(base: Answer) -> list[str]:
    request, plan = base.request, base.plan
    guesses = request.options.n_staging * request.sizes.expert_bytes if plan.home else 0
    parts = {**request.needs, "margin": MARGIN_BYTES, "guesses": guesses, "experts": plan.device_bytes}
    here = plan.n_resident + sum(plan.slots.values())
    return [
        f"plan for {gb(request.vram)} on the device and {gb(request.ram)} of RAM, "
        f"{request.context} tokens of context:",
        str(plan),
        f"  {here / len(plan.sizes.layers):.1f} of {plan.sizes.n_experts} experts per layer on the device",
        f"  device: {gb(sum(parts.values()))} of {gb(request.vram)}: {listed(parts)}",
    ]


def _speed(base: Answer) -> list[str]:
    request, found = base.request, base.projection
    costs, rate = found.costs, min(request.link, request.disk) if found.disk else request.link
    slow = " (the disk)" if found.disk else ""
    copies = f"a copy of an expert takes {_time(costs.copy_s)} at {rate / 1e9:g} GB/s{slow}"
    lines = [
        "projection (computed from rates and expected routing, not measured):",
        f"  {found.tokens_per_s:.1f} tokens/s: {_time(found.time_per_token_s)} per token, of them "
        f"{_time(found.compute_s)} computing",
        f"  {found.hit_rate:.0%} hits, {found.misses_per_token:.1f} copies per token; {copies}",
        f"  first token of a {PROMPT_TOKENS}-token prompt after {_time(found.first_token_s)}, "
        "on a cold cache",
    ]
    if base.plan.home is None:
        lines[2:3] = []
    words = [
        *base.routing,
        f"computing: {BANDWIDTH_SHARE:.0%} of {request.bandwidth / 1e9:g} GB/s, and {_time(costs.host_s)} "
        "or more per layer for the host (both assumed)",
    ]
    if found.disk:
        words.append("what the system keeps of the files in RAM comes faster: not counted")
    return [*lines, *(f"  - {line}" for line in words)]


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _help(base: Answer) -> list[str]:
    now = base.projection.tokens_per_s
    found = best_knobs(base)
    if not found:
        return ["what would help: no single change gains 1 %"]
    lines = (
        f"  {text}: {now:.1f} -> {changed.projection.tokens_per_s:.1f} tokens/s" for text, changed in found
    )
    return ["what would help most, one change at a time:", *lines]
