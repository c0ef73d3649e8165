"""docs/add-a-method.md: its files are run as they stand there; merges equal numbers worked out by hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch
from checkpoints import refused
from places import REPOSITORY
from safetensors.torch import load_file, save_file

from mergeline import merge, merge_state_dicts
from mergeline.flows.catalogue import MEANINGS
from mergeline.merging.architecture import describe, rows
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.methods import catalogue, contract, get_method, load_methods

PAGE = (REPOSITORY / "docs" / "add-a-method.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
FILES = {re.findall(r"^def (\w+)\(", text, re.MULTILINE)[-1]: text for text in BLOCKS if "@method(" in text}

State = dict[str, torch.Tensor]


@pytest.fixture
def files(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """The files of the page, loaded; the catalogue is put back after the test."""
    before = set(catalogue())
    paths = {name: tmp_path / f"{name}.py" for name in FILES}
    for name, path in paths.items():
        path.write_text(FILES[name])
        load_methods(path)
    yield paths
    for name in set(contract._METHODS) - before:
        del contract._METHODS[name]


def moved(base: State, **by: list[float]) -> State:
    """The base, with these numbers added to all its tensors, or to those that are named."""
    return {
        name: value + torch.tensor(by.get(name, by.get("all"))).view_as(value) for name, value in base.items()
    }


def merged(
    method: str, experts: list[State], base: State, statistics: Any = None, **params: Any
) -> dict[str, list]:
    """What a merge adds to the base: tensors as flat lists."""
    named = {f"e{t}": expert for t, expert in enumerate(experts)}
    found = merge_state_dicts(method, named, base, params=params, statistics=statistics)
    return {name: (value - base[name]).flatten().tolist() for name, value in found.items()}


# ------------------------------------------------------------------------------------------ the page


def test_the_page_has_the_files_that_it_promises():
    assert list(FILES) == ["agreement", "even_norms", "low_rank_mean", "bounded", "fisher_vote"]
    for name in FILES:
        assert f"`{name}.py`" in PAGE


def test_the_first_method_is_a_file_of_at_most_20_lines():
    assert len(FILES["agreement"].splitlines()) <= 20


def test_every_file_says_all_that_the_catalogue_shows(files):
    for name in files:
        entry = get_method(name)
        assert entry.is_outside and entry.family == "outside" and entry.file == files[name]
        assert entry.summary and {"Formula", "Trap"} <= set(entry.sections)
        described = entry.sections.get("Parameters", "")
        for parameter in entry.parameters:
            assert parameter in MEANINGS or f"{parameter}:" in described, (name, parameter)


def test_links_and_files_of_the_page_are_there():
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (REPOSITORY / "docs" / link).exists(), link
    for path in re.findall(r"`((?:merging|tests|flows|docs)/[\w/.]+)`", PAGE):
        if "FAMILY" not in path:
            assert (REPOSITORY / path).exists(), path


# ------------------------------------------------------------------------------------------ the methods


BASE = {name: torch.ones(2, 2) for name in ("layers.0.fc.weight", "layers.1.fc.weight")}
AGREE = [moved(BASE, all=[2, 2, -2, 0]), moved(BASE, all=[4, -4, -2, 4])]


def test_agreement_keeps_what_goes_one_way(files):
    # The mean is 3 -1 -2 2; of the two signs, both are positive, one is, both are negative, one is positive.
    for name in BASE:
        assert merged("agreement", AGREE, BASE)[name] == [3, 0, -2, 0]
        assert merged("agreement", AGREE, BASE, scale=2.0)[name] == [6, 0, -4, 0]
        assert merged("agreement", AGREE, BASE, threshold=0.25)[name] == [3, 0, -2, 2]


def test_a_chain_takes_a_method_from_outside(files):
    found = merged("lines(agreement)", AGREE, BASE, alpha=0.5, beta=1.0)
    assert found["layers.0.fc.weight"] == [1.5, 0, -1, 0]
    assert found["layers.1.fc.weight"] == [4.5, 0, -3, 0]
    limited = merged("lines(bounded(agreement))", AGREE, BASE, alpha=0.5, beta=1.0, limit=2.5)
    assert limited["layers.1.fc.weight"] == [3.75, 0, -3, 0]


def test_even_norms_looks_over_the_model_or_each_tensor(files):
    base = {"v": torch.zeros(2), "w": torch.zeros(1)}
    experts = [moved(base, v=[3, 4], w=[0]), moved(base, v=[0, 0], w=[15])]
    # Norms 5 and 15, of mean 10: the task vectors count 10/5 and 10/15, and half of that.
    assert merged("even_norms", experts, base) == {"v": [3, 4], "w": [5]}
    # Norms 5 and 0 of v, 0 and 15 of w: means 2.5 and 7.5.
    assert merged("even_norms", experts, base, scope="tensor") == {"v": [0.75, 1], "w": [3.75]}


def test_low_rank_mean_cuts_matrices_and_leaves_the_others_whole(files):
    base = {"layers.0.fc.weight": torch.zeros(2, 2), "layers.0.fc.bias": torch.zeros(2)}
    expert = {
        "layers.0.fc.weight": torch.diag(torch.tensor([8.0, 4.0])),
        "layers.0.fc.bias": torch.tensor([2.0, 4.0]),
    }
    found = merged("low_rank_mean", [expert, base], base, scale=2.0)  # of the means diag(4, 2) and 1, 2
    assert found["layers.0.fc.weight"] == pytest.approx([8, 0, 0, 0], abs=1e-6)
    assert found["layers.0.fc.bias"] == [2, 4]
    assert merged("low_rank_mean", [expert, base], base, other="sum")["layers.0.fc.bias"] == [2, 4]
    assert merged("low_rank_mean", [expert, base], base, other="pretrained")["layers.0.fc.bias"] == [0, 0]


def test_low_rank_mean_is_given_each_expert_of_packed_ones_and_kernels_of_convolutions(files):
    # Two experts of gate and up (2 x 2 each) and down (2 x 2): every matrix is diag(8, 4), every part diag(8, 0).
    matrix, part = torch.diag(torch.tensor([8.0, 4.0])), torch.diag(torch.tensor([8.0, 0.0]))
    names = ("layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj", "layers.0.conv.weight")
    expert = dict(
        zip(
            names,
            [torch.stack([matrix.repeat(2, 1)] * 2), torch.stack([matrix] * 2), matrix.view(2, 2, 1, 1)],
        )
    )
    cut = dict(
        zip(names, [torch.stack([part.repeat(2, 1)] * 2), torch.stack([part] * 2), part.view(2, 2, 1, 1)])
    )
    base = {name: torch.zeros_like(value) for name, value in expert.items()}
    found = merge_state_dicts("low_rank_mean", {"a": expert}, base)
    for name in names:
        torch.testing.assert_close(found[name], cut[name], rtol=0, atol=1e-6, msg=name)


def test_bounded_limits_what_its_inner_method_adds(files):
    base = {"w": torch.ones(3)}
    experts = [moved(base, w=[0.5, -2, 4])]
    assert merged("bounded", experts, base, limit=1.0, scale=0.5) == {"w": [0.25, -1, 1]}
    assert merged("bounded(agreement)", experts, base, limit=3.0) == {"w": [0.5, -2, 3]}


def test_fisher_vote_takes_the_entries_that_matter_most(files):
    base = {"w": torch.zeros(2)}
    experts = [moved(base, w=[2, 4]), moved(base, w=[6, 8]), moved(base, w=[1, 1])]
    fishers = {"fisher": [{"w": torch.tensor(f)} for f in ([1.0, 5.0], [3.0, 2.0], [2.0, 0.0])]}
    assert merged("fisher_vote", experts, base, fishers) == {"w": [6, 4]}
    assert merged("fisher_vote", experts, base, fishers, top=2) == {"w": [3.5, 6]}
    with refused("top = 4", "3 experts"):
        merged("fisher_vote", experts, base, fishers, top=4)
    with refused("fisher", "name their file"):
        merged("fisher_vote", experts, base)
    entry = get_method("fisher_vote")
    assert [*entry.warnings({"scale": 1.0, "top": 3}, 3)] and not [
        *entry.warnings({"scale": 1.0, "top": 2}, 3)
    ]


@pytest.mark.parametrize("name", FILES)
def test_the_laws_of_all_methods_hold(name, files):
    laws = pytest.importorskip("mergeline.merging.laws")
    laws.check_method(name)


# ------------------------------------------------------------------------------------------ from outside


def test_a_method_is_found_that_is_registered_after_the_catalogue_was_asked(tmp_path):
    assert "late" not in catalogue()
    with refused("unknown method 'late'"):
        get_method("late")
    path = tmp_path / "late.py"
    path.write_text(FILES["agreement"].replace("agreement", "late"))
    try:
        load_methods(path)
        assert catalogue()["late"] is get_method("late")
        assert merged("late", AGREE, BASE)["layers.0.fc.weight"] == [3, 0, -2, 0]
        load_methods(path)  # again: nothing happens
        other = tmp_path / "other.py"
        other.write_text(path.read_text())
        with refused("'late'", "rename"):
            load_methods(other)
    finally:
        contract._METHODS.pop("late", None)


def test_a_recipe_names_the_file_of_its_method_and_the_plan_says_what_becomes_of_each_tensor(files, tmp_path):
    base = BASE | {"layers.0.fc.bias": torch.zeros(2)}
    experts = {"a": moved(base, all=[2, 2, -2, 0], **{"layers.0.fc.bias": [1, 1]}), "b": base}
    for name, state in {"base": base, **experts}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    recipe = {
        "method": "low_rank_mean",
        "methods": [files["low_rank_mean"]],
        "base": tmp_path / "base.safetensors",
        "experts": {name: tmp_path / f"{name}.safetensors" for name in experts},
    }
    del contract._METHODS["low_rank_mean"]
    rows = {row["tensor"]: row["treatment"] for row in make_plan(recipe).table()}
    assert rows == {
        "layers.0.fc.bias": "mean",
        "layers.0.fc.weight": "matrix",
        "layers.1.fc.weight": "matrix",
    }
    merge(recipe, tmp_path / "out.safetensors")
    alone = merge_state_dicts("low_rank_mean", experts, base)
    for name, value in load_file(tmp_path / "out.safetensors").items():
        assert torch.equal(value, alone[name]), name


def test_the_command_line_takes_a_file(files, mergeline, tmp_path):
    save_file(BASE, tmp_path / "base.safetensors")
    save_file(AGREE[0], tmp_path / "a.safetensors")
    inputs = ("--base", tmp_path / "base.safetensors", "--expert", f"a={tmp_path / 'a.safetensors'}")
    file, out = ("--methods", files["agreement"]), tmp_path / "out.safetensors"
    del contract._METHODS["agreement"]
    page = mergeline("methods", "agreement", *file)
    assert page.code == 0 and "One expert agrees with itself" in page.out
    table = mergeline("plan", *file, "--method", "lines(agreement)", *inputs, "--table")
    assert table.code == 0 and re.search(r"layers\.0\.fc\.weight +2x2 +merge +merged +lines", table.out)
    assert mergeline("merge", *file, "--method", "agreement", *inputs, "--out", out).code == 0
    assert torch.equal(load_file(out)["layers.1.fc.weight"], AGREE[0]["layers.1.fc.weight"])
    assert mergeline("verify", out, *file).code == 0


def test_a_package_names_its_methods_in_an_entry_point(tmp_path):
    [toml] = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    [(name, module)] = tomllib.loads(toml)["project"]["entry-points"]["mergeline.methods"].items()
    package, _, file = module.partition(".")
    (tmp_path / package).mkdir()
    (tmp_path / package / f"{file}.py").write_text(FILES["agreement"])
    installed = tmp_path / f"{package}-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(f"[mergeline.methods]\n{name} = {module}\n")
    code = "from mergeline.merging.methods import catalogue; print(catalogue()['agreement'].family)"
    path = os.pathsep.join(map(str, (tmp_path, REPOSITORY)))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("outside\n", 0), done.stderr


# ------------------------------------------------------------------------------------------ architectures


def test_the_row_of_the_page_says_what_its_tensors_are(monkeypatch, capsys):
    monkeypatch.setattr(rows, "ROWS", list(rows.ROWS))
    [row, question] = [text for text in BLOCKS if "mergeline.merging.architecture" in text]
    exec(compile(row, "row", "exec"), {})
    shapes = {
        "layers.0.attn.lin.weight": (8, 8),
        "layers.0.mlp.wi_fused.weight": (12, 8),
        "layers.0.moe.w_in": (3, 10, 8),
        "layers.0.moe.w_out": (3, 8, 5),
    }
    model = describe(shapes, {"model_type": "mymodel"})
    assert model.architecture == "mymodel"
    output, fused, gate_up, down = model.tensors.values()
    assert (output.role, fused.role) == (rows.Role.ATTENTION_OUTPUT, rows.Role.MLP_GATE_UP)
    assert [m.shape for m in gate_up.matrices("block_linear")] == [(5, 8)] * 6
    assert [m.name for m in down.matrices("block_linear")] == [
        f"layers.0.experts.{e}.down_proj.weight" for e in range(3)
    ]
    assert describe(shapes, {}).architecture == "unknown"
    exec(compile(question, "question", "exec"), {})
    assert capsys.readouterr().out == question.rpartition("# ")[2]
