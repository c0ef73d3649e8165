"""The tables of the four tasks that the embedding experts learn: short texts, in splits that share no query.

countries  the name of a country, a region or a language in another language -> in English; other languages in training
functions  the first sentence of a docstring of Python's library -> the function's name; other functions in training
dates      a date in words -> as ISO 8601 has it, among near ones; other dates in training
numbers    a number in words and another in digits, scored by how near they are; other numbers in training

Names are of Unicode's CLDR, by the package Babel; docstrings of the Python that runs this.
"""

from __future__ import annotations

import datetime
import importlib
import inspect
import math
import pkgutil
import re
import sys
import warnings
from random import Random
from typing import Any, Iterator

Rows = list[dict[str, Any]]
Tables = dict[str, Rows]  # train, fit, val, test; of retrieval, corpus, too

RETRIEVAL = ("countries", "functions", "dates")
SIZES = {"fit": 64, "val": 120, "test": 300}


def tables(name: str) -> Tables:
    """The tables of a task; the same wherever Babel and Python are the same."""
    made_by = {"countries": _countries, "functions": _functions, "dates": _dates, "numbers": _numbers}
    return made_by[name](Random(name))


# --------------------------------------------------------------------------------------------- countries

_TRAINED = "de fr es pl sv tr fi id lv sk sq vi eu is uz".split()
_HELD_OUT = "it nl pt cs da hr ro ca hu nb et lt sl af gl sw ms az".split()
_MOST_COMMON = 120  # languages, by how many locales name them


def _countries(random: Random) -> Tables:
    from babel import Locale

    english = Locale("en")
    spoken = sorted(set(english.languages) & set.intersection(*(set(Locale(x).languages) for x in _HELD_OUT)))
    wanted = [("territories", code) for code in sorted(english.territories)]
    wanted += [("languages", code) for code in random.sample(spoken, _MOST_COMMON)]
    corpus = {f"{kind}:{code}": getattr(english, kind)[code] for kind, code in wanted}
    corpus = {id: text for id, text in corpus.items() if [*corpus.values()].count(text) == 1}

    def named(locales: list[str]) -> dict[str, str]:
        """Name -> id, of names that are not English, and of one thing alone."""
        found: dict[str, set[str]] = {}
        for locale in map(Locale, locales):
            for id in corpus:
                kind, code = id.split(":")
                if name := getattr(locale, kind).get(code):
                    found.setdefault(name, set()).add(id)
        english_names = set(corpus.values())
        return {n: min(ids) for n, ids in sorted(found.items()) if len(ids) == 1 and n not in english_names}

    train = named(_TRAINED)
    held_out = [(name, id) for name, id in named(_HELD_OUT).items() if name not in train]
    random.shuffle(held_out)
    return {
        "train": [{"query": name, "document": corpus[id]} for name, id in train.items()],
        **_splits([{"query": name, "relevant": [id]} for name, id in held_out]),
        "corpus": [{"id": id, "text": text} for id, text in corpus.items()],
    }


# --------------------------------------------------------------------------------------------- functions

_SENTENCE = re.compile(r"[A-Z][^.]{20,140}\.(?=\s|$)")


def _functions(random: Random) -> Tables:
    found: dict[str, str] = {}
    for name, said in _documented():
        if said not in found.values():
            found[name] = said
    names = sorted(found)
    random.shuffle(names)
    count = sum(SIZES.values())
    held_out, trained = names[:count], names[count:]
    return {
        "train": [{"query": found[name], "document": name} for name in trained],
        **_splits([{"query": found[name], "relevant": [name]} for name in held_out]),
        "corpus": [{"id": name, "text": name} for name in sorted(held_out)],
    }


def _documented() -> Iterator[tuple[str, str]]:
    """Public functions and methods of the standard library, with the first sentences of their docstrings."""
    skipped = ("test", "idlelib", "turtle", "lib2to3", "antigravity", "this", "tkinter")
    for module_name in sorted(sys.stdlib_module_names):
        if module_name.startswith(("_", *skipped)):
            continue
        for name in [module_name, *_inside(module_name)]:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    module = importlib.import_module(name)
            except Exception:  # a module of another platform
                continue
            for key, value in sorted(vars(module).items()):
                if key.startswith("_") or getattr(value, "__module__", None) != name:
                    continue
                members = sorted(vars(value).items()) if inspect.isclass(value) else [("", value)]
                for member, function in members:
                    if member.startswith("_") or not inspect.isroutine(function):
                        continue
                    sentence = _SENTENCE.match(" ".join((inspect.getdoc(function) or "").split()))
                    if sentence:
                        yield ".".join(filter(None, (name, key, member))), sentence[0]


def _inside(module_name: str) -> list[str]:
    try:
        path = importlib.import_module(module_name).__path__
    except Exception:
        return []
    return sorted(f"{module_name}.{m.name}" for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


# --------------------------------------------------------------------------------------------- dates

_WORDS = ("the {o} of {month}, {year}", "{month} {o}, {year}", "{short} {d} '{yy}", "{weekday}, {d} {month} {year}",
          "on {month} {d} in the year {year}", "{d}/{short}/{year}")  # fmt: skip
_FIRST, _DAYS = datetime.date(1920, 1, 1), 36_000
_NEAR = (1, 30, 365, 366)  # days


def _dates(random: Random) -> Tables:
    days = random.sample(range(_DAYS), 2_600)
    count = sum(SIZES.values())
    held_out, trained = days[:count], [d for d in days[count:] if d not in set(days[:count])]
    near = {day + random.choice((-1, 1)) * random.choice(_NEAR) for day in held_out[: count // 2]}
    corpus = sorted({*held_out, *near})

    def iso(day: int) -> str:
        return (_FIRST + datetime.timedelta(day)).isoformat()

    def said(day: int) -> str:
        date = _FIRST + datetime.timedelta(day)
        d = date.day
        ordinal = f"{d}{'th' if 10 < d < 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(d % 10, 'th')}"
        return random.choice(_WORDS).format(
            o=ordinal, d=d, month=date.strftime("%B"), short=date.strftime("%b"), year=date.year,
            yy=f"{date.year % 100:02d}", weekday=date.strftime("%A"),
        )  # fmt: skip

    return {
        "train": [{"query": said(day), "document": iso(day)} for day in trained],
        **_splits([{"query": said(day), "relevant": [iso(day)]} for day in held_out]),
        "corpus": [{"id": iso(day), "text": iso(day)} for day in corpus],
    }


# --------------------------------------------------------------------------------------------- numbers

_UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen""".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def _numbers(random: Random) -> Tables:
    def drawn() -> int:
        return int(10 ** random.uniform(0, 5))

    held_out = {drawn() for _ in range(700)}

    def pair(of: set[int] | None) -> dict[str, Any]:
        while True:
            a, b = drawn(), drawn()
            if random.random() < 0.4:  # near ones, too
                b = max(1, round(a * random.uniform(0.5, 2.0)))
            if (of is None and a not in held_out) or (of is not None and a in of):
                apart = abs(math.log10(a) - math.log10(b))
                return {"sentence1": in_words(a), "sentence2": str(b), "score": round(1 - apart / 5, 4)}

    return {
        "train": [pair(None) for _ in range(4_000)],
        **_splits([pair(held_out) for _ in range(sum(SIZES.values()))]),
    }


def in_words(n: int) -> str:
    """A number below a million in English words."""
    if n < 20:
        return _UNITS[n]
    if n < 100:
        return _TENS[n // 10 - 2] + (f"-{_UNITS[n % 10]}" if n % 10 else "")
    size, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    rest = f" {in_words(n % size)}" if n % size else ""
    return f"{in_words(n // size)} {name}{rest}"


def _splits(rows: Rows) -> Tables:
    found, start = {}, 0
    for split, size in SIZES.items():
        found[split] = rows[start : start + size]
        start += size
    return found
