"""What traces cost: recording while a model generates, and replaying 1,000,000 (token, layer) events.

    python benchmarks/tracing.py [--tokens 150] [--repeats 15] [--replays 3]

Runs with and without `record` take turns; the cost is the median over pairs of their ratio. Prints both and writes
benchmarks/results/tracing.json.
"""

import argparse
import json
import platform
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from ablation import PROMPTS, RESULTS, generate

from mixtral_offload import from_pretrained, load_tokenizer, record, simulate
from mixtral_offload.trace import RoutingTrace

EVENTS = 1_000_000
POLICIES = ("lru", "lfu", "lrfu", "belady")


def recording(arguments) -> tuple[dict, RoutingTrace]:
    """Seconds per token with and without recording, and the last trace."""
    model, tokenizer = (
        from_pretrained(device=arguments.device, cache_size=4, store="ram", prefetch=2),
        load_tokenizer(),
    )
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], **options).to(arguments.device)
        for text in PROMPTS
    ]
    generate(model, prompts, arguments.tokens)  # warm up
    plain, recorded, trace = [], [], None
    for turn in range(arguments.repeats):
        for prompt in prompts:
            for with_trace in (turn % 2, 1 - turn % 2):  # neither is always the first
                with record(model, tokenizer) if with_trace else empty(model) as run:
                    seconds = generate(model, [prompt], arguments.tokens)[0]
                (recorded if with_trace else plain).append(seconds)
                trace = run.trace if with_trace else trace
    ratios = [a / b for a, b in zip(recorded, plain)]
    low, median, high = statistics.quantiles(ratios)
    print(
        f"recording costs {median - 1:+.2%} (median of {len(ratios)} pairs; quartiles {low - 1:+.1%}, {high - 1:+.1%})"
    )
    return {"cost": median - 1, "plain_s": plain, "recorded_s": recorded}, trace


@contextmanager
def empty(model):
    """Begins with an empty cache, as `record` does."""
    with model.offload.cache.lock:
        model.offload.cache.clear()
    yield


def replaying(trace: RoutingTrace, repeats: int) -> dict:
    """Seconds to replay EVENTS (token, layer) events made of a real trace, again and again, by policy."""
    copies = -(-EVENTS // (trace.n_tokens * trace.n_layers))
    experts = np.tile(trace.experts, (copies, 1, 1))[: -(-EVENTS // trace.n_layers)]
    long = RoutingTrace.from_routing(experts, np.ones(experts.shape), trace.n_experts)
    found = {}
    for shared in (False, True):
        for policy in POLICIES:
            times = []
            for _ in range(repeats):
                begin = time.perf_counter()
                hit_rate = simulate(long, 4, policy, shared).hit_rate
                times.append(time.perf_counter() - begin)
            name = f"{policy}, {'one pool' if shared else 'a pool for each layer'}"
            found[name] = {"seconds": times, "hit_rate": hit_rate}
            print(
                f"replay of {long.n_tokens * long.n_layers:,} events, {name}: {statistics.median(times):.1f} s"
            )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--replays", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "tracing.json")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    cost, trace = recording(arguments)
    result = {"machine": f"{platform.machine()}, {arguments.device}", "recording": cost}
    result["replay"] = replaying(trace, arguments.replays)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
