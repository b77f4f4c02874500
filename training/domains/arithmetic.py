"""Small arithmetic: sums, differences, times tables, comparing, counting on, odd and even."""

import random

from training.domains.common import Exchange, held

DOMAIN = "arithmetic"
ADD = ["What is {a} + {b}?", "{a}+{b}=", "{a} + {b}", "Add {a} and {b}.", "What is {a} plus {b}?",
       "Calculate {a} + {b}.",
       "How much is {a} + {b}?", "{a} plus {b}", "What's the sum of {a} and {b}?", "Can you add {a} and {b}?",
       "{a} + {b} = ?", "Compute {a}+{b}", "What do you get if you add {a} to {b}?", "what is {a}+{b}",
       "I have {a} apples and buy {b} more. How many apples do I have?", "Sum {a} and {b}."]  # fmt: skip
SUB = ["What is {a} - {b}?", "{a}-{b}=", "{a} - {b}", "Subtract {b} from {a}.", "What is {a} minus {b}?",
       "Calculate {a} - {b}.",
       "How much is {a} - {b}?", "{a} minus {b}", "What's the difference between {a} and {b}?",
       "Take {b} away from {a}.",
       "{a} - {b} = ?", "Compute {a}-{b}", "what is {a}-{b}",
       "I have {a} apples and eat {b}. How many apples are left?"]  # fmt: skip
MUL = ["What is {a} x {b}?", "{a}*{b}=", "{a} * {b}", "{a} x {b}", "What is {a} times {b}?",
       "Multiply {a} by {b}.",
       "How much is {a} times {b}?", "{a} times {b}", "Multiply {a} and {b}.", "Calculate {a} * {b}.",
       "{a}x{b}",
       "What's the product of {a} and {b}?", "What is {a} * {b}?",
       "What is {a} multiplied by {b}?"]  # fmt: skip
COMPARE = ["Which is bigger, {a} or {b}?", "Which number is larger: {a} or {b}?", "Is {a} bigger than {b}?",
           "Compare {a} and {b}.", "What is greater, {a} or {b}?"]  # fmt: skip
SMALLER = ["Which is smaller, {a} or {b}?", "Which number is less: {a} or {b}?", "Is {a} smaller than {b}?"]
AFTER = [
    "What comes after {a}?",
    "What number comes after {a}?",
    "What is the next number after {a}?",
    "What number follows {a}?",
]
BEFORE = ["What comes before {a}?", "What number comes before {a}?", "Which number is just before {a}?"]
PARITY = [
    "Is {a} even or odd?",
    "Is {a} odd or even?",
    "Is {a} an even number?",
    "Is {a} odd?",
    "{a}: even or odd?",
]
HALF = ["What is half of {a}?", "Half of {a}?", "What is {a} / 2?", "Divide {a} by 2."]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SPELLED = [
    "What is {a} plus {b}?",
    "{a} plus {b}",
    "Add {a} and {b}.",
    "How much is {a} and {b}?",
    "What is {a} times {b}?",
    "{a} times {b}",
]
DOUBLE = ["What is double {a}?", "Double {a}.", "What is twice {a}?"]


def _exchange(user, answer, key, require):
    return Exchange(DOMAIN, user, answer, f"{DOMAIN}|{key}", (require,))


def _small(rng):
    return rng.randrange(100) if rng.random() < 0.85 else rng.randrange(13)


def add(rng):
    a, b = _small(rng), _small(rng)
    fact = f"{a} + {b} = {a + b}."
    return _exchange(rng.choice(ADD).format(a=a, b=b), fact, f"add|{min(a, b)}|{max(a, b)}", f" {a + b}.")


def subtract(rng):
    a, b = _small(rng), _small(rng)
    if a < b and rng.random() < 0.9:
        a, b = b, a
    fact = f"{a} - {b} = {a - b}."
    number = rng.randrange(len(SUB) - (a < b))
    return _exchange(SUB[number].format(a=a, b=b), fact, f"sub|{a}|{b}", f" {a - b}.")


def multiply(rng):
    a, b = rng.randrange(13), rng.randrange(13)
    number = rng.randrange(len(MUL))
    return _exchange(
        MUL[number].format(a=a, b=b), f"{a} x {b} = {a * b}.", f"mul|{a}|{b}|{number}", f" {a * b}."
    )


def compare(rng):
    a, b = rng.sample(range(100 if rng.random() < 0.8 else 1000), 2)
    bigger = rng.random() < 0.6
    question = rng.choice(COMPARE if bigger else SMALLER).format(a=a, b=b)
    high, low = max(a, b), min(a, b)
    fact = f"{high} is bigger than {low}." if bigger else f"{low} is smaller than {high}."
    if question.startswith("Is "):
        fact = ("Yes, " if (a > b) == bigger else "No, ") + fact
    return _exchange(question, fact, f"compare|{low}|{high}", fact)


def step(rng):
    after = rng.random() < 0.6
    a = rng.randrange(1, 1000 if rng.random() < 0.2 else 130)
    result = a + 1 if after else a - 1
    number = rng.randrange(len(AFTER if after else BEFORE))
    question = (AFTER if after else BEFORE)[number].format(a=a)
    return _exchange(
        question,
        f"{result} comes {'after' if after else 'before'} {a}.",
        f"step|{after}|{a}|{number}",
        f"{result} ",
    )


def parity(rng):
    a = rng.randrange(1000 if rng.random() < 0.3 else 100)
    number = rng.randrange(len(PARITY))
    kind = "odd" if a % 2 else "even"
    lead = {2: "Yes, " if kind == "even" else "No, ", 3: "Yes, " if kind == "odd" else "No, "}.get(number, "")
    return _exchange(
        PARITY[number].format(a=a), f"{lead}{a} is {kind}.", f"parity|{a}|{number}", f"{a} is {kind}"
    )


def half(rng):
    a = rng.randrange(51)
    if rng.random() < 0.5:
        number = rng.randrange(len(HALF))
        return _exchange(
            HALF[number].format(a=2 * a), f"Half of {2 * a} is {a}.", f"half|{a}|{number}", f" is {a}."
        )
    number = rng.randrange(len(DOUBLE))
    return _exchange(
        DOUBLE[number].format(a=a), f"Double {a} is {2 * a}.", f"double|{a}|{number}", f" is {2 * a}."
    )


def in_words(rng):
    a, b = rng.randrange(11), rng.randrange(11)
    number = rng.randrange(len(SPELLED))
    fact = f"{a} + {b} = {a + b}." if number < 4 else f"{a} x {b} = {a * b}."
    asked = SPELLED[number].format(a=WORDS[a], b=WORDS[b])
    return _exchange(asked, fact, f"words|{a}|{b}|{number}", fact.split("=")[1])


def sample(rng: random.Random) -> Exchange:
    kinds = [add, subtract, multiply, compare, step, parity, half, in_words]
    return rng.choices(kinds, [34, 28, 14, 9, 6, 5, 4, 3])[0](rng)


__all__ = ["held", "sample"]
