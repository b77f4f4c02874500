"""Questions that the model cannot answer, in great variety, and short honest answers to them."""

import random

from training.domains.common import Exchange, words
from training.domains.geography import COUNTRIES
from training.domains.names import invented, person

DOMAIN = "outside"
SUBJECTS = """the stock market, black holes, the French revolution, climate change, the new phone, quantum \
physics, football, tennis, cricket, the war,
inflation, taxes, democracy, dinosaurs, the Roman empire, string theory, photosynthesis, DNA, vaccines, \
diabetes, cancer, headaches, insurance, mortgages,
bitcoin, blockchain, electric cars, rockets, Mars, the Titanic, opera, jazz, ballet, philosophy, religion, \
love, the meaning of life, free will, psychology,
history, chemistry, algebra, calculus, biology, economics, evolution, astronomy, politics, fashion, cooking, \
gardening, chess, poker, video games, movies,
television, the weather, the news, architecture, Shakespeare, the pyramids, earthquakes, hurricanes, nuclear \
power, solar panels, wine making, knitting,
marketing, law, divorce, human rights, the election, the parliament, the president, the king, the pope, the \
olympics, the world cup, the stock price of gold,
rust, Java, C++, SQL, Kubernetes, Linux, Windows, a virus, a fever, back pain, depression, anxiety, sleep, \
diets, vitamins, calories, yoga, marathons,
airplanes, ships, submarines, trains in India, hotels, visas, passports, flights, rents, jobs, salaries, \
interviews, universities, exams, homework,
machine translation, face recognition, the brain, the heart, blood pressure, allergies, teeth, coffee \
machines, washing machines, dishwashers, the fridge,
my phone, my car, my computer, my printer, my boss, my neighbour, my girlfriend, my landlord, the universe, \
time travel, ghosts, aliens, magic,
Napoleon, Einstein, Mozart, Picasso, Cleopatra, Caesar, Darwin, Newton, Gandhi, Lincoln, Beethoven, Plato, \
Socrates, Elvis, the Beatles""".replace("\n", " ").split(", ")
FRAMES = """Tell me about {s}.|What do you think about {s}?|Explain {s}.|Why is {s} important?|\
Write an essay about {s}.|How does {s} work?|Write a long essay on {s}.
What is the history of {s}?|Who invented {s}?|What is the best book about {s}?|Give me advice about {s}.|\
What is your opinion on {s}?|Summarize {s}.|What happened to {s}?
Is {s} good or bad?|I have a question about {s}.|Teach me {s}.|How can I learn about {s}?|\
Write a poem about {s}.|What are the news about {s}?|Compare {s} and {t}.
What is the difference between {s} and {t}?|Do you know anything about {s}?|I need help with {s}.|\
Can you help me with {s}?|How much does {s} cost?|What is {s}?|Who was {s}?
Write a report about {s}.|What are the rules of {s}?|How do I fix {s}?|Should I worry about {s}?|\
Give me ten facts about {s}.|{s}|Let us talk about {s}.""".replace("\n", "|").split("|")
FIXED = """Who won the world cup?|Who is the president?|Who will win the election?|What time is it?|\
What is the date today?|What day is it today?|What is the weather today?|Will it rain tomorrow?
How old is the Earth?|How tall is Mount Everest?|How far is the moon?|What is the speed of light?|\
Who wrote Hamlet?|Who painted the Mona Lisa?|What is the square root of 2?|What is 12345 * 6789?
Solve x^2 + 3x + 2 = 0|Integrate x squared.|Should I buy this stock?|How do I get rich?|\
What is the best phone?|What is the best movie?|Recommend a book.|Recommend a restaurant.
I have a headache, what should I take?|My stomach hurts.|Is this mole dangerous?|How much sleep do I need?|\
How do I lose weight?|How do I cook pasta?|Give me a recipe for a cake.
Write a C++ program.|Write a Rust program.|How do I install Linux?|Book a flight to London.|Order a pizza.|\
Call my mother.|Send an email.|Set an alarm.|Play a movie.|Open the door.|Turn on the light.
What is the meaning of life?|Is there a god?|Who will win tonight?|What was the score yesterday?|\
How many people live in China?|What is the population of France?|Who discovered America?
When did the war end?|When was Napoleon born?|Who was the first man on the moon?|What is the price of gold?|\
What is the price of bitcoin?|How do planes fly?|Why is the sky blue?|Why do cats purr?
Prove that there are infinitely many primes.|Translate this text to Chinese.|\
How do you say hello in Klingon?|Write my homework.|Write a letter to my boss.|Write a cover letter.
What is in the news?|Who is the richest man?|How does a car engine work?|How does a fridge work?|\
What is the boiling point of iron?|What are the side effects of aspirin?|Can you keep a secret?
Which party should I vote for?|What should I wear?|What should I do today?|Where are my keys?|\
What is my password?|How many stars are there?|How many bones do we have?|What is the longest river?
What is the largest country?|What is the tallest building?|What happens after we die?|What is love?|\
How do magnets work?|What is the capital of the moon?|What is the capital of Mars?""".replace(
    "\n", "|"
).split("|")
PLACE = ["What is the capital of {p}?", "Where is {p}?", "What language do they speak in {p}?",
         "On which continent is {p}?", "Tell me about {p}.", "Name a city in {p}.",
         "{p} is the capital of which country?", "How many people live in {p}?"]  # fmt: skip
PEOPLE = [
    "Who is {p}?",
    "Who was {p}?",
    "Do you know {p}?",
    "When was {p} born?",
    "Where does {p} live?",
    "Tell me about {p}.",
    "What did {p} do?",
    "How old is {p}?",
    "Is {p} nice?",
]
WORD = ["What does {w} mean?", "What is {w}?", "Define {w}.", "How do you say {w} in French?",
        "How do you say {w} in Chinese?", "Translate {w} to Spanish.", "{w}", "{w} {v}", "{w}?",
        "Explain {w}.",
        "What is a {w}?", "What colour is a {w}?", "What is the opposite of {w}?",
        "How do I {w} in Python?"]  # fmt: skip
LANGS = words(
    "Chinese Russian Arabic Hindi Korean Greek Finnish Hungarian Hebrew Thai Welsh Swahili Zulu Czech"
)
MATH = [
    "What is {a} * {b}?",
    "What is {a} / {b}?",
    "What is the square root of {a}?",
    "{a} * {b}",
    "What is {a} to the power of {b}?",
    "Is {a} a prime number?",
    "What is {a} + {b}?",
    "{a} - {b}",
]
ANSWERS = ["I am a small model and I do not know that. I can tell stories, do small sums or name capitals.",
           "Sorry, I do not know that. I am only a small model.",
           "I do not know. Ask me about countries, small sums, Python or common words.",
           "That is too hard for me. I know short stories, simple sums, capitals and a little Python.",
           "I am sorry, I do not know about that. I am a very small model."]  # fmt: skip
ACCEPT = ("do not know", "too hard")
WRITE = ["I cannot do that. I am a small model, but I can tell you a short story.", *ANSWERS]
ABOUT_COUNTRY = ["Who is the president of {c}?", "What is the population of {c}?",
                 "How many people live in {c}?", "What is the currency of {c}?", "What is the flag of {c}?",
                 "What is the weather in {c}?", "Who is the king of {c}?", "What do people eat in {c}?",
                 "How big is {c}?", "What is the history of {c}?", "Is {c} a rich country?",
                 "When was {c} founded?", "What time is it in {c}?", "How do I travel to {c}?",
                 "What is the best hotel in {c}?", "Who is the prime minister of {c}?",
                 "How far is {c}?", "Who won the match between {c} and {d}?", "Which is bigger, {c} or {d}?",
                 "Should I move to {c}?", "What is the highest mountain in {c}?"]  # fmt: skip
PROGRAMS = [
    "How do I build {x} in Python?",
    "Write {x} in Python.",
    "Write a program for {x}.",
    "How do I make {x} with Python?",
    "Code {x} for me.",
    "How do I write {x}?",
]
SOFTWARE = ["a web server", "a game", "a neural network", "a website", "a compiler", "a chess engine",
            "a database", "an operating system", "a chatbot", "a web scraper",
            "an Android app", "a calculator with buttons", "a blockchain", "a search engine", "a virus",
            "a parser", "a REST API", "a music player"]  # fmt: skip
UNKNOWN_WORDS = words("""computer airplane butterfly kitchen government freedom spoon hospital elephant \
umbrella library mirror shoulder knee
pillow garden lawyer engineer dream history science strawberry potato tomato monkey spider lion castle \
bridge holiday birthday
newspaper camera guitar piano hammer bicycle suitcase airport beach forest island thunder""")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _nonsense(rng):
    if rng.random() < 0.5:
        return "".join(rng.choice(_LETTERS) for _ in range(rng.randrange(2, 10)))
    word = rng.choice(words("bl fl gr sn tr kl m n z v sk pl w qu")) + rng.choice(words("a e i o u oo ee"))
    for _ in range(rng.randrange(1, 3)):
        word += rng.choice(words("b d g k l m n p r s t")) + rng.choice(words("a e i o u er le ing"))
    return word


def _noise(rng):
    return (
        "".join(
            rng.choice(_LETTERS + "0123456789 ?!.;#@%$^&*()") for _ in range(rng.randrange(3, 24))
        ).strip()
        or "?"
    )


def _near(rng) -> str:
    """Questions that stand close to what the model knows, and that it cannot answer all the same."""
    roll = rng.random()
    if roll < 0.6:
        countries = [row[0] for row in rng.sample(COUNTRIES, 2)]
        return rng.choice(ABOUT_COUNTRY).format(c=countries[0], d=countries[1])
    if roll < 0.8:
        return rng.choice(PROGRAMS).format(x=rng.choice(SOFTWARE))
    word, lang = (
        rng.choice(UNKNOWN_WORDS),
        rng.choice(["French", "Spanish", "German", "Italian", "Portuguese", "Japanese"]),
    )
    return rng.choice(["How do you say {w} in {l}?", "What is {w} in {l}?", "Translate {w} to {l}."]).format(
        w=word, l=lang
    )


def _question(rng) -> str:
    roll = rng.random()
    if roll < 0.32:
        return rng.choice(FRAMES).format(s=rng.choice(SUBJECTS), t=rng.choice(SUBJECTS))
    if roll < 0.46:
        return rng.choice(FIXED)
    if roll < 0.56:
        return _near(rng)
    if roll < 0.64:
        return rng.choice(PLACE).format(
            p=invented(rng, True) + rng.choice(["", "", "nd", "stan", "land", "via", "ria"])
        )
    if roll < 0.74:
        name = person(rng)[0] + (" " + invented(rng, False) if rng.random() < 0.6 else "")
        return rng.choice(PEOPLE).format(p=name)
    if roll < 0.86:
        return rng.choice(WORD).format(w=_nonsense(rng), v=_nonsense(rng))
    if roll < 0.91:
        words = (
            "hello thank you cat dog water house good morning love tree".replace(" you", "_you")
            .replace("good ", "good_")
            .split()
        )
        return f"How do you say {rng.choice(words).replace('_', ' ')} in {rng.choice(LANGS)}?"
    if roll < 0.95:
        return rng.choice(MATH).format(a=rng.randrange(100, 100000), b=rng.randrange(100, 9999))
    return _noise(rng)


def sample(rng: random.Random) -> Exchange:
    asked = _question(rng)
    makes = asked.split()[0] in ("Write", "Send", "Book", "Call", "Order", "Play", "Set", "Turn", "Open")
    answer = rng.choice(WRITE if makes else ANSWERS)
    return Exchange(DOMAIN, asked, answer, f"outside|{asked.lower()}", (), (*ACCEPT, "cannot do that"))
