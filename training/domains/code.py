"""Python how-tos: a task in several wordings, one sentence and a short block of code."""

import random
from pathlib import Path

from training.domains.common import ask

DOMAIN = "python"
FRAMES = ["How do I {t} in Python?", "How can I {t} in Python?", "How to {t} in Python?",
          "Show me how to {t} in Python.", "Python: {t}",
          "Write Python code to {t}.", "How do you {t} in Python?", "I want to {t} in Python.",
          "Give me Python code to {t}.",
          "Help me {t} in Python.", "What is the Python code to {t}?",
          "Can you show me how to {t} with Python?"]  # fmt: skip
# one task a paragraph: wordings separated by "|", then the sentence, then the code
TASKS = Path(__file__).with_name("python_tasks.txt").read_text(encoding="utf-8")


def _parse(text):
    found = []
    for block in text.strip().split("\n\n"):
        wordings, sentence, code = block.split("\n", 2)
        found.append((wordings.split("|"), sentence, code))
    return found


PARSED = _parse(TASKS)


def sample(rng: random.Random):
    wordings, sentence, code = rng.choice(PARSED)
    wording = rng.choice(wordings)
    line = max(code.split("\n"), key=len)
    answer = f"{sentence}\n```python\n{code}\n```".replace("{", "{{").replace("}", "}}")
    return ask(rng, DOMAIN, wording, FRAMES, answer, [line], t=wording)
