"""How long things take on a device: one copy, one layer, one expert, and what is between two tokens.

Numbers only: `experiments/calibration.py` measures them, `analysis/projection.py` estimates them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite

from mixtral_offload.core.copy_order import CHUNKS
from mixtral_offload.core.misses import MissCosts
from mixtral_offload.errors import OptionError
from mixtral_offload.units import check_whole


@dataclass(frozen=True)
class DeviceCosts:
    """Times in seconds (or in any one unit: a timed replay's results are in the same).

    Args:
        copy_s: One expert over the link, in `chunks` equal parts.
        attention_s: A layer, for one token, until its routing is known.
        expert_s: One expert for one token.
        token_s: Everything outside the layers, for each pass: head and sampling of the token before, the
            host's own work, embedding. It comes before layer 0 and before any prediction.
        prompt_attention_s: What each token after the first one of a pass adds to attention. 0: a prompt's
            pass costs as much as one token's, because reading weights is the limit and not arithmetic.
        prompt_expert_s: The same for an expert.
        chunks: Parts of a copy.
        host_s: The host's own time for a layer. A layer's compute takes no less; the difference is before its
            routing.
        latency_s: From a copy's last byte to when the device may use the expert; costs nothing where nothing
            waits.
        predict_s: Predicting after a layer, or from the embedding.
        cpu_expert_s: One expert for one token on the CPU, beside the device. 0: it computes none.
        prompt_cpu_expert_s: What each token after the first one adds to it.

    Raises:
        OptionError: For a time that is negative or not finite, and for 0 where something has to last.
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
    predict_s: float = 0.0
    cpu_expert_s: float = 0.0
    prompt_cpu_expert_s: float = 0.0

    def __post_init__(self) -> None:
        check_whole("chunks", self.chunks)
        for name in (field.name for field in fields(self) if field.name != "chunks"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
            must_last = name in ("copy_s", "attention_s", "expert_s")
            if not is_number or value < 0 or (must_last and value == 0):
                expected = f"seconds, {'more than 0' if must_last else '0 or more'}"
                raise OptionError(f"impossible {name}", expected=expected, found=value)

    @property
    def of_misses(self) -> MissCosts:
        """What a miss costs.

        Raises:
            OptionError: If the CPU computes none.
        """
        if not self.cpu_expert_s:
            raise OptionError(
                "the CPU computes no experts with these costs", expected="cpu_expert_s", found=0
            )
        return MissCosts(self.copy_s, self.cpu_expert_s, self.prompt_cpu_expert_s)
