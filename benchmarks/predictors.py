"""Which hidden state predicts coming layers' experts best, and LRU's hit rates, on the held-out text.

    python benchmarks/predictors.py [--model FOLDER] [--texts 40]

Prints recall of two predictions by source and look-ahead, layer 0's from the previous token, and LRU's hit
rates compared with chance; writes benchmarks/results/predictors.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from machine import machine

from mixtral_offload import from_pretrained, load_tokenizer
from mixtral_offload.analysis.recall import SOURCES, collect_states, first_layer_recall, measure_recall
from mixtral_offload.analysis.replay import hit_rate_curves
from mixtral_offload.core.trace import RoutingTrace
from mixtral_offload.weights.source import DEMO

HERE = Path(__file__).parent
TEXTS = HERE.parent / "training" / "heldout_text.jsonl"


def recalls(layers, states) -> dict:
    """Measure recall of two predictions by source and look-ahead; print it, and that of three."""
    found = {}
    for source in SOURCES:
        recall = measure_recall(layers, states, (1, 2, 3, 10), source)
        average = recall.average()
        found[source] = dict(zip(map(str, recall.look_aheads), average[:, 2].tolist()))
        found[source]["by_layer"] = np.nan_to_num(recall.recall[0, :, 2], nan=-1).tolist()
        shown = "  ".join(
            f"{ahead} ahead {row[2]:.3f} ({row[3]:.3f})" for ahead, row in zip(recall.look_aheads, average)
        )
        print(f"{source:>8}: {shown}")
    return found


def hit_rates(states, n_experts: int) -> dict:
    """Of each policy and cache size, averaged over layers; printed too."""
    experts = torch.stack(states.chosen, 1).cpu().numpy()
    trace = RoutingTrace.from_routing(experts, np.ones(experts.shape), n_experts)
    curves = {name: curve.mean(1) for name, curve in hit_rate_curves(trace).items()}
    sizes = range(trace.top_k, n_experts + 1)
    print("\nhit rate by cache size:", "  ".join(f"{k}" for k in sizes))
    for name, curve in (*curves.items(), ("chance", np.array(sizes) / n_experts)):
        print(f"  {name:>7}:", " ".join(f"{value:.3f}" for value in curve))
    return {name: dict(zip(map(str, sizes), curve.tolist())) for name, curve in curves.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--texts", type=int, default=40, help="held-out conversations to run")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "predictors.json")
    arguments = parser.parse_args()
    model, tokenizer = from_pretrained(arguments.model, cache_size="auto"), load_tokenizer(arguments.model)
    lines = TEXTS.read_text(encoding="utf-8").splitlines()[: arguments.texts]
    texts = [
        tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=True)["input_ids"][:1024]
        for line in lines
    ]
    layers = model.offload.layers
    states = collect_states(model, layers, texts)
    n_experts = model.offload.checkpoint.n_experts
    chance = 2 / n_experts
    print(
        f"{len(states.first)} tokens. "
        f"Recall of the two likeliest (chance {chance:.2f}); in brackets of three\n"
    )
    found = {"machine": machine(), "tokens": len(states.first), "texts": len(texts)}
    found["chance_of_two"] = chance
    found["recall_of_two"] = recalls(layers, states)
    print("\nlayer 0:")
    found["layer_0"] = {name: curve[2] for name, curve in first_layer_recall(layers, states).items()}
    print("\n".join(f"  {name}: {recall:.3f}" for name, recall in found["layer_0"].items()))
    found["hit_rate"] = hit_rates(states, n_experts)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
