"""The catalogue of methods as `mergeline methods` shows it: what they declare, say of themselves, and were measured."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping

from mergeline.merging.learning.contract import LearnedMethod
from mergeline.merging.methods.bound import bind
from mergeline.merging.methods.contract import Declared, Method

# What tools/parity.py measured: golden cases, and how often a method reads its inputs.
MEASURED = Path(__file__).with_name("measured.json")

FAMILIES = {
    "elementwise": "entries are merged for themselves, some by thresholds over a tensor or the model",
    "geometric": "directions and angles of whole tensors",
    "spectral": "singular vectors of matrices",
    "optimised": "a loss of the task vectors alone is descended, without data",
    "statistics": "what was gathered from data or training says what counts",
    "adapters": "low-rank adapters, by their factors",
    "store": "one expert is given back from what is kept of all (`mergeline compress`)",
    "wrapper": "change what another method sees, or what it made",
    "learned": "fitted to a few examples of the tasks (`mergeline fit`), then merged as any other",
    "outside": "defined outside of Mergeline, by a package or a file",
}

# What a parameter means in every method that says nothing else of it.
MEANINGS = {
    "scale": "what the merged task vector is multiplied by",
    "weights": "one number an expert, in their order; equal by default",
    "normalize": "divide by the sum of the weights",
    "density": "share of the entries that is kept",
    "drop_rate": "share of the entries that is dropped at random",
    "rank": "share of full rank that is kept: k = max(1, int(rank · min(M, N)))",
    "rank_rounding": "how rank · min(M, N) becomes a whole number",
    "scope": "over what it is taken: the model (global), each tensor, each row (last dimension) or column (first)",
    "reduce": "how the entries that agree are combined",
    "keys": "which tensors are matrices to it: all 2-D ones but a text tower's projection (matrices), linear weights "
    "in numbered blocks (block_linear), or these and the last projection",
    "convolutions": "whether kernels of convolutions in numbered blocks are matrices, too, (outputs, inputs · height · "
    "width)",
    "other": "what the remaining tensors add: nothing (pretrained), the mean or the sum of the task vectors",
    "inner": "the method that is wrapped; its parameters stand beside these",
    "variant": "which implementation is followed where they differ",
    "masks": "drawn from the seed, or given as statistics (1 is kept)",
    "iterations": "steps of the optimiser",
    "learning_rate": "of the optimiser",
    "optimizer": "which one",
    "task": "which expert is given back, from 0",
    "stored": "the dtype in which a store keeps numbers; by default that in which the tensor is read",
}


Entry = Method | LearnedMethod


def described(entry: Method) -> dict[str, Any]:
    """All that is known of a method, as JSON values; `unit` and `statistics` with its default parameters.

    `parameters` are the defaults, `schema` is the JSON schema of each with its meaning as the description.
    """
    sections = entry.sections
    reference = entry.reference_of(entry.parameters)
    return {
        **_page(entry),
        "reference": reference if isinstance(reference, str) else "mean",
        "needs": [*_needs(entry), *filter(None, [_paragraph(sections.get("Needs", ""))])],
        "needs_base": "base" in entry.needs_of(entry.parameters),
        "minimum_experts": entry.experts[0],
        "maximum_experts": entry.experts[1],
        "statistics": entry.statistics_of(entry.parameters),
        "reads_statistics": callable(entry.needs) or bool(entry.statistics_of({})),
        "is_store": entry.store is not None,
        "merges_factors": entry.factors is not None,
        "wraps": entry.wraps,
        "unit": bind(entry, entry.resolve({})).own_unit,
        "cost": {
            "unit": _units(entry),
            "readings": measured()["readings"].get(entry.id),
            "spectral_work": _paragraph(sections.get("Spectral work", "")),
        },
        "parity": {
            "status": parity(entry.id),
            "cases": [case for case in measured()["cases"] if case["method"] == entry.id],
        },
        "trap": _paragraph(sections.get("Trap", "")),
    }


def described_learned(entry: LearnedMethod) -> dict[str, Any]:
    """All that is known of a learned method, as JSON values; `data` is what it looks at beside the weights."""
    return {
        **_page(entry),
        "data": entry.data,
        "marked": entry.marked,
        "trains": entry.trains,
        "task_known": entry.task_known,
        "needs": ["the base", _examples(entry)],
        "wraps": entry.wraps,
        "trap": _paragraph(entry.sections.get("Trap", "")),
    }


def _page(entry: Entry) -> dict[str, Any]:
    """What methods of both kinds say of themselves."""
    return {
        "id": entry.id,
        "family": entry.family,
        "summary": entry.summary,
        "notes": _paragraph(entry.notes),
        "formula": entry.sections.get("Formula", "").split("\n"),
        "parameters": entry.parameters,
        "schema": _schema(entry),
        "paper": entry.paper,
        "code": entry.code,
    }


def _examples(entry: LearnedMethod) -> str:
    if entry.data == "none":
        return f"no examples ({entry.stand_in})" if entry.stand_in else "no examples"
    return f"examples, {entry.data}"


@cache
def measured() -> dict[str, Any]:
    return json.loads(MEASURED.read_text())


def parity(id: str) -> str:
    """In how far a method was compared with another implementation."""
    cases = [case for case in measured()["cases"] if case["method"] == id]
    outputs = [case for case in cases if case["kind"] == "merge"]
    known = [_named(case) for case in outputs if "@" in case["source"]]
    rebuilt = [_named(case) for case in outputs if "@" not in case["source"]]
    drawn = [f"`{case['case']}`" for case in cases if case["kind"] == "stochastic"]
    found = [f"equals {', '.join(known)}"] if known else []
    found += [f"equals a reconstruction, no code being public, {', '.join(rebuilt)}"] if rebuilt else []
    found += [f"draws follow the distribution of {', '.join(drawn)}"] if drawn else []
    return "; ".join(found) or "properties only: there is no golden case"


def _named(case: Mapping[str, Any]) -> str:
    """A golden case and its tolerance."""
    but = f", but for {case['allowed']} elements" if case["allowed"] else ""
    return f"`{case['case']}` (to {case['atol']:g} + {case['rtol']:g} · |b|{but})"


def short_needs(entry: Method | LearnedMethod) -> str:
    """What a method cannot do without, in few words."""
    if isinstance(entry, LearnedMethod):
        return f"base, {_examples(entry)}"
    found = [need.removeprefix("the ") for need, setting in _needs_by_setting(entry) if not setting]
    return ", ".join(found) or "experts"


def by_family(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Methods in the order of `FAMILIES`, those that have one."""
    entries = list(entries)
    found = {family: [entry for entry in entries if entry.family == family] for family in FAMILIES}
    return {family: own for family, own in found.items() if own}


def kind(schema: Mapping[str, Any]) -> str:
    """The type and range of a parameter, in words."""
    if "anyOf" in schema:
        return " or ".join(kind(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "const" in schema or "enum" in schema:
        return ", ".join(map(str, schema.get("enum") or [schema["const"]]))
    if schema["type"] == "array":
        return f"list, each a {kind(schema['items'])}"
    words = {"number": "number", "integer": "whole number", "boolean": "true or false", "string": "text"}
    return words[schema["type"]] + _range(schema)


def _range(schema: Mapping[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if high is None and below is None:
        return f" ≥ {low}" if low is not None else f" > {above}" if above is not None else ""
    start = f"[{low}" if low is not None else f"({above}"
    end = f"{high}]" if high is not None else f"{below})"
    return f" in {start}, {end}"


def _schema(entry: Declared) -> dict[str, Any]:
    own: dict[str, list[str]] = {}
    for line in entry.sections.get("Parameters", "").split("\n"):
        name, colon, meaning = line.partition(": ")
        if colon and not line.startswith(" "):
            own[name] = [meaning]
        elif line:
            own[list(own)[-1]].append(line.strip())
    unknown = own.keys() - entry.parameters.keys()
    assert not unknown, (
        f"{entry.id}: its docstring speaks of the parameters {unknown}, which it does not have"
    )
    meanings = MEANINGS | {name: " ".join(words) for name, words in own.items()}
    properties = entry.schema.model_json_schema().get("properties", {})
    return {
        name: {key: value for key, value in found.items() if key != "title"}
        | {"description": meanings.get(name, "")}
        for name, found in properties.items()
    }


def _needs(entry: Method) -> list[str]:
    """What it needs, with some parameters or always, a phrase each."""
    return [need + (f" with {setting}" if setting else "") for need, setting in _needs_by_setting(entry)]


def _needs_by_setting(entry: Method) -> Iterator[tuple[str, str]]:
    """A phrase, and the settings that make it true; none if it always is."""
    least, most = entry.experts
    if most == least:
        yield f"{least} expert{'s' * (least > 1)}", ""
    elif least > 1:
        yield f"{least} experts or more", ""
    for _, setting in _answers(entry, lambda params: "base" in entry.needs_of(params)):
        yield "the base", setting
    for kinds, setting in _answers(entry, lambda params: ", ".join(entry.statistics_of(params))):
        yield from [(f"the statistics {kinds}", setting)] if kinds else []


def _units(entry: Method) -> str:
    """The blocks that it can be given, and the settings that make them larger."""
    if entry.keys is not None:
        return "matrix"
    if isinstance(entry.unit, str):
        return entry.unit
    return "; ".join(
        unit + (f" with {setting}" if setting else "") for unit, setting in _answers(entry, entry.unit)
    )


def _answers(entry: Method, ask: Callable[[Mapping[str, Any]], Any]) -> Iterator[tuple[Any, str]]:
    """What is true with the default parameters, and what else is if one of them is set to another of its choices."""
    usual = ask(entry.parameters)
    others: dict[Any, dict[str, list[str]]] = {}
    for name, found in entry.schema.model_json_schema().get("properties", {}).items():
        for value in found.get("enum") or ([True, False] if found.get("type") == "boolean" else []):
            answer = ask({**entry.parameters, name: value})
            if answer != usual:
                shown = value if isinstance(value, str) else json.dumps(value)
                others.setdefault(answer, {}).setdefault(name, []).append(shown)
    if usual:
        yield usual, ""
    for answer, settings in others.items():
        if answer:
            yield answer, " or ".join(f"{name}: {' or '.join(values)}" for name, values in settings.items())


def _paragraph(text: str) -> str:
    """The text on one line a paragraph."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
