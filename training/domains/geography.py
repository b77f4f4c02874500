"""Countries: capital, continent, language, a well-known city or river, and the way back from the capital."""

import random

from training.domains.common import ask, table

DOMAIN = "geography"
COUNTRIES = table("""
France|Paris|Europe|French|Lyon|Seine
Spain|Madrid|Europe|Spanish|Barcelona|Ebro
Germany|Berlin|Europe|German|Munich|Rhine
Italy|Rome|Europe|Italian|Milan|Po
Portugal|Lisbon|Europe|Portuguese|Porto|Tagus
the United Kingdom|London|Europe|English|Manchester|Thames
Ireland|Dublin|Europe|English|Cork|Shannon
the Netherlands|Amsterdam|Europe|Dutch|Rotterdam|
Belgium|Brussels|Europe|Dutch|Antwerp|
Luxembourg|Luxembourg City|Europe|Luxembourgish||
Switzerland|Bern|Europe|German|Zurich|
Austria|Vienna|Europe|German|Salzburg|Danube
Poland|Warsaw|Europe|Polish|Krakow|Vistula
the Czech Republic|Prague|Europe|Czech|Brno|Vltava
Slovakia|Bratislava|Europe|Slovak|Kosice|
Hungary|Budapest|Europe|Hungarian|Debrecen|Danube
Romania|Bucharest|Europe|Romanian|Cluj|Danube
Bulgaria|Sofia|Europe|Bulgarian|Plovdiv|
Greece|Athens|Europe|Greek|Thessaloniki|
Albania|Tirana|Europe|Albanian||
Croatia|Zagreb|Europe|Croatian|Split|Sava
Serbia|Belgrade|Europe|Serbian|Novi Sad|Danube
Slovenia|Ljubljana|Europe|Slovene|Maribor|
Bosnia and Herzegovina|Sarajevo|Europe|Bosnian|Mostar|
North Macedonia|Skopje|Europe|Macedonian||
Montenegro|Podgorica|Europe|Montenegrin||
Denmark|Copenhagen|Europe|Danish|Aarhus|
Norway|Oslo|Europe|Norwegian|Bergen|
Sweden|Stockholm|Europe|Swedish|Gothenburg|
Finland|Helsinki|Europe|Finnish|Tampere|
Iceland|Reykjavik|Europe|Icelandic||
Estonia|Tallinn|Europe|Estonian|Tartu|
Latvia|Riga|Europe|Latvian||
Lithuania|Vilnius|Europe|Lithuanian|Kaunas|
Belarus|Minsk|Europe|Belarusian||
Ukraine|Kyiv|Europe|Ukrainian|Lviv|Dnieper
Moldova|Chisinau|Europe|Romanian||
Russia|Moscow|Europe|Russian|Saint Petersburg|Volga
Malta|Valletta|Europe|Maltese||
Cyprus|Nicosia|Asia|Greek||
Monaco|Monaco|Europe|French||
Turkey|Ankara|Asia|Turkish|Istanbul|
Georgia|Tbilisi|Asia|Georgian|Batumi|
Armenia|Yerevan|Asia|Armenian||
Azerbaijan|Baku|Asia|Azerbaijani||
Israel|Jerusalem|Asia|Hebrew|Tel Aviv|Jordan
Jordan|Amman|Asia|Arabic||
Lebanon|Beirut|Asia|Arabic||
Syria|Damascus|Asia|Arabic|Aleppo|
Iraq|Baghdad|Asia|Arabic|Basra|Tigris
Iran|Tehran|Asia|Persian|Isfahan|
Saudi Arabia|Riyadh|Asia|Arabic|Jeddah|
Yemen|Sanaa|Asia|Arabic|Aden|
Oman|Muscat|Asia|Arabic||
Qatar|Doha|Asia|Arabic||
Kuwait|Kuwait City|Asia|Arabic||
the United Arab Emirates|Abu Dhabi|Asia|Arabic|Dubai|
Bahrain|Manama|Asia|Arabic||
Afghanistan|Kabul|Asia|Pashto|Kandahar|
Pakistan|Islamabad|Asia|Urdu|Karachi|Indus
India|New Delhi|Asia|Hindi|Mumbai|Ganges
Nepal|Kathmandu|Asia|Nepali||
Bhutan|Thimphu|Asia|Dzongkha||
Bangladesh|Dhaka|Asia|Bengali|Chittagong|
Sri Lanka|Sri Jayawardenepura Kotte|Asia|Sinhala|Kandy|
Myanmar|Naypyidaw|Asia|Burmese|Yangon|Irrawaddy
Thailand|Bangkok|Asia|Thai|Chiang Mai|Chao Phraya
Laos|Vientiane|Asia|Lao||Mekong
Cambodia|Phnom Penh|Asia|Khmer|Siem Reap|Mekong
Vietnam|Hanoi|Asia|Vietnamese|Ho Chi Minh City|Mekong
Malaysia|Kuala Lumpur|Asia|Malay||
Singapore|Singapore|Asia|English||
Indonesia|Jakarta|Asia|Indonesian|Bandung|
the Philippines|Manila|Asia|Filipino|Cebu|
China|Beijing|Asia|Chinese|Shanghai|Yangtze
Mongolia|Ulaanbaatar|Asia|Mongolian||
Japan|Tokyo|Asia|Japanese|Osaka|
South Korea|Seoul|Asia|Korean|Busan|
North Korea|Pyongyang|Asia|Korean||
Kazakhstan|Astana|Asia|Kazakh|Almaty|
Uzbekistan|Tashkent|Asia|Uzbek|Samarkand|
Kyrgyzstan|Bishkek|Asia|Kyrgyz||
Tajikistan|Dushanbe|Asia|Tajik||
Turkmenistan|Ashgabat|Asia|Turkmen||
Egypt|Cairo|Africa|Arabic|Alexandria|Nile
Libya|Tripoli|Africa|Arabic|Benghazi|
Tunisia|Tunis|Africa|Arabic||
Algeria|Algiers|Africa|Arabic|Oran|
Morocco|Rabat|Africa|Arabic|Casablanca|
Sudan|Khartoum|Africa|Arabic||Nile
Ethiopia|Addis Ababa|Africa|Amharic||Blue Nile
Somalia|Mogadishu|Africa|Somali||
Kenya|Nairobi|Africa|Swahili|Mombasa|
Tanzania|Dodoma|Africa|Swahili|Dar es Salaam|
Uganda|Kampala|Africa|English||
Rwanda|Kigali|Africa|Kinyarwanda||
Nigeria|Abuja|Africa|English|Lagos|Niger
Ghana|Accra|Africa|English|Kumasi|Volta
Senegal|Dakar|Africa|French||
Mali|Bamako|Africa|Bambara|Timbuktu|Niger
Niger|Niamey|Africa|Hausa||
Cameroon|Yaounde|Africa|French|Douala|
Angola|Luanda|Africa|Portuguese||
Mozambique|Maputo|Africa|Portuguese|Beira|
Zambia|Lusaka|Africa|English||Zambezi
Zimbabwe|Harare|Africa|English||
Namibia|Windhoek|Africa|English||
Botswana|Gaborone|Africa|English||
Madagascar|Antananarivo|Africa|Malagasy||
South Africa|Pretoria|Africa|Zulu|Cape Town|Orange River
Canada|Ottawa|North America|English|Toronto|
the United States|Washington, D.C.|North America|English|New York|Mississippi
Mexico|Mexico City|North America|Spanish|Guadalajara|
Guatemala|Guatemala City|North America|Spanish||
Honduras|Tegucigalpa|North America|Spanish||
El Salvador|San Salvador|North America|Spanish||
Nicaragua|Managua|North America|Spanish||
Costa Rica|San Jose|North America|Spanish||
Panama|Panama City|North America|Spanish||
Cuba|Havana|North America|Spanish||
Jamaica|Kingston|North America|English||
Haiti|Port-au-Prince|North America|Haitian Creole||
the Dominican Republic|Santo Domingo|North America|Spanish||
Colombia|Bogota|South America|Spanish|Medellin|Magdalena
Venezuela|Caracas|South America|Spanish|Maracaibo|Orinoco
Ecuador|Quito|South America|Spanish|Guayaquil|
Peru|Lima|South America|Spanish|Cusco|Amazon
Bolivia|Sucre|South America|Spanish|La Paz|
Chile|Santiago|South America|Spanish|Valparaiso|
Argentina|Buenos Aires|South America|Spanish|Cordoba|Parana
Uruguay|Montevideo|South America|Spanish||
Paraguay|Asuncion|South America|Spanish||
Brazil|Brasilia|South America|Portuguese|Rio de Janeiro|Amazon
Australia|Canberra|Oceania|English|Sydney|Murray
New Zealand|Wellington|Oceania|English|Auckland|
Fiji|Suva|Oceania|English||
Papua New Guinea|Port Moresby|Oceania|Tok Pisin||
""")
CAPITAL = ["What is the capital of {country}?", "What's the capital of {country}?", "Capital of {country}?",
           "Tell me the capital of {country}.", "Which city is the capital of {country}?",
           "Name the capital of {country}.",
           "Do you know the capital of {country}?", "What is the capital city of {country}?",
           "the capital of {country}",
           "Can you tell me what the capital of {country} is?",
           "{country}: what is its capital?"]  # fmt: skip
REVERSE = ["{capital} is the capital of which country?", "Which country has {capital} as its capital?",
           "What country is {capital} the capital of?",
           "Of which country is {capital} the capital?",
           "What country has the capital {capital}?"]  # fmt: skip
CONTINENT = ["On which continent is {country}?", "What continent is {country} in?",
             "Which continent is {country} on?",
             "Where is {country}?", "Where in the world is {country}?",
             "In which part of the world is {country}?"]  # fmt: skip
LANGUAGE = ["What language do people speak in {country}?", "What is the main language of {country}?",
            "Which language is spoken in {country}?",
            "What do they speak in {country}?", "What language is spoken in {country}?"]  # fmt: skip
CITY = [
    "In which country is {city}?",
    "Where is {city}?",
    "What country is {city} in?",
    "Which country is the city of {city} in?",
]
KNOWN = ["Name a city in {country}.", "Tell me a city in {country}.", "What is a famous city in {country}?"]
RIVER = [
    "Name a river in {country}.",
    "Which river flows through {country}?",
    "What is a big river in {country}?",
]
ABOUT = [
    "Tell me about {country}.",
    "What do you know about {country}?",
    "What can you tell me about {country}?",
]
NOTE = {"Bolivia": "Sucre is the capital of Bolivia. The government sits in La Paz."}


def _upper(text):
    return text[0].upper() + text[1:]


def sample(rng: random.Random):
    country, capital, continent, language, city, river = rng.choice(COUNTRIES)
    slots = {"country": country, "capital": capital, "language": language, "city": city, "river": river,
             "Country": _upper(country), "continent": continent}  # fmt: skip
    kind = rng.choices(
        ["capital", "reverse", "continent", "language", "city", "river", "about"], [36, 16, 14, 12, 12, 5, 5]
    )[0]
    if (kind == "city" and not city) or (kind == "river" and not river):
        kind = "capital"

    def make(name, questions, answers, require):
        return ask(rng, DOMAIN, f"{name}|{country}", questions, answers, require, **slots)

    if kind == "capital":
        return make(kind, CAPITAL, NOTE.get(country, "The capital of {country} is {capital}."), [capital])
    if kind == "reverse":
        return make(kind, REVERSE, "{capital} is the capital of {country}.", [country])
    if kind == "continent":
        return make(kind, CONTINENT, "{Country} is in {continent}.", [continent])
    if kind == "language":
        return make(kind, LANGUAGE, "The main language of {country} is {language}.", [language])
    if kind == "city" and rng.random() < 0.6:
        return make(kind, CITY, "{city} is a city in {country}.", [country])
    if kind == "city":
        return make("known", KNOWN, "{city} is a city in {country}.", [city])
    if kind == "river":
        return make(
            kind, RIVER, "The {river} flows through {country}.".replace("River River", "River"), [river]
        )
    text = "{Country} is a country in {continent}. "
    text += "Its capital is {capital}, and its main language is {language}."
    return make(kind, ABOUT, text, [capital])
