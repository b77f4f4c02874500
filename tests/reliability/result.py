"""What a check has found, and on which machine."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict, dataclass

import torch

from mixtral_offload.system.machine import processor


@dataclass
class Result:
    """One line of the table.

    Attributes:
        what: What was tried.
        wrong: How often it went wrong.
        tried: How often it was tried.
        unit: What was counted.
        seconds: Wall time of the check.
        details: Anything else worth keeping.
    """

    what: str
    wrong: int
    tried: int
    unit: str
    seconds: float = 0.0
    details: dict | None = None

    def asdict(self) -> dict:
        return asdict(self)


def machine() -> dict[str, str]:
    """Processor, its instruction sets that matter here, and versions."""
    name, sets = processor()
    return {
        "processor": name,
        "instruction_sets": sets,
        "threads": str(torch.get_num_threads()),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "system": platform.system(),
    }
