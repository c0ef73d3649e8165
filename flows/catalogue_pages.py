"""The catalogue of methods as text: a list, one method, and the page docs/methods.md."""

from __future__ import annotations

import json
import shutil
import textwrap
from typing import Any, Sequence

from mergeline.flows.catalogue import (
    FAMILIES,
    Entry,
    by_family,
    described,
    described_learned,
    kind,
    short_needs,
)
from mergeline.merging.learning.contract import LearnedMethod

_LEAST_WIDTH = 80

_NOTATION = """\
θ₀ is the base, θₜ expert t of T, θ̄ the mean of the experts, τₜ = θₜ − θ₀ a task vector, all of one tensor of the
model, matrices M x N; wₜ is a weight, 1 unless `weights` says otherwise. P_k(X) is the part of X in its k leading
singular directions, polar(X) = U Vᵀ of X = U S Vᵀ, ⊙ multiplies entry by entry, and [ ] is 1 where what it holds is
true, else 0. Other names are parameters. Parameters of a wrapper and of what it wraps stand side by side; where
both have one of a name, the inner one's is `inner_NAME`.

Cost: the unit is what a method must see of a tensor at once: `element` any stretch of it, `row` rows of its last
dimension, `tensor` all of it, `matrix` all of it where `keys` makes it a matrix and any stretch elsewhere. Readings
are how often the tensor that is read most often is read of an expert, with default parameters, the merge itself
included (statistics are not counted); a wrapper's are with its default inner method. Memory is that of a few units,
whatever the size of the model.

Parity: a golden case is the output of another implementation, the official one where there is one, on small inputs
([parity.md](parity.md) has tolerances and differences); all methods are held to properties that pin their formula,
and those without a case to these alone."""

_LEFT_OUT = {
    "`nan` (2505.16148)": "only its abstract was read: coefficients from inverse norms, not the formula",
    "`larv` (2602.09413)": "only its abstract was read: a rescaling by layer, not the formula",
    "`r_tsvm` (2502.06876)": "neither code nor the formula of its weights and thresholds was found",
    "`esm_pp` (2606.19164)": "routes every input to an expert while the model runs, so it is no checkpoint; `esm` is "
    "the static merge that it starts from",
    "`free` with experts (FREE-Merging)": "adds an expert a task, by a router, while the model runs; `free` is its one "
    "model, FR-Merging",
    "`actmerge`": "is `wudi` with `norm_power: 0` and `solver: direct`",
    "`lata` with `mode: log_rank`": "the formula of the logarithm was not found; the linear one and the threshold are "
    "reconstructed",
    "`map_pareto` (2406.07529)": "searches by evaluations for a front of merges: `sampler: map` of a search",
    "`peta`, `svfit`": "need experts that were trained in another form: in a partly linearised model, or as singular "
    "values",
    "`mc_smoe`, `sub_moe`": "merge the experts inside of a mixture-of-experts layer, by its router's statistics",
}


def listed(entries: Sequence[Entry]) -> str:
    """A line for each method, by family: id, what it needs, what it does."""
    width, needs = (max(map(len, column)) for column in zip(*((e.id, short_needs(e)) for e in entries)))
    lines = []
    for family, own in by_family(entries).items():
        lines += ["", f"{family}: {FAMILIES[family]}"]
        lines += [f"  {e.id:{width}}  {short_needs(e):{needs}}  {e.summary}" for e in own]
    return "\n".join(lines[1:])


def one(entry: Entry) -> str:
    """All that is known of a method, for a terminal."""
    found = all_of(entry)
    lines = _wrapped(f"{found['id']}: {found['summary']}")
    lines += ["", *(f"    {line}" for line in found["formula"])]
    for paragraph in filter(None, found["notes"].split("\n\n")):
        lines += ["", *_wrapped(paragraph)]
    lines.append("")
    for label, text in [*_facts(found).items(), ("trap", found["trap"])]:
        lines += _wrapped(f"{label:15}{text}", 15)
    lines.append("parameters" if found["schema"] else f"{'parameters':15}none")
    for name, schema in found["schema"].items():
        lines.append(f"  {name:18}{json.dumps(schema['default'])}  ({kind(schema)})")
        lines += [" " * 20 + line for line in _wrapped(schema["description"], 0, 20)]
    if found["wraps"]:
        lines.append("  and those of its inner method")
    return "\n".join(lines)


def all_of(entry: Entry) -> dict[str, Any]:
    """All that is known of a method, learned or not, as JSON values."""
    return described_learned(entry) if isinstance(entry, LearnedMethod) else described(entry)


def markdown(entries: Sequence[Entry]) -> str:
    """The page docs/methods.md."""
    families = by_family(entries)
    lines = ["# Methods", ""]
    lines += [
        "Written by `mergeline methods --markdown > docs/methods.md`, from the code.",
        "",
        _NOTATION,
        "",
    ]
    lines += ["## Contents", ""]
    for family, own in families.items():
        links = ", ".join(f"[`{e.id}`](#{e.id})" for e in own)
        lines.append(f"- [{family}](#{family}-methods): {FAMILIES[family]}. {links}")
    lines.append("- [left out](#left-out)")
    for family, own in families.items():
        lines += ["", f"## {family.capitalize()} methods", "", f"{FAMILIES[family].capitalize()}."]
        for entry in own:
            lines += ["", *_section(all_of(entry))]
    lines += ["", "## Left out", "", "| what | why |", "|---|---|"]
    lines += [f"| {what} | {why} |" for what, why in _LEFT_OUT.items()]
    return "\n".join(lines) + "\n"


def _section(found: dict[str, Any]) -> list[str]:
    """A method on the page."""
    lines = [f"### {found['id']}", "", _escaped(found["summary"]), "", "```", *found["formula"], "```", ""]
    if found["notes"]:
        lines += [_escaped(found["notes"]), ""]
    if found["schema"]:
        lines += ["| parameter | default | type and range | meaning |", "|---|---|---|---|"]
        for name, schema in found["schema"].items():
            default = f"`{json.dumps(schema['default'])}`"
            cells = [f"`{name}`", default, kind(schema), schema["description"]]
            lines.append("| " + " | ".join(_escaped(cell).replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    links = {"paper": _paper(found["paper"]), "official code": _code(found["code"])}
    facts = {label: links.get(label) or _escaped(text) for label, text in _facts(found).items()}
    lines += [f"- {label}: {text}" for label, text in facts.items()]
    return [*lines, f"- **Trap:** {_escaped(found['trap'])}"]


def _facts(found: dict[str, Any]) -> dict[str, str]:
    """What is said of a method in a line each."""
    if found["family"] == "learned" or "cost" not in found:
        return _learned_facts(found)
    cost = found["cost"]
    alone = not (found["needs_base"] or found["minimum_experts"] > 1 or found["maximum_experts"])
    needs = [*(["experts alone"] if alone else []), *found["needs"]]
    needs += ["and what its inner method needs"] if found["wraps"] else []
    return {
        "needs": "; ".join(needs),
        **({"adapters": "`extract-lora` keeps them factors"} if found["merges_factors"] else {}),
        "reference": found["reference"],
        "unit": cost["unit"],
        "readings": str(cost["readings"]),
        "spectral work": cost["spectral_work"] or "none",
        "paper": found["paper"],
        "official code": found["code"] or "none",
        "parity": found["parity"]["status"],
    }


def _learned_facts(found: dict[str, Any]) -> dict[str, str]:
    said = [
        "the weights leave what merging reaches: it is training" if found["trains"] else "",
        "the task of an input must be known where the merge is used" if found["task_known"] else "",
        f"{found['marked']}: no official code was found" if found["marked"] else "",
    ]
    needs = [*found["needs"], *(["and what its inner method needs"] if found["wraps"] else [])]
    return {
        "needs": "; ".join(needs),
        **({"note": "; ".join(filter(None, said))} if any(said) else {}),
        "paper": found["paper"],
        "official code": found["code"] or "none",
    }


def _paper(paper: str) -> str:
    return f"[arXiv {paper}](https://arxiv.org/abs/{paper})" if paper[:4].isdecimal() else paper


def _code(code: str) -> str:
    repository, _, commit = code.partition("@")
    tree = f"/tree/{commit}" if commit else ""
    return f"[{code}](https://github.com/{repository}{tree})" if code else "none"


def _escaped(text: str) -> str:
    """Text in which Markdown takes nothing but `code` for its own."""
    parts = text.split("`")
    parts[::2] = [part.replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def _wrapped(text: str, indent: int = 0, margin: int = 0) -> list[str]:
    width = max(_LEAST_WIDTH, min(120, shutil.get_terminal_size().columns)) - margin
    return textwrap.wrap(text, width, subsequent_indent=" " * indent, break_on_hyphens=False)
