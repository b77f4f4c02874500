"""The cost of traces: recording while a model generates, and replaying 1,000,000 (token, layer) events.

    python benchmarks/tracing.py [--tokens 100] [--repeats 20] [--replays 3]

Tokens with and without recording alternate; the cost compares the medians of their times. Prints both and
writes benchmarks/results/tracing.json.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from ablation import PROMPTS, RESULTS, generate
from machine import machine
from transformers import LogitsProcessor, LogitsProcessorList

from mixtral_offload import from_pretrained, load_tokenizer, record, replay
from mixtral_offload.analysis.recorder import Recorder
from mixtral_offload.core.trace import RoutingTrace

EVENTS = 1_000_000
POLICIES = ("lru", "lfu", "lrfu", "belady")


class Alternating(LogitsProcessor):
    """Times each token, every other one with the recorder on; switching it is not timed."""

    def __init__(self, recorder: Recorder, is_on: bool):
        self.recorder, self.seconds = recorder, ([], [])
        self.is_on, self._began_s = is_on, None

    def __call__(self, ids, scores):
        now = time.perf_counter()
        if self._began_s is not None:  # the first one holds the prompt
            self.seconds[self.is_on].append(now - self._began_s)
        self.is_on = not self.is_on
        if self.is_on:
            self.recorder.start()
        else:
            self.recorder.stop()
        self._began_s = time.perf_counter()
        return scores


@torch.inference_mode()
def recording(model, prompts, arguments) -> dict:
    """Seconds of tokens that were recorded and of their neighbours that were not."""
    off, on = [], []
    for turn in range(arguments.repeats):
        for prompt in prompts:
            recorder = Recorder(model)
            recorder.stop()
            steps = Alternating(recorder, is_on=turn % 2 == 0)
            n_tokens = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens}
            model.generate(
                **prompt, **n_tokens, do_sample=False, logits_processor=LogitsProcessorList([steps])
            )
            if steps.is_on:
                recorder.stop()
            off += steps.seconds[False]
            on += steps.seconds[True]
    cost = statistics.median(on) / statistics.median(off) - 1
    print(f"recording costs {cost:+.2%} (medians of {len(on)} and {len(off)} tokens, alternating)")
    return {
        "cost": cost,
        "tokens": len(on),
        "recorded_s": statistics.quantiles(on),
        "plain_s": statistics.quantiles(off),
    }


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
                hit_rate = replay(long, 4, policy, shared).hit_rate
                times.append(time.perf_counter() - begin)
            name = f"{policy}, {'one pool' if shared else 'a pool for each layer'}"
            found[name] = {"seconds": times, "hit_rate": hit_rate}
            n_events = long.n_tokens * long.n_layers
            print(f"replay of {n_events:,} events, {name}: {statistics.median(times):.1f} s")
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
    model, tokenizer = (
        from_pretrained(device=arguments.device, cache_size=4, store="ram", prefetch=2),
        load_tokenizer(),
    )
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], **options).to(arguments.device)
        for text in PROMPTS
    ]
    with record(model, tokenizer) as run:
        generate(model, prompts, arguments.tokens)  # also warms up
    result = {"machine": machine(arguments.device)}
    result["recording"] = recording(model, prompts, arguments)
    result["replay"] = replaying(run.trace, arguments.replays)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
