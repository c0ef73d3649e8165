"""Who may know whom, and that small commands stay small.

An arrow is an import, wherever it stands: at the top of a file, inside a function, or for type checkers alone.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Iterator

import pytest
from checkpoints import save_family
from places import REPOSITORY

# From the ground up: a room knows the rooms before it, and none beside it.
LAYERS = [
    ["ground"],
    ["algebra", "checkpoints"],
    ["methods", "permutations"],
    ["recipes"],
    ["engine"],
    ["diagnoses"],
    ["verbs"],
    ["learning"],
    ["evaluation"],
    ["tasks"],
    ["flows"],
]
LAYER = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}
# Of the files in merging/: these, and the others are verbs: what one can do with checkpoints, and the doors to it.
GROUND = {"architecture", "canonical", "errors", "files", "keys", "lazy", "reading", "strict_yaml"}
# What evaluation may know of merging: nothing of how merges are made.
LEAVES = {
    "architecture.classes", "checkpoints.checkpoint", "checkpoints.companions", "checkpoints.components",
    "checkpoints.dcp", "checkpoints.gguf_header", "checkpoints.heads", "checkpoints.modules",
    "checkpoints.pickled", "checkpoints.remote", "checkpoints.router", "checkpoints.shards",
    "checkpoints.task_adapters", "checkpoints.upscaling", "errors", "files", "reading", "strict_yaml",
}  # fmt: skip

PIPELINE = {"prefect", "dvc", "mlflow"}
HEAVY = PIPELINE | {
    "torch",
    "torchvision",
    "open_clip",
    "transformers",
    "lm_eval",
    "huggingface_hub",
    "matplotlib",
    "pandas",
}
FOREIGN = {
    "merging": PIPELINE | {"open_clip", "transformers", "lm_eval"},
    "evaluation": PIPELINE,
    "tasks": {"prefect"},
}
# Imported by the commands that start Prefect, and by them alone.
OF_PREFECT = {"flows.artifacts", "flows.pipeline"}
OF_MLFLOW = {"tasks.serving.code"}  # which MLflow runs, and nothing imports
OF_TORCH = {"merging.pretended_device"}  # which tests of methods import, by a law


def modules(folder: str) -> dict[str, Path]:
    """The files of a folder at the top of the repository, by the name of the module."""
    found = {}
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        *packages, last = path.relative_to(REPOSITORY).with_suffix("").parts
        found[".".join([*packages, *([] if last == "__init__" else [last])])] = path
    assert found
    return found


MODULES = {
    name if folder == "mergeline" else f"mergeline.{name}": path
    for folder in ("mergeline", "merging", "evaluation", "tasks", "flows")
    for name, path in modules(folder).items()
}


def room(module: str) -> str:
    _, top, first, *_ = [*module.split("."), "", ""]
    if top not in ("", "merging"):
        return top
    return "ground" if first in GROUND else first if first in LAYER else "verbs"


def members(name: str) -> list[str]:
    found = [module for module in MODULES if room(module) == name]
    assert found
    return found


def imports(path: Path, module_level: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; with `module_level`, only those that importing it imports."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif module_level and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)


def own_module(name: str) -> str | None:
    """The module of ours that an imported name is, or is in."""
    parts = name.split(".")
    candidates = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((candidate for candidate in candidates if candidate in MODULES), None)


@cache
def arrows(module: str) -> frozenset[str]:
    """The modules of ours that a module imports."""
    return frozenset(filter(None, map(own_module, imports(MODULES[module])))) - {module}


def reached(module: str) -> set[str]:
    """The modules to which arrows lead from a module, by way of others, too."""
    found: set[str] = set()
    todo = [module]
    while todo:
        new = arrows(todo.pop()) - found
        found |= new
        todo += new
    return found


def top(names: Iterator[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


# --------------------------------------------------------------------------------------- rooms


def test_every_import_of_ours_is_seen():
    assert own_module("mergeline.merging.errors.UserError") == "mergeline.merging.errors"
    assert "mergeline.merging.api" in arrows("mergeline.merging")  # inside a function, and for types
    assert "mergeline.tasks.workspace" in arrows("mergeline.flows.launch")  # for types alone
    for module, path in MODULES.items():
        strangers = top(imports(path)) & {"merging", "evaluation", "tasks", "flows"}
        assert not strangers, f"{module}: write mergeline.{strangers.pop()}"


def test_every_folder_of_merging_is_a_room():
    folders = {path.name for path in (REPOSITORY / "merging").iterdir() if list(path.glob("*.py"))}
    assert folders - GROUND <= LAYER.keys()


@pytest.mark.parametrize("name", LAYER)
def test_arrows_point_down(name):
    wrong = [
        (module, target)
        for module in members(name)
        for target in sorted(arrows(module))
        if room(target) != name and LAYER[room(target)] >= LAYER[name]
    ]
    assert wrong == []


@pytest.mark.parametrize("name", LAYER)
def test_no_arrows_lead_back(name):
    assert [module for module in members(name) if module in reached(module)] == []


@pytest.mark.parametrize("folder", FOREIGN)
def test_tools_stay_in_their_rooms(folder):
    for path in modules(folder).values():
        assert not top(imports(path)) & FOREIGN[folder], path


def test_evaluation_knows_only_leaves_of_merging():
    leaves = {f"mergeline.merging.{leaf}" for leaf in LEAVES}
    for module in [*members("evaluation"), *leaves]:
        known = {target for target in arrows(module) if target.startswith("mergeline.merging")}
        assert known <= leaves, module
    for leaf in leaves:
        assert not top(imports(MODULES[leaf], module_level=True)) & HEAVY, leaf


# --------------------------------------------------------------------------------------- what is heavy


@pytest.mark.parametrize("folder", ["merging", "evaluation", "tasks", "flows"])
def test_heavy_imports_wait_inside_functions(folder):
    for module, path in modules(folder).items():
        if module in OF_PREFECT | OF_MLFLOW | OF_TORCH:
            continue
        assert not top(imports(path, module_level=True)) & HEAVY, path


def run(code: list[str], *arguments: str) -> str:
    """The last line that Python code prints, in a process of its own."""
    command = [sys.executable, "-c", "\n".join(code), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


COMMANDS = {
    "merge --help": [["merge", "--help"]],
    "methods": [["methods"], ["methods", "cart", "--json"]],
    "plan": [["plan", "--method", "cart", "--expert", "{a}", "--expert", "{b}", "--base", "{base}"]],
    "plan --recipe": [
        ["plan", "--recipe", "{recipe}", "--table"],
        ["plan", "--recipe", "{recipe}", "--json"],
    ],
    "inspect": [["inspect", "{a}"]],
}
RUN_COMMANDS = [
    "import sys",
    "before = set(sys.modules)",
    "from mergeline.flows.cli import main",
    "for argv in eval(sys.argv[1]):",
    "    try:",
    "        code = main(argv)",
    "    except SystemExit as exit:",
    "        code = exit.code",
    "    assert not code, code",
]
TELL_HEAVY = "print('heavy:', sorted(set(eval(sys.argv[-1])) & set(sys.modules)))"


@pytest.mark.parametrize("command", COMMANDS)
def test_small_commands_import_nothing_heavy(command, tmp_path):
    recipe = save_family(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text("method: lines\nbase: base.safetensors\nexperts: {a: a.safetensors, b: b.safetensors}\n")
    names = {"base": recipe["base"], "recipe": file, **recipe["experts"]}
    argv = [[str(part).format(**names) for part in arguments] for arguments in COMMANDS[command]]
    told = run([*RUN_COMMANDS, TELL_HEAVY], repr(argv), repr(HEAVY | {"numpy", "scipy"}))
    assert told == "heavy: []"


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_need_python_alone(argument):
    foreign = "{name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names"
    assert run([*RUN_COMMANDS, f"print({foreign})"], repr([[argument]])) == "{'mergeline'}"


def test_the_library_imports_nothing_before_it_is_used():
    code = ["import sys", "before = set(sys.modules)", "import mergeline"]
    known = (
        "{name for name in set(sys.modules) - before if name.split('.')[0] not in sys.stdlib_module_names}"
    )
    assert run([*code, f"print({known})"]) == "{'mergeline'}"
    told = run([*code, "mergeline.merge, mergeline.merge_state_dicts", TELL_HEAVY], repr(HEAVY | {"numpy"}))
    assert told == "heavy: []"
