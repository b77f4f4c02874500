"""The paper's Table 2 on the shipped model: the effect of the LRU cache and of speculative loading.

    python benchmarks/ablation.py [--cache-sizes 2 4] [--tokens 48] [--repeats 5] [--ratio 5.5]

Runs `mixtral_offload.experiments.ablation` with one link for all cache sizes, throttled until the copy of an
expert takes `ratio` times one layer's compute, measured in the same run. Prints tables and writes
benchmarks/results/ablation.json.
"""

import argparse
import json
from pathlib import Path

import torch
from machine import machine

from mixtral_offload import from_pretrained, load_tokenizer
from mixtral_offload.errors import CapacityError
from mixtral_offload.experiments.ablation import PROMPTS, ablate, generate
from mixtral_offload.experiments.baselines import throttled
from mixtral_offload.models.checkpoint import open_checkpoint
from mixtral_offload.runtime.prefetch import MOMENTS
from mixtral_offload.weights.source import DEMO

__all__ = ["PROMPTS", "RESULTS", "generate"]  # for the other benchmarks
RESULTS = Path(__file__).parent / "results"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache-sizes", type=int, nargs="+", default=(2, 4))
    parser.add_argument("--prefetch", type=int, default=2)
    parser.add_argument("--look-ahead", type=int, default=1)
    parser.add_argument(
        "--moments", nargs="+", default=MOMENTS, choices=("before", "after"), help="when to predict"
    )
    parser.add_argument("--tokens", type=int, default=48, help="generated for each of four prompts")
    parser.add_argument("--naive-tokens", type=int, default=8, help="the same for the slowest variant")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--ratio", type=float, default=5.5, help="one expert's copy over one layer's compute; 0: as it is"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.json")
    return parser.parse_args()


def models(arguments: argparse.Namespace):
    """Build the model with slots for every variant, and one all on the device (None if too big)."""
    place = {"device": arguments.device}
    slots = {"cache_size": max(arguments.cache_sizes), "prefetch": arguments.prefetch}
    model = from_pretrained(arguments.model, **slots, look_ahead=arguments.look_ahead, store="ram", **place)
    try:
        everything = open_checkpoint(arguments.model).n_experts
        return model, from_pretrained(arguments.model, cache_size=everything, **place)
    except CapacityError as error:
        print(f"without the row of everything on the device: {error}")
        return model, None


def main():
    arguments = parse()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    tokenizer = load_tokenizer(arguments.model)
    model, resident = models(arguments)
    same = {name: getattr(arguments, name) for name in ("prefetch", "look_ahead", "moments", "tokens")}
    same |= {"naive_tokens": arguments.naive_tokens, "repeats": arguments.repeats, "ratio": None}
    found = {}
    with throttled(model, arguments.ratio or None):
        for size in arguments.cache_sizes:
            found[size] = ablate(model, tokenizer, PROMPTS, cache_size=size, resident=resident, **same)
            ahead = f"{arguments.prefetch} predictions, {arguments.look_ahead} layer(s) ahead"
            print(f"\ncache of {size}, {ahead}\n{found[size]}", flush=True)
    columns = ("tokens_per_s", "prefetch_saves", "seconds_per_token", "counters")
    runs = {size: {name: getattr(of, name) for name in columns} for size, of in found.items()}
    first = found[arguments.cache_sizes[0]]
    settings = {k: str(v) for k, v in vars(arguments).items() if k != "out"} | {"model": arguments.model.name}
    result = {
        "machine": machine(arguments.device),
        "layer_s": first.layer_s,
        "copy_s": first.copy_s,
        "runs": runs,
        "settings": settings,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
