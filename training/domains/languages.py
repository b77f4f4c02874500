"""Greetings and common words in a handful of languages, asked both ways."""

import random

from training.domains.common import ask, table

DOMAIN = "languages"
NAMES = ["French", "Spanish", "German", "Italian", "Portuguese"]
WORDS = table("""
hello|bonjour|hola|hallo|ciao|olá
good morning|bonjour|buenos días|guten Morgen|buongiorno|bom dia
good evening|bonsoir|buenas tardes|guten Abend|buonasera|boa tarde
good night|bonne nuit|buenas noches|gute Nacht|buonanotte|boa noite
goodbye|au revoir|adiós|auf Wiedersehen|arrivederci|adeus
see you soon|à bientôt|hasta pronto|bis bald|a presto|até logo
thank you|merci|gracias|danke|grazie|obrigado
please|s'il vous plaît|por favor|bitte|per favore|por favor
yes|oui|sí|ja|sì|sim
no|non|no|nein|no|não
sorry|pardon|perdón|Entschuldigung|scusa|desculpe
how are you|comment ça va|cómo estás|wie geht es dir|come stai|como vai
I love you|je t'aime|te quiero|ich liebe dich|ti amo|eu te amo
friend|ami|amigo|Freund|amico|amigo
water|eau|agua|Wasser|acqua|água
bread|pain|pan|Brot|pane|pão
milk|lait|leche|Milch|latte|leite
coffee|café|café|Kaffee|caffè|café
tea|thé|té|Tee|tè|chá
wine|vin|vino|Wein|vino|vinho
cheese|fromage|queso|Käse|formaggio|queijo
apple|pomme|manzana|Apfel|mela|maçã
egg|oeuf|huevo|Ei|uovo|ovo
meat|viande|carne|Fleisch|carne|carne
fish|poisson|pescado|Fisch|pesce|peixe
rice|riz|arroz|Reis|riso|arroz
salt|sel|sal|Salz|sale|sal
sugar|sucre|azúcar|Zucker|zucchero|açúcar
house|maison|casa|Haus|casa|casa
door|porte|puerta|Tür|porta|porta
window|fenêtre|ventana|Fenster|finestra|janela
table|table|mesa|Tisch|tavolo|mesa
chair|chaise|silla|Stuhl|sedia|cadeira
bed|lit|cama|Bett|letto|cama
book|livre|libro|Buch|libro|livro
school|école|escuela|Schule|scuola|escola
street|rue|calle|Straße|strada|rua
city|ville|ciudad|Stadt|città|cidade
car|voiture|coche|Auto|macchina|carro
train|train|tren|Zug|treno|trem
dog|chien|perro|Hund|cane|cachorro
cat|chat|gato|Katze|gatto|gato
horse|cheval|caballo|Pferd|cavallo|cavalo
bird|oiseau|pájaro|Vogel|uccello|pássaro
cow|vache|vaca|Kuh|mucca|vaca
tree|arbre|árbol|Baum|albero|árvore
flower|fleur|flor|Blume|fiore|flor
sun|soleil|sol|Sonne|sole|sol
moon|lune|luna|Mond|luna|lua
star|étoile|estrella|Stern|stella|estrela
sea|mer|mar|Meer|mare|mar
mountain|montagne|montaña|Berg|montagna|montanha
rain|pluie|lluvia|Regen|pioggia|chuva
snow|neige|nieve|Schnee|neve|neve
fire|feu|fuego|Feuer|fuoco|fogo
mother|mère|madre|Mutter|madre|mãe
father|père|padre|Vater|padre|pai
brother|frère|hermano|Bruder|fratello|irmão
sister|soeur|hermana|Schwester|sorella|irmã
son|fils|hijo|Sohn|figlio|filho
child|enfant|niño|Kind|bambino|criança
man|homme|hombre|Mann|uomo|homem
woman|femme|mujer|Frau|donna|mulher
day|jour|día|Tag|giorno|dia
night|nuit|noche|Nacht|notte|noite
week|semaine|semana|Woche|settimana|semana
year|année|año|Jahr|anno|ano
today|aujourd'hui|hoy|heute|oggi|hoje
tomorrow|demain|mañana|morgen|domani|amanhã
yesterday|hier|ayer|gestern|ieri|ontem
red|rouge|rojo|rot|rosso|vermelho
blue|bleu|azul|blau|blu|azul
green|vert|verde|grün|verde|verde
yellow|jaune|amarillo|gelb|giallo|amarelo
black|noir|negro|schwarz|nero|preto
white|blanc|blanco|weiß|bianco|branco
big|grand|grande|groß|grande|grande
small|petit|pequeño|klein|piccolo|pequeno
good|bon|bueno|gut|buono|bom
bad|mauvais|malo|schlecht|cattivo|mau
beautiful|beau|hermoso|schön|bello|bonito
new|nouveau|nuevo|neu|nuovo|novo
old|vieux|viejo|alt|vecchio|velho
hand|main|mano|Hand|mano|mão
head|tête|cabeza|Kopf|testa|cabeça
heart|coeur|corazón|Herz|cuore|coração
one|un|uno|eins|uno|um
two|deux|dos|zwei|due|dois
three|trois|tres|drei|tre|três
four|quatre|cuatro|vier|quattro|quatro
five|cinq|cinco|fünf|cinque|cinco
ten|dix|diez|zehn|dieci|dez
""")
EXTRA = table("""
hello|konnichiwa|Japanese
good morning|ohayou gozaimasu|Japanese
good evening|konbanwa|Japanese
thank you|arigatou|Japanese
goodbye|sayounara|Japanese
yes|hai|Japanese
no|iie|Japanese
cat|neko|Japanese
dog|inu|Japanese
water|mizu|Japanese
hello|hej|Swedish
thank you|tack|Swedish
hello|hallo|Dutch
thank you|dank je|Dutch
good morning|goedemorgen|Dutch
hello|cześć|Polish
thank you|dziękuję|Polish
hello|merhaba|Turkish
hello|salve|Latin
""")
TO = ["How do you say {q}{word}{q} in {lang}?", "How do I say {q}{word}{q} in {lang}?",
      "What is {q}{word}{q} in {lang}?", "Translate {q}{word}{q} to {lang}.",
      "Translate {q}{word}{q} into {lang}.", "What is the {lang} word for {q}{word}{q}?",
      "{q}{word}{q} in {lang}", "How to say {q}{word}{q} in {lang}?",
      "Say {q}{word}{q} in {lang}.", "Tell me how to say {q}{word}{q} in {lang}.",
      "What's the {lang} for {q}{word}{q}?"]  # fmt: skip
FROM = ["What does {q}{foreign}{q} mean in English?", "What does {q}{foreign}{q} mean?",
        "What is the meaning of {q}{foreign}{q}?", "Translate {q}{foreign}{q} to English.",
        "What does the {lang} word {q}{foreign}{q} mean?", "{q}{foreign}{q} in English?",
        "What is {q}{foreign}{q} in English?"]  # fmt: skip
GREET = {
    "French": (["Bonjour!", "Bonjour, comment ça va?", "Salut!", "Bonsoir!", "Salut, ça va?"],
               ["Bonjour! Comment puis-je vous aider?", "Bonjour! Je suis content de vous voir."]),
    "Spanish": (["¡Hola!", "Hola", "Buenos días", "Hola, ¿cómo estás?", "Buenas tardes"],
                ["¡Hola! ¿Cómo puedo ayudarte?", "¡Hola! Me alegro de verte."]),
    "German": (["Guten Tag!", "Hallo!", "Guten Morgen!", "Guten Abend!", "Hallo, wie geht es dir?"],
               ["Hallo! Wie kann ich dir helfen?", "Guten Tag! Schön, dich zu sehen."]),
    "Italian": (["Ciao!", "Buongiorno!", "Ciao, come stai?", "Buonasera!"],
                ["Ciao! Come posso aiutarti?", "Ciao! Sono felice di vederti."]),
    "Portuguese": (["Olá!", "Bom dia!", "Olá, como vai?", "Boa tarde!"],
                   ["Olá! Como posso ajudar?", "Olá! É bom ver você."]),
}  # fmt: skip
THANKS = {"French": ("Merci!", "De rien!"), "Spanish": ("¡Gracias!", "¡De nada!"),
          "German": ("Danke!", "Bitte!"),
          "Italian": ("Grazie!", "Prego!"), "Portuguese": ("Obrigado!", "De nada!")}  # fmt: skip
MEANINGS: dict[str, list] = {}
for _row in WORDS:
    for _lang, _foreign in zip(NAMES, _row[1:]):
        MEANINGS.setdefault(_foreign, []).append((_lang, _row[0]))
for _word, _foreign, _lang in EXTRA:
    MEANINGS.setdefault(_foreign, []).append((_lang, _word))


def _entry(rng):
    if rng.random() < 0.12:
        word, foreign, lang = rng.choice(EXTRA)
    else:
        row, column = rng.choice(WORDS), rng.randrange(5)
        word, foreign, lang = row[0], row[column + 1], NAMES[column]
    return word, foreign, lang


def sample(rng: random.Random):
    if rng.random() < 0.08:
        lang = rng.choice(NAMES)
        if rng.random() < 0.2:
            asked, answer = THANKS[lang]
            return ask(rng, DOMAIN, f"thanks|{lang}", [asked], answer, [answer])
        asked, answers = GREET[lang]
        return ask(
            rng, DOMAIN, f"greet|{lang}", asked, answers, accept=[answer.split("!")[0] for answer in answers]
        )
    word, foreign, lang = _entry(rng)
    slots = {"word": word, "foreign": foreign, "lang": lang, "q": rng.choice(["", "", '"', "'"])}
    if rng.random() < 0.64:
        return ask(
            rng,
            DOMAIN,
            f"to|{lang}|{word}",
            TO,
            '"{word}" in {lang} is "{foreign}".',
            [f'"{foreign}"'],
            **slots,
        )
    meanings = MEANINGS[foreign]
    number = (
        4 if len({english for _, english in meanings}) > 1 or len(meanings) > 1 else rng.randrange(len(FROM))
    )
    slots["word"] = '" or "'.join(dict.fromkeys(english for other, english in meanings if other == lang))
    answer = '"{foreign}" means "{word}" in {lang}.'
    return ask(rng, DOMAIN, f"from|{lang}|{word}|{number}", [FROM[number]], answer, [f'"{word}"'], **slots)
