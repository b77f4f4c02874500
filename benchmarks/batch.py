"""Many sequences at once on the shipped model: speed and traffic against the batch size, and an ablation.

    python benchmarks/batch.py [--requests 64] [--cache-sizes 2 4 6] [--batch-sizes 1 2 4 8 16 32 64]

Runs `mixtral_offload.experiments.batching` (2211.10017) with one link for all cache sizes, throttled until
the copy of an expert takes `--ratio` times one layer's compute. One core computes; only the comparison of
single passes with transformers' own experts uses all. Prints tables and writes benchmarks/results/batch.json
and .png.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from machine import machine
from packed_vs_transformers import DEQUANTIZED, PACKED, compare_passes

from mixtral_offload import from_pretrained, load_tokenizer
from mixtral_offload.experiments.baselines import layer_seconds, throttled
from mixtral_offload.experiments.batching import (
    BATCH_SIZES,
    LENGTHS,
    ablate_batch,
    expected_bytes,
    measure_batches,
    measure_usage,
    workload,
)
from mixtral_offload.experiments.plots import plot_batches

RESULTS = Path(__file__).parent / "results"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, help="of the ablation's answers, drawn from these"
    )
    parser.add_argument("--even", type=int, default=16, help="length of all answers in the other runs")
    parser.add_argument("--cache-sizes", type=int, nargs="+", default=(2, 4, 6))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument(
        "--prefetch", type=int, default=2, help="predictions, in rows of their own; 0: no such rows"
    )
    parser.add_argument(
        "--prefetch-batch-sizes", type=int, nargs="+", default=(1, 32), help="to measure predictions with"
    )
    parser.add_argument("--ablation-batch", type=int, default=32)
    parser.add_argument("--ablation-cache", type=int, default=4)
    parser.add_argument(
        "--ratio", type=float, default=5.5, help="one expert's copy over one layer's compute; 0: as it is"
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--passes", type=int, default=15, help="turns of single passes, everything on the device"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "batch.json")
    return parser.parse_args()


def build(arguments: argparse.Namespace, cache_size: int, prefetch: int = 0):
    """Build the shipped model, with room for the largest batch."""
    most = max(*arguments.batch_sizes, *arguments.prefetch_batch_sizes, arguments.ablation_batch)
    return from_pretrained(
        cache_size=cache_size, prefetch=prefetch, store="ram", batch_size=most, device="cpu"
    )


def sweeps(arguments: argparse.Namespace, requests, resident, layer_s: float) -> dict:
    """Return (cache size, predictions) -> `Throughput` by batch size; all experts cached means no link."""
    found = {}
    for prefetch in dict.fromkeys((0, arguments.prefetch)):
        sizes = arguments.prefetch_batch_sizes if prefetch else arguments.batch_sizes
        for k in arguments.cache_sizes:
            model = build(arguments, k, prefetch)
            with throttled(model, arguments.ratio or None, layer_s):
                found[k, prefetch] = measure_batches(model, requests, sizes, arguments.repeats)
            model.offload.close()
            print(
                f"\n{k} experts of a layer cached, {prefetch} predictions\n{found[k, prefetch]}", flush=True
            )
    n_experts = resident.offload.checkpoint.n_experts
    found[n_experts, 0] = measure_batches(resident, requests, arguments.batch_sizes, arguments.repeats)
    print(f"\neverything on the device\n{found[n_experts, 0]}", flush=True)
    return found


def ablations(arguments: argparse.Namespace, requests, model, resident, layer_s: float) -> dict:
    """Return where the experts are -> `Throughput` by variant."""
    settings = requests, arguments.ablation_batch, arguments.repeats
    found = {
        f"{arguments.ablation_cache} cached": ablate_batch(
            model, *settings, arguments.ratio or None, layer_s
        ),
        "everything on the device": ablate_batch(resident, *settings),
    }
    for name, of in found.items():
        print(f"\nbatch {arguments.ablation_batch}, {name}\n{of}", flush=True)
    return found


def passes(arguments: argparse.Namespace, requests, resident) -> dict:
    """Compare single passes with transformers' own experts, on all cores."""
    torch.set_num_threads(os.cpu_count())
    dequantized = from_pretrained(dequantize_on_load=True, device="cpu")
    found = compare_passes(resident, dequantized, requests, arguments.batch_sizes, arguments.passes)
    over = {name: {n: found.over_best(name, n) for n in found.seconds} for name in (PACKED, DEQUANTIZED)}
    for name, of in over.items():
        rows = ", ".join(f"{n}: {ratio:.2f}" for n, ratio in of.items())
        print(f"\none pass, all on the device, {name}: speed over transformers' best by batch size: {rows}")
    print(f"logits differ by {found.difference}")
    return vars(found) | {"over_best": over, "threads": torch.get_num_threads()}


def main() -> None:
    arguments, began_s = parse(), time.perf_counter()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer()
    requests = workload(tokenizer, arguments.requests, lengths=[arguments.even])
    mixed = workload(tokenizer, arguments.requests, lengths=arguments.lengths)
    resident, model = build(arguments, 8), build(arguments, arguments.ablation_cache)
    layer_s, usage = layer_seconds(model), measure_usage(resident, requests)
    found = sweeps(arguments, requests, resident, layer_s)
    expert_bytes = model.offload.layout.n_bytes
    expected = {
        k: {n: expected_bytes(usage, k, expert_bytes, requests, n) for n in arguments.batch_sizes}
        for k in arguments.cache_sizes
    }
    ablated = ablations(arguments, mixed, model, resident, layer_s)
    result = {
        "machine": machine(),
        "settings": {name: str(of) for name, of in vars(arguments).items() if name != "out"},
        "requests": [[len(of.ids), of.max_new_tokens] for of in mixed],
        "layer_s": layer_s,
        "expert_bytes": expert_bytes,
        "usage": usage.tolist(),
        "sweeps": [
            {"cache_size": k, "prefetch": prefetch} | of.to_dict() for (k, prefetch), of in found.items()
        ],
        "expected_bytes_per_token": expected,
        "ablations": {name: of.to_dict() for name, of in ablated.items()},
        "passes": passes(arguments, requests, resident),
    }
    result["total_s"] = time.perf_counter() - began_s
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    shown = {k: of for (k, prefetch), of in found.items() if not prefetch}
    figure, _ = plot_batches(shown, expected, ablated, resident.offload.checkpoint.n_experts)
    figure.savefig(arguments.out.with_suffix(".png"), dpi=120)
    print(f"{result['total_s']:.0f} s in all")


if __name__ == "__main__":
    main()
