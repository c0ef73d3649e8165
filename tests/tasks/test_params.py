"""params.yaml: every mistake is blamed by line, with the nearest known name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import refused
from places import REPOSITORY
from ruamel.yaml import YAML
from soon import soon

from mergeline.merging.strict_yaml import YamlFile
from mergeline.tasks import workspace as workspace_module
from mergeline.tasks.params import load_params, lookup, raw_params
from mergeline.tasks.workspace import Workspace

LINES = """\
name: small
checkpoints:
  layout: as_is
  files: {base: in/base, a: in/a.safetensors}
  uris:
    b: hf://org/b@main
base: base
experts: [a, b]
datasets:
  image_size: 32
  files:
    digits: in/digits.npz
  uris: {}
suite: suite.yaml
merges:
  soup:
    method: average
  grid:
    method: cart
    params: {scale: 1.0}
    search:
      rank: [0.1, 0.5]
      keys: [matrices, block_linear]
gates:
  minimum_mean: 0.5
seed: 7
"""


def write(folder: Path, old: str = "", new: str = "") -> Path:
    assert old in LINES
    path = folder / "params.yaml"
    path.write_text(LINES.replace(old, new, 1))
    return path


def test_what_is_right_is_read(tmp_path):
    params = load_params(write(tmp_path))
    assert list(params.sources) == ["base", "a", "b"] and params.tasks == ["digits"]
    assert params.seed == 7
    assert list(params.merges["soup"].points) == [{}]
    assert list(params.merges["grid"].points) == [
        {"scale": 1.0, "rank": rank, "keys": keys}
        for rank in (0.1, 0.5)
        for keys in ("matrices", "block_linear")
    ]


@pytest.mark.parametrize(
    "file",
    [
        "params.yaml",
        "samples/llm/params.yaml",
        "samples/embeddings/params.yaml",
        *(f"examples/{p.name}" for p in (REPOSITORY / "examples").glob("*.yaml")),
    ],
)
def test_the_files_of_the_repository_are_right(file):
    if not file.endswith(".suite.yaml"):
        load_params(REPOSITORY / file)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A params.yaml of 500 checkpoints by URI and 200 merges, each with a grid of 20 x 20 x 10 that is written out."""
    experts = [f"expert_{i:03}" for i in range(500)]
    uris = {name: f"hf://organisation/model-{i}@{i:040x}" for i, name in enumerate(experts)}
    search = {
        "density": [round((i + 1) / 20, 2) for i in range(20)],
        "scale": [round((i + 1) / 5, 1) for i in range(20)],
        "rank": [round((i + 1) / 10, 1) for i in range(10)],
    }
    params = YAML(typ="safe").load(LINES)
    params["checkpoints"] = {"layout": "as_is", "files": {"base": "in/base"}, "uris": uris}
    params["experts"] = experts
    params["merges"] = {f"merge_{i:03}": {"method": "truncate(ties)", "search": search} for i in range(200)}
    path = tmp_path / "params.yaml"
    path.write_text(json.dumps(params, indent=1))  # which is YAML, too, and quick to write
    return path


@pytest.mark.slow
def test_a_large_file_is_read_soon(many):
    with soon():
        params = load_params(many)
    assert (len(params.sources), len(params.merges)) == (501, 200)
    assert sum(1 for _ in params.merges["merge_000"].points) == 4000


def test_a_workspace_reads_its_file_once(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(workspace_module, "YamlFile", lambda path: read.append(path) or YamlFile(path))
    workspace = Workspace(write(tmp_path))
    assert workspace.raw["name"] == workspace.params.name == "small"
    assert read == [tmp_path / "params.yaml"]


def test_a_merge_may_have_experts_of_its_own_in_its_own_order(tmp_path):
    params = load_params(write(tmp_path, "method: average", "method: slerp\n    experts: [b, a]"))
    assert params.experts_of("soup") == ["b", "a"] and params.experts_of("grid") == ["a", "b"]


def test_more_experts_than_a_method_merges(tmp_path):
    text = LINES.replace("experts: [a, b]", "experts: [a, b, c]").replace(
        "    b: hf", "    c: hf://org/c\n    b: hf"
    )
    path = tmp_path / "params.yaml"
    path.write_text(text.replace("method: average", "method: slerp"))
    with refused(f"{path}:17: ", "slerp merges at most 2 expert(s), got 3"):
        load_params(path)
    path.write_text(text.replace("method: average", "method: slerp\n    experts: [c, a]"))
    load_params(path)


def test_raw_params_are_plain(tmp_path):
    raw = raw_params(write(tmp_path))
    assert lookup(raw, "merges.grid.search") == {"rank": [0.1, 0.5], "keys": ["matrices", "block_linear"]}
    plain = (dict, list, str, int, float, bool)

    def check(value: object) -> None:
        assert type(value) in plain
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(inner)

    check(raw)


@pytest.mark.parametrize(
    ("old", "new", "line", "parts"),
    [
        # keys
        ("suite: ", "siute: ", 14, ["siute", "unknown key", "did you mean 'suite'?"]),
        ("  image_size", "  image_siz", 10, ["datasets.image_siz", "did you mean 'image_size'?"]),
        ("    search:", "    serch:", 21, ["merges.grid.serch", "did you mean 'search'?"]),
        ("  minimum_mean", "  minimal_mean", 25, ["gates.minimal_mean", "did you mean 'minimum_mean'?"]),
        ("suite: suite.yaml\n", "", 1, ["suite: is required, and missing"]),
        ("      rank:", "      rnak:", 22, ["cart", "unknown parameter 'rnak'", "did you mean 'rank'?"]),
        ("{scale: 1.0}", "{scael: 1.0}", 20, ["unknown parameter 'scael'", "did you mean 'scale'?"]),
        # values
        ("method: cart", "method: crat", 19, ["unknown method 'crat'", "did you mean 'cart'?"]),
        ("{scale: 1.0}", "{scale: much}", 20, ["scale = 'much'"]),
        ("[0.1, 0.5]", "[0.1, 1.5]", 22, ["rank = 1.5"]),
        ("[0.1, 0.5]", "[]", 22, ["merges.grid.search.rank"]),
        ("[0.1, 0.5]", "0.1", 22, ["merges.grid.search.rank"]),
        ("image_size: 32", "image_size: big", 10, ["datasets.image_size"]),
        ("image_size: 32", "image_size: 4", 10, ["datasets.image_size", "8"]),
        ("minimum_mean: 0.5", "minimum_mean: 50", 25, ["gates.minimum_mean"]),
        ("layout: as_is", "layout: clip", 3, ["checkpoints.layout"]),
        ("experts: [a, b]", "experts: []", 8, ["experts"]),
        # names
        ("  soup:", "  so/up:", 16, ["'so/up'", "letters, digits"]),
        ("  soup:", "  ..:", 16, ["'..'", "letters, digits"]),
        ("    digits:", "    .hidden:", 12, ["'.hidden'", "letters, digits"]),
        ("    b: hf", "    ../b: hf", 6, ["'../b'", "letters, digits"]),
        ("name: small", "name: a b", 1, ["'a b'", "letters, digits"]),
        ("  soup:", "  baselines:", 16, ["'baselines'", "choose another name"]),
        # what belongs together
        ("experts: [a, b]", "experts: [a, bb]", 8, ["'bb' is not among the", "did you mean 'b'?"]),
        ("experts: [a, b]", "experts: [a, a]", 8, ["listed twice"]),
        ("experts: [a, b]", "experts: [a, base]", 8, ["is the base"]),
        ("base: base\n", "base: bose\n", 7, ["'bose'", "did you mean 'base'?"]),
        ("    b: hf", "    a: hf", 6, ["'a' is among the files and the uris"]),
        ("in/a.safetensors", "hf://org/a", 4, ["'hf://org/a' is a URI", "checkpoints.uris"]),
        ("in/digits.npz", "hf-dataset://org/d", 12, ["is a URI", "datasets.uris"]),
        ("    digits: in/digits.npz", "    {}", 9, ["datasets are empty"]),
        ("      rank:", "      scale: [1.0]\n      rank:", 22, ["'scale' is fixed in params"]),
        ("d: average", "d: average\n    experts: [a, bb]", 18, ["'bb' is not among the", "did you mean 'b'?"]),
        ("d: average", "d: average\n    keep: {x: c}", 18, ["'c' is none of its experts, nor base"]),
        ("d: average", "d: average\n    rules: [{mach: x}]", 18, ["mach"]),
        ("d: average", "d: average\n    experts: [base]", 18, ["'base' is not among the experts"]),
        ("d: average", "d: average\n    experts: [b, b]", 18, ["listed twice"]),
        ("d: average", "d: average\n    experts: []", 18, ["average needs at least 1 expert(s), got 0"]),
        ("d: average", "d: slerp\n    experts: [b]", 18, ["slerp needs at least 2 expert(s), got 1"]),
        ("d: average", "d: average\n    experts: a", 18, ["merges.soup.experts"]),
        ("d: average", "d: task_arithmetic\n    params: {weights: [1.0]}", 18, ["1 weights for 2 experts"]),
        # YAML
        ("base: base\n", "base: base\nbase: a\n", 8, ["not valid YAML", "duplicate"]),
        ("  soup:", "  grid:", 18, ["not valid YAML", "duplicate"]),
        ("experts: [a, b]", "experts: [a, b", 9, ["not valid YAML"]),
        ("name: small", "name: 'small", 27, ["not valid YAML"]),
        ("name: small", "name: *nowhere", 1, ["not valid YAML"]),
        ("name: small", "\tname: small", 1, ["not valid YAML"]),
        (LINES, "- a list\n", 1, ["the file must hold keys and values", "mergeline init"]),
        (LINES, "", 1, ["the file is empty", "mergeline init"]),
        (LINES, "just text", 1, ["the file must hold keys and values"]),
        # values, in plain words
        ("seed: 7", "seed: much", 26, ["seed: must be a whole number"]),
        ("experts: [a, b]", "experts: a", 8, ["experts: must be a list"]),
        ("layout: as_is", "layout: clip", 3, ["checkpoints.layout: must be 'as_is' or 'open_clip'"]),
        ("image_size: 32", "image_size: 4", 10, ["datasets.image_size: must be 8 or more"]),
        ("seed: 7", "seed: 7\ndevice: gpu", 27, ["device 'gpu' is not known; choose cpu, cuda or cuda:N"]),
    ],
)  # fmt: skip
def test_a_mistake_is_blamed_by_line(old, new, line, parts, tmp_path):
    path = write(tmp_path, old, new)
    with refused(f"{path}:{line}: ", *parts):
        load_params(path)


def test_no_file(tmp_path):
    with refused("params.yaml", "No such file"):
        load_params(tmp_path / "params.yaml")


def test_no_text(tmp_path):
    (tmp_path / "params.yaml").write_bytes(b"name: \xff")
    with refused("params.yaml:1: not valid YAML"):
        load_params(tmp_path / "params.yaml")


LANGUAGE = """\
name: small
checkpoints:
  layout: as_is
  files: {base: in/base, maths: in/maths, code: in/code}
  uris: {}
base: base
experts: [maths, code]
language:
  tasks: tasks
  suites:
    maths: [sums, roots]
    other: [code, facts]
  perplexity: [prose]
merges:
  soup: {method: average}
seed: 7
"""


def test_language_models_are_measured_on_suites(tmp_path):
    (tmp_path / "params.yaml").write_text(LANGUAGE)
    params = load_params(tmp_path / "params.yaml")
    assert params.tasks == ["sums", "roots", "code", "facts"]
    # An expert's tasks are those of the suite of its name, or else the task of its name.
    assert params.owners == {"sums": "maths", "roots": "maths", "code": "code"}


@pytest.mark.parametrize(("old", "new", "line", "parts"), [
    ("language:\n", "suite: s.yaml\nlanguage:\n", 9, ["image models with datasets and suite"]),
    ("  perplexity: [prose]", "  perplexities: [prose]", 13, ["perplexities", "perplexity"]),
    ("    maths: [sums, roots]", "    maths: []", 11, ["maths"]),
    ("  tasks: tasks\n", "", 8, ["tasks"]),
])  # fmt: skip
def test_a_mistake_in_language_is_blamed_by_line(old, new, line, parts, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(LANGUAGE.replace(old, new, 1))
    with refused(f"{path}:{line}: ", *parts):
        load_params(path)


def test_files_that_define_methods_are_run_and_make_searches_and_merges_stale(workspace):
    yaml = YAML()
    file = workspace / "params.yaml"
    params = yaml.load(file)
    params["methods"] = ["own_methods.py"]
    params["merges"]["own"] = {"method": "lines", "params": {"inner": "half_way"}}
    yaml.dump(params, file)
    with refused("params.yaml", "own_methods.py", "no such Python file"):
        load_params(file)
    (workspace / "own_methods.py").write_text(
        "from mergeline.merging.methods import Slot, method\n\n\n"
        '@method(paper="none", scale=0.5, needs=("base",))\n'
        "def half_way(x: Slot):\n"
        '    """base + scale * the first task vector."""\n'
        "    return x.task_vectors[0]\n"
    )
    stages = Workspace(file).stages
    reading = {stage.name for stage in stages if "own_methods.py" in stage.deps}
    assert reading == {f"{step}@{name}" for step in ("fit", "search", "merge") for name in params["merges"]}


# --------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    "uri",
    [
        "https://bob:S3CR3T@host/b.safetensors",
        "HTTPS://S3CR3T@host/b.safetensors",
        "filecache::https://S3CR3T@host/b.safetensors",
        "https://host/b.safetensors?sig=S3CR3T",
    ],
)
def test_credentials_in_uris_are_refused_and_not_shown(uri, tmp_path):
    path = write(tmp_path, "hf://org/b@main", uri)
    with refused(f"{path}:6: ", "host/b.safetensors", "dvc.lock would record", "~/.netrc") as _:
        try:
            load_params(path)
        except Exception as error:
            assert "S3CR3T" not in str(error)
            raise
    datasets = write(tmp_path, "  uris: {}\nsuite", f"  uris: {{a: '{uri}'}}\nsuite")
    with refused("dvc.lock would record"):
        load_params(datasets)


def test_credentials_among_files_are_not_shown(tmp_path):
    path = write(tmp_path, "a: in/a.safetensors", "a: 'https://bob:S3CR3T@host/a.safetensors'")
    with refused("'https://host/a.safetensors' is a URI; list it under checkpoints.uris"):
        load_params(path)


def test_what_is_kept_how_long_is_said_in_numbers(tmp_path):
    params = load_params(write(tmp_path, "seed: 7", "seed: 7\nretention: {days: 2, gigabytes: 0.5}"))
    assert (params.retention.age.days, params.retention.bytes) == (2, 500_000_000)
    for wrong in ("{days: 0}", "{gigabytes: -1}", "{weeks: 2}"):
        with refused("params.yaml:26: retention."):
            load_params(write(tmp_path, "seed: 7", f"retention: {wrong}\nseed: 7"))


BUDGET = """\
    search:
      sampler: tpe
      budget: 40
      race: {error: 0.1}
      space:
        rank: {low: 0.01, high: 1, log: true}
        keys: [matrices, block_linear]
      first: {rank: [0.16]}
"""
GRID = """\
    search:
      rank: [0.1, 0.5]
      keys: [matrices, block_linear]
"""


def with_budget(folder: Path, old: str = "", new: str = "") -> Path:
    assert old in BUDGET
    return write(folder, GRID, BUDGET.replace(old, new, 1))


def test_a_search_with_a_budget_is_read(tmp_path):
    merge = load_params(with_budget(tmp_path)).merges["grid"]
    assert merge.within and merge.grid == {} and merge.within.budget.words == "40 points"
    assert merge.within.race and (merge.within.race.error, merge.within.race.looks) == (0.1, 5)
    [branch] = merge.branches
    assert (branch.method, branch.params) == ("cart", {"scale": 1.0})
    settings = [setting.params for setting in branch.settings(2)]
    assert settings == [{"scale": 1.0, "rank": 0.01, "keys": key} for key in ("matrices", "block_linear")]
    usual = load_params(with_budget(tmp_path, "race: {error: 0.1}", "race: true")).merges["grid"]
    assert usual.within and usual.within.race and usual.within.race.error == 0.05


def test_several_methods_stand_under_the_search_alone(tmp_path):
    search = (
        "search: {sampler: tpe, budget: {minutes: 2}, methods: [{method: lines(ties)}, {method: average}]}"
    )
    params = load_params(write(tmp_path, "method: average", search))
    assert [branch.method for branch in params.merges["soup"].branches] == ["lines", "average"]
    assert params.merges["soup"].method == "lines"
    assert [s.params for s in params.settings_of("soup")] == [{"inner": "ties"}, {}]
    path = write(tmp_path, "method: average", f"method: average\n    {search}")
    with refused(f"{path}:", "name one method, or several under search"):
        load_params(path)


@pytest.mark.parametrize(
    "old, new, parts",
    [
        ("sampler: tpe", "sampler: tpo", ["sampler", "'tpe', 'cmaes', 'nsga2', 'map' or 'random'"]),
        ("budget: 40", "budget: 0", ["budget", "must be more than 0"]),
        ("budget: 40", "budget: {minutes: 0}", ["budget.minutes", "must be more than 0"]),
        ("budget: 40", "budget: {minutes: 1, points: 2}", ["write a number of points, {minutes: M}"]),
        ("      budget: 40\n", "", ["budget"]),
        ("sampler: tpe", "sample: tpe", ["sample: unknown key; did you mean 'sampler'?"]),
        (
            BUDGET[BUDGET.index("      space") :],
            "      space: {}\n",
            ["the space is empty; name a parameter"],
        ),
        ("rank: {", "rnk: {", ["unknown parameter 'rnk'; did you mean 'rank'?"]),
        ("rank: {", "scale: [1.0]\n        rank: {", ["'scale' is fixed in params and varied in space"]),
        ("high: 1,", "high: 0.001,", ["low 0.01 must be less than high 0.001"]),
        ("high: 1,", "hihg: 1,", ["hihg: unknown key; did you mean 'high'?"]),
        ("low: 0.01", "low: 0", ["a logarithmic range begins above 0"]),
        ("log: true", "step: 0", ["step", "must be more than 0"]),
        ("high: 1,", "high: 7,", ["rank", "7"]),
        ("[matrices, block_linear]", "matrices", ["must be a list of choices, or a range"]),
        ("[matrices, block_linear]", "[]", ["keys"]),
        ("[matrices, block_linear]", "[matrices, blocks]", ["keys"]),
        ("first: {rank: [0.16]}", "first: {rank: [3]}", ["'rank' is 3, which is not in its space"]),
        ("first: {rank: [0.16]}", "first: [{rnk: 0.1}]", ["'rnk' is not in the space; did you mean 'rank'?"]),
        ("first: {rank: [0.16]}", "first: 3", ["must be a list of points, or a grid"]),
        ("sampler: tpe", "sampler: cmaes", ["cmaes proposes numbers alone, not 'keys'"]),
        ("sampler: tpe", "sampler: nsga2", ["a race drops points by their mean"]),
        ("error: 0.1", "error: 0.7", ["error", "less than 0.5"]),
    ],
)
def test_what_is_wrong_with_a_search_is_blamed_in_one_line(old, new, parts, tmp_path):
    path = with_budget(tmp_path, old, new)
    with refused(f"{path}:", *parts):
        load_params(path)
