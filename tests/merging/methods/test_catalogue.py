"""What the catalogue says of methods is complete, and is what the code and the golden cases say."""

from __future__ import annotations

import json

import pytest
from conftest import REPOSITORY
from golden_cases import ALL, CASES

from mergeline.flows.catalogue import FAMILIES, MEANINGS, described, measured
from mergeline.merging.learning.contract import learned_methods
from mergeline.merging.methods import catalogue
from mergeline.merging.methods.contract import SECTIONS
from tools import parity

METHODS = pytest.mark.parametrize("entry", catalogue().values(), ids=list(catalogue()))


@METHODS
def test_every_method_says_all_that_a_user_asks(entry):
    found = described(entry)
    for field in ("summary", "formula", "paper", "reference", "trap"):
        assert found[field] and found[field] != [""], field
    assert found["family"] in FAMILIES and list(entry.sections) == [
        t for t in SECTIONS if t in entry.sections
    ]
    for name, schema in found["schema"].items():
        assert schema["description"], name
    assert found["parameters"].keys() == found["schema"].keys()
    assert bool(found["cost"]["spectral_work"]) == bool(entry.spectral)
    assert found["cost"]["unit"] and found["cost"]["readings"] >= 1 and found["parity"]["status"]


def test_what_all_methods_mean_by_a_parameter_is_needed():
    names = [name for entry in catalogue().values() for name in entry.parameters]
    assert set(MEANINGS) <= set(names)


@METHODS
def test_a_formula_names_its_parameters(entry):
    """Of numbers that every method of that name has in its formula."""
    formula = " ".join(described(entry)["formula"])
    for name in {"scale", "alpha", "beta", "power", "threshold", "density"} & entry.parameters.keys():
        assert name in formula, name


def test_the_pages_are_what_the_code_says(mergeline):
    made = "make them again: mergeline methods --markdown > docs/methods.md, and python tools/parity.py"
    assert (REPOSITORY / "docs" / "methods.md").read_text() == mergeline("methods", "--markdown").out, made
    assert parity.PAGE.read_text() == parity.page(measured()), made


def test_links_of_the_pages_lead_somewhere():
    page = (REPOSITORY / "docs" / "methods.md").read_text()
    headings = {line.lstrip("# ").lower().replace(" ", "-") for line in page.splitlines() if line[:2] == "##"}
    for text in (page, parity.PAGE.read_text().replace("methods.md#", "#")):
        assert {link.split(")")[0] for link in text.split("](#")[1:]} <= headings


def test_every_golden_case_has_a_row_within_its_tolerance():
    assert {case["method"] for case in ALL} - set(catalogue()) == {"extract_lora"}  # as docs/parity.md says
    rows = {row["case"]: row for row in measured()["cases"]}
    assert sorted(rows) == sorted(case["case"] for case in CASES)
    for case in CASES:
        row = rows[case["case"]]
        declared = {k: case[k] for k in ("method", "kind", "source", "atol", "rtol")}
        assert declared.items() <= row.items() and row["allowed"] == case["max_mismatch_elements"]
        if case["kind"] == "merge":
            assert 0 <= row["beyond"] <= row["allowed"]
            assert row["beyond"] or row["used"] is None or row["used"] <= 1
            assert row["used"] is not None or row["beyond"] or not row["absolute"]
            assert f"| {row['case']} |" in parity.PAGE.read_text()


@METHODS
def test_readings_are_those_that_were_measured(entry):
    assert parity.readings(entry.id) == measured()["readings"][entry.id]


def test_the_list_has_every_method_by_family_and_what_it_needs(mergeline):
    lines = mergeline("methods").out.splitlines()
    assert [line.split(":")[0] for line in lines if line[:1].strip()] == [
        family for family in FAMILIES if family != "outside"
    ]
    listed = [line.split() for line in lines if line.startswith("  ")]
    assert sorted(words[0] for words in listed) == sorted([*catalogue(), *learned_methods()])
    [slerp] = [" ".join(words) for words in listed if words[0] == "slerp"]
    assert slerp.startswith("slerp 2 experts Spherical")


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        ("cart", "the base with origin: task_arithmetic or tsv_merge"),
        ("ota", "the base with merge: linear or ties or rescale: true"),
        ("dare", "the statistics masks with masks: given"),
        ("regmean", "the statistics gram"),
        ("nearswap", "1 expert"),
        ("model_stock", "2 experts or more"),
    ],
)
def test_needs_are_those_that_are_checked(method, needs, mergeline):
    [found] = json.loads(mergeline("methods", method, "--json").out)
    assert needs in found["needs"]
