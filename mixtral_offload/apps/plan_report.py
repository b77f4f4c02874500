"""`mixtral-offload plan`: from a model's name to the text of its plan.

Knows where a configuration comes from, and how people read numbers. Computes none of them.
"""

from __future__ import annotations

from pathlib import Path

from mixtral_offload.analysis.planner import Answer, Request, answer, best_knobs
from mixtral_offload.analysis.projection import BANDWIDTH_SHARE, PROMPT_TOKENS
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.errors import CheckpointError
from mixtral_offload.models.checkpoint import load_config
from mixtral_offload.models.sizes import model_sizes
from mixtral_offload.runtime.options import MARGIN_BYTES
from mixtral_offload.units import gb
from mixtral_offload.weights.hub import fetch_file
from mixtral_offload.weights.source import local_folder


def describe_plan(
    model: str, revision: str | None, bits: int, attention_bits: int, trace: str | None, **given
) -> str:
    """given: as `Request.parse` takes them. Raises OffloadError."""
    sizes = model_sizes(read_model_config(model, revision)).at(bits, attention_bits)
    recorded = None if trace is None else RoutingTrace.load(trace)
    base = answer(Request.parse(sizes, trace=recorded, **given))
    return "\n".join([*_model(base), "", *_plan(base), "", *_speed(base), "", *_help(base)])


def read_model_config(model: str, revision: str | None = None):
    """transformers' configuration of a folder, a config.json, "demo", or a hub repository (that one file is fetched).

    Raises CheckpointError or DownloadError.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return load_config(path)
    folder = local_folder(model)
    path = fetch_file(model, "config.json", revision=revision) if folder is None else folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            "no configuration here", path=path, expected="config.json", found="no such file"
        )
    return load_config(path)


def _model(base: Answer) -> list[str]:
    sizes = base.request.sizes
    bits = 8 * sizes.expert_bytes / sizes.expert_parameters
    return [
        f"{sizes.model_type}: {len(sizes.layers)} layers x {sizes.n_experts} experts, {sizes.top_k} per token; "
        f"{sizes.n_parameters / 1e9:.1f} billion parameters, {sizes.active_parameters / 1e9:.1f} per token",
        f"  expert: {sizes.expert_parameters:,} parameters, {gb(sizes.expert_bytes)} at {sizes.bits} bits"
        f" ({bits:.2f} per weight, with scales)",
        f"  trunk: {gb(sizes.trunk_bytes)}, attention at {sizes.attention_bits} bits, all else at 16",
        *(f"  note: {note}" for note in sizes.notes),
    ]


def _plan(base: Answer) -> list[str]:
    request, plan = base.request, base.plan
    guesses = request.options.n_staging * request.sizes.expert_bytes if plan.home else 0
    parts = {**request.needs, "margin": MARGIN_BYTES, "guesses": guesses, "experts": plan.device_bytes}
    listed = ", ".join(f"{name} {gb(n_bytes)}" for name, n_bytes in parts.items() if n_bytes)
    here = plan.n_resident + sum(plan.slots.values())
    return [
        f"plan for {gb(request.vram)} on the device and {gb(request.ram)} of RAM, {request.context} tokens of context:",
        str(plan),
        f"  {here / len(plan.sizes.layers):.1f} of {plan.sizes.n_experts} experts per layer on the device",
        f"  device: {gb(sum(parts.values()))} of {gb(request.vram)}: {listed}",
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
        f"  first token of a {PROMPT_TOKENS}-token prompt after {_time(found.first_token_s)}, on a cold cache",
    ]
    if base.plan.home is None:
        lines[2:3] = []
    words = [*base.routing, f"computing: {BANDWIDTH_SHARE:.0%} of {request.bandwidth / 1e9:g} GB/s, and {_time(costs.host_s)} or more"
             " per layer for the host (both assumed)"]  # fmt: skip
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
