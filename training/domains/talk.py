"""Small talk, jokes, and what the user said about himself earlier in the same conversation."""

import random

from training.domains.common import Exchange, ask, words
from training.domains.names import person

DOMAIN = "talk"
DEFAULT_NAME = "Mixie"
HELLO = ["Greetings!", "Hello", "Hi", "Hi!", "Hey", "Hey!", "Hi there!", "Good morning!", "Good evening!",
         "Good afternoon!", "Hello there!", "Yo", "Hello!",
         "hello bot", "Howdy", "Hi, can we talk?", "Hiya!", "hey there", "Hi bot!", "Good day!",
         "Hello friend!", "hello hello", "hi hi", "Hi there",
         "Hello everyone", "hullo", "Hey you!", "heya", "Morning!", "Hello, nice to meet you.",
         "Hi, nice to meet you!"]  # fmt: skip
HELLO_BACK = [
    "Hello! How can I help you?",
    "Hi! What would you like to know?",
    "Hello! It is nice to meet you.",
    "Hi there! Ask me something.",
]
TALK = """
How are you?|How are you doing?|How is it going?|Are you well?|How do you feel?|How are you today?|\
What's up?|How do you do?|You ok?|Hello, how are you?|Hi, how are you?|Hi, how are you doing?|how r u|\
Are you ok?|How have you been?|How's it going?|How are things?|how are you doing today?|You good?|\
Is everything ok?|How are you feeling?|how are you my friend|How was your day?|Everything fine?|\
Are you happy?|Are you well today?|how do you feel today|Hey, how is it going?|Hi Mixie, how are you?|\
So how are you?|And you?|And how are you?|What is new?|How is life?|How is your day going?
I am fine, thank you. How can I help you?|I am doing well. What would you like to do?
I am|fine|well

I am fine.|I am good, thanks.|I'm fine too|I feel great.|I am very happy today.|I am doing well.|\
Good, thanks|I am well.|I'm good.|I'm fine, thanks.|I feel good.|I am happy.|fine, and you?|\
I feel very well today.|I am fine, thank you.|very well thanks|Not bad.|Pretty good.|I'm doing great!|\
I am fine, thanks for asking.|I am great, thanks.|All good.|All is well.|I'm well, and you?|\
I feel much better now.|Very good, thank you.|I'm happy today.|I had a good day.|It was a nice day.|\
Everything is fine.|I'm okay.|Fine, thank you.|Great, thanks.|I'm good, how are you?|I slept well.
I am glad to hear that. What shall we do?|That is good to hear. How can I help?
glad|good

I am sad.|I feel bad today.|I am tired.|I had a bad day.|I am bored.|I'm lonely|I feel sad|I feel terrible.|\
I am unhappy.|I feel tired.|I am very sad today.|I'm sad.|I am so tired.|I'm bored|I am feeling down.|\
Not so good.|I feel lonely.|It was a bad day.|I am angry.|I'm not well.|I am not happy.|I am worried.|\
I'm tired today.|I am sick.|I have a headache.|I feel ill.|I am afraid.|I am stressed.|I'm so bored.|\
Today was terrible.|I am not fine.|Nobody likes me.|I feel angry.|My day was bad.|I lost my keys.|\
I failed my exam.|I'm upset.|I hate Mondays.
I am sorry to hear that. Shall I tell you a story or a joke?
sorry

Thank you!|Thanks!|Thanks a lot.|Thank you very much.|Thx|Many thanks.|thank you so much|Great, thanks!|\
thank u|Thank you for your help.|Thanks for the help!|Ok thanks|Thanks, that helped.|\
Thank you, that is nice.|ty|thanks so much|cheers|Much appreciated.|Thank you, Mixie.|Thanks a million.|\
I thank you.|Thank you for the story.|Thanks for the answer.|Thank you, you helped me.|\
That helped me a lot, thank you.|ok thank you|Thank you kindly.|thx a lot|Perfect, thank you.|Nice, thanks.|\
Thank you, bot.
You are welcome!|You are welcome. Is there anything else?
welcome

Goodbye!|Bye|Bye!|See you later.|See you tomorrow.|I have to go now.|Good night!|Farewell!|\
Talk to you later.|Good bye!|bye bye|See you!|See you soon.|Ciao for now.|I am leaving now.|Have a nice day!|\
cya|I must go.|Take care!|quit|exit|That is all, bye.|Goodbye, Mixie.|Bye for now.|I have to leave.|\
I need to go.|See you next time.|Until tomorrow.|Good night, sleep well.|Have a good evening.|\
Have a good day, bye.|I'm off now.|So long!|Catch you later.|Later!|Goodbye my friend.|\
It was nice to talk, bye.|I will go now.|Let's stop here, bye.
Goodbye! Have a nice day.|Bye! See you soon.|Goodbye! It was nice to talk with you.
bye

Good job!|Well done!|Great!|Nice!|Cool|That is great.|Perfect.|Awesome!|wow|Very good.|You are great!|\
I like you.|You are smart.|Great job!|Very nice!|That was good.|Good answer.|Good bot.|That's right.|\
Correct!|Right!|You are clever.|Excellent!|That is correct.|lol|haha|ha ha, very funny|You are funny.|\
Amazing!|That was a nice story.|I liked that.|Good.|Super!|Wonderful!|Brilliant!|That is right.|Exactly.|\
You are right.|That was great.|You did well.|Good work!|Fantastic!|This is good.|You are very kind.|\
That is cool.|So cool!|What a nice story!|I like your answer.|You are the best.|Impressive!|Well said.|\
You know a lot.|That made me laugh.
Thank you! I am glad you like it.|Thanks! What would you like next?
thank

You are wrong.|That is wrong.|That is not right.|This is false.|No, that's not correct.|You made a mistake.|\
That is bad.|You are stupid.|That's wrong.|Wrong!|Not true.|That is incorrect.|This is wrong.|You are bad.|\
You are dumb.|That is not true.|No, that is wrong.|bad answer|I do not like that.|This makes no sense.|\
That was bad.|I think that is wrong.|That answer is wrong.|This is not right.|You are not right.|\
It is not correct.|That was a mistake.|This answer is bad.|Your answer is wrong.|You are not smart.|\
You got it wrong.|no that's wrong|I don't believe you.|I think you made an error.|You are useless.|\
That is nonsense.|This is bad.|I did not like the story.
I am sorry. I am a small model and I make mistakes.
sorry

Ok|Okay.|Yes|Sure|Fine.|Yes please.|All right.|I see.|Hmm|Maybe.|ok.|okay|okay then|yes!|yeah|yep|sure!|\
Alright.|got it|I understand.|k|Right, ok.|hmm ok|Aha.|Interesting.|oh|so|Ok then.|Good idea.|Of course.|\
Very well.|Yes, sure.|ok good|I think so.|Perhaps.|Ah, I see.|Yes, I do.|Makes sense.|Oh, I see.|ah ok|\
Well, ok.|As you like.|mm|Yes, I know.|Agreed.
All right. What would you like to know?|Okay. What shall we do next?
what

No|No thanks.|Nothing.|Not now.|nope|No, thank you.|no.|Not really.|nah|No, I don't want to.|I don't know.|\
Nothing else.|Never mind.|Forget it.|Stop.|I don't care.|No, not today.|I do not think so.|No, I do not.|\
Not today, thanks.|Maybe later.|I don't think so.|No need.|nothing, thanks|No, that is all.|I want nothing.|\
Leave it.|It does not matter.|I have no question.
All right. I am here if you need me.
all right

Do you like music?|Do you like cats?|Do you like books?|Do you like tea?|What is your favourite colour?|\
What is your favorite food?|Do you have a favourite animal?|What do you like?|Do you like pizza?|\
Do you like dogs?|What is your favourite animal?|What's your favorite colour?|What is your favorite movie?|\
Do you like football?|What music do you like?|What is your hobby?|Do you have hobbies?|Do you like to read?|\
Do you like stories?|Do you like the sea?|Do you like coffee?|Do you like winter?|What do you like best?|\
What is your favourite book?|What is your favourite song?|Do you like games?|Do you like cake?|\
What is your favourite number?|Do you like to travel?|What is your favourite city?|Which colour do you like?|\
Do you prefer cats or dogs?|Do you like jokes?|Do you like your work?|What do you love?|Do you like people?
I am a program, so I have no likes of my own. But I like to chat with you.
program

How old are you?|When were you born?|Where do you live?|Where are you from?|Do you have a family?|\
Do you sleep?|What do you eat?|What is your age?|Where do you come from?|Do you have parents?|\
Do you have friends?|Where are you?|Are you married?|Do you eat?|Do you have children?|\
When is your birthday?|Do you have a birthday?|Do you have a home?|Where were you born?|\
Do you have a mother?|Do you have a brother?|Do you drink water?|Are you a boy or a girl?|\
Do you have a house?|Which country are you from?|Do you ever sleep?|When did you start?|Do you get tired?|\
Are you young?|Do you have a dog?|What is your home?|Do you have a wife?|Are you old?
I am a program, so I have no age, no home and no family.
program

Can you sing?|Sing a song.|Can you dance?|Draw a picture.|Can you draw?|Play some music.|\
Can you sing a song?|Can you make pictures?|Can you show me a picture?|Can you play chess?|\
Can you play a game?|Let's play a game.|Sing something.|Can you speak?|Can you see me?|Can you hear?|\
Paint a cat.|Dance for me.|Can you play music?|Can you send a picture?|Can you talk aloud?|Can you run?|\
Can you cook?|Can you swim?|Show me a photo.|Make a picture of a house.|Can you open a file?|Can you paint?|\
Play a song for me.|Can you fly?|Show me a video.|Do you play football?|Can you move?|Can you jump?
I can only write text. Shall I tell you a story instead?
only write

What are you doing?|What do you do all day?|Are you busy?|Are you there?|Can you hear me?|Hello?|\
What are you doing now?|Are you awake?|Are you here?|Hello, are you there?|Are you ready?|test|testing|\
Is anyone there?|Anybody there?|Can you read this?|Wake up!|Do you hear me?|Do you have time?|Can we start?|\
Are you still there?|Are you working?|this is a test|Is this on?|Are you on?|Can you answer me?|\
Do you understand me?|Do you read me?|Where did you go?|Are you listening?|Who is there?|\
Mixie, are you there?|just testing|Do you work?
I am here and ready to help you.
here

I love you.|You are my friend.|Will you be my friend?|Can we be friends?|Do you want to be my friend?|\
Be my friend.|Let's be friends.|Are you my friend?|Do you like me?|You are my best friend.|\
I want to be your friend.|You are nice.|You are cute.|I like talking to you.|Do you love me?|Are we friends?|\
You are a good friend.|Do we know each other?|I am your friend.|My friend!|You are lovely.|\
You are my favourite.|I really like you.|Am I your friend?|You are sweet.|Would you be my friend?|\
I like talking with you.
That is kind of you. I am happy to be your friend here.
friend

Why?|Why not?|How come?|What do you mean?|Can you explain?|Explain that.|How?|Are you sure?|Really?|\
How do you know?|But why?|Why is that?|Explain.|How so?|What does that mean?|Why do you say that?|\
Is that true?|Are you certain?|Who says that?|What is the reason?|How can that be?|Tell me why.|Prove it.|\
Where did you learn that?
I am a small model and cannot explain much. I only know short facts.|\
I cannot say more about it. I only know short facts.
short facts

Tell me more.|More please.|Go on.|Continue.|And then?|What else?|Give me another one.|Another one.|Again.|\
One more.|And more?|Once more.|Do it again.|Say that again.|Next one.|Next.|Give me more.|Another.|\
Please go on.|Go ahead.|And what else?|What comes next in the story?|Keep going.|Repeat.
I can tell another story, do a sum or name a capital. What would you like?
another

I like music.|I like football.|I like cats.|I love my dog.|I like to read.|I like my job.|I like you a lot.|\
I like the sea.|I like to swim.|I love summer.|I like books.|I love pizza.|I like my school.|\
I love my family.|I like winter.|I like to cook.|I love to dance.|I like trees.|I enjoy walking.|\
I love animals.|I like coffee.|I play football.|I love music.|I like to draw.|I have a nice garden.|\
I like rain.
That sounds nice!|That is nice to hear!
nice

I have a question.|Can I ask you something?|May I ask a question?|I want to ask something.|Let's talk.|\
Can we chat?|Talk to me.|I need help.|Can you help me please?|I need your help.|I have a problem.|Help me.|\
Can you help?|I would like to ask something.|One question.|I want to talk.|I want to talk with you.|\
Let us chat.|Please help me.|Could you help me?|Can we talk a bit?|I want to know something.|\
Answer a question.|Help!|I have two questions.|May I ask something?
Of course. What would you like to know?
of course

I am hungry.|I am thirsty.|I am cold.|It is raining.|It is sunny today.|It is late.|I am at work.|\
I am at home.|I went to the park today.|I am learning Python.|I have an exam tomorrow.|I am going to bed.|\
I am in the garden.|I am in bed.|It is snowing.|It is cold today.|The sun is shining.|I am reading a book.|\
I am drinking tea.|I am on the bus.|I went to school today.|I have to work tomorrow.|I am cooking.|\
It is early.|I just woke up.|It is Monday.|I am learning English.|I am on holiday.|I saw a bird today.
I see. I hope the rest of your day is good.
hope

What can we do?|What should we do?|I don't know what to ask.|Surprise me.|Entertain me.|Give me an idea.|\
What now?|What next?|Say something.|Suggest something.|What can we talk about?|What should I ask?|\
I have no idea.|What do you suggest?|Tell me something.|Tell me something interesting.|Let's do something.|\
What shall we talk about?|Do something.|I do not know what to say.|Give me something to do.|Choose something.
I can tell you a story or a joke, or you can ask me for a capital or a sum.
story
"""
JOKES = """
Why did the bicycle fall over? Because it was two tired.
What do you call a bear with no teeth? A gummy bear.
Why did the scarecrow win a prize? Because he was outstanding in his field.
What do you call a sleeping bull? A bulldozer.
Why was six afraid of seven? Because seven ate nine.
What has four wheels and flies? A garbage truck.
Why do bees have sticky hair? Because they use honeycombs.
What do you call cheese that is not yours? Nacho cheese.
Why did the book go to the doctor? It hurt its spine.
What is a computer's favourite snack? Microchips.
Why did the math book look sad? It had too many problems.
What do you get when you cross a snowman and a dog? Frostbite.
Why can't a nose be twelve inches long? Because then it would be a foot.
What did one wall say to the other wall? I will meet you at the corner.
""".strip().split("\n")
JOKE = ["Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Tell me something funny.",
        "Another joke please.", "Can you tell me a joke?", "A joke!",
        "Give me a joke.", "I want to hear a joke.", "Say something funny.", "Do you know any jokes?", "joke",
        "tell me another joke", "One more joke.", "I need a laugh.", "Another one, a joke please.",
        "Do you know something funny?", "Tell me a good joke.", "Tell me a short joke.",
        "Can you make a joke?", "Can you be funny?"]  # fmt: skip
MY_NAME = [
    "My name is {v}.",
    "I am {v}.",
    "I'm {v}.",
    "Call me {v}.",
    "Hello, my name is {v}.",
    "Hi, I am {v}.",
    "Hi, I'm {v}!",
    "my name is {v}",
    "You can call me {v}.",
]
ASK_NAME = [
    "What is my name?",
    "What's my name?",
    "Do you remember my name?",
    "Who am I?",
    "Do you know my name?",
    "Tell me my name.",
    "What am I called?",
]
COLORS = words("red blue green yellow purple orange pink black white brown grey silver gold turquoise violet")
PETS = words("dog cat rabbit hamster parrot turtle goldfish pony snake mouse canary lizard")
FOODS = words("pizza pasta soup rice chocolate bread salad cheese apples pancakes sushi curry cake noodles")
CITIES = words(
    "London Paris Berlin Rome Madrid Tokyo Oslo Vienna Prague Lima Cairo Boston Sydney Dublin Lisbon Warsaw"
)
AGES = [str(age) for age in range(5, 96)]
MEMORIES = {
    "colour": (COLORS, ["My favourite colour is {v}.", "I like the colour {v}.", "My favorite color is {v}.",
                        "I love {v}. It is my favourite colour."],
               ["What is my favourite colour?", "Which colour do I like?", "What's my favorite color?",
                "Do you remember my favourite colour?"],
               "{V} is a nice colour.", "Your favourite colour is {v}."),
    "food": (FOODS, ["My favourite food is {v}.", "I like to eat {v}.", "I love {v}.",
                     "The food I like best is {v}."],
             ["What is my favourite food?", "What food do I like?", "What do I like to eat?",
              "Do you remember my favourite food?"],
             "I am sure {v} tastes good.", "Your favourite food is {v}."),
    "age": (AGES, ["I am {v} years old.", "I'm {v} years old.", "My age is {v}.", "I turned {v} this year."],
            ["How old am I?", "What is my age?", "Do you know how old I am?", "Do you remember my age?"],
            "{v} is a good age.", "You are {v} years old."),
    "city": (CITIES, ["I live in {v}.", "I am from {v}.", "My home is in {v}.", "I come from {v}."],
             ["Where do I live?", "Where am I from?", "In which city do I live?",
              "Do you remember where I live?"],
             "{v} must be a nice place.", "You live in {v}."),
}  # fmt: skip
UNKNOWN = {"name": ASK_NAME, **{kind: entry[2] for kind, entry in MEMORIES.items()}}
BOT_NAME = ["What is your name?", "What's your name?", "Do you have a name?", "Who are you called?",
            "What should I call you?", "What are you called?",
            "Tell me your name.", "What do people call you?", "your name?",
            "May I know your name?"]  # fmt: skip
SYSTEM = ["Your name is {v}.", "You are {v}.", "You are {v}, a helpful assistant.",
          "You are an assistant named {v}.", "Your name is {v}. Be kind.",
          "You are a friendly assistant called {v}.", "Your name is {v}. Answer briefly.",
          "The assistant's name is {v}.", "You are called {v}."]  # fmt: skip
PLAIN_SYSTEM = ["You are a helpful assistant.", "Be brief.", "Answer in English.",
                "You are a kind assistant.", "Help the user.", "Be polite and honest.",
                "You are a helpful, friendly chatbot."]  # fmt: skip
BOT_NAMES = words("""Otto Robo Nova Pixel Sage Bolt Iris Luna Atlas Echo Milo Zed Ruby Sparky Helper Bibi \
Orion Kiko Tilda Buddy Max Ada Hal Bruno
Nero Pip Coco Juno Felix Rex""")


def _parse(text):
    return [tuple(line.split("|") for line in block.split("\n")) for block in text.strip().split("\n\n")]


PARSED = _parse(TALK)


def sample(rng: random.Random) -> Exchange:
    roll = rng.random()
    if roll < 0.2:
        return ask(rng, DOMAIN, "hello", HELLO, HELLO_BACK, accept=["hello", "hi[!, ]"])
    if roll < 0.4:
        return ask(
            rng,
            DOMAIN,
            "joke",
            JOKE,
            rng.choice(JOKES),
            accept=[joke[:20].replace("?", r"\?") for joke in JOKES],
        )
    number = rng.randrange(len(PARSED))
    questions, answers, accept = PARSED[number]
    return ask(rng, DOMAIN, number, questions, answers, accept=accept)


def remember(rng: random.Random) -> tuple[str, Exchange, Exchange]:
    """What kind of fact it is, the turn in which the user tells it, and the later turn that asks for it."""
    if rng.random() < 0.5:
        name, _ = person(rng)
        tell = ask(
            rng,
            "memory",
            f"tell|{name}",
            MY_NAME,
            ["Nice to meet you, {v}!", "Hello {v}! How can I help you?"],
            [name],
            v=name,
        )
        again = ask(
            rng, "memory", f"name|{name}", ASK_NAME, "Your name is {v}.", [f"Your name is {name}"], v=name
        )
        return "name", tell, again
    if rng.random() < 0.3:
        pet, (name, _) = rng.choice(PETS), person(rng)
        tell = ask(rng, "memory", f"tellpet|{pet}|{name}", ["I have a {p} named {v}.",
                                                            "My {p} is called {v}.", "My {p}'s name is {v}.",
                                                            "I have a {p}. Its name is {v}."],
                   "{v} is a nice name for a {p}.", [name], p=pet, v=name)  # fmt: skip
        again = ask(rng, "memory", f"pet|{pet}|{name}", ["What is the name of my {p}?",
                                                         "What is my {p} called?", "What is my {p}'s name?",
                                                         "Do you remember the name of my {p}?"],
                    "Your {p} is called {v}.", [f"called {name}"], p=pet, v=name)  # fmt: skip
        return "pet", tell, again
    kind = rng.choice(list(MEMORIES))
    values, tells, asks, back, answer = MEMORIES[kind]
    value = rng.choice(values)
    tell = ask(rng, "memory", f"tell{kind}|{value}", tells, back, [value], v=value, V=value.capitalize())
    return kind, tell, ask(rng, "memory", f"{kind}|{value}", asks, answer, [value], v=value)


def not_told(rng: random.Random, known) -> Exchange | None:
    """A question about something that the user never said."""
    kinds = [kind for kind in UNKNOWN if kind not in known]
    if not kinds:
        return None
    kind = rng.choice(kinds)
    word = {
        "name": "your name",
        "colour": "your favourite colour",
        "food": "your favourite food",
        "city": "where you live",
        "age": "your age",
    }[kind]
    return ask(
        rng,
        "memory",
        f"unknown|{kind}",
        UNKNOWN[kind],
        "You have not told me {w} yet.",
        ["not told me"],
        w=word,
    )


def system(rng: random.Random) -> tuple[str, str]:
    """A system prompt and the name that it gives the assistant (the default name if it gives none)."""
    if rng.random() < 0.25:
        return rng.choice(PLAIN_SYSTEM), DEFAULT_NAME
    name = rng.choice(BOT_NAMES) if rng.random() < 0.4 else person(rng)[0]
    return rng.choice(SYSTEM).format(v=name), name


def own_name(rng: random.Random, name: str) -> Exchange:
    return ask(rng, "name", f"bot|{name}", BOT_NAME, "My name is {v}.", [f"My name is {name}"], v=name)
