"""The unit of the corpus (one question and its answer) and the rule that holds some of them out."""

import hashlib
import random
from dataclasses import dataclass

HELD_SHARE = 10  # one key in ten is never trained on


@dataclass(frozen=True)
class Exchange:
    """A question, its answer, the key that decides its split, and what a right answer must hold."""

    domain: str
    user: str
    answer: str
    key: str
    require: tuple = ()
    accept: tuple = ()


def held(key: str) -> bool:
    """True when this key belongs to the held-out tenth (stable across machines and runs)."""
    return int.from_bytes(hashlib.sha1(key.encode()).digest()[:4], "big") % HELD_SHARE == 0


def ask(rng: random.Random, domain, fact, questions, answers, require=(), accept=(), **slots) -> Exchange:
    """Fill one of the questions and one of the answers; the key is the pair (fact, question template)."""
    number = rng.randrange(len(questions))
    answer = rng.choice(answers) if isinstance(answers, (list, tuple)) else answers
    return Exchange(
        domain,
        questions[number].format(**slots),
        answer.format(**slots),
        f"{domain}|{fact}|{number}",
        tuple(require),
        tuple(accept),
    )


def table(text: str) -> list[list[str]]:
    """Rows of a 'a|b|c' table, blank lines skipped."""
    return [[cell.strip() for cell in row.split("|")] for row in text.strip().splitlines() if row.strip()]


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


def article(noun: str) -> str:
    """The noun with 'a' or 'an' before it."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun
