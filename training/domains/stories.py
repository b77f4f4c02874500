"""Short stories: a request with a name, an animal, a place or an object, and a small plot that uses them."""

import random

from training.domains.common import Exchange, article, words
from training.domains.names import person

DOMAIN = "stories"
ANIMALS = words("""dog cat fox rabbit bear owl mouse frog duck turtle horse pony goat sheep cow pig hen lion \
tiger elephant monkey
giraffe zebra wolf deer squirrel hedgehog badger otter beaver whale dolphin seal penguin parrot crow swan \
goose donkey camel
kangaroo koala panda lizard snake snail spider bee butterfly ant dragon unicorn crab octopus robin sparrow \
kitten puppy lamb
hamster bat mole raccoon""")
PLACES = """forest garden village castle city river lake sea beach mountain valley desert island cave farm \
meadow library school
market park harbour tower museum bakery zoo train station barn swamp jungle field kitchen attic lighthouse \
cottage bridge
mill orchard playground circus palace""".replace("train station", "station").split()
OBJECTS = words("""key map lantern ball kite book hat boat bell stone coin ring flute drum umbrella basket \
letter clock mirror box
bicycle lamp scarf feather shell crown button teapot cake apple pumpkin star balloon robot train blanket \
candle compass ladder
rope whistle spoon pencil painting violin sled necklace jar seed""")
ROLES = words("""pirate princess king queen knight wizard witch ghost robot farmer baker teacher sailor \
giant mermaid prince clown
fairy monster doctor painter thief soldier detective chef pilot gardener fisherman astronaut dinosaur elf \
dwarf troll
scientist nurse singer dancer baby grandmother grandfather boy girl alien superhero snowman cowboy ninja \
vampire""")
MORE_PLACES = words("""house ship shop kitchen cellar moon sky mine volcano town hospital restaurant bus \
hotel theatre airport
office bedroom cathedral stadium canyon lagoon glacier meadow tent treehouse dungeon temple pyramid \
spaceship""")
MORE_OBJECTS = words("""sword car phone computer rocket guitar piano chair table window door cup plate \
bottle knife carpet pillow
shoe glove coat banana cookie pizza sandwich cheese egg rose flower leaf magnet camera telescope wand potion \
bag chest puzzle
cloud snowball icicle treasure diamond pearl television radio wheel hammer nail brush button sock toy doll""")
_PARTS = (
    words("bl gr sn tr kl m n z v sk pl w f d b"),
    words("a e i o u oo ee"),
    words("b d g k l m n p r t"),
    words("a o er le in um et"),
)
MOODS = words(
    "small old brave shy kind clever lazy happy lonely curious hungry quiet gentle funny tiny young"
)
WEATHER = ["One sunny morning", "One rainy day", "One cold night", "One windy afternoon", "Early one morning",
           "On a warm summer day",
           "One snowy evening", "One day", "Last spring", "On a quiet Sunday", "After lunch one day",
           "Late one evening"]  # fmt: skip

OPEN = ["Once upon a time, there was a {kid} named {n}.", "{n} was a {mood} {kid} who lived near the {p}.",
        "There once was a {kid} called {n}.",
        "{n} lived in a little house by the {p}.", "{n} was a {mood} {kid} who loved the {p}.",
        "Long ago, a {mood} {kid} named {n} lived close to the {p}."]  # fmt: skip
MEET = ["{w}, {he} met {ma} in the {p}.", "{w}, {he} went to the {p} and saw {ma}.",
        "{w}, {ma} came to {him} in the {p}.",
        "{w}, {he} walked to the {p} and found {ma} there.",
        "{w}, {he} heard a sound in the {p}, and it was {ma}."]  # fmt: skip
PLOTS = [
    (["The {a} was sad because it had lost its {o}.", "The {a} was crying, for its {o} was gone.",
      '"I lost my {o}," said the {a}.'],
     ["{n} looked under the stones and behind the trees.", "They looked for the {o} all day long.",
      '"Do not worry, I will help you," said {n}.'],
     ["At last {he} found the {o} under some leaves.", "In the end, the {o} was inside an old box.",
      "Then {he} saw the {o} shining in the grass."],
     ["The {a} danced with joy.", "The {a} thanked {him} again and again.",
      '"You are a true friend," said the {a}.']),
    (["The {a} was stuck in a deep hole.", "The {a} had a foot caught under a big stone.",
      "The {a} could not get down from a high wall."],
     ["{n} had only {mo} with {him}.", "{he_} thought for a while and took out {mo}.",
      "{he_} ran home to fetch {mo}."],
     ["With the {o} and a little luck, {he} set the {a} free.",
      "{he_} used the {o}, and soon the {a} was free.",
      "Slowly and carefully, {he} helped the {a} out with the {o}."],
     ["From then on, the {a} followed {him} everywhere.", "The {a} gave {him} a big hug.",
      "They shared some bread and laughed."]),
    (["The {a} showed {him} {mo} hidden in the ground.", "The {a} was guarding {mo}.",
      "The {a} carried {mo} on its back."],
     ["When {n} touched the {o}, it began to glow.", "{n} picked up the {o}, and it started to sing.",
      '"It is magic," whispered the {a}.'],
     ["{he_} made a wish, and flowers grew all over the {p}.",
      "{he_} made a wish for a feast, and a long table appeared.",
      "The {o} lifted them up, and they flew over the {p}."],
     ["They put the {o} back and kept the secret.", "In the evening they came home tired and happy.",
      "They promised never to tell anyone."]),
    (["The {a} wanted to learn to dance.", "The {a} wanted to see the world.",
      "The {a} was afraid of the dark."],
     ["{n} gave it {mo} to make it brave.", "{n} had an idea and brought {mo}.",
      '"Take my {o}, it will help," said {n}.'],
     ["At first it went wrong, and they both fell down.",
      "The first try was a mess, but they did not give up.", "They practised every day after school."],
     ["Step by step, the {a} became brave.", "By winter, the {a} could do it alone.",
      "Soon everyone in the {p} came to watch."]),
    (["They decided to have a race to the end of the {p}.",
      "They made a plan to build a tiny house in the {p}.",
      "They wanted to bake a cake for everyone in the {p}."],
     ["But a strong wind came and blew the {o} away.", "But {n} dropped the {o} on the way.",
      "But somebody had taken the {o}."],
     ["The {a} ran fast and caught it.", "{n} and the {a} followed the trail until they had it back.",
      "They worked together and got it back."],
     ["Everyone cheered for {n} and the {a}.", "Nobody won, but everyone had fun.",
      "That night there was music in the {p}."]),
    (["The {a} asked {him} a riddle about {mo}.", "The {a} would not let {him} pass without {mo}.",
      '"Bring me {mo}," said the {a}, "and I will tell you a secret."'],
     ["{n} thought hard and walked up and down.", "{n} asked an old woman for help.",
      "{n} sat down and had a good think."],
     ["Then {he} smiled, because {he} knew what to do.", "In {his} pocket {he} found just the right {o}.",
      "{he_} came back with the {o} before sunset."],
     ["The {a} laughed and let {him} pass.", "The {a} told {him} that kindness is the best treasure.",
      "The {a} bowed and became {his} friend."]),
]  # fmt: skip
END = ["From that day on, {n} and the {a} were best friends.", "And {n} never forgot that day in the {p}.",
       "{n} went home with a smile.",
       "They lived happily ever after.", "That night {n} slept very well.",
       "And every year they met again in the {p}.",
       "Since then, {n} visits the {a} every week.", "It was the best day of {his} life."]  # fmt: skip
TAIL = ["about {x}", "with {x}", "about {x}", "about {x}"]
HEAD = ["Tell me a story {t}.", "Tell me a short story {t}.", "Write a story {t}.",
        "Can you tell me a story {t}?", "I want a story {t}.", "Make up a story {t}.",
        "Please write a short story {t}.", "Give me a little story {t}.", "A story {t}, please.",
        "Could you write a tale {t}?", "Tell a story {t}.", "story {t}"]  # fmt: skip
BARE = ["Tell me a story.", "Tell me a short story.", "Write a story.", "Can you tell me a story?",
        "I want to hear a story.", "Another story please.",
        "Tell me a bedtime story.", "Make up a story.", "One more story, please."]  # fmt: skip


def tell(rng, name, girl, animal, place, thing) -> str:
    """Compose the story: an opening, a meeting, the four beats of one plot, and perhaps an ending."""
    he, him, his = ("she", "her", "her") if girl else ("he", "him", "his")
    mood = rng.choice(MOODS)
    slots = {"n": name, "a": animal, "p": place, "o": thing, "he": he, "him": him, "his": his,
             "he_": he.capitalize(),
             "mood": mood, "kid": "girl" if girl else "boy", "w": rng.choice(WEATHER),
             "ma": article(rng.choice(MOODS) + " " + animal), "mo": article(thing)}  # fmt: skip
    beats = [rng.choice(OPEN), rng.choice(MEET)] + [rng.choice(beat) for beat in rng.choice(PLOTS)]
    if rng.random() < 0.15:
        beats.pop(5)
    elif rng.random() < 0.8:
        beats.append(rng.choice(END))
    return " ".join(beat.format(**slots) for beat in beats)


def _thing(rng, usual, more):
    """A noun: usually a known one, sometimes a rarer one, at times one that does not exist."""
    roll = rng.random()
    if roll < 0.6:
        return rng.choice(usual)
    return rng.choice(more) if roll < 0.93 else "".join(rng.choice(part) for part in _PARTS)


def sample(rng: random.Random) -> Exchange:
    name, girl = person(rng)
    animal, place, thing = (
        _thing(rng, ANIMALS, ROLES),
        _thing(rng, PLACES, MORE_PLACES),
        _thing(rng, OBJECTS, MORE_OBJECTS),
    )
    given = {k for k in "napo" if rng.random() < 0.5}
    parts, require = [], []
    if "n" in given:
        parts.append(name if rng.random() < 0.7 else ("a girl" if girl else "a boy") + " named " + name)
        require.append(name)
    if "a" in given:
        parts.append(article(animal) if rng.random() < 0.8 else article(rng.choice(MOODS) + " " + animal))
        require.append(animal)
    if "o" in given:
        parts.append(article(thing))
        require.append(thing)
    rng.shuffle(parts)
    tail = rng.choice(TAIL).format(x=_join(parts)) if parts else ""
    if "p" in given:
        require.append(place)
        tail += (
            (" in the " + place)
            if parts
            else f"about the {place}"
            if rng.random() < 0.5
            else f"set in {article(place)}"
        )
    asked = rng.choice(HEAD).format(t=tail) if tail else rng.choice(BARE)
    key = f"story|{name if 'n' in given else '*'}|{animal}|{place}"
    return Exchange(DOMAIN, asked, tell(rng, name, girl, animal, place, thing), key, tuple(require))


def _join(parts):
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
