"""Position encodings that depend on how long a whole pass is.

Knows transformers' rotary embeddings (modeling_rope_utils.py). Knows nothing of caches.
"""

from __future__ import annotations

from torch import nn

#: their frequencies follow from the largest position of a pass, and so do all keys that it computes. Those of
#: "dynamic" do
#: so only beyond max_position_embeddings, where no context of this package reaches
BY_LENGTH = frozenset(("longrope",))


def depend_on_length(model: nn.Module) -> bool:
    """Whether the keys of one token may differ with the tokens beside it: then a KV cache of an earlier pass,
    or a batch with a longer sequence, gives other answers than the sequence alone."""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if not BY_LENGTH.isdisjoint(kind.values() if isinstance(kind, dict) else (kind,)):
            return True
    return False
