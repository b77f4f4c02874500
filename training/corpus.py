"""Endless training conversations: mixed domains, questions about earlier turns, and careless typing.

python -m training.corpus                print a few conversations
python -m training.corpus --check 20000  count the held-out keys and prompts met in that many (must be 0)
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from training.domains import about, arithmetic, code, everyday, geography, languages, outside, stories, talk
from training.domains.common import Exchange, held, words

HELDOUT = Path(__file__).with_name("heldout.jsonl")
DOMAINS = {
    "stories": stories,
    "arithmetic": arithmetic,
    "geography": geography,
    "python": code,
    "languages": languages,
    "everyday": everyday,
    "about": about,
    "talk": talk,
    "outside": outside,
}
# weights of the domains in turns; those of long answers (stories, code) have a larger share of the tokens
MIXTURE = {"stories": 7, "arithmetic": 34, "geography": 18, "python": 7, "languages": 26, "everyday": 18,
           "about": 11, "talk": 13, "outside": 9}  # fmt: skip
CARELESS = set(
    words("""what which how does tell about story please capital language country write python mean translate
between number order bigger smaller comes after favourite colour remember called experts opposite explain \
show people speak
thank hello""")
)
BEFORE = [
    "please ",
    "Please ",
    "hey, ",
    "Hey, ",
    "ok, ",
    "so, ",
    "Hi, ",
    "and ",
    "now ",
    "Well, ",
    "quick question: ",
]
AFTER = [" please", " thanks", " :)", "!", " ?", "..", " pls"]


def _typo(rng, text):
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if word.lower() in CARELESS and len(word) > 3]
    if places:
        i = rng.choice(places)
        word, at = words[i], rng.randrange(1, len(words[i]) - 1)
        words[i] = rng.choice(
            [
                word[:at] + word[at + 1 :],
                word[:at] + word[at] + word[at:],
                word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            ]
        )
    return " ".join(words)


def careless(rng: random.Random, text: str) -> str:
    """Type as people do: often unchanged, else without capitals or stop, with a typo or more words."""
    if rng.random() < 0.45:
        return text
    if rng.random() < 0.3:
        text = text.lower()
    if rng.random() < 0.35:
        text = text.rstrip(".?!") or text
    if rng.random() < 0.12:
        text = _typo(rng, text)
    if rng.random() < 0.09:
        start = text if text.split()[0] in ("I", "I'm") else text[0].lower() + text[1:]
        text = rng.choice(BEFORE) + start
    if rng.random() < 0.05:
        text += rng.choice(AFTER)
    return text


def draw(rng: random.Random, make, wanted_held: bool):
    """Call make(rng) until its exchange falls in the wanted split."""
    while True:
        made = make(rng)
        if held(made.key) == wanted_held:
            return made


class Conversation:
    """Builds one conversation turn by turn; remembers what the user has told and what comes up later."""

    def __init__(self, rng: random.Random, system_share=0.2, wanted_held=False):
        self.rng, self.held = rng, wanted_held
        self.messages, self.exchanges = [], []
        self.name, self.known, self.waiting = talk.DEFAULT_NAME, set(), []
        if rng.random() < system_share:
            text, self.name = talk.system(rng)
            while held(f"name|bot|{self.name}|0") != wanted_held and self.name != talk.DEFAULT_NAME:
                text, self.name = talk.system(rng)
            self.messages.append({"role": "system", "content": text})

    def add(self, exchange: Exchange):
        self.exchanges.append(exchange)
        self.messages.append({"role": "user", "content": careless(self.rng, exchange.user)})
        self.messages.append({"role": "assistant", "content": exchange.answer})

    def own_name(self):
        made = talk.own_name(self.rng, self.name)
        self.add(Exchange(made.domain, made.user, made.answer, f"name|bot|{self.name}|0", made.require))

    def remember(self) -> Exchange:
        """The user tells a fact; the question about it waits for a later turn and is also returned."""
        while True:
            kind, tell, again = talk.remember(self.rng)
            if kind not in self.known and not held(tell.key) and held(again.key) == self.held:
                break
            if len(self.known) > 3:
                return None
        self.known.add(kind)
        self.add(tell)
        self.waiting.append(again)
        return again

    def turn(self, domain=None):
        """One more turn: a due memory, the assistant's name, or something from a domain."""
        roll = self.rng.random()
        if self.waiting and roll < 0.16:
            again = self.rng.choice(self.waiting)
            if self.rng.random() < 0.6:
                self.waiting.remove(again)
            return self.add(again)
        if roll < 0.19:
            return self.about_memory()
        if roll < 0.23 and len(self.known) < 4:
            return self.remember()
        domain = domain or self.rng.choices(list(MIXTURE), MIXTURE.values())[0]
        return self.add(draw(self.rng, DOMAINS[domain].sample, self.held))

    def about_memory(self):
        """The assistant's own name, or something that the user never told."""
        if self.held:
            return self.own_name() if self.name != talk.DEFAULT_NAME else None
        if self.rng.random() < 0.65:
            return self.own_name()
        made = talk.not_told(self.rng, self.known)
        if made and not held(made.key):
            self.add(made)


def converse(rng: random.Random, characters: int) -> Conversation:
    """A conversation of about this many characters; one in four stays mostly in one domain."""
    made = Conversation(rng)
    only = rng.choice(list(MIXTURE)) if rng.random() < 0.2 else None
    if made.name != talk.DEFAULT_NAME and rng.random() < 0.35:
        made.own_name()
    size = 0
    while size < characters:
        before = len(made.messages)
        made.turn(only if rng.random() < 0.85 else None)
        size += sum(len(message["content"]) for message in made.messages[before:])
    return made


def conversations(seed: int):
    """Endless conversations of many lengths."""
    rng = random.Random(seed)
    while True:
        yield converse(rng, rng.choice([60, 200, 500, 1000, 1800, 3000]))


def _plain(text: str) -> str:
    """The text without case and without marks at its ends, to compare prompts."""
    return text.lower().strip(" .?!,")


def check(count: int) -> dict:
    """How many of the keys, and of the held-out prompts of one turn, occur in this many conversations."""
    prompts = set()
    if HELDOUT.exists():
        items = [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
        prompts = {
            item["messages"][-1]["content"] for item in items if item["domain"] not in ("memory", "name")
        }
    found, seen = Counter(), Counter()
    stream = conversations(987)
    for _ in range(count):
        for exchange in next(stream).exchanges:
            found["exchanges"] += 1
            found["held-out keys"] += held(exchange.key)
            found["held-out prompts"] += _plain(exchange.user) in prompts
            seen[exchange.user] += 1
    return {**found, "different questions": len(seen)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", type=int, default=0)
    args = parser.parse_args()
    if args.check:
        print(check(args.check))
        return
    stream = conversations(1)
    for _ in range(6):
        for message in next(stream).messages:
            print(f"{message['role']:>9}: {message['content']}")
        print("-" * 60)


if __name__ == "__main__":
    main()
