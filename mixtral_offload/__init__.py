"""Run big Mixture-of-Experts models on small devices: expert cache, quantized experts, transformers underneath."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixtral_offload.analysis.recorder import record
    from mixtral_offload.analysis.replay import replay
    from mixtral_offload.core.trace import RoutingTrace
    from mixtral_offload.errors import OffloadError
    from mixtral_offload.generation.batch import Request, generate_batch
    from mixtral_offload.generation.chat import ChatSession
    from mixtral_offload.generation.tokenizer import load_tokenizer
    from mixtral_offload.runtime.build import from_pretrained
    from mixtral_offload.runtime.convert import convert_checkpoint
    from mixtral_offload.runtime.memory import memory_use
    from mixtral_offload.weights.hqq import Quantization

__version__ = "0.1.0"

_HOMES = {
    "from_pretrained": "runtime.build",
    "load_tokenizer": "generation.tokenizer",
    "ChatSession": "generation.chat",
    "generate_batch": "generation.batch",
    "Request": "generation.batch",
    "memory_use": "runtime.memory",
    "record": "analysis.recorder",
    "RoutingTrace": "core.trace",
    "replay": "analysis.replay",
    "convert_checkpoint": "runtime.convert",
    "Quantization": "weights.hqq",
    "OffloadError": "errors",
}
__all__ = [
    "ChatSession",
    "OffloadError",
    "Quantization",
    "Request",
    "RoutingTrace",
    "convert_checkpoint",
    "from_pretrained",
    "generate_batch",
    "load_tokenizer",
    "memory_use",
    "record",
    "replay",
]


def __getattr__(name: str) -> object:
    # torch and transformers take seconds to import: only those who use them wait
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
