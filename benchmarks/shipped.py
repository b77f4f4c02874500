"""What the kernels of this package change for the shipped model: speed, and answers.

    python benchmarks/shipped.py [--turns 7]

Seconds per token while decoding, and per pass of a batch, with the kernels, with torch's products of packed
experts, and with experts dequantized on load; the ways take turns. Divergence of the next token's
distribution (Kullback-Leibler, nats) from torch's products, token by token over held-out conversations, exact
and fast. Writes benchmarks/results/shipped-KERNELS.json.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from pathlib import Path

import torch
from machine import machine, words

from mixtral_offload import from_pretrained, load_tokenizer
from mixtral_offload.experiments.bit_widths import held_out
from mixtral_offload.weights.native import FORCE

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 2, 8, 32, 64)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=40, help="decoded in a turn")
    parser.add_argument("--conversations", type=int, default=6, help="for the divergence, 150 tokens of each")
    return parser.parse_args()


def build(kernels: str, **options):
    """Build the shipped model with some kernels; "": those that are chosen without this benchmark."""
    before = os.environ.get(FORCE, "")
    os.environ[FORCE] = kernels or before
    try:
        return from_pretrained(**options)
    finally:
        os.environ[FORCE] = before


def in_turns(ways: dict, turns: int) -> dict[str, float]:
    """Median seconds of each way, after one turn that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns + 1):
        for name, way in ways.items():
            began_s = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(of[1:]) for name, of in taken.items()}


def speeds(arguments: argparse.Namespace) -> dict:
    """Seconds per token with all experts on the device and with 4 of 8, and per pass of some batches."""
    found, prompt = {}, torch.arange(5, 13).view(1, -1)
    for size in (8, 4):
        models = {"kernels": build("", cache_size=size), "torch": build("none", cache_size=size)}
        if size == 8:
            models["dequantized on load"] = build("", dequantize_on_load=True)
        n = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens, "do_sample": False}
        ways = {name: lambda of=of, n=n: of.generate(prompt, **n) for name, of in models.items()}
        seconds = in_turns(ways, arguments.turns)
        found[f"token, {size} of 8 experts"] = {name: s / arguments.tokens for name, s in seconds.items()}
        if size < 8:
            continue
        for n_tokens in BATCHES:
            ids = torch.randint(5, 900, (n_tokens, 1), generator=torch.Generator().manual_seed(n_tokens))
            ways = {name: lambda of=of, ids=ids: of(ids, use_cache=False) for name, of in models.items()}
            found[f"pass, batch of {n_tokens}"] = in_turns(ways, 2 * arguments.turns)
    return found


def by_token(model, ids: torch.Tensor) -> torch.Tensor:
    """Log probabilities `[T, V]` of each next token, one token in a pass."""
    past, rows = None, []
    for i in range(ids.shape[1]):
        output = model(ids[:, i : i + 1], past_key_values=past, use_cache=True)
        past = output.past_key_values
        rows.append(output.logits[0].log_softmax(-1))
    return torch.cat(rows)


def divergence(arguments: argparse.Namespace) -> dict:
    """Divergence and share of equal first choices, exact and fast, from torch's products."""
    tokenizer, plain = load_tokenizer(), build("none", cache_size=8)
    models = {name: build("", cache_size=8, precision=name) for name in ("exact", "fast")}
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in models}
    n_tokens = 0
    for messages in held_out()[: arguments.conversations]:
        ids = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")["input_ids"][
            :, :150
        ]
        expected = by_token(plain, ids)
        n_tokens += ids.shape[1]
        for name, model in models.items():
            found = by_token(model, ids)
            sums[name][0] += (expected.exp() * (expected - found)).sum().item()
            sums[name][1] += (expected.argmax(-1) == found.argmax(-1)).sum().item()
    return {
        name: {"kl_nats": kl / n_tokens, "same_choice": same / n_tokens} for name, (kl, same) in sums.items()
    } | {"tokens": n_tokens}


@torch.no_grad()
def main() -> None:
    arguments = parse()
    warnings.simplefilter("ignore")
    result = {"machine": machine(), "seconds": speeds(arguments), "divergence": divergence(arguments)}
    print(words(result["machine"]))
    for name, of in result["seconds"].items():
        print(f"{name}: " + ", ".join(f"{way} {1e3 * s:.2f} ms" for way, s in of.items()))
    print(result["divergence"])
    path = RESULTS / f"shipped-{result['machine']['kernels']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
