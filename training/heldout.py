"""Writes the held-out prompts and texts from the keys that are not in the training text.

python -m training.heldout
"""

import json
import random
from pathlib import Path

from training.corpus import DOMAINS, Conversation, careless, draw
from training.domains import talk
from training.domains.common import held
from training.domains.names import person

PROMPTS = Path(__file__).with_name("heldout.jsonl")
TEXTS = Path(__file__).with_name("heldout_text.jsonl")
COUNTS = {"stories": 20, "arithmetic": 32, "geography": 20, "python": 16, "languages": 20, "everyday": 20,
          "about": 14, "talk": 14, "outside": 20,
          "memory": 14, "name": 14}  # fmt: skip
FOUR_SENTENCES = r"(?s)([.!?][\"']?\s.*){3}"


def _item(domain, messages, exchange) -> dict:
    found = {"domain": domain, "messages": messages}
    if exchange.require:
        found["require"] = list(exchange.require)
    if domain == "stories":
        found["accept"] = [FOUR_SENTENCES]
    elif exchange.accept:
        found["accept"] = list(exchange.accept)
    return found


def plain(rng, domain) -> dict:
    """One question of a domain, as people type it."""
    exchange = draw(rng, DOMAINS[domain].sample, True)
    while domain == "stories" and len(exchange.require) < 2:
        exchange = draw(rng, DOMAINS[domain].sample, True)
    return _item(domain, [{"role": "user", "content": careless(rng, exchange.user)}], exchange)


def memory(rng) -> dict:
    """The user tells something, talks about other things, and asks for it."""
    while True:
        made = Conversation(rng, system_share=0.0, wanted_held=True)
        again = made.remember()
        made.held = False
        for _ in range(rng.randrange(1, 5)):
            made.add(draw(rng, DOMAINS[rng.choice(list(DOMAINS))].sample, False))
        made.add(again)
        if rng.random() < 0.6 or "name" in again.key:
            return _item("memory", made.messages[:-1], again)


def named(rng) -> dict:
    """Make a system prompt that names the assistant, and ask the name, first or after another turn."""
    name = person(rng)[0]
    while not held(f"name|bot|{name}|0"):
        name = person(rng)[0]
    made = Conversation(rng, system_share=0.0)
    made.name = name
    made.messages.append({"role": "system", "content": rng.choice(talk.SYSTEM).format(v=name)})
    if rng.random() < 0.5:
        made.add(draw(rng, DOMAINS[rng.choice(["geography", "arithmetic", "talk"])].sample, False))
    made.own_name()
    return _item("name", made.messages[:-1], made.exchanges[-1])


def prompts(seed=2024) -> list[dict]:
    rng, found, seen = random.Random(seed), [], set()
    makers = {"memory": memory, "name": named}
    for domain, count in COUNTS.items():
        kept = tries = 0
        while kept < count and tries < 2000:
            tries += 1
            item = makers[domain](rng) if domain in makers else plain(rng, domain)
            mark = json.dumps(item["messages"]).lower()
            if mark not in seen:
                seen.add(mark)
                found.append(item)
                kept += 1
    return found


def texts(seed=4048, characters=115_000) -> list[dict]:
    """Conversations made of held-out exchanges only, for perplexity."""
    rng, found, size = random.Random(seed), [], 0
    while size < characters:
        made = Conversation(rng, wanted_held=True)
        wanted = rng.choice([300, 900, 1800])
        while sum(len(message["content"]) for message in made.messages) < wanted:
            made.turn()
        found.append({"messages": made.messages})
        size += len(json.dumps(made.messages, ensure_ascii=False))
    return found


def main():
    for path, items in ((PROMPTS, prompts()), (TEXTS, texts())):
        path.write_text(
            "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8"
        )
        print(path.name, len(items), "lines")


if __name__ == "__main__":
    main()
