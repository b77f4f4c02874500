"""What a check has found, and on which machine."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "amx_int8", "neon", "asimd")


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
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    fields = dict((part.strip() for part in line.partition(":")[::2]) for line in lines if ":" in line)
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "instruction_sets": " ".join(flag for flag in FLAGS if flag in flags),
        "threads": str(torch.get_num_threads()),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "system": platform.system(),
    }
