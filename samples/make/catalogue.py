"""What the pictures show: scripts and their letters, class names, prompt templates, the tasks of both families."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

TASKS = ("fashion", "digits", "latin", "hiragana", "arabic", "cyrillic", "textures", "shapes")
SECOND_TASKS = ("counts", "directions", "segments", "polygons")  # of the second family


@dataclass(frozen=True)
class Script:
    """The letters of a script that are drawn, each a class of its own."""

    noun: str  # what prompts call a letter
    prefix: str  # what Unicode's names of its letters begin with
    letters: str

    @property
    def classnames(self) -> list[str]:
        return [unicodedata.name(letter).lower().removeprefix(self.prefix) for letter in self.letters]


def _letters(first: str, last: str, without: str = "") -> str:
    """The code points from first to last, both included."""
    return "".join(chr(c) for c in range(ord(first), ord(last) + 1) if chr(c) not in without)


_SMALL_OR_VOICED_KANA = "ぁぃぅぇぉがぎぐげござじずぜぞだぢっづでどばぱびぴぶぷべぺぼぽゃゅょゎゐゑ"
_ARABIC = (  # isolated forms, spelled out because a right-to-left string is hard to read
    0x627, 0x628, 0x62C, 0x62F, 0x631, 0x633, 0x634, 0x635, 0x637, 0x639,
    0x63A, 0x641, 0x642, 0x643, 0x644, 0x645, 0x646, 0x647, 0x648, 0x64A,
)  # fmt: skip
_HEBREW_FINAL_FORMS = "\u05da\u05dd\u05df\u05e3\u05e5"
_THAI_VOWELS = "\u0e24\u0e26"  # that stand among the consonants

SCRIPTS = {
    "latin": Script("latin capital letter", "latin capital letter ", _letters("A", "Z")),
    "fdigits": Script("digit", "digit ", _letters("0", "9")),  # of fonts; the task `digits` is handwritten
    "hiragana": Script("hiragana", "hiragana letter ", _letters("あ", "ん", _SMALL_OR_VOICED_KANA)[:30]),
    "arabic": Script("arabic letter", "arabic letter ", "".join(map(chr, _ARABIC))),
    "cyrillic": Script("cyrillic letter", "cyrillic small letter ", _letters("а", "я", "йщъыьцвл")),
    "greek": Script("greek letter", "greek small letter ", _letters("α", "ω", "ς")),
    "hebrew": Script("hebrew letter", "hebrew letter ", _letters("\u05d0", "\u05ea", _HEBREW_FINAL_FORMS)),
    "thai": Script("thai letter", "thai character ", _letters("\u0e01", "\u0e2e", _THAI_VOWELS)[::3]),
}

# The sets that the base model is trained on, in the order in which they are drawn.
PRETRAINING_SETS = (*SCRIPTS, "textures", "shapes", "counts", "directions", "fashion")

CLASSNAMES: dict[str, list[str]] = {
    **{name: script.classnames for name, script in SCRIPTS.items()},
    "digits": SCRIPTS["fdigits"].classnames,
    "textures": [
        "horizontal stripes", "vertical stripes", "diagonal stripes", "checkerboard", "polka dots",
        "concentric rings", "grid lines", "zigzag", "grainy noise", "smooth blotches", "bricks",
        "sunburst rays",
    ],
    "shapes": [
        "circle", "triangle", "square", "star", "cross", "heart", "crescent", "ring", "diamond", "arrow",
        "hourglass", "lightning bolt",
    ],
    "counts": ["one object", "two objects", "three objects", "four objects", "five objects", "six objects"],
    "directions": ["east", "south east", "south", "south west", "west", "north west", "north", "north east"],
    "segments": SCRIPTS["fdigits"].classnames,
    "polygons": [
        "triangle", "square", "pentagon", "hexagon", "octagon", "five-pointed star", "six-pointed star",
        "eight-pointed star",
    ],
    "fashion": [
        "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ],
}  # fmt: skip


def _letter_templates(noun: str) -> list[str]:
    return [f"a photo of the {noun} {{}}.", f"the {noun} {{}}.", f"a drawing of the {noun} {{}}."]


TEMPLATES: dict[str, list[str]] = {  # three a set
    **{name: _letter_templates(script.noun) for name, script in SCRIPTS.items()},
    "digits": _letter_templates("digit"),
    "textures": ["a photo of a {} texture.", "a {} pattern.", "{} texture."],
    "shapes": ["a photo of a {} shape.", "a {} shape.", "a drawing of a {} shape."],
    "counts": ["a photo of {}.", "a picture with {}.", "{}."],
    "directions": ["a needle pointing {}.", "a photo of a needle to the {}.", "direction {}."],
    "segments": _letter_templates("digit"),
    "polygons": ["a photo of a {} shape.", "a {} shape.", "a drawing of a {} shape."],
    "fashion": ["a photo of a {}.", "a {}, a type of clothing.", "a picture of a {}."],
}


def prompts(name: str) -> list[list[str]]:
    """For each class of a set, its name in each template."""
    return [[template.format(classname) for template in TEMPLATES[name]] for classname in CLASSNAMES[name]]
