"""A disk that fails for a moment: an error each time, and no wrong answer afterwards."""

from __future__ import annotations

import os
import random

from mixtral_offload.errors import OffloadError
from mixtral_offload.generation.tokenizer import load_tokenizer
from mixtral_offload.runtime.build import from_pretrained

from .interrupts import QUESTIONS, answer
from .result import Result


def check_read_errors(n: int = 100, seed: int = 0, n_tokens: int = 12) -> Result:
    """Make reads of experts fail (an I/O error, or an early end of the file) at random during n answers.

    Wrong are answers that differ from the undisturbed ones, and errors that are not this package's.
    """
    draw, tokenizer = random.Random(seed), load_tokenizer()
    expected = {
        text: answer(from_pretrained(device="cpu", cache_size=8), tokenizer, text, n_tokens)
        for text in QUESTIONS
    }
    model, own = from_pretrained(device="cpu", cache_size=2, store="disk", prefetch=2), os.preadv
    wrong = failed = 0
    foreign: dict[str, int] = {}

    def faulty(file, buffers, offset, *flags):
        chance = draw.random()
        if chance < rate:
            raise OSError(5, "Input/output error")
        return 0 if chance < 2 * rate else own(file, buffers, offset, *flags)

    for number in range(n):
        text, rate = QUESTIONS[number % len(QUESTIONS)], draw.choice((0.0, 0.0005, 0.003))
        os.preadv = faulty
        try:
            found = answer(model, tokenizer, text, n_tokens)
        except OffloadError:
            found, failed = None, failed + 1
        except Exception as error:
            name = type(error).__name__
            found, foreign[name] = None, foreign.get(name, 0) + 1
        finally:
            os.preadv = own
        wrong += found is not None and found != expected[text]
        wrong += answer(model, tokenizer, text, n_tokens) != expected[text]
    model.offload.cache.close()
    return Result(
        "answers during and after read errors",
        wrong + sum(foreign.values()),
        n,
        "answers",
        details={"ended_with_an_error": failed, "foreign_errors": foreign},
    )
