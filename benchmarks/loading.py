"""Peak memory and speed of building an offloaded model, for each store and cache size.

    python benchmarks/loading.py [--gb 2.0] [--json FILE]

Makes a synthetic checkpoint, reads its files once plainly, then builds the model from them, each in its own
process, alternating, with files in the page cache for both. On a virtual machine, memory that the host has
yet to provide costs more than anything measured here, so each process first touches as much as it will need.
The bound on memory: slots + store in RAM + dense part + one expert + 300 MB.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine
from shapes import mixtral_config
from synthetic import write_checkpoint

from mixtral_offload.weights.hqq import PAPER

CASES = (("ram", 2), ("ram", 4), ("disk", 4), ("auto", 8))
ALLOWANCE_BYTES = 300_000_000
FIXTURE = Path(__file__).parent.parent / "tests/fixtures/published-format"


def touch(n_bytes: int) -> None:
    """Make the host provide this much memory, or half of what is free, then free it."""
    import torch

    torch.ones(min(n_bytes, half_of_free()), dtype=torch.uint8)


def half_of_free() -> int:
    import psutil

    return psutil.virtual_memory().available // 2


def build(folder: str, store: str, cache_size: int, n_touched: int) -> dict:
    """In a process of its own: build the model; the peak is what exceeds the memory after the imports."""
    import psutil

    from mixtral_offload.runtime.build import from_pretrained
    from mixtral_offload.runtime.options import parse_options

    from_pretrained(FIXTURE, device="cpu")  # pays for imports and first-use allocations
    touch(n_touched)
    # clear_refs sets the high-water mark back to what is resident now
    Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    model = from_pretrained(folder, store=store, cache_size=cache_size, device="cpu", compile=False)
    build_s = time.perf_counter() - begin
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    plan, checkpoint = model.offload.plan, model.offload.checkpoint
    item = parse_options({"device": "cpu"}).dtype.itemsize
    dense = sum(p.numel() * item for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    bound = plan.device_bytes + plan.ram_bytes + dense + checkpoint.layout.n_bytes + ALLOWANCE_BYTES
    return {
        "asked": store, "cache_size": cache_size, "store": plan.store, "build_s": build_s,
        "bytes": plan.ram_bytes + plan.n_resident * checkpoint.layout.n_bytes + checkpoint.dense_bytes,
        "peak_bytes": peak - before, "bound_bytes": bound,
    }  # fmt: skip


def read_plainly(folder: Path, n_bytes: int) -> float:
    """Measure the seconds to read up to n_bytes of the checkpoint's files.

    They are read into memory that is kept, as a store keeps it; or, if that is more than half of what is
    free, file by file into memory that is freed.
    """
    touch(2 * n_bytes)
    is_kept = n_bytes <= half_of_free()
    begin, kept, left = time.perf_counter(), [], n_bytes
    for path in sorted(folder.glob("*.safetensors"), reverse=True):  # the dense part comes last by name
        if left <= 0:
            break
        kept = [*(kept if is_kept else ()), path.read_bytes()]
        left -= len(kept[-1])
    return time.perf_counter() - begin


def in_process(arguments: list[str]) -> dict:
    output = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def make(folder: Path, gb: float, vocab: int = 32000) -> int:
    """Write a checkpoint with at least `gb` GB of experts; return its bytes."""
    layers = math.ceil(gb * 1e9 / 8 / 66.5e6)
    n_bytes = write_checkpoint(folder, mixtral_config(layers, vocab=vocab), PAPER[2], PAPER[4])
    os.sync()  # writing it back must not run during the measurement
    return n_bytes


def measure(folder: Path, n_bytes: int, repeats: int) -> list[dict]:
    results = []
    for store, cache_size in CASES:
        runs, reads = [], []
        case = ["--build", str(folder), store, str(cache_size), str(2 * n_bytes)]
        in_process(case)  # brings the files into the page cache
        for _ in range(repeats):
            runs.append(in_process(case))
            reads.append(in_process(["--read", str(folder), str(runs[-1]["bytes"])])["read_s"])
        read_s = statistics.median(reads)
        build_s = statistics.median(run["build_s"] for run in runs)
        worst = max(runs, key=lambda run: run["peak_bytes"])
        results.append(worst | {"build_s": build_s, "read_s": read_s, "speed_ratio": read_s / build_s})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.0, help="size of the experts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--build", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        folder, store, *numbers = arguments.build
        print(json.dumps(build(folder, store, *map(int, numbers))))
        return
    if arguments.read:
        print(json.dumps({"read_s": read_plainly(Path(arguments.read[0]), int(arguments.read[1]))}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        n_bytes = make(folder, arguments.gb)
        results = measure(folder, n_bytes, arguments.repeats)
    print(f"checkpoint {n_bytes / 1e9:.2f} GB, Mixtral-8x7B at 2 bits")
    for r in results:
        print(
            f"store {r['store'] or 'device'!s:6} cache {r['cache_size']}: "
            f"peak {r['peak_bytes'] / 1e6:6.0f} MB of {r['bound_bytes'] / 1e6:6.0f} MB allowed; "
            f"build {r['build_s']:.2f} s, reading {r['read_s']:.2f} s, ratio of speeds {r['speed_ratio']:.2f}"
        )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine(), "checkpoint_bytes": n_bytes, "cases": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
