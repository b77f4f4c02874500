"""How long things take on a card: one copy, one layer, one expert, and what lies between two tokens.

Knows numbers. Knows nothing of how they are measured (`experiments/calibration.py`) or of traces that are played against them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite

from mixtral_offload.core.copy_order import CHUNKS
from mixtral_offload.errors import OptionError
from mixtral_offload.units import check_whole


@dataclass(frozen=True)
class Card:
    """Times in seconds (or any one unit: what comes out of a replay is in the same).

    copy_s: one expert over the link, in `chunks` equal parts. attention_s: a layer, for one token, until its routing
    is known. expert_s: one expert for one token. token_s: what lies beside the layers for each pass (head and sampling
    of the token before, the host's own work, embedding), before layer 0 and before any guess.
    prompt_attention_s, prompt_expert_s: what each token after a pass's (or an expert's) first one adds. 0: a prompt's
    pass costs what one token's does, as where reading weights is the limit and not arithmetic.
    guess_s: making the guesses after a layer, or from the embedding.
    host_s: the host's own time for a layer; a layer's compute takes no less (the difference lies before its routing).
    latency_s: from a copy's last byte to when the device may use the expert; costs nothing where nobody waits.
    Raises OptionError for a time that is negative or not finite, and for 0 where something has to last.
    """

    copy_s: float
    attention_s: float
    expert_s: float
    token_s: float = 0.0
    prompt_attention_s: float = 0.0
    prompt_expert_s: float = 0.0
    chunks: int = CHUNKS
    host_s: float = 0.0
    latency_s: float = 0.0
    guess_s: float = 0.0

    def __post_init__(self):
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name == "chunks":
                check_whole(name, value)
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
            if name in ("copy_s", "attention_s", "expert_s"):
                good, expected = number and value > 0, "seconds, more than 0"
            else:
                good, expected = number and value >= 0, "seconds, 0 or more"
            if not good:
                raise OptionError(f"impossible {name}", expected=expected, found=value)
