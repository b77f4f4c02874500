"""The shipped model answers sensibly, through the offloaded 4-bit checkpoint that users get."""

import re
from pathlib import Path

from transformers import MixtralForCausalLM

from mixtral_offload.generation.tokenizer import load_tokenizer
from mixtral_offload.weights.source import DEMO
from training.evaluate import evaluate, expert_use, read

ROOT = Path(__file__).parents[2]


def test_held_out_prompts_and_the_score_in_the_readme(offloaded):
    assert len(read("heldout.jsonl")) >= 100
    result = evaluate(offloaded(DEMO, cache_size=4), load_tokenizer(DEMO))
    assert result["score"] >= 0.8, result
    stated = re.search(r"(\d+) % of (\d+) held-out prompts", (ROOT / "README.md").read_text())
    assert int(stated[2]) == len(read("heldout.jsonl"))
    assert abs(int(stated[1]) - 100 * result["score"]) <= 1  # another processor may round a token differently


def test_any_text_encodes_and_decodes_exactly():
    tokenizer = load_tokenizer(DEMO)
    for text in ("Hello, world!", "  two  spaces\n\tand a tab", "naïve café, 東京 — 🦊", "x = {'a': 1}"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_it_fits_the_repository():
    files = [path for path in DEMO.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24_000_000


def test_its_experts_specialise_by_domain():
    """Beyond layer 0, which sees one token's surroundings at most, the domain says which experts are used."""
    found = expert_use(
        MixtralForCausalLM.from_pretrained(DEMO.parent / "fp16"), load_tokenizer(DEMO), per_domain=15
    )
    assert min(found["mutual_information"][1:]) > 0.2
    assert min(min(shares) for shares in found["overall"]) > 0.04  # and none is idle
