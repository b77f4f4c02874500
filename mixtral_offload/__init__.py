"""Run big Mixture-of-Experts models on small devices: expert cache, quantized experts, transformers underneath."""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "from_pretrained": "offload",
    "load_tokenizer": "tokenizer",
    "ChatSession": "chat",
    "generate_batch": "batch",
    "Request": "batch",
    "memory_use": "memory",
    "record": "recorder",
    "RoutingTrace": "trace",
    "simulate": "replay",
    "convert_checkpoint": "convert",
    "Quantization": "quantization",
    "OffloadError": "errors",
}
__all__ = [*_HOMES]


def __getattr__(name):
    # torch and transformers take seconds to import: only those who use them wait
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
