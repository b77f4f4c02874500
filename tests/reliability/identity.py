"""Logits are bit-identical for every cache size, prefetch and store."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from mixtral_offload.generation.templates import encode
from mixtral_offload.generation.tokenizer import load_tokenizer
from mixtral_offload.runtime.build import from_pretrained

from .result import Result

HELD_OUT = Path(__file__).parents[2] / "training" / "heldout.jsonl"


def prompts(n: int) -> list[torch.Tensor]:
    """n prompts [1, T] that the shipped model was not trained on."""
    tokenizer = load_tokenizer()
    lines = [json.loads(line) for line in HELD_OUT.read_text().splitlines()]
    chosen = lines[:: max(len(lines) // n, 1)][:n]
    return [torch.tensor([encode(tokenizer, line["messages"])]) for line in chosen]


@torch.no_grad()
def logits_of(model, ids: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Logits [n_tokens, vocabulary] of a greedy answer of exactly n_tokens tokens."""
    output = model.generate(
        ids,
        max_new_tokens=n_tokens,
        min_new_tokens=n_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.cat(output.logits)


def check_identity(
    n_prompts: int = 20,
    n_tokens: int = 32,
    sizes: Iterable[int] = range(2, 8),
    prefetch: Iterable[int] = (0, 2, 4),
    stores: Iterable[str] = ("ram", "disk"),
) -> Result:
    """Compare every combination of settings with a model that has every expert on the device, bit by bit."""
    of = prompts(n_prompts)
    reference = from_pretrained(device="cpu", cache_size=8)
    expected = [logits_of(reference, ids, n_tokens) for ids in of]
    wrong = tried = 0
    for size, n, store in itertools.product(sizes, prefetch, stores):
        model = from_pretrained(
            device="cpu", cache_size=size, prefetch=n, look_ahead=2 if n else 1, store=store
        )
        for ids, logits in zip(of, expected):
            same = (logits_of(model, ids, n_tokens) == logits).all(dim=-1)
            wrong, tried = wrong + int((~same).sum()), tried + len(same)
        assert model.offload.stats.misses > 0
        model.offload.cache.close()
    return Result("logits bit-identical over cache size, prefetch and store", wrong, tried, "tokens' logits")
