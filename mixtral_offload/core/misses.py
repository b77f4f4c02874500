"""Which missing experts the CPU computes where they lie, and which are copied: one rule for live and replay.

Numbers only. `runtime/miss_costs.py` measures them, `analysis/projection.py` estimates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from mixtral_offload.core.policies import Key
from mixtral_offload.errors import OptionError

COPY, CPU, AUTO = MISSES = ("copy", "cpu", "auto")


@dataclass(frozen=True)
class MissCosts:
    """How long a miss takes, in seconds or in any one unit.

    Args:
        copy_s: One expert over the link.
        cpu_expert_s: One expert for one token, on the CPU.
        cpu_token_s: What each further token adds to it.
    """

    copy_s: float
    cpu_expert_s: float
    cpu_token_s: float = 0.0

    def on_cpu(self, n_tokens: int) -> float:
        """Return how long the CPU computes one expert."""
        return self.cpu_expert_s + self.cpu_token_s * (n_tokens - 1)


@dataclass(frozen=True)
class MissRule:
    """What happens to an expert that a layer needs and the device lacks.

    Depends on nothing that changes while a model runs: a replay makes a live run's choices again.

    Args:
        mode: COPY: all are copied. Otherwise as many as there are empty slots are copied, or a fast CPU would
            leave the cache empty. CPU: the CPU computes the rest. AUTO: link and CPU share the rest so that
            both are done soonest.
        costs: For AUTO.

    Raises:
        OptionError: Unknown mode, or AUTO without costs.
    """

    mode: str = COPY
    costs: MissCosts | None = None

    def __post_init__(self) -> None:
        if self.mode not in MISSES:
            raise OptionError("unknown misses", expected=", ".join(MISSES), found=self.mode)
        if self.mode == AUTO and self.costs is None:
            raise OptionError('misses="auto" needs the costs of a copy and of the CPU', found=None)

    def for_cpu(
        self, missing: Sequence[Key], n_tokens: Sequence[int], n_coming: int, n_free: int
    ) -> list[Key]:
        """Choose those that the CPU computes, in the order in which it does.

        Args:
            missing: Experts that a layer call needs, and that are neither on the device nor on their way.
            n_tokens: How many tokens each is for.
            n_coming: Copies of other experts that the call waits for; counted as whole ones.
            n_free: Slots that hold nothing yet.

        Returns:
            Some of `missing`. AUTO: those for few tokens, as many as let link and CPU end soonest; of equally
            good numbers the smallest, because a copy also fills the cache.
        """
        n_coming += min(n_free, len(missing))
        missing, n_tokens = missing[n_free:], n_tokens[n_free:]
        if self.mode == COPY or not missing:
            return []
        if self.mode == CPU:
            return [*missing]
        costs = self.costs
        assert costs is not None
        order = sorted(range(len(missing)), key=lambda i: n_tokens[i])
        best, best_s, cpu_s = 0, inf, 0.0
        for n in range(len(missing) + 1):
            if n:
                cpu_s += costs.on_cpu(n_tokens[order[n - 1]])
            end_s = max(cpu_s, (len(missing) - n + n_coming) * costs.copy_s)
            if end_s < best_s:
                best, best_s = n, end_s
        return [missing[i] for i in order[:best]]
