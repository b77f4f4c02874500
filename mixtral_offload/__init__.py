"""Run big Mixture-of-Experts models on small devices: expert cache, quantized experts, transformers underneath."""

from importlib import import_module

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
    "simulate": "analysis.replay",
    "convert_checkpoint": "runtime.convert",
    "Quantization": "weights.hqq",
    "OffloadError": "errors",
}
__all__ = [*_HOMES]


def __getattr__(name):
    # torch and transformers take seconds to import: only those who use them wait
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
