"""The model card of a merged checkpoint, in the Hugging Face format."""

from __future__ import annotations

import json
from typing import Any

from merging.companions import hub_id
from merging.methods import get_method


def model_card(manifest: dict[str, Any]) -> str:
    """Markdown with YAML front matter: what was merged, how, and the digests that prove it."""
    recipe = manifest["recipe"]
    method = get_method(recipe["method"])
    origins = [*([recipe["base"]] if recipe["base"] else []), *recipe["experts"].values()]
    models = [name for name in (hub_id(origin.get("source")) for origin in origins) if name]
    store, adapter = "store" in manifest, "adapter" in manifest
    relation, models = ("adapter", models[:1]) if adapter else ("merge", models)
    kind = "Compressed" if store else "An adapter of what was merged" if adapter else "Merged"
    lines = [
        "---",
        *(["library_name: peft"] if adapter else []),
        *(["base_model:", *(f"- {name}" for name in models), f"base_model_relation: {relation}"] if models else []),
        "tags:",
        *(["- lora"] if adapter else []),
        "- merge",
        "- mergeline",
        f"- {method.id}",
        "---",
        "",
        f"# {kind} by {method.id}",
        "",
        f"{method.summary} Paper: {method.citation}.",
        "",
        "| checkpoint | role | digest |",
        "|---|---|---|",
    ]
    if recipe["base"]:
        lines.append(f"| base | base | `{recipe['base']['digest']}` |")
    lines += [f"| {_cell(name)} | expert | `{e['digest']}` |" for name, e in recipe["experts"].items()]
    lines += [
        f"| this | {'store' if store else 'adapter' if adapter else 'merged'} | `{manifest['output']['digest']}` |",
        "",
        "```json",
        json.dumps({"method": recipe["method"], "params": recipe["params"]}, indent=1, ensure_ascii=False),
        "```",
        "",
        *(["`mergeline extract-expert` gives any of the experts back as a checkpoint.", ""] if store else []),
        "Made with Mergeline; `mergeline verify` re-derives it bit for bit.",
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
