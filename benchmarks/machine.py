"""Where a benchmark ran: processor, instruction sets, threads, and the kernels that it used."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from mixtral_offload.weights.native import find_native

SETS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")


def machine(device: str = "cpu") -> dict:
    """Describe the machine, in JSON's types."""
    info = {"processor": platform.processor() or platform.machine(), "instruction_sets": ""}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                info["processor"] = value.strip()
            elif name.strip() in ("flags", "Features"):
                info["instruction_sets"] = " ".join(one for one in SETS if one in value.split())
                break
    except OSError:  # not Linux
        pass
    native, why = find_native()
    info |= {"kernels": why if native is None else native.name, "cores": os.cpu_count()}
    info |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if device != "cpu":
        info["card"] = torch.cuda.get_device_name(device)
    return info


def words(of: dict) -> str:
    """A machine in one line."""
    sets = f" ({of['instruction_sets']})" if of["instruction_sets"] else ""
    return of.get("card") or f"{of['processor']}{sets}, {of['threads']} threads, kernels: {of['kernels']}"
