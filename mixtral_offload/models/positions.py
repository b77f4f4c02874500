"""Position encodings that depend on the length of a whole pass."""

from __future__ import annotations

from torch import nn

#: types whose frequencies, and so all keys, follow from the largest position of a pass. Those of "dynamic" do
#: so only beyond max_position_embeddings, which no context of this package exceeds
BY_LENGTH = frozenset(("longrope",))


def depend_on_length(model: nn.Module) -> bool:
    """Return whether the keys of one token may differ with the other tokens of its pass.

    Then a KV cache of an earlier pass, or a batch with a longer sequence, gives other answers than the
    sequence alone.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if not BY_LENGTH.isdisjoint(kind.values() if isinstance(kind, dict) else (kind,)):
            return True
    return False
