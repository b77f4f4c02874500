"""Run Mixture-of-Experts models that are larger than the device, as transformers models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixtral_offload.analysis.recorder import record
    from mixtral_offload.analysis.replay import replay
    from mixtral_offload.analysis.reports import inspect, plan
    from mixtral_offload.core.costs import DeviceCosts
    from mixtral_offload.core.trace import RoutingTrace
    from mixtral_offload.errors import (
        CapacityError,
        CheckpointError,
        ConversationError,
        DownloadError,
        GenerationError,
        JobError,
        OffloadError,
        OptionError,
        TemplateError,
    )
    from mixtral_offload.generation.batch import GenerationRequest, generate_batch
    from mixtral_offload.generation.chat import ChatSession
    from mixtral_offload.generation.tokenizer import load_tokenizer
    from mixtral_offload.runtime.build import from_pretrained
    from mixtral_offload.runtime.convert import convert_checkpoint
    from mixtral_offload.runtime.memory import memory_use
    from mixtral_offload.weights.hqq import Quantization

__version__ = "0.1.0"

_MODULES = {
    "from_pretrained": "runtime.build",
    "load_tokenizer": "generation.tokenizer",
    "ChatSession": "generation.chat",
    "generate_batch": "generation.batch",
    "GenerationRequest": "generation.batch",
    "memory_use": "runtime.memory",
    "record": "analysis.recorder",
    "RoutingTrace": "core.trace",
    "DeviceCosts": "core.costs",
    "inspect": "analysis.reports",
    "plan": "analysis.reports",
    "replay": "analysis.replay",
    "convert_checkpoint": "runtime.convert",
    "Quantization": "weights.hqq",
    "OffloadError": "errors",
    "CapacityError": "errors",
    "CheckpointError": "errors",
    "ConversationError": "errors",
    "DownloadError": "errors",
    "GenerationError": "errors",
    "JobError": "errors",
    "OptionError": "errors",
    "TemplateError": "errors",
}
__all__ = [
    "CapacityError",
    "ChatSession",
    "CheckpointError",
    "ConversationError",
    "DeviceCosts",
    "DownloadError",
    "GenerationError",
    "GenerationRequest",
    "JobError",
    "OffloadError",
    "OptionError",
    "Quantization",
    "RoutingTrace",
    "TemplateError",
    "convert_checkpoint",
    "from_pretrained",
    "generate_batch",
    "inspect",
    "load_tokenizer",
    "memory_use",
    "plan",
    "record",
    "replay",
]


def __getattr__(name: str) -> object:
    # torch and transformers take seconds to import: load them on first use
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
