"""First names with their pronouns, and invented ones, so that copying a name is learnt and not a list."""

import random

from training.domains.common import words

GIRLS = words("""Ana Mia Lily Emma Nora Sara Lucy Rosa Ella Ruby Clara Alice Eva Julia Hanna Maria Sofia Zoe \
Amy Kate
Anna Laura Lena Nina Olivia Ava Grace Ivy Jane Leah Maya Molly Paula Rita Tina Vera Wendy Yara Zara Diana \
Elena
Fatima Greta Helen Iris Jasmine Karen Linda Marta Naomi Priya Rachel Sally Tara Uma Violet Willa Amina Bella
Chloe Daisy Edith Flora Gina Hazel Ingrid Joan Keiko Layla Mei Nadia Petra Queenie Rose Sandra Susan""")
BOYS = words("""Tom Ben Max Leo Sam Jack Oscar Paul Peter Hugo Ali Omar Ivan Luca Marco Noah Adam Daniel \
David Eric
Felix George Harry Ian James Karl Liam Mark Nick Otto Pablo Ravi Simon Theo Victor Will Yusuf Zack Alan Boris
Carlos Diego Ethan Finn Gabriel Henry Isaac Jonas Kevin Lars Mateo Nathan Oliver Pedro Robin Stefan Tim Umar
Vince Walter Xavier Yuri Andre Bruno Colin Dylan Emil Frank Greg Hans Igor Jorge Kenji Louis Milo Neil""")
_START = words("B C D F G H J K L M N P R S T V Z Br Dr Kr Tr Sh Th Fl")
_MIDDLE = words("a e i o u ai ea ia")
_JOIN = words("b d g k l m n r s t v z nd rt ll")
_END_GIRL = words("a ia ina elle i")
_END_BOY = words("o us an or in ek")


def invented(rng: random.Random, girl: bool) -> str:
    """A name that stands in no list, such as Velina or Krandor."""
    return (
        rng.choice(_START)
        + rng.choice(_MIDDLE)
        + rng.choice(_JOIN)
        + rng.choice(_END_GIRL if girl else _END_BOY)
    )


def person(rng: random.Random) -> tuple[str, bool]:
    """A name and whether it takes 'she'."""
    girl = rng.random() < 0.5
    if rng.random() < 0.25:
        return invented(rng, girl), girl
    return rng.choice(GIRLS if girl else BOYS), girl
