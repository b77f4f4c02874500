"""A model that is dropped gives all its memory back.

As a program, it is the process of its own in which that is measured.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys

import psutil
import torch

from mixtral_offload.runtime.build import from_pretrained

from .result import Result

MIB = 1 << 20


def check_drops(n: int = 30, warm_up: int = 15) -> Result:
    """Build, use and drop a model n times, in turns with each kind of store; memory must not drift by 1 MiB.

    The drift is the difference of the medians of the last and the first third of the process's own memory
    (USS), after `warm_up` models, when the allocator's caches have settled.
    """
    command = [sys.executable, "-m", __name__, str(warm_up + n)]
    # one arena: glibc gives concurrent threads several, whose free memory changes the result by 4 MiB
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    held = json.loads(done.stdout)[warm_up:]
    third = max(n // 3, 1)
    drift = sorted(held[-third:])[third // 2] - sorted(held[:third])[third // 2]
    return Result(
        "models built and dropped, memory drift under 1 MiB",
        int(abs(drift) >= MIB),
        n,
        "models",
        details={"drift_bytes": drift},
    )


def memory_after_each(n: int) -> list[int]:
    """This process's own memory, in bytes, after each of n models."""
    ways = (
        {"cache_size": 2},
        {"cache_size": 2, "store": "disk"},
        {"cache_size": 2, "prefetch": 2, "throttle": "1GB"},
    )
    held = []
    for number in range(n):
        _use(ways[number % len(ways)])
        held.append(own_bytes())
    return held


def _use(options: dict) -> None:
    model = from_pretrained(device="cpu", **options)
    model.generate(torch.tensor([[300, 700, 900]]), max_new_tokens=4, do_sample=False)


def own_bytes() -> int:
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_full_info().uss


if __name__ == "__main__":
    print(json.dumps(memory_after_each(int(sys.argv[1]))))
