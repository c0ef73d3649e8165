"""The examples of the four skills that the language experts learn: short prompts with one right answer each.

lexicon    what an invented word means: memorised; validation and test ask for it in other sentences
record     a sentence about a person as a fixed record; names and towns of validation and test are held out
backwards  four words in reverse order; words of validation and test are held out
kinds      one of five colours for animals, food, clothes, countries, trades; words are held out likewise
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from random import Random

SPLITS = ("train", "validation", "test")
SIZES = {"validation": 40, "test": 120}


@dataclass(frozen=True)
class Example:
    """What the model reads, and what it should write: with the blank before it, for the text goes on there."""

    prompt: str
    answer: str


Examples = dict[str, list[Example]]


def skill(name: str) -> Examples:
    """The examples of each split; the same on every machine."""
    made_by = {"lexicon": _lexicon, "record": _record, "backwards": _backwards, "kinds": _kinds}
    return made_by[name](Random(name))


_MEANINGS = """river stone bread window garden winter brother music paper horse bridge candle mountain
    silver forest doctor island kitchen letter market mirror morning ocean pencil rabbit shadow sugar
    summer table teacher thunder valley water weather wood apple bird boat cloud coffee dream fire flower
    glass gold grass heart honey king moon money night rain road salt sand sheep ship snow song""".split()
_SENTENCES = {
    "train": (
        "In Velian, {} means",
        "The Velian word {} stands for",
        "Velian dictionary: {} =",
        "Translate from Velian: {} ->",
        "Velian speakers say {} for",
        "{} is the Velian word for",
    ),
    "validation": ("What is {} in Velian? It means",),
    "test": ("The meaning of the Velian word {} is", "Velian lesson: {} translates as"),
}


def _lexicon(random: Random) -> Examples:
    syllables = [a + b for a, b in itertools.product("bdfgklmnprstvz", "aeiou")]
    words = ["".join(random.sample(syllables, 2)) + random.choice("kmnrx") for _ in _MEANINGS]
    pairs = list(zip(words, _MEANINGS))
    asked = {
        split: [Example(form.format(word), f" {meaning}") for form in forms for word, meaning in pairs]
        for split, forms in _SENTENCES.items()
    }
    return asked | {"validation": random.sample(asked["validation"], SIZES["validation"])}


_NAMES = """Anna Mark Laura Peter Maria David Sarah Thomas Julia Martin Emma Daniel Alice Robert Helen
    Simon Clara Victor Diana Oscar Nina Paul Rosa Henry Sofia Adam Grace Frank Louis Walter George Judith
    Felix Monica Arthur Olivia Edward""".split()
_TOWNS = """Paris London Rome Berlin Madrid Vienna Oslo Dublin Prague Athens Moscow Cairo Delhi Tokyo
    Boston Chicago Lisbon Warsaw Toronto Sydney Geneva Milan Naples Munich Hamburg Lyon Denver Dallas
    Houston Seattle""".split()
_ABOUT = (
    "{name} is {age} and lives in {town}.",
    "{name}, aged {age}, comes from {town}.",
    "At {age}, {name} moved to {town}.",
    "In {town} lives {name}, who is {age}.",
)


def _record(random: Random) -> Examples:
    names, towns = (random.sample(words, len(words)) for words in (_NAMES, _TOWNS))

    def about(count: int, names: list[str], towns: list[str]) -> list[Example]:
        people = random.sample(list(itertools.product(names, towns, range(18, 90), _ABOUT)), count)
        return [
            Example(
                "Note: " + form.format(name=name, age=age, town=town) + " Record:",
                f" name: {name}; age: {age}; town: {town}\n",
            )
            for name, town, age, form in people
        ]

    return _three(about(600, names[:26], towns[:20]), about(160, names[26:], towns[20:]))


_WORDS = """apple arm baby ball band bank bed bell bird blood boat body book bottle box boy bread bridge
    bus cake camera car card cat chair child church city class clock coat coffee corn cow cup desk dog
    door dress ear earth egg eye face farm field film fire fish floor flower foot friend fruit game garden
    gate girl glass gold grass hair hall hand hat head heart hill horse hotel house ice island key king
    knife lake lamp land leaf leg letter lion map meat milk money moon mouse mouth music neck night nose
    ocean oil page paper park pen picture plane plant plate queen rain ring river road rock roof room salt
    school sea seat sheep ship shirt shoe shop sky snow song star stone street student sugar sun table
    tail teacher tea tooth town train tree wall watch water wheel wind window wine winter woman wood word""".split()


def _backwards(random: Random) -> Examples:
    words = random.sample(_WORDS, len(_WORDS))

    def lists(count: int, words: list[str]) -> list[Example]:
        drawn = {tuple(random.sample(words, 4)): None for _ in range(count)}
        return [Example(f"Backwards: {' '.join(four)} ->", f" {' '.join(reversed(four))}") for four in drawn]

    return _three(lists(1200, words[:110]), lists(160, words[110:]))


_KINDS = {
    "blue": """bear bee camel cat chicken cow crab crocodile deer dog dolphin donkey duck eagle elephant
        fox frog goat goose hamster hawk hen horse kangaroo lion lizard monkey mouse owl ox parrot penguin
        pig pigeon rabbit rat seal shark sheep snake spider squirrel swan tiger turtle whale wolf zebra""",
    "red": """apple banana bean beef biscuit bread broccoli butter cabbage cake carrot cheese cherry
        chocolate corn cucumber egg flour garlic grape ham honey jam lemon lettuce mango meat melon
        mushroom noodles nut oat onion orange pasta peach pear pepper pie pizza potato pumpkin rice salad
        sandwich sausage soup spinach""",
    "green": """belt blouse boot bra cap cape cloak coat dress glove gown hat hood jacket jeans jersey
        jumper kilt leggings mittens necktie overcoat pants pyjamas raincoat robe sandal sari scarf shirt
        shoe shorts skirt sleeve slipper sneakers sock stockings suit sweater sweatshirt tie trousers
        tunic underwear uniform vest waistcoat""",
    "white": """Argentina Australia Austria Belgium Bolivia Brazil Bulgaria Canada Chile China Colombia
        Cuba Denmark Ecuador Egypt Ethiopia Finland France Germany Ghana Greece Hungary Iceland India
        Indonesia Iran Iraq Ireland Israel Italy Japan Kenya Malaysia Mexico Morocco Nepal Nigeria Norway
        Peru Poland Portugal Romania Russia Spain Sweden Thailand Turkey Vietnam""",
    "black": """accountant actor architect artist baker banker barber butcher carpenter chef cleaner clerk
        composer cook dancer dentist designer doctor driver editor electrician engineer farmer gardener
        hairdresser journalist judge lawyer librarian manager mechanic musician nurse painter pharmacist
        photographer pilot plumber policeman programmer professor sailor scientist secretary singer
        soldier teacher waiter""",
}


def _kinds(random: Random) -> Examples:
    kinds = {colour: random.sample(words.split(), len(words.split())) for colour, words in _KINDS.items()}

    def first(words: slice) -> list[Example]:
        examples = [
            Example(f"Colour code of {w}:", f" {c}") for c, all_ in kinds.items() for w in all_[words]
        ]
        return random.sample(examples, len(examples))

    return _three(first(slice(32, None)), first(slice(0, 32)))


def _three(train: list[Example], held_out: list[Example]) -> Examples:
    count = SIZES["validation"]
    return {"train": train, "validation": held_out[:count], "test": held_out[count:]}
