"""A small invented world, the same for the same seed: people, towns, trades, foods and the facts about them.

The world is what the embedded model knows. Because every fact is generated here, it is certain which questions the model
was trained on, which are new phrasings, and which are about entities that it has never met.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

KINDS = ("person", "town", "trade", "food")
RELATIONS = {
    "person": ("home", "birthplace", "address", "trade", "food", "born", "friend", "teacher", "alias", "pet",
               "instrument", "fear"),
    "town": ("region", "river", "dish", "founded", "epithet", "mayor"),
    "trade": ("tool", "workplace", "pay"),
    "food": ("ingredient", "taste", "origin"),
}
"""The relations of each kind of entity; the object of a relation is text or the name of another entity."""


@dataclass(frozen=True)
class Term:
    """A word or name in each language; invented names are the same in all."""

    en: str
    fr: str

    def in_language(self, language: str) -> str:
        """The word in a language, `en` or `fr`."""
        return self.fr if language == "fr" else self.en


def name(text: str) -> Term:
    """A name that is the same in all languages."""
    return Term(text, text)


@dataclass(frozen=True)
class Entity:
    """One person, town, trade or food, with its facts: relation -> object."""

    kind: str
    term: Term
    facts: dict[str, Term] = field(hash=False)


@dataclass(frozen=True)
class Fact:
    """One relation of an entity."""

    subject: Entity
    relation: str

    @property
    def object(self) -> Term:
        """The object of the relation."""
        return self.subject.facts[self.relation]


def held_out(text: str, one_in: int) -> bool:
    """Whether a text is one of the test texts, one in `one_in`; the text alone decides, so training never has it."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") % one_in == 0


_SYLLABLES = {
    "first": ("a e i o u ba be bi da do el fa fi ga ha ira jo ka ke ki la le li lo lu ma me mi na ne ni no nu "
              "pa ra re ri ro sa se si so ta te ti to va ve vi ya yo za").split(),
    "last": ("bar bel bor cor dan del dor fen fol gar gol har hol kal kar kor lan len lor mar mer mol nar nor "
             "pel por rad ran rim ros sal sar sel sol tal tar tel tor van ver vor wen wil zan zor").split(),
    "town": ("ar bel bri cal cor dar del dun el fal gal gor hal il kel kor lam lor mar mel mor nar nev or pal "
             "por quen ral ros sar sel tam tir ul val ver wen yar zel").split(),
    "food": ("ba bo bu cha chi da du fa fu ga gu ja ju ka ku la lu ma mu na nu pa pu ra ru sha ta tu wa za").split(),
    "alias": ("bib bob dod dud fif gig kik lol mim nan pep pip pop rir sis tat tit tut viv zaz").split(),
}
_ENDINGS = {
    "first": ("n", "ra", "l", "s", "ri", "mo", "th", ""),
    "last": ("son", "ton", "man", "wick", "dell", "ley", "ick", "er"),
    "town": ("ford", "ham", "stad", "mouth", "wick", "dale", "port", "burg"),
    "food": ("ra", "li", "no", "ti", "sh", "ko", "la", "pa"),
    "alias": ("o", "i", "a", "u", "et", "ino"),
}
_PARTS = {"first": 2, "last": 1, "town": 2, "food": 2, "alias": 1}

REGIONS = tuple(Term(en, fr) for en, fr in (
    ("the Northern Marsh", "le Marais du Nord"), ("the Red Hills", "les Collines Rouges"),
    ("the Salt Coast", "la Côte du Sel"), ("the Old Forest", "la Vieille Forêt"),
    ("the Long Valley", "la Longue Vallée"), ("the Blue Plateau", "le Plateau Bleu"),
    ("the Lake Country", "le Pays des Lacs"), ("the Southern Isles", "les Îles du Sud"),
    ("the Windy Plain", "la Plaine du Vent"), ("the White Mountains", "les Montagnes Blanches")))
EPITHETS = tuple(Term(f"the City of {en}", f"la Cité des {fr}") for en, fr in (
    ("Bells", "Cloches"), ("Lanterns", "Lanternes"), ("Bridges", "Ponts"), ("Gardens", "Jardins"),
    ("Towers", "Tours"), ("Mirrors", "Miroirs"), ("Kites", "Cerfs-volants"), ("Cats", "Chats"),
    ("Stairs", "Escaliers"), ("Fountains", "Fontaines"), ("Drums", "Tambours"), ("Masks", "Masques"),
    ("Roses", "Roses"), ("Ships", "Navires"), ("Books", "Livres"), ("Doves", "Colombes"),
    ("Clocks", "Horloges"), ("Stones", "Pierres"), ("Songs", "Chansons"), ("Wells", "Puits"),
    ("Stars", "Étoiles"), ("Mills", "Moulins"), ("Horses", "Chevaux"), ("Gates", "Portes"),
    ("Crows", "Corbeaux"), ("Shells", "Coquillages"), ("Flags", "Drapeaux"), ("Owls", "Hiboux"),
    ("Boats", "Bateaux"), ("Bees", "Abeilles"), ("Walls", "Murailles"), ("Trees", "Arbres"),
    ("Rings", "Anneaux"), ("Coins", "Pièces"), ("Statues", "Statues"), ("Poets", "Poètes"),
    ("Candles", "Bougies"), ("Foxes", "Renards"), ("Swans", "Cygnes"), ("Feathers", "Plumes")))
_CRAFTS = tuple(Term(en, fr) for en, fr in (
    ("weaver", "tisseur"), ("carver", "sculpteur"), ("keeper", "gardien"), ("mender", "réparateur"),
    ("painter", "peintre"), ("reader", "lecteur")))
_MATERIALS = tuple(Term(en, fr) for en, fr in (
    ("lamp", "de lampes"), ("salt", "de sel"), ("cloud", "de nuages"), ("bell", "de cloches"),
    ("glass", "de verre"), ("river", "de rivières"), ("stone", "de pierres"), ("kite", "de cerfs-volants"),
    ("map", "de cartes"), ("honey", "de miel"), ("wind", "de vent"), ("shadow", "d'ombres")))
TOOLS = tuple(Term(en, fr) for en, fr in (
    ("a copper needle", "une aiguille de cuivre"), ("a long spoon", "une longue cuillère"),
    ("a silver hammer", "un marteau d'argent"), ("a bone comb", "un peigne d'os"),
    ("a green lens", "une lentille verte"), ("a wooden wheel", "une roue de bois"),
    ("an iron hook", "un crochet de fer"), ("a clay whistle", "un sifflet d'argile"),
    ("a red rope", "une corde rouge"), ("a brass scale", "une balance de laiton"),
    ("a horn knife", "un couteau de corne"), ("a paper fan", "un éventail de papier")))
WORKPLACES = tuple(Term(en, fr) for en, fr in (
    ("a deep cellar", "une cave profonde"), ("a high tower", "une haute tour"),
    ("an open market", "un marché ouvert"), ("a quiet barn", "une grange calme"),
    ("a stone bridge", "un pont de pierre"), ("a small boat", "un petit bateau"),
    ("a warm kitchen", "une cuisine chaude"), ("an old mill", "un vieux moulin"),
    ("a round tent", "une tente ronde"), ("a dark mine", "une mine sombre")))
INGREDIENTS = tuple(Term(en, fr) for en, fr in (
    ("barley", "l'orge"), ("goat milk", "le lait de chèvre"), ("river fish", "le poisson de rivière"),
    ("black beans", "les haricots noirs"), ("chestnuts", "les châtaignes"), ("pumpkin", "la citrouille"),
    ("seaweed", "les algues"), ("millet", "le millet"), ("plums", "les prunes"), ("lentils", "les lentilles"),
    ("mushrooms", "les champignons"), ("walnuts", "les noix"), ("cassava", "le manioc"), ("rye", "le seigle"),
    ("onions", "les oignons"), ("figs", "les figues")))
TASTES = tuple(Term(en, fr) for en, fr in (
    ("sweet", "sucré"), ("sour", "acide"), ("salty", "salé"), ("bitter", "amer"), ("smoky", "fumé"),
    ("spicy", "épicé"), ("mild", "doux"), ("creamy", "crémeux")))
STREETS = tuple(Term(f"{en} Street", f"rue {fr}") for en, fr in (
    ("Willow", "des Saules"), ("Baker", "du Boulanger"), ("Bridge", "du Pont"), ("Church", "de l'Église"),
    ("Fish", "du Poisson"), ("Garden", "du Jardin"), ("Gold", "de l'Or"), ("Harbour", "du Havre"),
    ("Hill", "de la Colline"), ("King", "du Roi"), ("Lake", "du Lac"), ("Long", "Longue"), ("Market", "du Marché"),
    ("Mill", "du Moulin"), ("Moon", "de la Lune"), ("North", "du Nord"), ("Oak", "du Chêne"), ("Old", "Vieille"),
    ("Orchard", "du Verger"), ("Park", "du Parc"), ("Queen", "de la Reine"), ("Rose", "de la Rose"),
    ("School", "de l'École"), ("Silver", "de l'Argent"), ("Snow", "de la Neige"), ("South", "du Sud"),
    ("Spring", "de la Source"), ("Station", "de la Gare"), ("Sun", "du Soleil"), ("Tower", "de la Tour"),
    ("Wall", "du Mur"), ("Well", "du Puits")))
PETS = tuple(Term(en, fr) for en, fr in (
    ("a grey goose", "une oie grise"), ("a white goat", "une chèvre blanche"), ("a black hen", "une poule noire"),
    ("an old donkey", "un vieil âne"), ("a tame crow", "un corbeau"), ("a fat cat", "un gros chat"),
    ("a lame fox", "un renard"), ("a small owl", "un petit hibou"), ("a green parrot", "un perroquet vert"),
    ("a brown rabbit", "un lapin brun"), ("a red squirrel", "un écureuil roux"), ("a wild duck", "un canard sauvage"),
    ("a spotted pig", "un cochon tacheté"), ("a blind dog", "un chien aveugle"), ("a slow turtle", "une tortue lente"),
    ("a tiny mouse", "une petite souris"), ("a grass snake", "une couleuvre"), ("a proud rooster", "un coq fier"),
    ("a young bear", "un jeune ours"), ("a golden carp", "une carpe dorée")))
INSTRUMENTS = tuple(Term(en, fr) for en, fr in (
    ("the flute", "la flûte"), ("the drum", "le tambour"), ("the fiddle", "le violon"), ("the harp", "la harpe"),
    ("the horn", "le cor"), ("the lute", "le luth"), ("the trumpet", "la trompette"), ("the organ", "l'orgue"),
    ("the banjo", "le banjo"), ("the cymbals", "les cymbales"), ("the bagpipe", "la cornemuse"), ("the kora", "la kora"),
    ("the accordion", "l'accordéon"), ("the xylophone", "le xylophone"), ("the piano", "le piano"),
    ("the zither", "la cithare")))
FEARS = tuple(Term(en, fr) for en, fr in (
    ("thunder", "le tonnerre"), ("deep water", "l'eau profonde"), ("spiders", "les araignées"), ("ghosts", "les fantômes"),
    ("heights", "les hauteurs"), ("wolves", "les loups"), ("fire", "le feu"), ("the dark", "le noir"),
    ("crowds", "la foule"), ("snakes", "les serpents"), ("storms at sea", "les tempêtes en mer"), ("bees", "les abeilles"),
    ("ice", "la glace"), ("old age", "la vieillesse"), ("silence", "le silence"), ("horses", "les chevaux"),
    ("bad dreams", "les mauvais rêves"), ("thieves", "les voleurs"), ("rats", "les rats"), ("fog", "le brouillard")))


def _address(rng: random.Random) -> Term:
    number, street = rng.randrange(1, 60), rng.choice(STREETS)
    return Term(f"{number} {street.en}", f"{number} {street.fr}")


class Namer:
    """Draws names without repetition; `reserved` ones, one in ten, are for test entities only."""

    def __init__(self, rng: random.Random, *, reserved: bool = False) -> None:
        self.rng = rng
        self.reserved = reserved
        self.used: set[str] = set()

    def word(self, style: str) -> str:
        """A random word in the style of first names, last names, towns, foods or aliases."""
        parts = [self.rng.choice(_SYLLABLES[style]) for _ in range(_PARTS[style])]
        return ("".join(parts) + self.rng.choice(_ENDINGS[style])).capitalize()

    def draw(self, *styles: str) -> Term:
        """A new name, with one word in each of the styles."""
        while True:
            text = " ".join(self.word(style) for style in styles)
            if text not in self.used and held_out(text, 10) == self.reserved:
                self.used.add(text)
                return name(text)


@dataclass(frozen=True)
class World:
    """All entities of the invented world."""

    people: tuple[Entity, ...]
    towns: tuple[Entity, ...]
    trades: tuple[Entity, ...]
    foods: tuple[Entity, ...]

    @property
    def entities(self) -> tuple[Entity, ...]:
        """People, towns, trades and foods together."""
        return self.people + self.towns + self.trades + self.foods

    def facts(self) -> Iterator[Fact]:
        """Yield every fact of every entity."""
        for entity in self.entities:
            for relation in RELATIONS[entity.kind]:
                yield Fact(entity, relation)


def _town(namer: Namer, rng: random.Random, foods: list[Term], epithet: Term) -> Entity:
    return Entity("town", namer.draw("town"), {
        "region": rng.choice(REGIONS), "river": name(namer.word("food")), "dish": rng.choice(foods),
        "founded": name(str(rng.randrange(900, 1500))), "epithet": epithet})


def _person(namer: Namer, rng: random.Random, towns: list[Term], trades: list[Term], foods: list[Term]) -> Entity:
    return Entity("person", namer.draw("first", "last"), {
        "home": rng.choice(towns), "birthplace": rng.choice(towns), "trade": rng.choice(trades),
        "food": rng.choice(foods), "born": name(str(rng.randrange(1600, 2000))), "address": _address(rng),
        "alias": namer.draw("alias", "last"), "pet": rng.choice(PETS), "instrument": rng.choice(INSTRUMENTS),
        "fear": rng.choice(FEARS)})


def build_world(seed: int = 7, people: int = 960) -> World:
    """Build the world of a seed: `people` people, 40 towns, 36 trades and 40 foods; 11,988 facts by default."""
    rng = random.Random(seed)
    namer = Namer(rng)
    food_names = [namer.draw("food") for _ in range(40)]
    towns = tuple(_town(namer, rng, food_names, epithet) for epithet in rng.sample(EPITHETS, 40))
    town_names = [town.term for town in towns]
    crafts = rng.sample([Term(f"{m.en} {c.en}", f"{c.fr} {m.fr}") for m in _MATERIALS for c in _CRAFTS], 36)
    trades = tuple(Entity("trade", craft, {
        "tool": rng.choice(TOOLS), "workplace": rng.choice(WORKPLACES), "pay": rng.choice(INGREDIENTS)})
        for craft in crafts)
    foods = tuple(Entity("food", food, {
        "ingredient": rng.choice(INGREDIENTS), "taste": rng.choice(TASTES), "origin": rng.choice(town_names)})
        for food in food_names)
    persons = [_person(namer, rng, town_names, crafts, food_names) for _ in range(people)]
    for person in persons:
        person.facts["friend"], person.facts["teacher"] = (
            other.term for other in rng.sample([other for other in persons if other is not person], 2))
    for town in towns:
        town.facts["mayor"] = rng.choice(persons).term
    return World(tuple(persons), towns, trades, foods)


def strangers(world: World, rng: random.Random, count: int, *, reserved: bool) -> list[Entity]:
    """Invent `count` people or towns that are not in the world, so that a passage about them is new.

    Half of the towns, foods and trades in their facts are the world's own, half are invented as well. With
    `reserved` the names are those that training never draws.
    """
    namer = Namer(rng, reserved=reserved)
    towns = [rng.choice(world.towns).term if rng.random() < 0.5 else namer.draw("town") for _ in range(3)]
    foods = [rng.choice(world.foods).term if rng.random() < 0.5 else namer.draw("food") for _ in range(3)]
    if rng.random() < 0.3:
        strange_towns = [_town(namer, rng, foods, rng.choice(EPITHETS)) for _ in range(count)]
        for town in strange_towns:
            town.facts["mayor"] = namer.draw("first", "last")
        return strange_towns
    trades = [trade.term for trade in world.trades]
    people = [_person(namer, rng, towns, trades, foods) for _ in range(count)]
    for person in people:
        person.facts["friend"], person.facts["teacher"] = namer.draw("first", "last"), namer.draw("first", "last")
    return people
