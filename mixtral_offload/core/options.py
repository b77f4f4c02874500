"""The options of `from_pretrained`, declared once: for the dataclass, the command line (`apps/parser.py`)
and, through `docs/options.py`, the signature and `Args` of `from_pretrained` and the README's table.
"""

from __future__ import annotations

import dataclasses
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mixtral_offload.core.misses import COPY, MISSES
from mixtral_offload.core.policies import POLICIES, staging_rows

if TYPE_CHECKING:
    from typing import Self

    import torch


def _option(default: Any, help: str, *, flag: dict[str, Any] | None = None) -> Any:
    """Declare one option.

    Args:
        help: What it means, for documentation. Ends with a full stop.
        flag: Arguments of argparse's `add_argument`; None: not on the command line.
    """
    return dataclasses.field(default=default, metadata={"help": help, "flag": flag})


def parse_cache_size(text: str) -> int | str:
    """Read `--cache-size`; raise argparse's error."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f'expected "auto" or a number, found {text!r}') from None


@dataclass(frozen=True)
class OffloadOptions:
    """How to offload. `runtime/options.py` makes one from what was given and checks it."""

    device: str | torch.device | None = _option(
        None, 'Where experts run: "cpu", "cuda", "cuda:1", ... Default: cuda where there is one.', flag={}
    )
    dtype: torch.dtype | str | None = _option(
        None,
        "Type of activations and of the dense part: float16, bfloat16, float32, or "
        '"auto" for the checkpoint\'s own. Default: float16 on CUDA, float32 on the CPU.',
        flag={"choices": ("float16", "bfloat16", "float32", "auto")},
    )
    attn_implementation: str | None = _option(None, "As in transformers.")
    cache_size: int | str | Sequence[int] | None = _option(
        None,
        'Experts of each layer on the device: one number, one for each layer, or "auto" for all that fit. '
        'Default: what the checkpoint recommends, or "auto".',
        flag={"type": parse_cache_size, "metavar": "N"},
    )
    store: str = _option(
        "auto",
        'Where the other experts are: "ram", "disk", or "auto" for RAM where it is large enough.',
        flag={"choices": ("auto", "ram", "disk")},
    )
    vram: int | str | None = _option(
        None,
        'Device memory to use, in bytes or like "15GB". Default: what is free. On the CPU, vram and ram are '
        "one memory, and the smaller of those given counts.",
        flag={},
    )
    ram: int | str | None = _option(
        None, 'Host memory to use, in bytes or like "12GB". Default: what is free.', flag={}
    )
    context_length: int = _option(
        4096, "Tokens to reserve memory for; the limit of a chat.", flag={"type": int, "metavar": "N"}
    )
    batch_size: int = _option(
        1, "Number of contexts to reserve memory for; `generate_batch` shares them among its sequences."
    )
    prefetch: int | None = _option(
        None,
        "Number of experts to predict and copy early for each coming layer. Default: 2 on CUDA or with "
        "`throttle`, else 0.",
        flag={"type": int, "metavar": "N"},
    )
    look_ahead: int = _option(1, "Number of layers to predict ahead.", flag={"type": int, "metavar": "N"})
    policy: str = _option(
        "lru",
        'Expert to evict: "lru" (least recently used), "lfu" (least often used) or "lrfu" (between the two).',
        flag={"choices": tuple(POLICIES)},
    )
    shared_slots: bool = _option(False, "One pool of slots for all layers in place of one for each.", flag={})
    misses: str = _option(
        COPY,
        'What happens to an expert in RAM that a layer needs and the device lacks: "copy" it; let the "cpu" '
        "compute it there, once the slots are full (answers then depend on the cache in their last bits); "
        '"auto": link and CPU share them, as their measured speeds say.',
        flag={"choices": MISSES},
    )
    compile: bool | str = _option(
        "auto",
        'Compute from packed weights with torch.compile: True, False, or "auto": where the package has no '
        "kernels of its own (on CUDA), if experts are large enough and there is a compiler.",
        flag={},
    )
    precision: str = _option(
        "exact",
        'Products on the CPU: "exact" (relative error below 0.001), or "fast" (activations in 8 bits).',
        flag={"choices": ("exact", "fast")},
    )
    dequantize_on_load: bool = _option(
        False,
        "Dequantize all experts once at load time: the speed and size of an unquantized model. All experts "
        "must fit on the device.",
        flag={},
    )
    throttle: float | str | None = _option(
        None,
        'Limit copies to the device to this rate (bytes/s, or like "12GB"), to emulate a slower link.',
        flag={},
    )
    progress: bool = _option(False, "Show progress bars.")

    @property
    def n_staging(self) -> int:
        """Number of rows for predicted experts."""
        return staging_rows(self.prefetch or 0, self.look_ahead)

    def with_prefetch(self, possible: bool = True) -> Self:
        """Return options with a number for `prefetch`.

        Args:
            possible: Whether the model's routing can be predicted.
        """
        if self.prefetch is not None:
            return self
        worth = possible and (getattr(self.device, "type", None) == "cuda" or self.throttle is not None)
        return dataclasses.replace(self, prefetch=2 if worth else 0)


def declared() -> dict[str, dataclasses.Field]:
    """Return the options by name; their metadata has "help" and "flag", their type is a text."""
    return {field.name: field for field in dataclasses.fields(OffloadOptions)}
