"""The options of `from_pretrained`, checked, and the plan that follows from them on this machine.

Knows free memory and a checkpoint's sizes. Knows nothing of models or caches.
"""

from __future__ import annotations

import difflib
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mixtral_offload.core.misses import COPY, MISSES
from mixtral_offload.core.options import OffloadOptions, declared
from mixtral_offload.core.placement import Plan, Sizes, make_plan
from mixtral_offload.core.policies import check_predictions, make_policy
from mixtral_offload.errors import CapacityError, OptionError
from mixtral_offload.models.checkpoint import Checkpoint
from mixtral_offload.models.kv_cache import kv_bytes, kv_layout
from mixtral_offload.models.skeleton import build_meta, check_experts
from mixtral_offload.system.machine import free_memory
from mixtral_offload.units import check_whole, gb, parse_size
from mixtral_offload.weights.layout import ROWS, ExpertLayout
from mixtral_offload.weights.products import PRECISIONS, Kind, Products, choose_products
from mixtral_offload.weights.safetensors_io import StoredTensor

#: maximum prompt tokens of a batch in one pass; larger passes do not improve expert utilization
MOST_PASS_TOKENS = 4096
MARGIN_BYTES = 600_000_000  # CUDA context and allocator rounding
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class CheckedOptions(OffloadOptions):
    """Options for one checkpoint, with sizes in bytes; see `for_checkpoint`."""

    device: torch.device
    dtype: torch.dtype
    vram: int | None = None
    ram: int | None = None
    throttle: int | None = None


def parse_options(options: Mapping[str, Any]) -> OffloadOptions:
    """Check what was given to `from_pretrained`; fill in device and dtype, turn sizes into bytes.

    A dtype of "auto" and a prefetch of None remain: see `for_checkpoint` and `OffloadOptions.with_prefetch`.

    Raises:
        OptionError: For unknown names, with the nearest known one, and for impossible values.
    """
    known = list(declared())
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else None
            raise OptionError("unknown option", found=name, expected=", ".join(known), hint=hint)
    device = parse_device(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = options.get("dtype") or (torch.float16 if device.type == "cuda" else torch.float32)
    dtype = dtype if dtype == "auto" else _parse_dtype(dtype)
    sizes = {name: _size(name, options.get(name)) for name in ("vram", "ram", "throttle")}
    parsed = OffloadOptions(**{**options, **sizes, "device": device, "dtype": dtype})
    _check_values(parsed)
    return parsed


def _check_values(options: OffloadOptions) -> None:
    attention = options.attn_implementation
    if attention is not None and not (isinstance(attention, str) and attention):
        raise OptionError(
            "impossible attn_implementation", expected='a name, such as "sdpa"', found=attention
        )
    for name, least in (("prefetch", 0), ("look_ahead", 1), ("context_length", 1), ("batch_size", 1)):
        if name != "prefetch" or options.prefetch is not None:
            check_whole(name, getattr(options, name), least)
    if options.compile not in (True, False, "auto"):
        raise OptionError("unknown compile", expected='True, False or "auto"', found=options.compile)
    if options.precision not in PRECISIONS:
        raise OptionError("unknown precision", expected=", ".join(PRECISIONS), found=options.precision)
    if options.misses not in MISSES:
        raise OptionError("unknown misses", expected=", ".join(MISSES), found=options.misses)
    for name in ("dequantize_on_load", "shared_slots", "progress"):
        if getattr(options, name) not in (True, False):
            raise OptionError(f"unknown {name}", expected="True or False", found=getattr(options, name))
    make_policy(options.policy)
    _check_together(options)


def _check_together(options: OffloadOptions) -> None:
    """Refuse options that exclude each other."""
    if options.dequantize_on_load and options.compile is True:
        raise OptionError("dequantize_on_load=True leaves nothing to compile", found="compile=True")
    if options.dequantize_on_load and options.precision != "exact":
        found = f"precision={options.precision!r}"
        raise OptionError("dequantize_on_load=True leaves no packed experts", found=found)
    if options.misses != COPY and options.store == "disk":
        raise OptionError(
            "the CPU computes experts from RAM", found=f'misses={options.misses!r}, store="disk"'
        )


def for_checkpoint(options: OffloadOptions, checkpoint: Checkpoint) -> CheckedOptions:
    """Return parsed options with the dtype of config.json, or of the first float tensor, for "auto".

    Raises:
        OptionError: More predictions than this model can need.
    """
    dtype = options.dtype
    if dtype == "auto":
        plain = (of.dtype for key, of in checkpoint.dense.items() if checkpoint.places[key].field is None)
        stored = next((of for of in plain if of.is_floating_point), None)
        dtype = _parse_dtype(getattr(checkpoint.config, "dtype", None) or stored)
    checked = CheckedOptions(**{**vars(options), "dtype": dtype})
    n_layers = len(checkpoint.layers)
    check_predictions(options.prefetch or 0, options.look_ahead, checkpoint.n_experts, n_layers)
    return checked


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in DTYPES:
        raise OptionError("unknown dtype", expected='float16, bfloat16, float32 or "auto"', found=dtype)
    return found


def _size(name: str, value: float | str | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or parse_size(value) <= 0:
        raise OptionError(f"impossible {name}", expected="more than 0, as bytes or like 12GB", found=value)
    return parse_size(value)


def parse_device(name: str | torch.device) -> torch.device:
    """Return the device of this name, a CUDA one with its number.

    Raises:
        OptionError: If it is unknown or not here.
    """
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except (RuntimeError, TypeError):
        raise OptionError("unknown device", expected="cpu, cuda, cuda:1, ...", found=name) from None
    if device.type == "cpu":
        return device
    if (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices"
        raise OptionError("no such device", expected=name, found=found, hint='use device="cpu"')
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def plan_for(checkpoint: Checkpoint, options: CheckedOptions) -> Plan:
    """Plan a checkpoint on this machine, as it is now.

    Raises:
        CapacityError: If it does not fit.
        OptionError: For a cache size that the model cannot have.
    """
    options = options.with_prefetch()
    n_bytes = device_layout(checkpoint, options).n_bytes
    sizes = Sizes(checkpoint.layers, checkpoint.n_experts, checkpoint.top_k, n_bytes)
    cache_size = checkpoint.recommended_cache_size if options.cache_size is None else options.cache_size
    why = "the checkpoint recommends it" if options.cache_size is None else "as asked"
    if options.dequantize_on_load:
        if options.cache_size not in (None, "auto", sizes.n_experts):
            raise CapacityError(
                "dequantize_on_load needs every expert on the device",
                expected=f"cache_size={sizes.n_experts}, or none",
                found=options.cache_size,
            )
        cache_size, why = sizes.n_experts, "as asked"
    plan = plan_within(sizes, *budgets(options), dense_bytes(checkpoint, options), options, cache_size, why)
    if plan.store == "disk" and options.misses != COPY:
        raise CapacityError(
            f"misses={options.misses!r} needs the experts in RAM",
            found="; ".join(plan.reasons),
            hint='use misses="copy", or a smaller cache_size, or fewer bits per expert',
        )
    if not options.dequantize_on_load:
        return plan
    packed, dequantized = gb(checkpoint.layout.n_bytes), gb(sizes.expert_bytes)
    reason = f"dequantized once: an expert of {packed} takes {dequantized}"
    return replace(plan, reasons=(*plan.reasons, reason))


def device_layout(checkpoint: Checkpoint, options: CheckedOptions) -> ExpertLayout:
    """Return how an expert lies on the device: as it is stored, or dequantized."""
    return checkpoint.layout.dequantized(options.dtype) if options.dequantize_on_load else checkpoint.layout


def plan_within(
    sizes: Sizes,
    vram: int,
    ram: int,
    non_expert_bytes: int,
    options: CheckedOptions,
    cache_size: int | str | Sequence[int],
    why: str = "as asked",
) -> Plan:
    """Plan within given budgets; leave a margin on CUDA, and staging rows if experts are copied at all.

    Args:
        vram: Bytes that may be used on the device.
        ram: Bytes that may be used in RAM.
        non_expert_bytes: Device bytes of everything else.
        options: With a number for `prefetch`.
        cache_size: Takes the place of the options' own.
        why: Reason for it.
    """
    on_cpu = options.device.type == "cpu"
    free = vram - non_expert_bytes - (0 if on_cpu else MARGIN_BYTES)

    def plan(device_bytes: int) -> Plan:
        room, store = max(device_bytes, 0), options.store
        return make_plan(sizes, room, ram, cache_size=cache_size, store=store, shared_memory=on_cpu, why=why)

    found = plan(free)
    if found.store is None or not options.n_staging:
        return found
    return plan(free - options.n_staging * sizes.expert_bytes)


def budgets(options: CheckedOptions) -> tuple[int, int]:
    """Return the bytes that may be used on the device and in RAM; on the CPU, they are the same memory."""
    free = int(0.9 * free_memory())
    if options.device.type == "cpu":
        asked = [size for size in (options.vram, options.ram) if size is not None]
        budget = min(asked, default=free)
        return budget, budget
    gc.collect()  # a model that was just dropped may still hold memory
    with torch.cuda.device(options.device):
        torch.cuda.empty_cache()
    device = torch.cuda.mem_get_info(options.device)[0] if options.vram is None else options.vram
    return device, free if options.ram is None else options.ram


def device_needs(checkpoint: Checkpoint, options: CheckedOptions) -> dict[str, int]:
    """Compute the device bytes of everything but the experts, by name.

    Returns:
        "dense part"; "KV cache" of the context; "scratch": activations of one layer's experts, and one
        dequantized matrix.
    """
    config, layout, item = checkpoint.config, checkpoint.layout, options.dtype.itemsize
    kept = checkpoint.kept.get(options.dtype, frozenset())
    dense = sum(_dense_bytes(key, tensor, options, key in kept) for key, tensor in checkpoint.dense.items())
    context = min(options.context_length, config.max_position_embeddings)
    model = build_meta(config, torch.float32)
    kv, _ = kv_layout(model, config.get_text_config(), check_experts(model)[0])
    products = products_for(checkpoint, options)
    kinds = {(layout.shapes[matrix], layout.quantization[matrix]) for matrix in layout.shapes}
    dequantized = max(products.dequantized_bytes(*kind, item) for kind in kinds)
    n_tokens, (intermediate, hidden) = pass_tokens(context, options.batch_size), layout.shapes["gate"]
    return {
        "dense part": dense,
        "KV cache": kv_bytes(kv, context, item) * options.batch_size,
        "scratch": scratch_bytes(n_tokens, item, checkpoint.top_k, hidden, intermediate) + dequantized,
    }


def _dense_bytes(key: str, stored: StoredTensor, options: CheckedOptions, is_kept: bool) -> int:
    """Device bytes of one tensor of the dense part, an upper bound if it is dequantized; is_kept: in fp32."""
    item = 4 if is_kept else options.dtype.itemsize
    if options.dequantize_on_load and key.endswith(".W_q"):
        return stored.n_elements * item * (4 if stored.dtype == torch.uint8 else 10)  # values in a word
    is_plain = stored.dtype.is_floating_point and ".meta." not in key
    return stored.n_elements * item if is_plain else stored.n_bytes


def pass_tokens(context: int, batch_size: int) -> int:
    """Return the tokens that one pass may have: a whole context, or the prompts of a batch."""
    return max(context, min(context * batch_size, MOST_PASS_TOKENS))


def scratch_bytes(context: int, item: int, top_k: int, hidden: int, intermediate: int) -> int:
    """Compute the bytes of one layer's activations for `context` tokens of `item` bytes an element.

    All results, and their product with the weights; of one expert's tokens at a time gate, up, both together,
    and their product.
    """
    return item * (2 * top_k * hidden * context + (5 * intermediate + 2 * hidden) * min(context, ROWS))


def products_for(checkpoint: Checkpoint, options: CheckedOptions) -> Products:
    """Return how matrices are multiplied; raise OptionError for what is impossible."""
    if options.dequantize_on_load:
        return Products(Kind.PLAIN, "dequantized on load")
    return choose_products(options.compile, options.precision, checkpoint.layout, options.device)


def dense_bytes(checkpoint: Checkpoint, options: CheckedOptions) -> int:
    """Compute the device bytes of everything but the experts: the sum of `device_needs`."""
    return sum(device_needs(checkpoint, options).values())
