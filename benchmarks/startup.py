"""From a checkpoint to the first token, part by part, compared with plainly reading the same files.

    python benchmarks/startup.py [FOLDER] [--store ram] [--cache-size 4] [--repeats 5]

Each start and each plain read has a fresh process, and they alternate; files are in the page cache for both,
and both first touch as much memory as they will need (see `loading.py`). Default of FOLDER: the shipped
model. Writes benchmarks/results/startup.json; seconds are medians, parts:

    import       of this package, torch and transformers
    skeleton     the model without any weights
    dense part   all weights but the experts
    experts      the cache and the experts' store
    the rest     of `from_pretrained`: opening the checkpoint, the plan, hooks
    first token  `generate` for one token after a prompt of 8
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import loading
from machine import machine

RESULTS = Path(__file__).parent / "results"
PARTS = ("import", "skeleton", "dense part", "experts", "the rest", "first token")
PROMPT = 8


def start(folder: str | None, options: dict) -> dict:
    """In a process of its own: seconds of each part, and the bytes that were read."""
    began = time.perf_counter()
    import torch

    from mixtral_offload.runtime import build as offload
    from mixtral_offload.weights.source import DEMO

    seconds = {"import": time.perf_counter() - began}
    functions = {"build_skeleton": "skeleton", "load_dense": "dense part", "_build_cache": "experts"}
    for function, part in functions.items():
        setattr(offload, function, timed(getattr(offload, function), seconds, part))
    touched = sum(path.stat().st_size for path in Path(folder or DEMO).glob("*.safetensors"))
    loading.touch(2 * touched)
    began = time.perf_counter()
    model = offload.from_pretrained(folder, **options)
    built_s = time.perf_counter() - began
    missing = set(functions.values()) - set(seconds)
    if missing:
        raise RuntimeError(f"from_pretrained has no part {missing} any more: name its function here")
    seconds["the rest"] = built_s - sum(seconds[part] for part in functions.values())
    ids = torch.arange(3, 3 + PROMPT, device=model.get_input_embeddings().weight.device)[None]
    began = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0
    )
    seconds["first token"] = time.perf_counter() - began
    plan, checkpoint = model.offload.plan, model.offload.checkpoint
    n_bytes = plan.ram_bytes + plan.n_resident * checkpoint.layout.n_bytes + checkpoint.dense_bytes
    moved = model.offload.stats.bytes_moved if plan.store == "disk" else 0
    model.offload.cache.close()
    return {
        "seconds": seconds,
        "bytes": n_bytes + moved,
        "store": plan.store,
        "model": checkpoint.folder.name,
    }


def timed(function, seconds: dict, part: str):
    """The function, which adds its seconds to `part`."""

    def call(*arguments, **options):
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - began

    return call


def in_process(folder: str | None, options: dict) -> dict:
    command = [sys.executable, __file__, "--start", json.dumps([folder, options])]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def measure(folder: str | None, options: dict, repeats: int) -> dict:
    """Medians over `repeats` alternating starts and plain reads, after one start that is not counted."""
    from mixtral_offload.weights.source import DEMO

    first = in_process(folder, options)  # brings the files into the page cache
    runs, reads = [], []
    for _ in range(repeats):
        runs.append(in_process(folder, options))
        read = loading.in_process(["--read", str(folder or DEMO), str(first["bytes"])])
        reads.append(read["read_s"])
    seconds = {part: statistics.median(run["seconds"][part] for run in runs) for part in PARTS}
    total_s = statistics.median(sum(run["seconds"].values()) for run in runs)
    read_s, loaded_s = statistics.median(reads), total_s - seconds["import"]
    return first | {
        "seconds": seconds,
        "total_s": total_s,
        "read_s": read_s,
        "over_read": loaded_s / read_s,
        "over_read_with_import": total_s / read_s,
        "all_seconds": [run["seconds"] for run in runs],
        "all_read_s": reads,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", nargs="?", help="a checkpoint; default: the model that ships with the package"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--store", default="ram", choices=("ram", "disk", "auto"))
    parser.add_argument("--cache-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "startup.json")
    parser.add_argument("--start", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.start is not None:
        print(json.dumps(start(*arguments.start)))
        return
    options = {name: getattr(arguments, name) for name in ("device", "store", "cache_size")}
    result = measure(arguments.folder, options, arguments.repeats)
    result |= {"machine": machine(), "options": options}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for part, seconds in result["seconds"].items():
        print(f"{part:12} {seconds:8.3f} s")
    print(
        f"to the first token {result['total_s']:.2f} s; without the import {result['over_read']:.1f} times"
        f" as long as reading {result['bytes'] / 1e6:.0f} MB plainly ({result['read_s']:.3f} s)"
    )


if __name__ == "__main__":
    main()
