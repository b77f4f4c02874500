"""What the user asks for, and the plan that follows from it on this machine.

Knows the options' meaning, free memory and a checkpoint's sizes. Knows nothing of models or caches.
"""

from __future__ import annotations

import difflib
import gc
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from mixtral_offload.core.placement import Plan, Sizes, make_plan
from mixtral_offload.core.policies import make_policy, staging_rows
from mixtral_offload.errors import CapacityError, OptionError
from mixtral_offload.models.checkpoint import Checkpoint
from mixtral_offload.models.kv_cache import kv_bytes, kv_layout
from mixtral_offload.models.skeleton import build_meta, check_experts
from mixtral_offload.system.machine import free_memory
from mixtral_offload.units import check_whole, gb, parse_size
from mixtral_offload.weights.kernels import choose, dequantized_bytes
from mixtral_offload.weights.layout import ROWS, ExpertLayout
from mixtral_offload.weights.safetensors_io import StoredTensor

#: of a batch's prompts, so many go through a pass together: more would fill the experts no better
PROMPT_TOKENS = 4096
MARGIN_BYTES = 600_000_000  # CUDA context and allocator rounding
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class OffloadOptions:
    """How to offload.

    device: "cpu", "cuda", "cuda:1" ...; default: cuda where there is one. dtype: of activations and of the trunk;
    default: float16 on CUDA, float32 on the CPU; "auto": the checkpoint's own. attn_implementation: as in transformers.
    cache_size: experts per layer on the device (one number, or one for each layer),
    or "auto" for all that fit; default: what the checkpoint asks for, or "auto". store: home of the other experts, "ram", "disk" or "auto".
    vram, ram: bytes (or text like "15GB") that may be used; default: what is free. On the CPU both are one memory, and
    the smaller of those given counts. context_length: tokens to leave room for; a chat goes no further. batch_size: how
    many such contexts to leave room for (`generate_batch` shares them among its sequences). link: slow copies down to so many bytes (or "12GB") per second, for experiments. prefetch: experts of each coming layer to
    copy ahead, guessed from the hidden state of now; default: 2 where there is a link to hide (CUDA, or `link`), else
    0. look_ahead: how many layers ahead to guess. policy: which expert leaves, "lru", "lfu" or "lrfu". shared_slots:
    one pool of slots for all layers instead of one for each. compile: products straight from packed bytes through
    torch.compile; "auto": where experts are large enough and there is a compiler. unpack: everything on the device, and
    dequantized once, while building: as fast as a model that never was quantized, and as large.
    """

    device: str | torch.device | None = None
    dtype: torch.dtype | str | None = None
    attn_implementation: str | None = None
    cache_size: int | str | Sequence[int] | None = None
    store: str = "auto"
    vram: int | str | None = None
    ram: int | str | None = None
    context_length: int = 4096
    batch_size: int = 1
    link: float | str | None = None
    prefetch: int | None = None
    look_ahead: int = 1
    policy: str = "lru"
    shared_slots: bool = False
    compile: bool | str = "auto"
    unpack: bool = False
    progress: bool = False

    @classmethod
    def parse(cls, options: dict) -> OffloadOptions:
        """Refuses unknown names, with the nearest known one, and impossible values; fills in device and dtype, and
        turns sizes into bytes. `prefetch` stays None where nothing was asked for: see `with_prefetch`."""
        known = [option.name for option in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else None
                raise OptionError("unknown option", found=name, expected=", ".join(known), hint=hint)
        device = parse_device(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = options.get("dtype") or (torch.float16 if device.type == "cuda" else torch.float32)
        if dtype != "auto":  # the checkpoint's, see `for_checkpoint`
            dtype = _parse_dtype(dtype)
        parsed = cls(**{**options, "device": device, "dtype": dtype})
        attention = parsed.attn_implementation
        if attention is not None and not (isinstance(attention, str) and attention):
            raise OptionError(
                "impossible attn_implementation", expected='a name, such as "sdpa"', found=attention
            )
        for name, least in (("prefetch", 0), ("look_ahead", 1), ("context_length", 1), ("batch_size", 1)):
            if getattr(parsed, name) is not None:
                check_whole(name, getattr(parsed, name), least)
        if parsed.compile not in (True, False, "auto"):
            raise OptionError("unknown compile", expected='True, False or "auto"', found=parsed.compile)
        if parsed.unpack not in (True, False) or (parsed.unpack and parsed.compile is True):
            found = f"unpack={parsed.unpack!r}, compile={parsed.compile!r}"
            raise OptionError(
                "unknown unpack", expected="True (and nothing to compile) or False", found=found
            )
        make_policy(parsed.policy)
        return replace(
            parsed, **{name: _size(name, getattr(parsed, name)) for name in ("vram", "ram", "link")}
        )

    def for_checkpoint(self, checkpoint: Checkpoint) -> OffloadOptions:
        """With the checkpoint's dtype where "auto" was asked for: what config.json says, or its first floating tensor's."""
        if self.dtype != "auto":
            return self
        plain = (of.dtype for key, of in checkpoint.trunk.items() if checkpoint.places[key].field is None)
        stored = next((dtype for dtype in plain if dtype.is_floating_point), None)
        return replace(self, dtype=_parse_dtype(getattr(checkpoint.config, "dtype", None) or stored))

    def with_prefetch(self, possible: bool = True) -> OffloadOptions:
        """With the default number of guesses where none was asked for; none where the model has no way to guess."""
        if self.prefetch is not None:
            return self
        worth = possible and (self.device.type == "cuda" or self.link is not None)
        return replace(self, prefetch=2 if worth else 0)

    @property
    def n_staging(self) -> int:
        """Rows for guesses."""
        return staging_rows(self.prefetch, self.look_ahead)


def _parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in DTYPES:
        raise OptionError("unknown dtype", expected='float16, bfloat16, float32 or "auto"', found=dtype)
    return found


def _size(name: str, value) -> int | None:
    """In bytes; None if nothing was asked for."""
    if value is None:
        return None
    if isinstance(value, bool) or parse_size(value) <= 0:
        raise OptionError(f"impossible {name}", expected="more than 0, as bytes or like 12GB", found=value)
    return parse_size(value)


def parse_device(name: str | torch.device) -> torch.device:
    """The device of this name, a CUDA one with its number; raises OptionError if it is unknown or not here."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except RuntimeError:
        raise OptionError("unknown device", expected="cpu, cuda, cuda:1, ...", found=name) from None
    if device.type == "cpu":
        return device
    if (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices"
        raise OptionError("no such device", expected=name, found=found, hint='use device="cpu"')
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def plan_for(checkpoint: Checkpoint, options: OffloadOptions) -> Plan:
    """The plan for a checkpoint on this machine, as it is now."""
    options = options.with_prefetch()
    n_bytes = device_layout(checkpoint, options).n_bytes
    sizes = Sizes(checkpoint.layers, checkpoint.n_experts, checkpoint.top_k, n_bytes)
    cache_size = checkpoint.recommended_cache_size if options.cache_size is None else options.cache_size
    why = "the checkpoint recommends it" if options.cache_size is None else "as asked"
    if options.unpack:
        return _unpacked_plan(sizes, checkpoint, options)
    return plan_within(sizes, *budgets(options), trunk_bytes(checkpoint, options), options, cache_size, why)


def _unpacked_plan(sizes: Sizes, checkpoint: Checkpoint, options: OffloadOptions) -> Plan:
    """Everything on the device; raises CapacityError where it does not fit or was not asked for."""
    if options.cache_size not in (None, "auto", sizes.n_experts):
        expected = f"cache_size={sizes.n_experts}, or none"
        raise CapacityError(
            "unpack needs every expert on the device", expected=expected, found=options.cache_size
        )
    beside = trunk_bytes(checkpoint, options)
    plan = plan_within(sizes, *budgets(options), beside, options, sizes.n_experts)
    packed = gb(checkpoint.layout.n_bytes)
    return replace(
        plan,
        reasons=(*plan.reasons, f"dequantized once: an expert of {packed} takes {gb(sizes.expert_bytes)}"),
    )


def device_layout(checkpoint: Checkpoint, options: OffloadOptions) -> ExpertLayout:
    """How an expert lies on the device: as it is stored, or dequantized."""
    return checkpoint.layout.dequantized(options.dtype) if options.unpack else checkpoint.layout


def plan_within(
    sizes: Sizes, device: int, ram: int, beside: int, options: OffloadOptions, cache_size, why: str = "as asked"
) -> Plan:  # fmt: skip
    """The plan within so many bytes on the device and in RAM; beside: device bytes of all that is no expert. A margin on
    CUDA, and rows for guesses where experts are copied at all, are left free. options: with `prefetch` filled in."""
    on_cpu = options.device.type == "cpu"
    device -= beside + (0 if on_cpu else MARGIN_BYTES)
    rest = {"cache_size": cache_size, "store": options.store, "shared_memory": on_cpu, "why": why}
    plan = make_plan(sizes, max(device, 0), ram, **rest)
    if plan.home is None or not options.n_staging:
        return plan
    return make_plan(sizes, max(device - options.n_staging * sizes.expert_bytes, 0), ram, **rest)


def budgets(options: OffloadOptions) -> tuple[int, int]:
    """Bytes that may be used on the device and in RAM; on the CPU, they are the same."""
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


def device_needs(checkpoint: Checkpoint, options: OffloadOptions) -> dict[str, int]:
    """Device bytes beside the experts, by name: the "trunk"; for the context the "KV cache"; and as "scratch" the
    activations of one layer's experts and one dequantized matrix."""
    config, layout, item = checkpoint.config, checkpoint.layout, options.dtype.itemsize
    kept = checkpoint.kept.get(options.dtype, frozenset())
    trunk = sum(_trunk_bytes(key, tensor, options, key in kept) for key, tensor in checkpoint.trunk.items())
    context = min(options.context_length, config.max_position_embeddings)
    model = build_meta(config, torch.float32)
    kv, _ = kv_layout(model, config.get_text_config(), check_experts(model)[0])
    compiled, _ = compile_choice(checkpoint, options)
    kinds = {(layout.shapes[matrix], layout.quantization[matrix]) for matrix in layout.shapes}
    dequantized = max(dequantized_bytes(*kind, item, compiled) for kind in kinds)
    scratch = (
        scratch_bytes(
            pass_tokens(context, options.batch_size), item, checkpoint.top_k, *reversed(layout.shapes["gate"])
        )
        + dequantized
    )
    return {"trunk": trunk, "KV cache": kv_bytes(kv, context, item) * options.batch_size, "scratch": scratch}


def _trunk_bytes(key: str, stored: StoredTensor, options: OffloadOptions, is_kept: bool) -> int:
    """Device bytes of one tensor beside the experts; of a packed one to be unpacked, as many as it could hold at most.
    is_kept: in fp32."""
    item = 4 if is_kept else options.dtype.itemsize
    if options.unpack and key.endswith(".W_q"):
        return stored.n_elements * item * (4 if stored.dtype == torch.uint8 else 10)  # values in a word
    is_plain = stored.dtype.is_floating_point and ".meta." not in key
    return stored.n_elements * item if is_plain else stored.n_bytes


def pass_tokens(context: int, batch_size: int) -> int:
    """Tokens that one pass may have: a whole context, or the prompts of a batch."""
    return max(context, min(context * batch_size, PROMPT_TOKENS))


def scratch_bytes(context: int, item: int, top_k: int, hidden: int, intermediate: int) -> int:
    """The activations of one layer's experts for `context` tokens of `item` bytes an element: all results, and their
    product with the weights; of one expert's tokens at a time gate, up, both together, and their product."""
    return item * (2 * top_k * hidden * context + (5 * intermediate + 2 * hidden) * min(context, ROWS))


def compile_choice(checkpoint: Checkpoint, options: OffloadOptions) -> tuple[bool, str]:
    """(whether to compile, why): see `kernels.choose`."""
    if options.unpack:
        return False, "unpacked: the library's products"
    return choose(options.compile, checkpoint.layout, options.device)


def trunk_bytes(checkpoint: Checkpoint, options: OffloadOptions) -> int:
    """Device bytes beside the experts, all `device_needs` together."""
    return sum(device_needs(checkpoint, options).values())
