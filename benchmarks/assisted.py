"""Several tokens per pass: transformers' assisted generation on the shipped model behind a throttled link.

    python benchmarks/assisted.py [--cache-sizes 2 4] [--ratio 5.5]

Tokens that go through one pass together share the experts that it loads. `prompt lookup` drafts the next
tokens from the text so far, at no cost; `draft` takes them from a second model: here the same model with
everything on the device. It is always right, so it is an upper bound for a draft model of its size. All ways
give the same tokens (checked). There are two kinds of prompts: stories, and answers that repeat the prompt.
Prints a table and writes benchmarks/results/assisted.json.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from machine import machine

from mixtral_offload import from_pretrained, load_tokenizer
from mixtral_offload.experiments.ablation import encode_prompt
from mixtral_offload.experiments.baselines import make_variants, switched, throttled

RESULTS = Path(__file__).parent / "results"
KINDS = {
    "stories": ("Tell me a story about a fox.", "Tell me a story about a boy named Tom."),
    "repeating": (
        "How do I sort a list in Python?",
        "How do I reverse a string in Python?",
        "Say hello in Greek.",
    ),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache-sizes", type=int, nargs="+", default=(2, 4))
    parser.add_argument("--ratio", type=float, default=5.5, help="one expert's copy over one layer's compute")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


@torch.inference_mode()
def run(model, prompt, n_tokens: int, **assistance) -> tuple[float, int, list]:
    """Return seconds per token after the first pass, the number of passes, and the tokens."""
    began = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda *_: began.append(time.perf_counter())
    )
    out = model.generate(
        **prompt,
        max_new_tokens=n_tokens,
        min_new_tokens=n_tokens,
        do_sample=False,
        pad_token_id=0,
        **assistance,
    )
    end = time.perf_counter()
    hook.remove()
    return (end - began[1]) / (n_tokens - 1), len(began) - 1, out.tolist()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer()
    model, resident = (
        from_pretrained(cache_size=max(arguments.cache_sizes), store="ram"),
        from_pretrained(cache_size=8),
    )
    ways = {"plain": {}, **{f"prompt lookup, {n}": {"prompt_lookup_num_tokens": n} for n in (2, 4, 8)},
            "draft, always right": {"assistant_model": resident}}  # fmt: skip
    rows = []
    with throttled(model, arguments.ratio):
        for k in arguments.cache_sizes:
            cache = make_variants(model, k, 0)["without prefetch"]
            for kind, texts in KINDS.items():
                found = {way: [] for way in ways}
                for text in texts * arguments.repeats:
                    prompt, answers = encode_prompt(tokenizer, text), []
                    for way, assistance in ways.items():
                        with switched(model, cache):
                            taken, n_passes, answer = run(model, prompt, arguments.tokens, **assistance)
                        answers.append(answer)
                        found[way].append((taken, n_passes, cache.stats.bytes_moved))
                    assert all(answer == answers[0] for answer in answers), f"an answer changed: {text}"
                for way, of in found.items():
                    saves = statistics.median(plain[0] / other[0] for plain, other in zip(found["plain"], of))
                    row = {
                        "cache_size": k,
                        "prompts": kind,
                        "way": way,
                        "speedup": saves,
                        "tokens_per_s": 1 / statistics.median(taken for taken, *_ in of),
                        "tokens_per_pass": (arguments.tokens - 1) / statistics.mean(n for _, n, _ in of),
                        "bytes_per_token": statistics.mean(n for *_, n in of) / arguments.tokens,
                    }
                    rows.append(row)
                    print(
                        f"cache of {k}, {kind:9} {way:20} {row['tokens_per_s']:6.1f} tokens/s "
                        f"({saves:.2f} of plain), {row['tokens_per_pass']:.2f} tokens a pass, "
                        f"{row['bytes_per_token'] / 1e3:.0f} kB a token",
                        flush=True,
                    )
    settings = {
        "machine": machine(),
        **{k: str(v) for k, v in vars(arguments).items()},
    }
    (RESULTS / "assisted.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
