"""`mergeline inspect` of a family: numbers against their definitions, input of every kind, the page and the tables."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import State, edit, random_state, refused, save_family
from html_pages import HOSTILE, LOADS, Page
from locks import locked_open_clip
from places import SAMPLES
from safetensors.torch import load_file, save_file

from mergeline.evaluation.pages.family import render_family
from mergeline.flows.family import lines
from mergeline.merging.algebra import slots
from mergeline.merging.describe import describe_family

MATRICES = ("blocks.0.attn.weight", "blocks.0.mlp.weight")
RANKS = (0.25, 0.5, 1.0)


def described(family: dict[str, Any], **options: Any) -> dict[str, Any]:
    return describe_family(family["base"], family["experts"], **{"ranks": RANKS, "workers": 1, **options})


def taus(family: dict[str, Any], origin: str = "base") -> list[State]:
    """The task vectors in float64."""
    base = {k: v.double() for k, v in load_file(family["base"]).items()}
    experts = [{k: v.double() for k, v in load_file(path).items()} for path in family["experts"].values()]
    if origin == "mean":
        base = {k: sum(e[k] for e in experts) / len(experts) for k in base}
    return [{k: e[k] - base[k] for k in base} for e in experts]


def family_of(folder: Path, *experts: State) -> dict[str, Any]:
    """A base of zeros, but for one entry, and these experts' task vectors."""
    base = {k: torch.zeros_like(v) for k, v in experts[0].items()} | {"one": torch.ones(1)}
    paths = {"base": folder / "base.safetensors"}
    save_file(base, paths["base"])
    for name, tau in zip("abcd", experts):
        paths[name] = folder / f"{name}.safetensors"
        save_file({**tau, "one": torch.ones(1)}, paths[name])
    return {"base": paths.pop("base"), "experts": paths}


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("block", [1 << 19, 12])
def test_norms_and_conflicts_are_what_their_definitions_say(block, tmp_path, monkeypatch):
    """Whether a tensor is one block or many."""
    monkeypatch.setattr(slots, "_BLOCK", block)
    family = save_family(tmp_path)
    found = described(family)
    flat = [torch.cat([tau[k].reshape(-1) for k in sorted(tau)]) for tau in taus(family)]
    for (i, a), (j, b) in combinations(enumerate(flat), 2):
        assert found["cosine"][i][j] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-5)
        opposite = a * b < 0
        assert found["sign_conflict"][i][j] == pytest.approx(float(opposite.double().mean()), abs=1e-5)
        weighted = float((a * b).abs()[opposite].sum() / (a * b).abs().sum())
        assert found["sign_conflict_by_magnitude"][i][j] == pytest.approx(weighted, abs=1e-5)
    together, apart = sum(flat).abs().sum(), sum(tau.abs() for tau in flat).sum()
    assert found["cancelled"] == pytest.approx(float(1 - together / apart), abs=1e-5)
    for own, tau in zip(found["experts"].values(), flat):
        assert own["norm"] == pytest.approx(float(tau.norm()), rel=1e-5)


@pytest.mark.parametrize("origin", ["base", "mean"])
def test_spectra_are_what_a_singular_value_decomposition_says(origin, tmp_path):
    family = save_family(tmp_path)
    found = described(family)["origins"][origin]
    for k, rank in enumerate(RANKS):
        error = total = 0.0
        interference: list[float] = []
        for name in MATRICES:
            decomposed = [torch.linalg.svd(tau[name], full_matrices=False) for tau in taus(family, origin)]
            kept = max(1, int(rank * min(decomposed[0].S.shape)))
            error += sum(float(d.S[kept:].square().sum()) for d in decomposed)
            total += sum(float(d.S.square().sum()) for d in decomposed)
            scaled = [(d.S / d.S.norm())[:kept, None] * d.Vh[:kept] for d in decomposed]
            interference += [float((a @ b.T).norm()) for a, b in combinations(scaled, 2)]
        assert found["error"][k] == pytest.approx(error, rel=1e-5, abs=1e-9)
        assert found["error_share"][k] == pytest.approx(error / total, rel=1e-5, abs=1e-9)
        assert found["interference"][k] == pytest.approx(sum(interference) / len(interference), rel=1e-5)


def test_ranks_and_overlaps_are_what_a_singular_value_decomposition_says(tmp_path):
    family = save_family(tmp_path)
    found = described(family)  # the listed rank nearest to 0.08 is 0.25: one direction of 4, and of 3
    assert found["typical_rank"] == 0.25
    decomposed = {
        n: [torch.linalg.svd(tau[n], full_matrices=False) for tau in taus(family)] for n in MATRICES
    }
    for t, own in enumerate(found["experts"].values()):
        values = [decomposed[n][t].S for n in MATRICES]
        stable = [float(s.square().sum() / s[0] ** 2) for s in values]
        effective = [float(torch.distributions.Categorical(s / s.sum()).entropy().exp()) for s in values]
        assert own["stable_rank"] == pytest.approx(sum(stable) / 2, rel=1e-5)
        assert own["effective_rank"] == pytest.approx(sum(effective) / 2, rel=1e-5)
        assert own["effective_rank_share"] == pytest.approx(
            (effective[0] / 4 + effective[1] / 3) / 2, rel=1e-5
        )
    for i, j in combinations(range(3), 2):
        pairs = [(decomposed[n][i], decomposed[n][j]) for n in MATRICES]
        inputs = sum(float(a.Vh[0] @ b.Vh[0]) ** 2 for a, b in pairs) / 2
        outputs = sum(float(a.U[:, 0] @ b.U[:, 0]) ** 2 for a, b in pairs) / 2
        assert found["overlap"]["inputs"][i][j] == pytest.approx(inputs, rel=1e-5)
        assert found["overlap"]["outputs"][j][i] == pytest.approx(outputs, rel=1e-5)
    assert found["overlap"]["inputs_by_chance"] == pytest.approx((1 / 4 + 1 / 5) / 2)
    assert found["overlap"]["outputs_by_chance"] == pytest.approx((1 / 6 + 1 / 3) / 2)


def test_a_family_by_hand(tmp_path):
    """a and b read from one input, c from another; a and b write to different outputs, and cancel in no entry."""
    place = {"a": (0, 0), "b": (1, 0), "c": (0, 2)}
    states = []
    for row, column in place.values():
        tau = torch.zeros(3, 4)
        tau[row, column] = 2.0
        states.append({"blocks.0.attn.weight": tau})
    found = described(family_of(tmp_path, *states), ranks=(1.0,))
    assert found["experts"]["a"] | {"alignment_with_base": None} == {
        "norm": 2.0,
        "relative_norm": 2.0,
        "alignment_with_base": None,
        "stable_rank": 1.0,
        "effective_rank": 1.0,
        "effective_rank_share": pytest.approx(1 / 3, rel=1e-5),
    }
    assert found["overlap"]["inputs"] == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert found["overlap"]["outputs"] == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert found["origins"]["base"]["interference"] == [pytest.approx(1 / 3, rel=1e-5)]
    assert found["origins"]["base"]["error"] == [0.0] and found["cancelled"] == 0.0


def test_experts_that_cancel(tmp_path):
    """Signs conflict where neither is zero: in one entry of two, which has all the magnitude they share."""
    tau = {"norm": torch.tensor([3.0, 1.0, 0.0])}
    found = described(family_of(tmp_path, tau, {"norm": torch.tensor([-1.0, 1.0, 5.0])}))
    assert found["sign_conflict"][0][1] == 0.5
    assert found["sign_conflict_by_magnitude"][0][1] == 0.75
    assert found["cancelled"] == pytest.approx(2 / 11, rel=1e-5)  # |3 - 1| of |3| + |1|


def test_layers_in_the_order_of_the_model(tmp_path):
    shapes = {f"t.{i}.mlp.weight": (4, 5) for i in (10, 2, 0)} | {"scale": (), "t.2.bias": (3,)}
    family = save_family(tmp_path, shapes=shapes)
    found = described(family)
    assert [(row["layer"], row["tensors"]) for row in found["layers"]] == [
        ("t.0", 1), ("t.2", 2), ("t.10", 1), ("outside blocks", 1)
    ]  # fmt: skip
    for row in found["layers"][:3]:
        names = [name for name in shapes if name.startswith(f"{row['layer']}.")]
        for norm, tau in zip(row["norm"], taus(family)):
            assert norm == pytest.approx(float(sum(tau[n].square().sum() for n in names)) ** 0.5, rel=1e-5)
    assert found["layers"][3]["error_share_base"] is None


def test_the_result_depends_on_the_inputs_alone(tmp_path):
    family = save_family(tmp_path)
    found = described(family)
    assert (
        found
        == described(family, workers=3, ranks=(1.0, 0.5, 0.25, 0.5))
        == described(family, memory=1 << 30)
    )
    with refused("memory", "allow more"):
        described(family, memory=100)


# ---------------------------------------------------------------------------------------------- kinds of input


def test_what_is_no_matrix_of_a_block_has_no_spectrum(tmp_path):
    shapes = {
        "blocks.0.bias": (5,),
        "conv.0.weight": (2, 3, 4, 4),
        "embed.weight": (6, 4),
        "scale": (),
        "no": (0, 3),
    }
    found = described(save_family(tmp_path, shapes=shapes))
    assert found["matrices"] == 0 and found["origins"] == {} and found["overlap"] is None
    assert found["experts"]["a"]["effective_rank"] is None and len(found["layers"]) == 3
    assert "By rank" not in "\n".join(lines(found)) and "R, base" not in "\n".join(lines(found))


def test_one_expert_has_no_pairs(tmp_path):
    found = described(save_family(tmp_path, experts=1))
    assert list(found["origins"]) == ["base"] and found["origins"]["base"]["interference"] == [None] * 3
    assert found["cancelled"] == 0 and found["overlap"] is None and found["layers"][0]["cosine"] is None
    assert "Cosine" not in "\n".join(lines(found))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, tmp_path):
    exact = described(save_family(tmp_path / "exact"))
    found = described(save_family(tmp_path / "rounded", dtype=dtype))
    for t in "abc":
        assert found["experts"][t]["norm"] == pytest.approx(exact["experts"][t]["norm"], rel=0.05)
    assert found["origins"]["mean"]["error_share"] == pytest.approx(
        exact["origins"]["mean"]["error_share"], abs=0.05
    )


def test_a_tensor_that_one_lacks_is_refused(tmp_path):
    family = save_family(tmp_path)
    edit(family["experts"]["b"], blocks__0__mlp__weight=None)
    with refused("'b' lacks 1 tensor", "blocks.0.mlp.weight"):
        described(family)


def test_nan_is_refused_and_ranks_are_fractions(tmp_path):
    family = save_family(tmp_path)
    for rank in (0.0, 1.5, float("nan")):
        with refused("is no fraction of full rank"):
            described(family, ranks=(0.5, rank))
    edit(family["experts"]["b"], logit_scale=torch.tensor(float("nan")))
    with refused("'b'", "logit_scale", "NaN"):
        described(family)


def test_what_looks_wrong_is_noted(tmp_path):
    family = save_family(tmp_path, experts=2)
    base = load_file(family["base"])
    for name, state in (
        ("same", base),
        ("stranger", random_state(99)),
        ("twin", load_file(family["experts"]["a"])),
    ):
        family["experts"][name] = tmp_path / f"{name}.safetensors"
        save_file(state, family["experts"][name])
    found = described(family)
    for part in ("'same' equals the base", "'stranger' was not fine-tuned", "'a' and 'twin' are the same"):
        sentences = [advice["sentence"] for advice in found["diagnoses"]["advice"]]
        assert sum(part in sentence for sentence in sentences) == 1, sentences
    assert found["cosine"][0][2] == 0 and found["experts"]["same"]["stable_rank"] is None
    assert found["origins"]["base"]["interference"][-1] < 1  # of the pairs that have some
    assert json.loads(json.dumps(found, allow_nan=False)) == found


# ---------------------------------------------------------------------------------------------- what is shown


def test_the_page_loads_nothing_and_escapes_names(tmp_path):
    for number, family in enumerate(
        (
            save_family(tmp_path / "a"),
            save_family(tmp_path / "b", 1),
            save_family(tmp_path / "c", shapes={"x": (3,)}),
        )
    ):
        found = described(family)
        found["experts"] = {HOSTILE + name: own for name, own in found["experts"].items()}
        found["notes"], found["layers"][0]["layer"] = [HOSTILE], HOSTILE
        render_family(tmp_path / "page.html", found)
        page = Page((tmp_path / "page.html").read_text())
        tags = {tag for tag, _ in page.tags}
        assert not tags & {"link", "img"}
        assert [attrs for tag, attrs in page.tags if tag == "script"] == [{}]  # our own
        assert all(v.startswith("#") for _, attrs in page.tags for key, v in attrs.items() if key in LOADS)
        assert HOSTILE.partition("{{")[0] in page.text and "7777" not in page.text
        assert ("svg" in tags) == (number < 2)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("locked") / "digits.safetensors"
    save_file(locked_open_clip(load_file(SAMPLES / "experts" / "digits.safetensors"), width=32), path)
    return path


def test_the_sample_family_from_the_command_line(mergeline, locked, tmp_path):
    shapes = SAMPLES / "experts" / "shapes.safetensors"
    page = tmp_path / "page.html"
    arguments = ["inspect", "--base", SAMPLES / "base", "--expert", f"s={shapes}", "--expert", f"d={locked}"]
    done = mergeline(*arguments, "--rank", "0.08,1", "--composition", "--html", page, "--workers", 1)
    assert done.code == 0
    assert "expert 'd' is locked against merging" in done.out and "4 of 4 attention modules" in done.out
    for title in (
        "Task vectors",
        "By rank",
        "Energy by rank",
        "Cosine",
        "Sign conflict",
        "Overlap",
        "By layer",
        "What to do",
        "Kinship",
        "Undone",
        "Composition of heads in visual.transformer.resblocks",
        "Scope",
    ):
        assert f"\n{title}" in done.out
    told = Page(page.read_text()).text
    assert all(
        title in told for title in ("What to do", "Interference by layer", "What attention heads pass on")
    )
    assert "expert 's' is locked" not in done.out and "locked against merging" in Page(page.read_text()).text
    found = json.loads(mergeline(*arguments, "--rank", "0.08", "--json").out)
    assert found["ranks"] == [0.08] and list(found["locks"]) == ["d"] and found["locks"]["d"]["modules"] == 4


def test_arguments_that_do_not_go_together(mergeline, tmp_path):
    family = save_family(tmp_path)
    base, a = family["base"], family["experts"]["a"]
    for arguments, part in (
        ([], "name a checkpoint"),
        ([a, "--base", base], "a family is --base and every --expert"),
        (["--base", base], "a family is --base and every --expert"),
        (["--expert", a], "a family is --base and every --expert"),
        ([a, "--rank", "0.5"], "are for a family"),
        ([a, "--html", tmp_path / "x.html"], "are for a family"),
        ([a, "--composition"], "are for a family"),
        (["--base", base, "--expert", a, "--rank", "half"], "are no numbers"),
        (["--base", base, "--expert", a, "--workers", "0"], "give one or more"),
        (
            ["--base", base, "--expert", a, "--html", tmp_path / "no" / ".." / "base.safetensors" / "x"],
            "cannot be",
        ),
    ):
        done = mergeline("inspect", *arguments)
        assert done.code == 2 and part in done.err and done.err.count("\n") == 1, arguments
