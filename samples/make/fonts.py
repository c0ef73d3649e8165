"""Which fonts draw the letters of train, val and test: families that look alike stay together.

Families are grouped when files of theirs draw at least five of eight letters alike, or when they share the
start of their name. Groups, not families, are split, and scripts that share letter shapes share one split.
Fonts are those that fontconfig knows, so another machine has other groups.
"""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Iterable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from make.catalogue import SCRIPTS
from make.hashing import stable_hash

Families = dict[str, list[str]]  # family -> its font files
Group = list[list[str]]  # families of a group, each a list of its font files
Splits = dict[str, dict[str, Group]]  # split -> number of a group -> group

# Scripts that share letter shapes share one split.
_BLOCKS = (("latin", "fdigits", "cyrillic", "greek"), ("hiragana",), ("arabic",), ("hebrew",), ("thai",))

_CROWDED = ("latin", "fdigits")  # most fonts have these
_MOST_FAMILIES = 300  # of those in a crowded script that have no other script
_FILES_A_FAMILY = 3
_NO_LETTERS = (  # parts of the paths of fonts that draw pictures, boxes or test patterns
    "emoji", "awesome", "material", "symbol", "unifont", "lastresort", "barcode", "wine", "dingbat",
    "braille", "lohit-test", "mathjax", "adobeblank",
)  # fmt: skip

_LETTERS = 8  # compared, spread over the alphabet
_LOOK_SIZE = 24  # pixels a side of a letter fitted to its box
_FONT_SIZE = 40
_LEAST_INK = 2000  # sum of grey levels; what has less is blank
_ALIKE = 0.97  # cosine of two fonts' renderings of a letter
_ALIKE_LETTERS = 5  # that make two families one group
_SAME_BOX = 0.985  # cosine of two letters of a font: above it, the font draws one box for everything
_DECORATIVE = 0.12  # share of the least typical fonts, left out
_DECORATIVE_CROWDED = 0.30

# A family's first word is the stem of its name, or its first two where the first is shared by many.
_SHARED_FIRST_WORDS = (
    "Noto", "IBM", "Open", "The", "New", "Old", "GFS", "TeX", "Latin", "STIX", "Red", "Alegreya", "PT",
    "FreeFont",
)  # fmt: skip

# The splits of groups in turn.
_CYCLE_MANY = ("test", "train", "val", "train", "test", "train", "train")  # of more than 50 groups
_CYCLE_FEW = ("test", "train", "test", "val", "train", "test", "train")
_MANY = 50
_PRETRAINING_ALL = 12  # pre-training sees every second group of train, or all of so few


def split_fonts(work: Path) -> None:
    """Write work/fonts.json (files by script, split, group) and work/font_split.json (families by group)."""
    installed = _thinned({script: _installed(script) for script in SCRIPTS})
    files: dict[str, Splits] = {}
    note: list[dict] = []
    for scripts in _BLOCKS:
        found, groups = _split_block(scripts, installed)
        files |= found
        note += groups
    (work / "fonts.json").write_text(json.dumps(files))
    (work / "font_split.json").write_text(json.dumps(note, indent=0))


def recall_fonts(work: Path, note: Path) -> None:
    """Write work/fonts.json with the split `train` alone: of the families that a font_split.json has there, those
    which are installed.
    """
    files: dict[str, Splits] = {}
    groups = _read(note)
    for script in SCRIPTS:
        families = _installed(script)
        train: dict[str, Group] = {}
        for number, group in enumerate(groups):
            if script in group["scripts"] and group["split"] == "train":
                found = {family: families[family] for family in group["families"] if family in families}
                if found and (apart := _looks(script, found).apart()):
                    train[str(number)] = list(apart.values())
        files[script] = {"train": train}
        total = sum(script in group["scripts"] and group["split"] == "train" for group in groups)
        print(f"{script}: {len(train)} of {total} groups")
    (work / "fonts.json").write_text(json.dumps(files))


def font_groups(work: Path, script: str, split: str) -> list[Group]:
    """The groups of a split; `pretraining` stands for the part of train that the base model sees."""
    pretraining = split == "pretraining"
    found = _read(work / "fonts.json")[script]["train" if pretraining else split]
    numbers = sorted(found, key=lambda number: stable_hash("g" + number))
    if pretraining and len(numbers) > _PRETRAINING_ALL:
        numbers = numbers[::2]
    return [found[number] for number in numbers]


@cache
def _read(path: Path) -> dict[str, Splits]:
    return json.loads(path.read_text())


def _installed(script: str) -> Families:
    """The families that have all letters of a script, as fontconfig knows them."""
    query = ":charset=" + " ".join(f"{ord(letter):x}" for letter in SCRIPTS[script].letters)
    command = ["fc-list", query, "family", "file"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    families: dict[str, set[str]] = {}
    for line in listing.splitlines():  # FILE: FAMILY,OTHER NAMES
        file, names = line.split(": ", 1)
        family = names.split(":")[0].split(",")[0].strip()
        lower = file.lower()
        if lower.endswith((".ttf", ".otf", ".ttc")) and not any(word in lower for word in _NO_LETTERS):
            families.setdefault(family, set()).add(file)
    return {family: _some_files(files) for family, files in families.items()}


def _some_files(files: set[str]) -> list[str]:
    return sorted(sorted(files), key=lambda file: stable_hash(Path(file).name))[:_FILES_A_FAMILY]


def _thinned(installed: dict[str, Families]) -> dict[str, Families]:
    """In crowded scripts, only families that have another script too, and some of the others."""
    elsewhere = {family for script in SCRIPTS if script not in _CROWDED for family in installed[script]}
    thinned = dict(installed)
    for script in _CROWDED:
        others = sorted((family for family in installed[script] if family not in elsewhere), key=stable_hash)
        keep = elsewhere | set(others[:_MOST_FAMILIES])
        thinned[script] = {family: files for family, files in installed[script].items() if family in keep}
    return thinned


def _split_block(
    scripts: tuple[str, ...], installed: dict[str, Families]
) -> tuple[dict[str, Splits], list[dict]]:
    """Per script, its files by split and group; and the groups' families and splits."""
    links, typical = _Links(), {}
    for script in scripts:
        looks = _looks(script, installed[script])
        for a, b in looks.alike():
            links.join(a, b)
        typical[script] = looks.typical(_DECORATIVE_CROWDED if script in _CROWDED else _DECORATIVE)
        print(f"{script}: {len(installed[script])} families, {len(typical[script])} kept")
    families = sorted({family for kept in typical.values() for family in kept})
    _join_by_name(families, links)
    groups = links.groups(families)
    splits = _splits(groups, len(families))
    found = {script: _files(kept, groups, splits) for script, kept in typical.items()}
    note = [{"scripts": scripts, "split": split, "families": group} for group, split in zip(groups, splits)]
    return found, note


@dataclass
class _Looks:
    """How the N font files of a script draw eight of its letters."""

    families: list[str]  # of each file
    files: list[str]
    letters: np.ndarray  # (N, 8, 24 * 24), each letter of norm 1

    def alike(self) -> list[tuple[str, str]]:
        """Pairs of families that draw at least five letters alike."""
        cosines = np.stack([self.letters[:, i] @ self.letters[:, i].T for i in range(_LETTERS)])
        pairs = np.nonzero(np.triu((cosines > _ALIKE).sum(0) >= _ALIKE_LETTERS, 1))
        return [(self.families[a], self.families[b]) for a, b in zip(*pairs)]

    def apart(self) -> Families:
        """The families and files that draw letters apart."""
        kept: Families = {}
        for family, file, letters in zip(self.families, self.files, self.letters):
            if _largest_cosine(letters) < _SAME_BOX:
                kept.setdefault(family, []).append(file)
        return kept

    def typical(self, decorative: float) -> Families:
        """The families and files that draw letters apart, without the share least like the mean letters."""
        apart = np.array([_largest_cosine(letters) < _SAME_BOX for letters in self.letters])
        centre = self.letters.mean(0)
        centre /= np.linalg.norm(centre, axis=1, keepdims=True)
        typicality = (self.letters * centre).sum(-1).mean(1)
        keep = apart & (typicality > np.quantile(typicality[apart], decorative))
        kept: Families = {}
        for i in np.nonzero(keep)[0]:
            kept.setdefault(self.families[i], []).append(self.files[i])
        return kept


def _largest_cosine(letters: np.ndarray) -> float:
    """Of two letters of one font: letters are (8, 24 * 24)."""
    return (letters @ letters.T)[np.triu_indices(_LETTERS, 1)].max()


def _looks(script: str, families: Families) -> _Looks:
    alphabet = SCRIPTS[script].letters
    letters = [alphabet[round(i * (len(alphabet) - 1) / (_LETTERS - 1))] for i in range(_LETTERS)]
    rows = [(family, file, _look(file, letters)) for family in sorted(families) for file in families[family]]
    rows = [row for row in rows if row[2] is not None]
    letters_of = [row[2] for row in rows]
    looks = np.stack(letters_of) if rows else np.empty((0, _LETTERS, _LOOK_SIZE**2), np.float32)
    return _Looks([row[0] for row in rows], [row[1] for row in rows], looks)


def _look(file: str, letters: list[str]) -> np.ndarray | None:
    """Each letter fitted to its box, (8, 24 * 24) of norm 1; None if a letter is blank."""
    try:
        font = ImageFont.truetype(file, _FONT_SIZE)
        fitted = [_fitted(letter, font) for letter in letters]
    except Exception:  # FreeType has many ways to refuse a font or a letter
        return None
    if any(look is None or look.sum() < _LEAST_INK for look in fitted):
        return None
    return np.stack([look / np.linalg.norm(look) for look in fitted])


def _fitted(letter: str, font: ImageFont.FreeTypeFont) -> np.ndarray | None:
    left, top, right, bottom = font.getbbox(letter)
    width, height = right - left, bottom - top
    if width < 3 or height < 3:
        return None
    side = max(width, height)
    mask = Image.new("L", (side, side))
    corner = ((side - width) / 2 - left, (side - height) / 2 - top)
    ImageDraw.Draw(mask).text(corner, letter, fill=255, font=font)
    return np.asarray(mask.resize((_LOOK_SIZE, _LOOK_SIZE), Image.BOX), np.float32).ravel()


class _Links:
    """Families joined into groups (union-find)."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def _root(self, family: str) -> str:
        while (parent := self._parent.setdefault(family, family)) != family:
            family = parent
        return family

    def join(self, a: str, b: str) -> None:
        self._parent[self._root(a)] = self._root(b)

    def groups(self, families: Iterable[str]) -> list[list[str]]:
        """Each group sorted by name, the groups in an order of no meaning."""
        groups: dict[str, list[str]] = defaultdict(list)
        for family in families:
            groups[self._root(family)].append(family)
        return sorted((sorted(group) for group in groups.values()), key=lambda group: stable_hash(group[0]))


def _join_by_name(families: Iterable[str], links: _Links) -> None:
    first: dict[str, str] = {}
    for family in families:
        links.join(family, first.setdefault(_stem(family), family))


def _stem(family: str) -> str:
    words = family.replace("-", " ").split()
    return " ".join(words[: 2 if words[0] in _SHARED_FIRST_WORDS else 1])


def _splits(groups: list[list[str]], families: int) -> list[str]:
    """The split of each group. Very large groups only train."""
    largest = max(8, families // 12)
    cycle = _CYCLE_MANY if len(groups) > _MANY else _CYCLE_FEW
    splits, turn = [], 0
    for group in groups:
        if len(group) > largest:
            splits.append("train")
        else:
            splits.append(cycle[turn % len(cycle)])
            turn += 1
    return splits


def _files(families: Families, groups: list[list[str]], splits: list[str]) -> Splits:
    number = {family: i for i, group in enumerate(groups) for family in group}
    found: Splits = {}
    for family, files in families.items():
        i = number[family]
        found.setdefault(splits[i], {}).setdefault(str(i), []).append(files)
    return found
