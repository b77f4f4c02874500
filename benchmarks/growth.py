"""How a token's cost grows with the context, the cache and the batch, compared with what is expected.

    python benchmarks/growth.py [--ratio 5.5]

The shipped model behind a throttled link (see overlap.py), without predictions. Expected: with the context, a
straight line, because each token reads the keys and values of all before it; with cache size and batch,
between the larger and the sum of compute (measured with everything on the device) and of the needed copies
times one copy's seconds. Writes benchmarks/results/growth.json and .png.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from machine import machine
from matplotlib.figure import Figure
from transformers import DynamicCache

from mixtral_offload import from_pretrained, load_tokenizer
from mixtral_offload.experiments.ablation import PROMPTS
from mixtral_offload.experiments.baselines import copy_seconds, make_variants, switched, throttled

RESULTS = Path(__file__).parent / "results"
CONTEXTS, SIZES, BATCHES = (16, 128, 256, 512, 768, 960), range(2, 9), (1, 2, 4, 8, 16)


@torch.inference_mode()
def decode(model, ids: torch.Tensor, context: int, n_tokens: int) -> float:
    """Measure the median seconds of a pass of one token per sequence, after `context` tokens.

    Args:
        ids: int [B, context + n_tokens].
    """
    cache, taken = DynamicCache(config=model.config), []
    model(ids[:, :context], past_key_values=cache, logits_to_keep=1)
    for at in range(context, context + n_tokens):
        begin = time.perf_counter()
        model(ids[:, at : at + 1], past_key_values=cache, logits_to_keep=1)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[2:]) if n_tokens > 2 else taken[-1]


@torch.inference_mode()
def mean_decode(model, ids: torch.Tensor, context: int, n_tokens: int, stats=None) -> tuple[float, float]:
    """(mean seconds of such a pass, mean misses), since misses come and go."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :context], past_key_values=cache, logits_to_keep=1)
    before = stats.misses if stats else 0
    begin = time.perf_counter()
    for at in range(context, context + n_tokens):
        model(ids[:, at : at + 1], past_key_values=cache, logits_to_keep=1)
    taken = (time.perf_counter() - begin) / n_tokens
    return taken, (stats.misses - before) / n_tokens if stats else 0.0


def text_ids(tokenizer, n_rows: int, length: int) -> torch.Tensor:
    """Make conversations of the kinds that the model was trained on, cut to rows of one length."""
    topics = [
        *PROMPTS,
        "What is 12 + 30?",
        "What is the capital of Peru?",
        "Say hello in Greek.",
        "Why is the sky blue?",
    ]
    rows = []
    for number in range(n_rows):
        order = topics[number % len(topics) :] + topics[: number % len(topics)]
        ids = tokenizer(" ".join(order * (1 + length // 40)))["input_ids"]
        rows.append(ids[:length])
    return torch.tensor(rows)


def measure(model, resident, tokenizer, repeats: int) -> dict:
    copy_s, longest = copy_seconds(model), max(CONTEXTS) + 24
    ids = text_ids(tokenizer, max(BATCHES), longest)
    context = {
        n: statistics.median(decode(resident, ids[:1], n, 16) for _ in range(repeats)) for n in CONTEXTS
    }
    result = {"copy_s": copy_s, "context": context, "cache": {}, "batch": {}}
    for n_slots in SIZES:
        result["cache"][n_slots] = both(model, resident, ids[:1], n_slots, repeats, 40)
    for batch in BATCHES:
        result["batch"][batch] = both(model, resident, ids[:batch], 4, repeats, 24)
    return result


def both(model, resident, ids, n_slots: int, repeats: int, n_tokens: int) -> dict:
    """Measure a pass of the offloaded and of the resident model in turns: seconds and misses."""
    cache, found, compute = make_variants(model, n_slots, 0)["without prefetch"], [], []
    for _ in range(repeats):
        compute.append(mean_decode(resident, ids, 16, n_tokens)[0])
        with switched(model, cache):
            found.append(mean_decode(model, ids, 16, n_tokens, cache.stats))
    seconds, misses = (statistics.median(column) for column in zip(*found))
    return {"s": seconds, "misses": misses, "compute_s": statistics.median(compute)}


def plot_growth(result: dict) -> tuple[Figure, dict[str, np.ndarray]]:
    """Plot measured against expected: panel -> float64 [4, points] of x, measured, least and most, in ms."""
    shown = {"context": np.array([[n, s, s, s] for n, s in result["context"].items()], float).T}
    ends = shown["context"][:2, [0, -1]]
    shown["context"][2:] = np.interp(shown["context"][0], *ends)
    for name in ("cache", "batch"):
        rows = [
            (int(n), of["s"], of["compute_s"], of["misses"] * result["copy_s"])
            for n, of in result[name].items()
        ]
        n, seconds, compute, copies = np.array(rows).T
        shown[name] = np.stack([n, seconds, np.maximum(compute, copies), compute + copies])
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    titles = {
        "context": "context (everything on the device)",
        "cache": "experts of a layer cached",
        "batch": "batch (4 cached)",
    }
    for axes, (name, (x, seconds, least, most)) in zip(figure.subplots(1, 3), shown.items()):
        if name == "context":
            axes.plot(x, 1e3 * least, "--", color="0.4", label="expected: a straight line")
        else:
            axes.fill_between(
                x,
                1e3 * least,
                1e3 * most,
                alpha=0.25,
                label="expected: copies and compute,\nfrom all to none overlapping",
            )
        axes.plot(x, 1e3 * seconds, "o-", label="measured")
        axes.set(xlabel=titles[name], ylim=(0, 1.3 * seconds.max() * 1e3))
        axes.legend()
    figure.axes[0].set_ylabel("ms per pass")
    return figure, shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=5.5, help="one expert's copy over one layer's compute")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer()
    model, resident = from_pretrained(cache_size=7, store="ram"), from_pretrained(cache_size=8)
    with throttled(model, arguments.ratio):
        result = measure(model, resident, tokenizer, arguments.repeats)
    result |= {
        "machine": machine(),
        "settings": {k: str(v) for k, v in vars(arguments).items()},
    }
    (RESULTS / "growth.json").write_text(json.dumps(result, indent=1) + "\n")
    figure, shown = plot_growth(result)
    figure.savefig(RESULTS / "growth.png", dpi=120)
    for name, (x, seconds, least, most) in shown.items():
        rows = ", ".join(
            f"{int(a)}: {1e3 * b:.1f} ({1e3 * c:.1f} to {1e3 * d:.1f})"
            for a, b, c, d in zip(x, seconds, least, most)
        )
        print(f"{name}: ms per pass (expected): {rows}")


if __name__ == "__main__":
    main()
