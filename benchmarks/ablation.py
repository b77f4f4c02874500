"""The paper's Table 2 on the shipped model: what the LRU cache and speculative loading are each worth.

    python benchmarks/ablation.py [--cache-sizes 2 4] [--tokens 48] [--repeats 5] [--ratio 5.5]

The link is slowed until the copy of one expert takes `ratio` times one layer's compute, measured in the same run
(2312.17238 on a T4: 66.4 MB at 12 GB/s is 5.5 ms, against about 1 ms). One model, one store and one link serve all
variants, which take turns. On the CPU one core computes and the other carries the link. Only decoding is timed. Prints
tables and writes benchmarks/results/ablation.json.
"""

import argparse
import json
import platform
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LogitsProcessorList

from mixtral_offload import from_pretrained, load_tokenizer
from mixtral_offload.cache import ExpertCache
from mixtral_offload.offload import DEMO
from mixtral_offload.prefetch import MOMENTS, Prefetcher, find_gates
from mixtral_offload.transfer import make_engine

RESULTS = Path(__file__).parent / "results"
#: tokens/s on a T4 at 2 bits (2312.17238, table 2)
PAPER = {"full": 2.092, "without prefetch": 1.567, "without cache and prefetch": 1.168, "naive": 0.661}
PROMPTS = [
    "Tell me a story about a fox.",
    "How do I sort a list in Python?",
    "Tell me a story about a boy named Tom.",
    "Who are you and what can you do?",
]


class Forgetful(ExpertCache):
    """Keeps nothing from one pass of a layer to the next: what a token needs is copied each time."""

    def serve(self, layer, experts, meanwhile=None):
        self._pools[layer].held.clear()
        yield from super().serve(layer, experts, meanwhile)


class Naive(Forgetful):
    """As accelerate offloads a layer: all of its experts are copied before the first one runs."""

    def serve(self, layer, experts, meanwhile=None):
        everything = dict(super().serve(layer, range(self.n_slots(layer)), meanwhile))
        for expert in experts:
            yield expert, everything[expert]


def variants(model, cache_size: int, arguments) -> dict[str, ExpertCache]:
    """name -> cache, all over the same store and the same engine."""
    offload = model.offload
    base = offload.cache
    n_experts, top_k = offload.checkpoint.n_experts, offload.checkpoint.top_k

    def cache(kind, n_slots, n_staging=0):
        layers = dict.fromkeys(offload.checkpoint.layers, (n_slots, ()))
        return kind(base.layout, layers, base.store, base.engine, offload.options.device, n_staging=n_staging)

    n_staging = arguments.prefetch * arguments.look_ahead + 1
    return {
        "full": cache(ExpertCache, cache_size, n_staging),
        "without prefetch": cache(ExpertCache, cache_size),
        "without cache and prefetch": cache(Forgetful, top_k),
        "naive": cache(Naive, n_experts),
    }


@torch.inference_mode()
def generate(model, prompts, n_tokens: int) -> tuple[float, list]:
    """Seconds per token after the first of each prompt, and what was generated."""
    seconds, out = 0.0, []
    for prompt in prompts:
        times: list[float] = []

        def stamp(ids, scores, times=times):
            times.append(time.perf_counter())
            return scores

        processors = LogitsProcessorList([stamp])
        out.append(
            model.generate(
                **prompt,
                max_new_tokens=n_tokens,
                min_new_tokens=n_tokens,
                do_sample=False,
                logits_processor=processors,
            )
        )
        seconds += times[-1] - times[0]
    return seconds / (n_tokens - 1) / len(prompts), out


@contextmanager
def switched(model, cache: ExpertCache, speculation):
    """The model with this cache, empty; with `speculation`, it guesses."""
    offload = model.offload
    offload.cache = cache
    cache.clear()
    cache.stats.reset()
    if speculation is not None:
        gates = find_gates(model, offload.modules)
        how = speculation.prefetch, speculation.look_ahead
        offload.prefetcher = Prefetcher(
            model, gates, offload.prefetch, *how, moments=tuple(speculation.moments)
        )
    yield
    if offload.prefetcher is not None:
        offload.prefetcher.close()
        offload.prefetcher = None


def measure(model, resident, prompts, cache_size: int, arguments) -> dict:
    """Seconds per token of each variant, repeat and prompt, and its counters; every answer is compared with the resident
    model's. The variants take turns with each prompt."""
    expected = [generate(resident, [prompt], arguments.tokens)[1][0] for prompt in prompts]
    seconds, counters = {"everything resident": []}, {}
    chosen = variants(model, cache_size, arguments)
    for _ in range(arguments.repeats):
        for prompt, answer in zip(prompts, expected):
            seconds["everything resident"].append(generate(resident, [prompt], arguments.tokens)[0])
            for name, cache in chosen.items():
                n_tokens = arguments.naive_tokens if name == "naive" else arguments.tokens
                with switched(model, cache, arguments if cache.n_staging else None):
                    taken, (out,) = generate(model, [prompt], n_tokens)
                assert torch.equal(out, answer[:, : out.shape[1]]), f"{name} changed an answer"
                seconds.setdefault(name, []).append(taken)
                counters[name] = add(counters.get(name), vars(cache.stats))
    speed = {name: 1 / statistics.median(taken) for name, taken in seconds.items()}
    saved = [1 - a / b for a, b in zip(seconds["full"], seconds["without prefetch"])]
    return {
        "tokens_per_s": speed,
        "prefetch_saves": statistics.quantiles(saved),
        "seconds_per_token": seconds,
        "counters": counters,
    }


def add(total: dict | None, more: dict) -> dict:
    return {name: (total or {}).get(name, 0) + value for name, value in more.items()}


def table(result: dict) -> str:
    speed, counters = result["tokens_per_s"], result["counters"]
    lines = [f"{'':28}tokens/s  over naive  paper's T4, over naive  hits  MB moved (wasted)"]
    for name, value in speed.items():
        paper = f"{PAPER[name] / PAPER['naive']:.2f}" if name in PAPER else ""
        row, rest = counters.get(name), ""
        if row:
            hit_rate = row["hits"] / (row["hits"] + row["misses"])
            rest = f"{hit_rate:5.2f} {row['bytes_moved'] / 1e6:8.0f} ({row['wasted_bytes'] / 1e6:.0f})"
        lines.append(f"{name:28}{value:8.2f}  {value / speed['naive']:10.2f}  {paper:>22}  {rest}")
    low, median, high = result["prefetch_saves"]
    lines.append(
        f"prefetch saves {median:.1%} of the time (median of pairs; quartiles {low:.1%} and {high:.1%})"
    )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache-sizes", type=int, nargs="+", default=(2, 4))
    parser.add_argument("--prefetch", type=int, default=2)
    parser.add_argument("--look-ahead", type=int, default=1)
    parser.add_argument(
        "--moments", nargs="+", default=MOMENTS, choices=("before", "after"), help="when to guess"
    )
    parser.add_argument("--tokens", type=int, default=48, help="generated for each of four prompts")
    parser.add_argument("--naive-tokens", type=int, default=8, help="the same for the slowest variant")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ratio", type=float, default=5.5, help="one expert's copy over one layer's compute")
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.json")
    return parser.parse_args()


def main():
    arguments = parse()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    tokenizer = load_tokenizer(arguments.model)
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], **options).to(arguments.device)
        for text in PROMPTS
    ]
    place = {"device": arguments.device, "store": "ram"}
    resident = from_pretrained(arguments.model, cache_size="auto", **place)
    model = from_pretrained(arguments.model, cache_size=2, prefetch=0, **place)
    generate(resident, prompts, 8)  # warm up
    layers = model.offload.checkpoint.layers
    token_s = statistics.median(generate(resident, prompts, arguments.tokens)[0] for _ in range(3))
    copy_s = arguments.ratio * token_s / len(layers)
    n_bytes = model.offload.layout.n_bytes
    model.offload.cache.engine = make_engine(model.offload.options.device, False, n_bytes, n_bytes / copy_s)
    print(
        f"one layer's compute {1e3 * token_s / len(layers):.2f} ms, one expert's copy {1e3 * copy_s:.2f} ms"
    )
    runs = {}
    for size in arguments.cache_sizes:
        runs[size] = measure(model, resident, prompts, size, arguments)
        ahead = f"{arguments.prefetch} guesses, {arguments.look_ahead} layer(s) ahead"
        print(f"\ncache of {size}, {ahead}\n{table(runs[size])}", flush=True)
    result = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {arguments.device}",
              "layer_s": token_s / len(layers), "copy_s": copy_s, "runs": runs,
              "settings": {k: str(v) for k, v in vars(arguments).items() if k != "out"}}  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
