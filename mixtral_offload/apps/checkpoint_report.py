"""What a checkpoint holds, what it needs, and whether it fits here, as text.

Knows how to ask the other modules; reads headers, never weights.
"""

from __future__ import annotations

from mixtral_offload.errors import CapacityError, DownloadError
from mixtral_offload.models.checkpoint import Checkpoint, open_checkpoint
from mixtral_offload.runtime.options import OffloadOptions, plan_for, trunk_bytes
from mixtral_offload.units import gb
from mixtral_offload.weights.hub import plan_download
from mixtral_offload.weights.source import local_folder, resolve


def describe(model: str, revision: str | None, options: dict) -> str:
    """The text of `mixtral-offload info`; downloads nothing. options: as `from_pretrained` takes them."""
    parsed = OffloadOptions.parse(options)
    folder = local_folder(model)
    if folder is None:
        try:
            plan = plan_download(model, revision=revision)
        except DownloadError:
            plan = None  # said by `resolve`, unless a complete copy is here
        if plan and plan.remaining_bytes:
            return (
                f"{plan.repo_id}: {len(plan.files)} files, {gb(plan.total_bytes)}; {gb(plan.remaining_bytes)} not here yet\n"
                f"disk: {gb(plan.free_bytes)} free in {plan.folder}\n"
                f"next step: mixtral-offload download {plan.repo_id}"
            )
        folder = resolve(model, revision=revision)
    checkpoint = open_checkpoint(folder)
    return "\n".join(
        [*_contents(checkpoint), "", *_needs(checkpoint, parsed), "", *_here(checkpoint, parsed)]
    )


def _contents(checkpoint: Checkpoint) -> list[str]:
    layout, config = checkpoint.layout, checkpoint.config
    files = {stored.path for fields in checkpoint.experts.values() for stored in fields.values()}
    n_parameters = sum(n * k for n, k in layout.shapes.values())
    return [
        f"{checkpoint.folder}: {config.model_type}, {len(checkpoint.layers)} layers x {checkpoint.n_experts} experts, "
        f"{checkpoint.top_k} per token",
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
        f"needs on the device ({str(options.dtype).removeprefix('torch.')}): {gb(trunk)} for trunk, context and scratch, and",
        f"  from {gb(smallest)} ({checkpoint.top_k} experts per layer) to {gb(everything)} (all of them) for experts",
    ]


def _here(checkpoint: Checkpoint, options: OffloadOptions) -> list[str]:
    try:
        return [f"fits here, on {options.device}:", str(plan_for(checkpoint, options))]
    except CapacityError as error:
        return [f"does not fit here, on {options.device}:", str(error)]
