"""Where a benchmark ran: processor, instruction sets, threads, and the kernels that it used."""

from __future__ import annotations

import os

import torch

from mixtral_offload.system.machine import processor
from mixtral_offload.weights.native import find_native


def machine(device: str = "cpu") -> dict:
    """Describe the machine, in JSON's types."""
    name, sets = processor()
    native, why = find_native()
    info = {"processor": name, "instruction_sets": sets, "kernels": why if native is None else native.name}
    info |= {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return info if device == "cpu" else info | {"card": torch.cuda.get_device_name(device)}


def words(of: dict) -> str:
    """A machine in one line."""
    sets = f" ({of['instruction_sets']})" if of["instruction_sets"] else ""
    threads = f"{of['threads']} thread{'s' if of['threads'] > 1 else ''}"
    return of.get("card") or f"{of['processor']}{sets}, {threads}, kernels: {of['kernels']}"
