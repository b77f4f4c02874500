"""outlines on offloaded experts: answers bound to a JSON schema, a choice, a regex; compared with the twin.

python -m benchmarks.ecosystem.outlines_json
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, Field

from mixtral_offload.generation.tokenizer import load_tokenizer

from .checks import Check, close, equal, exit_with, run_program
from .twin import last_logits, ours, questions, twin

PACKAGES = ("outlines", "outlines_core")
PROMPTS, LONGEST = 6, 96
TOLERANCE = 1e-4


class City(BaseModel):
    name: str = Field(max_length=12)
    country: str = Field(max_length=12)
    kind: Literal["city", "town"]
    capital: bool


def checks() -> Iterator[Check]:
    import outlines
    from outlines.types import Regex

    tokenizer = load_tokenizer()
    prompts = [
        tokenizer.apply_chat_template(of, add_generation_prompt=True, tokenize=False)
        for of in questions(PROMPTS)
    ]
    bound = {
        "a JSON schema": City,
        "a choice": Literal["yes", "no", "perhaps"],
        "a regular expression": Regex("[0-9]{3}-[A-Z]{2}"),
    }
    found: dict[str, list[list[str]]] = {}
    logits = []
    for model in (ours(), twin()):
        wrapped = outlines.from_transformers(model, tokenizer)
        with last_logits(model) as of_model:
            for name, kind in bound.items():
                answers = [
                    wrapped(prompt, kind, max_new_tokens=LONGEST, do_sample=False) for prompt in prompts
                ]
                found.setdefault(name, []).append(answers)
        logits.append(of_model)
    yield close("logits at every token of these answers", *logits, TOLERANCE)
    for name, answers in found.items():
        yield equal(f"answers bound to {name}", *answers)
    invalid = [text for text in found["a JSON schema"][0] if not _is_city(text)]
    yield Check(
        "answers that are the schema's JSON",
        len(invalid),
        0,
        PROMPTS,
        "invalid answers",
        message=invalid[0] if invalid else None,
    )
    wrapped = [outlines.from_transformers(model, tokenizer) for model in (ours(), twin())]
    both = [of.batch(prompts, City, max_new_tokens=LONGEST, do_sample=False) for of in wrapped]
    yield equal("a batch of answers bound to a JSON schema", *both)


def _is_city(text: str) -> bool:
    try:
        City(**json.loads(text))
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    exit_with(run_program("outlines", PACKAGES, checks))
