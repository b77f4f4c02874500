"""Tables of everyday facts: calendar, opposites, colours, animals, definitions, counts."""

from training.domains.common import table, words

DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
SEASONS = {"spring": "March, April and May", "summer": "June, July and August",
           "autumn": "September, October and November",
           "winter": "December, January and February"}  # fmt: skip
OPPOSITES = [pair.split("/") for pair in words("""big/small hot/cold up/down left/right day/night old/young \
happy/sad fast/slow open/closed
full/empty high/low long/short light/dark wet/dry hard/soft rich/poor strong/weak loud/quiet early/late \
thick/thin clean/dirty near/far
good/bad first/last inside/outside true/false easy/difficult heavy/light wide/narrow begin/end love/hate \
win/lose push/pull give/take
buy/sell awake/asleep brave/afraid sweet/sour front/back always/never alive/dead deep/shallow right/wrong \
top/bottom""")]  # fmt: skip
COLORS = table("""
the sky|blue
grass|green
snow|white
a banana|yellow
a tomato|red
coal|black
an orange|orange
milk|white
a lemon|yellow
a strawberry|red
a leaf|green
the sea|blue
blood|red
the night|black
a carrot|orange
a frog|green
a cherry|red
chocolate|brown
an elephant|grey
a flamingo|pink
a cucumber|green
a swan|white
a fire engine|red
a pumpkin|orange
a crow|black
the sun|yellow
salt|white
a plum|purple
a pea|green
a polar bear|white
""")
ANIMALS = table("""
dog|barks|puppy|mammal|four|bones
cat|meows|kitten|mammal|four|fish
cow|moos|calf|mammal|four|grass
horse|neighs|foal|mammal|four|hay
sheep|bleats|lamb|mammal|four|grass
pig|oinks|piglet|mammal|four|almost anything
duck|quacks|duckling|bird|two|water plants
hen|clucks|chick|bird|two|seeds
lion|roars|cub|mammal|four|meat
wolf|howls|pup|mammal|four|meat
frog|croaks|tadpole|amphibian|four|insects
bee|buzzes|larva|insect|six|nectar
owl|hoots|owlet|bird|two|mice
goat|bleats|kid|mammal|four|leaves
donkey|brays|foal|mammal|four|hay
snake|hisses|snakelet|reptile|no|mice
mouse|squeaks|pup|mammal|four|seeds
goose|honks|gosling|bird|two|grass
bear|growls|cub|mammal|four|berries and fish
elephant|trumpets|calf|mammal|four|leaves and grass
kangaroo|clicks|joey|mammal|four|grass
swan|trumpets|cygnet|bird|two|water plants
spider|makes no sound|spiderling|arachnid|eight|insects
""")
DEFINE = table("""
rain|Rain is water that falls from clouds.
snow|Snow is frozen water that falls in white flakes.
the sun|The sun is a star that gives the Earth light and heat.
the moon|The moon is a ball of rock that goes around the Earth.
a star|A star is a very large ball of hot gas that shines.
a planet|A planet is a large round body that goes around a star.
a cloud|A cloud is made of tiny drops of water in the air.
the wind|Wind is moving air.
a river|A river is a long stream of water that flows to the sea.
a mountain|A mountain is a very high piece of land.
an island|An island is land with water all around it.
a desert|A desert is a very dry place where little grows.
a volcano|A volcano is a mountain that can throw out hot melted rock.
a computer|A computer is a machine that follows instructions to work with data.
the internet|The internet is a network that joins computers all over the world.
a book|A book is many pages of text bound together.
a library|A library is a place where you can borrow books.
a doctor|A doctor is a person who helps sick people.
a teacher|A teacher is a person who helps others learn.
a baker|A baker is a person who makes bread and cakes.
a pilot|A pilot is a person who flies a plane.
a clock|A clock shows the time.
a map|A map is a drawing that shows where places are.
a bridge|A bridge lets people cross a river or a road.
a triangle|A triangle is a shape with three sides.
a square|A square is a shape with four equal sides.
a circle|A circle is a perfectly round shape.
a robot|A robot is a machine that can do tasks by itself.
ice|Ice is frozen water.
fire|Fire is what we see when something burns and gives heat and light.
gravity|Gravity is the force that pulls things towards each other and keeps us on the ground.
a plant|A plant is a living thing that grows and makes food from light.
a tree|A tree is a tall plant with a trunk of wood.
oxygen|Oxygen is a gas in the air that we need to breathe.
music|Music is sound arranged to be pleasant to hear.
a poem|A poem is a short text with rhythm and often rhyme.
a verb|A verb is a word for an action, such as run or eat.
a noun|A noun is a word for a person, a place or a thing.
an algorithm|An algorithm is a list of steps that solves a problem.
a dictionary|A dictionary is a book that explains words.
money|Money is what we use to pay for things.
bread|Bread is food baked from flour and water.
cheese|Cheese is food made from milk.
honey|Honey is the sweet food that bees make from nectar.
a friend|A friend is a person you like and trust.
a week|A week is seven days.
a year|A year is twelve months, or 365 days.
a rainbow|A rainbow is an arc of colours made by sunlight in rain.
""")
COUNTS = table("""
days are in a week|There are 7 days in a week.
months are in a year|There are 12 months in a year.
hours are in a day|There are 24 hours in a day.
minutes are in an hour|There are 60 minutes in an hour.
seconds are in a minute|There are 60 seconds in a minute.
days are in a year|There are 365 days in a year, or 366 in a leap year.
weeks are in a year|There are 52 weeks in a year.
letters are in the alphabet|There are 26 letters in the English alphabet.
seasons are in a year|There are 4 seasons in a year.
continents are there|There are 7 continents.
planets are in the solar system|There are 8 planets in the solar system.
colours are in a rainbow|There are 7 colours in a rainbow.
legs does a spider have|A spider has 8 legs.
legs does an insect have|An insect has 6 legs.
fingers are on a hand|There are 5 fingers on a hand.
sides does a triangle have|A triangle has 3 sides.
sides does a square have|A square has 4 sides.
wheels does a bicycle have|A bicycle has 2 wheels.
wheels does a car have|A car has 4 wheels.
centimetres are in a metre|There are 100 centimetres in a metre.
metres are in a kilometre|There are 1000 metres in a kilometre.
grams are in a kilogram|There are 1000 grams in a kilogram.
""")
NUMBERS = words("one two three four five six seven eight nine ten")
THINGS = words("""apple banana cherry dog egg fish goat hat ice jam kite lemon mouse nut orange pear queen \
rose sun tree umbrella violin
water box yard zebra ant bread cat door ear fire grass house island jar king lamp moon night oak pen ring \
shoe table uncle vase wind""")
