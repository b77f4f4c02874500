"""Everyday knowledge: days and months, opposites, colours, animals, counting, short definitions, sorting."""

import random

from training.domains.common import Exchange, article, ask
from training.domains.everyday_facts import (
    ANIMALS,
    COLORS,
    COUNTS,
    DAYS,
    DEFINE,
    MONTHS,
    NUMBERS,
    OPPOSITES,
    SEASONS,
    THINGS,
)

DOMAIN = "everyday"
OF = ["What is {x}?", "Define {w}.", "What does {w} mean?", "Can you explain what {x} is?", "Explain {w}.",
      "Tell me what {x} is.", "What's {x}?", "Do you know what {x} is?"]  # fmt: skip


def calendar(rng):
    names, kind = (DAYS, "day") if rng.random() < 0.5 else (MONTHS, "month")
    index, after = rng.randrange(len(names)), rng.random() < 0.55
    word = "after" if after else "before"
    result = names[(index + (1 if after else -1)) % len(names)]
    asked = ["What {kind} comes {word} {x}?", "Which {kind} is {word} {x}?", "What is the {kind} {word} {x}?",
             "What comes {word} {x}?", "{kind} {word} {x}?"]  # fmt: skip
    return ask(
        rng,
        DOMAIN,
        f"cal|{word}|{index}|{kind}",
        asked,
        "{r} comes {word} {x}.",
        [f"{result} comes"],
        kind=kind,
        word=word,
        x=names[index],
        r=result,
    )


def tomorrow(rng):
    index, after = rng.randrange(7), rng.random() < 0.6
    asked = [
        "If today is {x}, what day is {t}?",
        "Today is {x}. What day is {t}?",
        "It is {x} today. Which day is {t}?",
    ]
    result = DAYS[(index + (1 if after else -1)) % 7]
    word = ("tomorrow", "is") if after else ("yesterday", "was")
    return ask(rng, DOMAIN, f"tom|{index}|{after}", [q.replace("is {t}", word[1] + " {t}") for q in asked],
               "If today is {x}, {t} {v} {r}.", [result], x=DAYS[index], t=word[0], v=word[1],
               r=result)  # fmt: skip


def opposite(rng):
    a, b = rng.choice(OPPOSITES)
    if rng.random() < 0.4 and b not in ("light", "short", "right"):
        a, b = b, a
    asked = ["What is the opposite of {a}?", "Opposite of {a}?", "What's the opposite of {a}?",
             "Give me the opposite of {a}.", 'What is the opposite of "{a}"?',
             "Tell me the antonym of {a}."]  # fmt: skip
    return ask(rng, DOMAIN, f"opp|{a}", asked, "The opposite of {a} is {b}.", [f"is {b}"], a=a, b=b)


def color(rng):
    thing, hue = rng.choice(COLORS)
    asked = ["What colour is {x}?", "What color is {x}?", "Which colour is {x}?",
             "Tell me the colour of {x}.", "What is the colour of {x}?", "{x}: what color?"]  # fmt: skip
    return ask(
        rng,
        DOMAIN,
        f"color|{thing}",
        asked,
        "{X} is {c}.",
        [hue],
        x=thing,
        X=thing[0].upper() + thing[1:],
        c=hue,
    )


def animal(rng):
    name, sound, baby, kind, legs, food = rng.choice(ANIMALS)
    slots = {"x": article(name), "X": article(name).capitalize(), "n": name, "baby": baby, "b": article(baby),
             "sound": sound, "k": article(kind), "legs": legs, "food": food}  # fmt: skip
    topic = rng.randrange(6)
    if topic <= 1:
        asked = [
            "What sound does {x} make?",
            "What does {x} say?",
            "What noise does {x} make?",
            "How does {x} sound?",
        ]
        return ask(rng, DOMAIN, f"sound|{name}", asked, "{X} {sound}.", [sound], **slots)
    if topic == 2:
        asked = [
            "What is a baby {n} called?",
            "What do you call a baby {n}?",
            "What is the name of a baby {n}?",
            "How is a young {n} called?",
        ]
        return ask(rng, DOMAIN, f"baby|{name}", asked, "A baby {n} is called {b}.", [baby], **slots)
    if topic == 3:
        asked = ["What kind of animal is {x}?", "What is {x}?", "What type of animal is {x}?"]
        return ask(rng, DOMAIN, f"kind|{name}", asked, "{X} is {k}. It has {legs} legs.", [kind], **slots)
    if topic == 4:
        asked = ["How many legs does {x} have?", "How many legs has {x}?", "Number of legs of {x}?"]
        return ask(rng, DOMAIN, f"legs|{name}", asked, "{X} has {legs} legs.", [f"{legs} legs"], **slots)
    asked = ["What does {x} eat?", "What do I feed {x}?", "What food does {x} like?"]
    return ask(rng, DOMAIN, f"food|{name}", asked, "{X} eats {food}.", [food], **slots)


def define(rng):
    thing, text = rng.choice(DEFINE)
    word = thing.split(" ", 1)[1] if thing.split()[0] in ("a", "an", "the") else thing
    return ask(rng, DOMAIN, f"def|{thing}", OF, text, [text[:20]], x=thing, w=word)


def how_many(rng):
    asked, answer = rng.choice(COUNTS)
    frames = [
        "How many {a}?",
        "Do you know how many {a}?",
        "Tell me how many {a}.",
        "Can you tell me how many {a}?",
    ]
    return ask(rng, DOMAIN, f"many|{asked}", frames, answer, [answer], a=asked)


def count(rng):
    low, n = rng.randrange(1, 20), rng.randrange(3, 11)
    if rng.random() < 0.4:
        low = 1
    values = ", ".join(str(v) for v in range(low, low + n))
    asked = ["Count from {a} to {b}.", "Can you count from {a} to {b}?", "Please count from {a} up to {b}."]
    if rng.random() < 0.25:
        values = ", ".join(str(v) for v in range(n + 2, 0, -1))
        return ask(
            rng,
            DOMAIN,
            f"down|{n}",
            ["Count down from {a}.", "Count backwards from {a}."],
            values + ".",
            [values + "."],
            a=n + 2,
        )
    return ask(rng, DOMAIN, f"count|{low}|{n}", asked, values + ".", [values + "."], a=low, b=low + n - 1)


def sort(rng):
    if rng.random() < 0.5:
        items = rng.sample(range(1, 100), 3)
        right = ", ".join(str(v) for v in sorted(items))
        asked = [
            "Sort {x}.",
            "Sort these numbers: {x}.",
            "Put {x} in order.",
            "Order {x} from small to large.",
        ]
    else:
        items = rng.sample(THINGS, 3)
        while len({item[0] for item in items}) < 3:
            items = rng.sample(THINGS, 3)
        right = ", ".join(sorted(items))
        asked = [
            "Sort {x}.",
            "Sort these words: {x}.",
            "Put {x} in alphabetical order.",
            "Sort alphabetically: {x}.",
        ]
    listed = ", ".join(str(v) for v in items)
    made = ask(rng, DOMAIN, "sort", asked, "In order: {r}.", [right], x=listed, r=right)
    return Exchange(DOMAIN, made.user, made.answer, "sort|" + right, made.require)


def other(rng):
    season = rng.choice(list(SEASONS))
    topic = rng.randrange(3)
    if topic == 0:
        asked = [
            "Which months are in {s}?",
            "What months belong to {s}?",
            "When is {s}?",
            "What are the months of {s}?",
        ]
        return ask(
            rng,
            DOMAIN,
            f"season|{season}",
            asked,
            "In the north, {s} is {m}.",
            [SEASONS[season]],
            s=season,
            m=SEASONS[season],
        )
    if topic == 1:
        names, kind = (DAYS, "days of the week") if rng.random() < 0.5 else (MONTHS, "months of the year")
        asked = ["Name the {k}.", "List the {k}.", "What are the {k}?", "Tell me the {k}."]
        return ask(rng, DOMAIN, kind, asked, ", ".join(names) + ".", [", ".join(names)], k=kind)
    n = rng.randrange(10)
    asked = ["How do you write {n} in words?", "Write {n} as a word.", "Spell the number {n}."]
    return ask(rng, DOMAIN, f"word|{n}", asked, "{n} is {w}.", [NUMBERS[n]], n=n + 1, w=NUMBERS[n])


def sample(rng: random.Random) -> Exchange:
    kinds = [calendar, tomorrow, opposite, color, animal, define, how_many, count, sort, other]
    return rng.choices(kinds, [12, 5, 14, 9, 18, 15, 8, 6, 12, 6])[0](rng)
