"""The model card of a merged checkpoint, in the Hugging Face format."""

from __future__ import annotations

import json
import re
from typing import Any

from mergeline.merging.checkpoints.companions import hub_id
from mergeline.merging.errors import printable
from mergeline.merging.methods import get_method
from mergeline.merging.recipes.recipe import Fitted

CARD = "README.md"


def model_card(manifest: dict[str, Any]) -> str:
    """Markdown with YAML front matter: what was merged, how, and the digests that prove it."""
    recipe = manifest["recipe"]
    method = get_method(recipe["method"])
    mixture = manifest.get("mixture")
    moe = manifest.get("moe")
    origins = [*([recipe["base"]] if recipe["base"] else []), *recipe["experts"].values()]
    models = [name for name in (hub_id(origin.get("source")) for origin in origins) if name]
    store, adapter = "store" in manifest, "adapter" in manifest
    relation, models = ("adapter", models[:1]) if adapter else ("merge", models)
    if mixture:
        kind, by, what = "A mixture made smaller", mixture["method"], _of_experts(mixture)
    elif moe:
        kind, by, what = "Dense models as experts", "moe", _of_models(moe)
    else:
        kind = "Compressed" if store else "An adapter of what was merged" if adapter else "Merged"
        by, what = method.id, f"{_prose(method.summary)} Paper: {_prose(method.citation)}."
    lines = [
        "---",
        *(["library_name: peft"] if adapter else []),
        *(
            ["base_model:", *(f"- {name}" for name in models), f"base_model_relation: {relation}"]
            if models
            else []
        ),
        "tags:",
        *(["- lora"] if adapter else []),
        "- merge",
        "- mergeline",
        f"- {by}",
        "---",
        "",
        f"# {kind} by {by}",
        "",
        what,
        "",
        *_table(manifest, "store" if store else "adapter" if adapter else "merged"),
        "",
        *(f"- {_cell(line)}" for line in manifest.get("read_as", ())),
        *([""] if manifest.get("read_as") else []),
        *(["| tensors | what they got |", "|---|---|"] if manifest.get("treatments") else []),
        *(f"| {count} | {word} |" for word, count in manifest.get("treatments", {}).items()),
        *([""] if manifest.get("treatments") else []),
        "```json",
        json.dumps(_settings(recipe), indent=1, ensure_ascii=False),
        "```",
        "",
        *_kept(manifest.get("store")),
        *_requantised(manifest.get("requantised")),
        *([f"{_seen(recipe['fitted'])}", ""] if recipe.get("fitted") else []),
        *_use(recipe),
        *(["`mergeline extract-expert` gives any of the experts back as a checkpoint.", ""] if store else []),
        "Made with Mergeline; `mergeline verify` re-derives it bit for bit.",
        "",
    ]
    return "\n".join(lines)


def _table(manifest: dict[str, Any], kind: str) -> list[str]:
    """What was merged and what became of it: digests, and where it is from, if that is known of any."""
    recipe = manifest["recipe"]
    rows = [("base", "base", recipe["base"])] if recipe["base"] else []
    rows += [(_cell(name), "expert", origin) for name, origin in recipe["experts"].items()]
    rows += [
        (_cell(name), "what its adapter adds to", origin) for name, origin in recipe.get("onto", {}).items()
    ]
    rows += [("this", kind, manifest["output"])]
    known = any("source" in origin for _, _, origin in rows)
    lines = ["| checkpoint | role | digest |", "|---|---|---|"]
    lines += [f"| {name} | {role} | `{origin['digest']}` |" for name, role, origin in rows]
    if not known:
        return lines
    sources = ["source |", "---|", *(f"{_uri(origin.get('source', ''))} |" for _, _, origin in rows)]
    return [
        f"{line} {source}" if i != 1 else line + source
        for i, (line, source) in enumerate(zip(lines, sources))
    ]


def _uri(source: str) -> str:
    """A URI as code, where it holds nothing that ends it."""
    return f"`{source}`" if re.fullmatch(r"[\w:/.@%+~=-]+", source) else _cell(source)


def _settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """What the card shows of a recipe: how it merges, and what layers and rows it makes of what."""
    told = ("stack", "tokens", "pad_to_multiple_of")
    found = {"method": recipe["method"], "params": recipe["params"]}
    return {**found, **{key: recipe[key] for key in told if recipe.get(key)}}


def _seen(fitted: dict[str, Any]) -> str:
    """What the merge was fitted to."""
    found = Fitted.model_validate(fitted)
    words = f"Fitted by {_cell(found.method)} to data: {_cell(found.words)}."
    if found.stand_in and found.data == "none":
        words = f"Fitted by {_cell(found.method)} to no data, but to {_cell(found.stand_in)}."
    if found.chosen_on:
        words += f" Default settings were chosen on {_cell(found.chosen_on)}."
    return words + (
        " Its test scores are of examples that it was fitted to." if found.split == "test" else ""
    )


def _of_models(moe: dict[str, Any]) -> str:
    """What a mixture of dense models is made of."""
    names = ", ".join(f"{_cell(e['name'])} ({_cell(e['of'])})" for e in moe["experts"])
    routers = "of prompts or given" if moe["routers"] == "file" else "drawn at random: it is to be trained"
    return (
        f"Experts are the MLPs of {names}"
        + (f", and for every token {_cell(moe['shared']['of'])}" if moe["shared"] else "")
        + f"; all else is the base's. A token is sent to {moe['experts_per_token']} of them. The router is {routers}. "
        "As mergekit-moe makes it (0.1.5)."
    )


def _of_experts(mixture: dict[str, Any]) -> str:
    """What was done to the experts of a mixture."""
    counts = {len(groups) for groups in mixture["merged"].values()}
    count = str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    done = {
        "mc_smoe": "are averaged in groups by usage (M-SMoE, arXiv 2310.01334)",
        "sub_moe": "are averaged in groups by usage, in the groups' leading directions (Sub-MoE, arXiv 2506.23266)",
        "prune": "are left out where others are used more",
    }[mixture["method"]]
    left = 0 if mixture["method"] == "prune" else sum(map(len, mixture["left_out"].values()))
    return (
        f"The {mixture['of']} experts of each of {len(mixture['merged'])} layers {done}: {count} are left"
        + (", each in the place of all its members" if mixture["router"] == "wide" else "")
        + (f". {left} experts are in no group." if left else ".")
        + _of_cut_experts(mixture)
    )


def _of_cut_experts(mixture: dict[str, Any]) -> str:
    """What cutting the experts that are left to low rank and sparse rows changed."""
    if not (cut := mixture.get("compressed")):
        return ""
    return (
        f" They are cut as MC-SMoE begins to, to factors and rows with {cut['numbers']:.1%} of their numbers: a "
        f"relative error of {cut['error']:.2%} (Frobenius). They are written dense, and are to be trained."
    )


def _kept(store: dict[str, Any] | None) -> list[str]:
    """What a store keeps of each expert, and how far that is from it."""
    if not store:
        return []
    errors = store["errors"]["experts"]
    lines = [
        f"Of {store['checkpoint']} bytes of a checkpoint {store['once']} are kept once, for all experts. Errors are "
        f"relative to {store['errors']['of']} (Frobenius), over all tensors and of the worst one.",
        "",
        "| expert | bytes of its own | error | at most | of |",
        "|---|---|---|---|---|",
    ]
    for name, count in store["experts"].items():
        error = errors.get(name)
        told = "| |"
        if error:
            worst = error["worst_tensor"]
            told = f"{error['all']:.2%} | {error['tensors'][worst]:.2%} | {_cell(worst)}"
        lines.append(f"| {_cell(name)} | {count} | {told} |")
    return [*lines, ""]


def _requantised(found: dict[str, Any] | None) -> list[str]:
    """What rounding to the base's quantised format changed."""
    if not found:
        return []
    return [
        f"{found['tensors']} tensors are rounded to the base's quantised format, with new scales: a relative error of "
        f"{found['mean']:.2%} in the mean, {found['worst']:.2%} at most (Frobenius, {_cell(found['worst_tensor'])}).",
        "",
    ]


def _use(recipe: dict[str, Any]) -> list[str]:
    """What lies beside the weights for where the task of an input is known, or is to be found."""
    if tasks := recipe.get("adapters"):
        known = (recipe.get("fitted") or {}).get("task_known", True)
        what = "corrects it where the task is known at use" if known else "experts add to it, token by token"
        return [f"`adapters/` holds what {what}: {', '.join(tasks)}.", ""]
    if recipe.get("heads"):
        return [
            f"`heads/` holds the head of each expert: {', '.join(map(_cell, recipe['experts']))}. "
            "`mergeline export` puts one of them on the merge.",
            "",
        ]
    if recipe.get("router"):
        return ["`router.safetensors` finds the expert of an input at use.", ""]
    return []


def _prose(text: str) -> str:
    """A line of a method's description, which may come from outside, without HTML."""
    return printable(text).replace("<", "&lt;")


def _cell(name: str) -> str:
    """A name as text of Markdown: whatever could be markup, or HTML, by its number."""
    return re.sub(r"[^\w .+-]", lambda character: f"&#{ord(character[0])};", printable(name))
