"""Who may know whom (flows -> tasks -> merging, evaluation), and that small commands stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest
from checkpoints import save_family

REPOSITORY = Path(__file__).parent.parent
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
FORBIDDEN = {
    "merging": PIPELINE | {"tasks", "flows", "evaluation", "open_clip", "transformers", "lm_eval"},
    "evaluation": PIPELINE | {"tasks", "flows"},
    "tasks": {"flows", "prefect"},
}
# What evaluation may know of merging: errors, files and checkpoints, nothing of how merges are made.
LEAVES = {"checkpoint", "errors", "files", "strict_yaml"}


def modules(room: str) -> list[Path]:
    found = sorted((REPOSITORY / room).rglob("*.py"))
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


def top(names: Iterator[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_arrows_point_down(room):
    for path in modules(room):
        assert not top(imports(path)) & FORBIDDEN[room], path


def test_evaluation_knows_only_leaves_of_merging():
    for path in modules("evaluation"):
        known = {name.split(".")[1] for name in imports(path) if name.startswith("merging")}
        assert known <= LEAVES, path
    for leaf in LEAVES:
        names = set(imports(REPOSITORY / "merging" / f"{leaf}.py", module_level=True))
        assert not top(names) & HEAVY
        assert {n.split(".")[1] for n in names if n.startswith("merging")} <= LEAVES


@pytest.mark.parametrize("room", ["merging", "evaluation", "tasks", "flows"])
def test_heavy_imports_wait_inside_functions(room):
    for path in modules(room):
        if path.parent.name == "flows" and path.stem != "cli":
            continue  # imported by `run` and `serve` alone
        assert not top(imports(path, module_level=True)) & HEAVY, path


COMMANDS = {
    "--help": [["--help"]],
    "merge --help": [["merge", "--help"]],
    "methods": [["methods"], ["methods", "cart", "--json"]],
    "plan": [["plan", "--method", "cart", "--expert", "{a}", "--expert", "{b}", "--base", "{base}"]],
    "plan --recipe": [
        ["plan", "--recipe", "{recipe}", "--table"],
        ["plan", "--recipe", "{recipe}", "--json"],
    ],
    "inspect": [["inspect", "{a}"]],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_small_commands_import_nothing_heavy(command, tmp_path):
    recipe = save_family(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text("method: lines\nbase: base.safetensors\nexperts: {a: a.safetensors, b: b.safetensors}\n")
    names = {"base": recipe["base"], "recipe": file, **recipe["experts"]}
    lines = [
        "import sys",
        "from flows.cli import main",
        "for argv in eval(sys.argv[1]):",
        "    try:",
        "        code = main(argv)",
        "    except SystemExit as exit:",
        "        code = exit.code",
        "    assert not code, code",
        "print('heavy:', sorted(set(eval(sys.argv[2])) & set(sys.modules)))",
    ]
    argv = [[str(part).format(**names) for part in arguments] for arguments in COMMANDS[command]]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), repr(argv), repr(HEAVY | {"numpy", "scipy"})],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stdout + done.stderr
