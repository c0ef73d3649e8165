"""Without the extras merging works, and what needs one names it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.util import find_spec

import pytest
from checkpoints import save_family
from fsspec.registry import _registry
from places import REPOSITORY

from mergeline.merging.errors import UserError
from mergeline.tasks import extras
from mergeline.tasks.extras import EXTRAS, missing_ones_named, require
from mergeline.tasks.modalities import modalities

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

# Runs commands where the packages of all extras are missing: each is given as a list, with the exit code to expect.
LIGHT = """
import sys
from mergeline.tasks.extras import EXTRAS
for package in {package for brought in EXTRAS.values() for package in brought}:
    sys.modules[package] = None
from mergeline.flows.cli import main
for argv in eval(sys.argv[1]):
    code = main(argv)
    print("rc", code, file=sys.stderr)
"""


def light(*commands: list[object]) -> subprocess.CompletedProcess[str]:
    argv = repr([[str(part) for part in command] for command in commands])
    return subprocess.run([sys.executable, "-c", LIGHT, argv], cwd=REPOSITORY, capture_output=True, text=True)


def test_merging_needs_no_extra(tmp_path):
    recipe = save_family(tmp_path)
    experts = [part for name, path in recipe["experts"].items() for part in ("--expert", f"{name}={path}")]
    family = ["--base", recipe["base"], *experts]
    done = light(
        ["methods"],
        ["plan", "--method", "cart", *family],
        ["inspect", recipe["base"]],
        ["inspect", *family, "--html", tmp_path / "family.html"],
        ["merge", "--method", "cart", *family, "--out", tmp_path / "merged"],
        ["verify", tmp_path / "merged"],
        ["sweep", "--method", "cart", *family, "--grid", "scale=1,2", "--out", tmp_path / "sweep"],
        ["diff", recipe["base"], tmp_path / "merged"],
    )
    assert done.stderr.count("rc 0") == 8, done.stdout + done.stderr
    assert (tmp_path / "family.html").exists() and len(list((tmp_path / "sweep").glob("scale-*"))) == 2


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        (["run"], "prefect", "pipeline"),
        (["publish"], "prefect", "pipeline"),
        (["init", "new"], "prefect", "pipeline"),
        (["evaluate"], "open_clip", "clip"),
        (["sweep", "--params", "params.yaml", "--out", "table.md"], "open_clip", "clip"),
    ],
)
def test_what_needs_an_extra_names_it_before_anything_is_written(
    command, missing, extra, workspace, mergeline, monkeypatch
):
    for package in (package for brought in EXTRAS.values() for package in brought):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(workspace)
    before = sorted(workspace.rglob("*"))
    told = f"mergeline: {missing} is not installed; pip install 'mergeline[{extra}]'\n"
    assert mergeline(*command) == (2, "", told)
    assert sorted(workspace.rglob("*")) == before


def test_a_package_that_is_missing_where_it_is_imported_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"^lm_eval is not installed; pip install 'mergeline\[language\]'$"):
        with missing_ones_named():
            import lm_eval.tasks  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        with missing_ones_named():
            import no_such_package  # noqa: F401


def test_an_address_that_needs_an_extra_names_it(monkeypatch, mergeline):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)  # that an earlier test opened
    outcome = mergeline("inspect", "--base", "s3://bucket/base", "--expert", "a=s3://bucket/a")
    assert outcome.code == 2
    assert outcome.err == "mergeline: s3://bucket/a: s3fs is not installed; pip install 'mergeline[s3]'\n"


def test_every_modality_has_the_extra_of_its_name_unless_it_needs_none():
    assert modalities().keys() == {
        "clip",
        "language",
        "image_classification",
        "text_classification",
        "text2text",
        "vision_language",
        "embeddings",
        "policies",
        "dense_prediction",
        "custom",
    }
    assert modalities().keys() - EXTRAS.keys() == {"custom"}


def test_extras_are_those_of_the_project():
    stated, own = PROJECT["optional-dependencies"], {extra.replace("_", "-") for extra in EXTRAS}
    assert own == stated.keys() - {"all", "test", "lint"}
    (everything,) = stated["all"]
    assert set(everything.partition("[")[2].rstrip("]").split(",")) == own


def test_what_is_installed_is_not_missing():
    for extra in EXTRAS:
        if all(find_spec(package) for package in EXTRAS[extra]):
            require(extra)
    require("no extra of this name")
    assert extras.missing(None) is None
