"""The examples of the text-to-text family: what its base is trained on, and the four tasks of its experts.

numbers   an English numeral as digits: `number: four hundred and seven` -> `407`; numbers of val and test are held out
dates     a date in one of four forms as ISO 8601 has it: `date: March 7, 1984` -> `1984-03-07`; days are held out
clock     a time of day as a clock shows it: `time: twenty to nine` -> `8:40`; times are held out
likeness  how alike two lists of words are, the number of places with the same one: `alike: sun sea | sun moon` -> `1`

The base is trained on operations on lists that are drawn, and on 500 training examples of each task among them.
"""

from __future__ import annotations

import datetime
from random import Random
from typing import Callable, Sequence

Pair = tuple[str, str]  # what the model reads, and what it should write
Splits = dict[str, list[Pair]]

SIZES = {"test": 300, "val": 150, "fit": 100}  # the rest is train
_FEW = {"test": 120, "val": 60, "fit": 40}  # of times, of which there are 720

_NOUNS = """sun moon star sea sand tree stone river rain wind snow fire bird fish horse house door road ship
    bread""".split()
_SMALL = """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen""".split()
UNITS = _SMALL[:9]  # they also stand behind a hyphen
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_MONTHS = """January February March April May June July August September October November December""".split()


def task(name: str) -> Splits:
    """The examples of each split, disjoint; the same on every machine."""
    return _TASKS[name](Random(name))


def words() -> list[str]:
    """All words that inputs and targets are made of; besides, there are digits and signs."""
    months = [form for month in _MONTHS for form in (month, month[:3])]
    asked = [f"{name}:" for name in (*_OPERATIONS, "number", "date", "time", "alike")]
    return [
        *_NOUNS,
        *_SMALL,
        *_TENS,
        *months,
        *asked,
        *"hundred thousand and past to half quarter o'clock |".split(),
    ]


# ---------------------------------------------------------------------------------------------- the base's operations


def operation(random: Random) -> Pair:
    """An example of one of the operations on lists."""
    name = random.choice([*_OPERATIONS])
    given, made = _OPERATIONS[name](random)
    return f"{name}: {given}", made


def _digits(random: Random, shortest: int = 1, longest: int = 5) -> str:
    return "".join(random.choices("0123456789", k=random.randint(shortest, longest)))


def _list(random: Random, shortest: int = 1, longest: int = 4) -> list[str]:
    return random.choices(_NOUNS, k=random.randint(shortest, longest))


def _copy(random: Random) -> Pair:
    text = random.choice((_digits(random), " ".join(_list(random))))
    return text, text


def _backwards(random: Random) -> Pair:
    text = _digits(random, 2, 4)
    return text, text[::-1]


def _swap(random: Random) -> Pair:
    first, second = _digits(random, 1, 2), _digits(random, 1, 4)
    return f"{first} {second}", f"{second} {first}"


def _first(random: Random) -> Pair:
    found = _list(random, 2)
    return " ".join(found), found[0]


def _last(random: Random) -> Pair:
    found = _list(random, 2)
    return " ".join(found), found[-1]


def _pad(random: Random) -> Pair:
    number = _digits(random, 1, 3)
    return number, number.zfill(3)


def _count(random: Random) -> Pair:
    found = _list(random, 1, 6)
    return " ".join(found), str(len(found))


def _spell(random: Random) -> Pair:
    found = random.choices(range(9), k=random.randint(1, 3))
    return " ".join(_SMALL[i] for i in found), " ".join(str(i + 1) for i in found)


_OPERATIONS: dict[str, Callable[[Random], Pair]] = {
    "copy": _copy, "backwards": _backwards, "swap": _swap, "first": _first, "last": _last, "pad": _pad,
    "count": _count, "spell": _spell,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- the experts' tasks


def _numbers(random: Random) -> Splits:
    return _split(random, [(f"number: {_numeral(n)}", str(n)) for n in random.sample(range(1, 10_000), 4000)])


def _numeral(n: int) -> str:
    """As British English has it, with `and`."""
    if n < 20:
        return _SMALL[n - 1]
    if n < 100:
        return _TENS[n // 10 - 2] + (f"-{_SMALL[n % 10 - 1]}" if n % 10 else "")
    size, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    rest = n % size
    between = " and " if 0 < rest < 100 else " "
    return f"{_SMALL[n // size - 1]} {name}" + (between + _numeral(rest) if rest else "")


def _dates(random: Random) -> Splits:
    first = datetime.date(1950, 1, 1).toordinal()

    def example(day: datetime.date) -> Pair:
        month = _MONTHS[day.month - 1]
        form = random.choice(
            (f"{month} {day.day}, {day.year}", f"{day.day} {month} {day.year}", f"{day.day} {month[:3]} {day.year}",
             f"{day.month}/{day.day}/{day.year}")
        )  # fmt: skip
        return f"date: {form}", day.isoformat()

    days = random.sample(range(27_000), 4000)
    return _split(random, [example(datetime.date.fromordinal(first + day)) for day in days])


def _clock(random: Random) -> Splits:
    times = [(hour, minute) for hour in range(1, 13) for minute in range(60)]
    return _split(random, [(f"time: {_spoken(*time)}", f"{time[0]}:{time[1]:02}") for time in times], _FEW)


def _spoken(hour: int, minute: int) -> str:
    if minute == 0:
        return f"{_SMALL[hour - 1]} o'clock"
    near = minute if minute <= 30 else 60 - minute
    said = {15: "quarter", 30: "half"}.get(near) or _numeral(near)
    return f"{said} past {_SMALL[hour - 1]}" if minute <= 30 else f"{said} to {_SMALL[hour % 12]}"


def _likeness(random: Random) -> Splits:
    def example() -> Pair:
        first = random.choices(_NOUNS, k=5)
        other = set(random.sample(range(5), random.randint(0, 5)))
        second = [random.choice(_NOUNS) if i in other else word for i, word in enumerate(first)]
        same = sum(a == b for a, b in zip(first, second))
        return f"alike: {' '.join(first)} | {' '.join(second)}", str(same)

    return _split(random, [*dict(example() for _ in range(4000)).items()])


_TASKS: dict[str, Callable[[Random], Splits]] = {
    "numbers": _numbers, "dates": _dates, "clock": _clock, "likeness": _likeness,
}  # fmt: skip
TASKS = [*_TASKS]


def _split(random: Random, pairs: Sequence[Pair], sizes: dict[str, int] = SIZES) -> Splits:
    """Examples in a random order, each in one split alone."""
    order, found = random.sample(pairs, len(pairs)), {}
    for split, size in sizes.items():
        found[split], order = order[:size], order[size:]
    return found | {"train": order}
