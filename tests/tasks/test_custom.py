"""Models of any kind, measured by a function or a command of the user's own, through the whole pipeline."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import refused
from ruamel.yaml import YAML
from safetensors.numpy import load_file
from toy_workspace import FAMILY, TASKS, run_all, save_with_score

from mergeline.evaluation.custom.runner import run
from mergeline.evaluation.custom.settings import Evaluate
from mergeline.merging.errors import UserError
from mergeline.tasks.dvc_yaml import dvc_yaml
from mergeline.tasks.modalities import modality_named
from mergeline.tasks.publish import publish
from mergeline.tasks.register import register
from mergeline.tasks.sweep import write_table
from mergeline.tasks.tracking import connect
from mergeline.tasks.workspace import Workspace

N = 20

# The error of a model's weight to points around a corner of its task.
SCORE = """
import numpy as np
from safetensors.numpy import load_file

def score(model, split, tasks, device):
    print("this is no score", split, device)
    [file] = model.glob("*.safetensors")
    weight = load_file(file)["w"]
    for task in tasks:
        rng = np.random.default_rng(["left", "right", "val", "test"].index(split) + 10 * (task == "left"))
        corner = np.array([1, 1, 0, 0]) if task == "left" else np.array([0, 0, 1, 1])
        for i in rng.permutation(20):
            point = corner + np.random.default_rng(100 * i + len(split)).normal(size=4) / 4
            yield task, int(i), np.square(weight - point).mean()

def best(model, split, tasks, device):
    for task, example, error in score(model, split, tasks, device):
        yield task, example, 1 - error
"""

# The same as a program, without what `child` does for a function.
PROGRAM = """
import argparse, json, pathlib
from score import score
parser = argparse.ArgumentParser()
for name in ("--model", "--split", "--device"):
    parser.add_argument(name)
parser.add_argument("--tasks", nargs="+")
a = parser.parse_args()
import contextlib, sys
with contextlib.redirect_stdout(sys.stderr):
    rows = [*score(pathlib.Path(a.model), a.split, a.tasks, a.device)]
for task, example, error in rows:
    print(json.dumps({"task": task, "id": example, "score": float(error), "more": "is left"}))
"""

PARAMS: dict[str, Any] = {
    **FAMILY,
    "name": "own",
    "evaluate": {
        "folder": "measure",
        "function": "score:score",
        "suites": {task: [task] for task in TASKS},
        "measure": "error",
        "better": "lower",
    },
    "gates": {"largest_mean": 5.0, "minimum_gain": -10, "largest_rise": 10.0},
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace in which nothing has run, as the current folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    save_with_score(tmp_path, SCORE)
    (tmp_path / "measure/program.py").write_text(PROGRAM)
    write(tmp_path)
    return tmp_path


def write(root: Path, **evaluate: Any) -> None:
    """params.yaml with other entries of `evaluate`, or other gates or merges."""
    whole = {key: evaluate.pop(key) for key in ("gates", "merges") if key in evaluate}
    own = {k: v for k, v in {**PARAMS["evaluate"], **evaluate}.items() if v is not None}
    YAML().dump({**PARAMS, "evaluate": own, **whole}, root / "params.yaml")


def went(root: Path) -> tuple[Workspace, dict[str, Any]]:
    return run_all(root), json.loads((root / "build/leaderboard/leaderboard.json").read_text())


def errors(weight: np.ndarray, task: str, split: str) -> np.ndarray:
    corner = np.array([1, 1, 0, 0]) if task == "left" else np.array([0, 0, 1, 1])
    points = [corner + np.random.default_rng(100 * i + len(split)).normal(size=4) / 4 for i in range(N)]
    return np.square(weight - np.array(points)).mean(1)


def test_a_function_measures_the_whole_pipeline(root, mlflow_database):
    mlflow_database(root)
    workspace, board = went(root)
    rows = {row["name"]: row for row in board["rows"]}
    assert board["measure"] == "error" and board["modality"] == "custom"
    assert board["measures"]["left"] == {"name": "error", "unit": "", "better": "lower"}
    for name, file in (("experts", None), ("average", "build/merges/average/model.safetensors")):
        for task in TASKS:
            weight = load_file(file or f"in/{task}.safetensors")["w"]
            wanted = errors(weight, task, "test").mean()
            found = rows[name]["tasks"][task]
            assert found["accuracy"] == pytest.approx(wanted, rel=1e-6), (name, task)
            assert 0 < found["lower"] < found["accuracy"] < found["upper"] and found["normalised"] is None
    search = json.loads(Path("build/search/sum.json").read_text())
    assert search["chosen"] == min(search["points"], key=lambda point: point["mean"])["params"]
    assert search["points"][0]["mean"] == pytest.approx(np.mean([*search["points"][0]["tasks"].values()]))
    merges = [rows[name] for name in ("average", "sum")]
    assert board["candidate"] == min(merges, key=lambda row: row["val_mean"])["name"]
    for row in (*merges, rows["base"]):
        errors_of = [task["accuracy"] for task in row["tasks"].values()]
        assert row["mean"] == pytest.approx(np.mean(errors_of)) and row["worst_task"] == max(errors_of)
        assert 0 < row["lower"] < row["mean"] < row["upper"]
    [pair] = board["pairs"]
    assert pair["difference"] == pytest.approx(merges[0]["mean"] - merges[1]["mean"])
    assert pair["lower"] < pair["difference"] < pair["upper"]
    scores = json.loads(Path("build/evaluations/sum/scores.json").read_text())
    assert scores["splits"]["test"]["left"]["mean"] == rows["sum"]["tasks"]["left"]["accuracy"]
    assert publish(workspace).run_id
    verdict = json.loads((workspace.state / "verdict.json").read_text())
    assert verdict["passed"] and verdict["champion_after"] == "1"
    said = {f["gate"]: f["sentence"] for f in verdict["findings"]}
    assert re.fullmatch(r"The mean test error is \d\.\d+; at most 5.0000 is allowed.", said["largest_mean"])
    assert "Against the base the largest rise in error is 0.0054 (task right)" in said["largest_rise"]
    page = Path("build/report.html").read_text()
    assert "Mean test error, lower is better, 95 % interval" in page and "Smaller is better." in page
    assert "accuracy" not in page and "negated" not in page
    candidate = load_file(f"build/merges/{board['candidate']}/model.safetensors")["w"]
    ids = sorted(map(str, range(N)))
    gains = {
        i: errors(load_file("in/base.safetensors")["w"], "left", "test")[int(i)]
        - errors(candidate, "left", "test")[int(i)]
        for i in ids
    }
    shown = re.findall(r'<figure class="shot">\s*<p>(\w+)</p>', page.partition('id="examples"')[2])
    assert (
        shown[: min(6, sum(gain > 0 for gain in gains.values()))] == sorted(ids, key=lambda i: -gains[i])[:6]
    )
    names = re.findall(r'<th scope="row"><span class="name">(\w+)</span>', page.partition("</table>")[0])
    assert names == sorted(rows, key=lambda name: rows[name]["mean"])
    client = connect(root)
    run = client.get_run(client.get_registered_model("own").latest_versions[0].run_id)
    metrics = run.data.metrics
    assert metrics["error.left"] == rows[board["candidate"]]["tasks"]["left"]["accuracy"]
    assert metrics["mean"] == rows[board["candidate"]]["mean"] and "accuracy.left" not in metrics


def test_a_smaller_error_beats_the_champion_and_a_larger_one_does_not(root, mlflow_database):
    mlflow_database(root)
    worse, better = ({"method": "task_arithmetic", "params": {"scale": scale}} for scale in (40.0, 0.5))
    gates = {"minimum_gain": 0.0, "largest_rise": 0.001}
    write(root, merges={"sum": worse}, gates={"minimum_gain": 0.0})
    assert register(root, run_all(root).raw).champion_after
    write(root, merges={"sum": better}, gates=gates)
    found = register(root, run_all(root).raw)
    said = {f.gate: f.sentence for f in found.findings}
    assert found.passed and "the mean test error changes by -" in said["minimum_gain"]
    assert "its upper end must be below +0.0000" in said["minimum_gain"]
    assert "the largest rise in error is 0.0000" in said["largest_rise"]
    write(root, merges={"sum": worse}, gates=gates)
    found = register(root, run_all(root).raw)
    failed = {f.gate: f.sentence for f in found.findings if not f.passed}
    assert "the mean test error changes by +" in failed["minimum_gain"] and "largest_rise" in failed


def test_tasks_of_different_measures_are_shown_in_their_own(root, mlflow_database):
    mlflow_database(root)
    right = {"measure": "PSNR@4", "unit": "dB", "better": "higher"}
    write(root, unit="m", measures={"right": right}, gates={"largest_rise": 10.0, "largest_drop": 10.0})
    workspace, board = went(root)
    rows = {row["name"]: row for row in board["rows"]}
    assert board["measure"] == "score" and board["measures"]["right"]["unit"] == "dB"
    for row in rows.values():
        left, own = (row["tasks"][task]["accuracy"] for task in TASKS)
        assert left > 0 and own > 0 and row["mean"] == pytest.approx((own - left) / 2)
        assert row["worst_task"] is None and row["normalised"] is None
    publish(workspace)
    page = html.unescape(Path("build/report.html").read_text())
    assert "A score is the mean of negated error (m) on left and PSNR@4 (dB) on right." in page
    assert "left: error (m), lower is better" in page
    said = {
        f["gate"]: f["sentence"]
        for f in json.loads((workspace.state / "verdict.json").read_text())["findings"]
    }
    assert "drop in PSNR@4 is" in said["largest_drop"] and "dB (task right)" in said["largest_drop"]
    assert "rise in error is" in said["largest_rise"] and "m (task left)" in said["largest_rise"]
    client = connect(root)
    run = client.get_run(client.get_registered_model("own").latest_versions[0].run_id)
    assert {"error.left", "PSNR_4.right"} < set(run.data.metrics)
    write_table(workspace, root / "table.md")
    assert (
        "Test score of negated error (m) on left and PSNR@4 (dB) on right" in (root / "table.md").read_text()
    )


def test_a_command_gives_what_the_function_gives(root):
    _, by_function = went(root)
    write(root, function=None, command=[sys.executable, "program.py"])
    _, by_command = went(root)
    assert by_command["rows"] == by_function["rows"]


def test_larger_scores_are_better_unless_said_otherwise(root):
    write(root, function="score:best", better=None, gates={})
    _, board = went(root)
    assert board["measure"] == "error"
    best = max((row for row in board["rows"] if row["kind"] == "merge"), key=lambda row: row["val_mean"])
    assert board["candidate"] == best["name"]


def test_models_are_measured_again_where_the_folder_changes(root):
    workspace, _ = went(root)
    found = {stage.name: stage for stage in workspace.stages}
    for name in ("baselines", "search@sum", "evaluate@sum"):
        assert "measure" in found[name].deps and "evaluate" in found[name].params
    assert "measure" not in found["merge@sum"].deps
    text = dvc_yaml(modality_named("custom"), ".")
    assert "- ${evaluate.folder}" in text and "Test score" in text


# ---------------------------------------------------------------------------------------------- what goes wrong


def measured(tmp_path: Path, text: str, tasks: tuple[str, ...] = TASKS, **settings: Any) -> Any:
    (tmp_path / "own").mkdir(exist_ok=True)
    (tmp_path / "own/own.py").write_text(text)
    given = {"folder": str(tmp_path / "own"), "function": "own:score", "suites": {"a": [*tasks]}, **settings}
    found = Evaluate(**{key: value for key, value in given.items() if value is not None})
    return run(found, tmp_path / "model", "val", tasks, "cpu", tmp_path / "log")


def yields(*rows: str) -> str:
    return "def score(model, split, tasks, device):\n" + "".join(f"    yield {row}\n" for row in rows)


BOTH = ("'left', 1, 0.5", "'right', 1, True")


def test_scores_come_in_the_order_of_ids(tmp_path):
    found = measured(tmp_path, yields("'left', 'b', 2", "'right', 3, 1", "'left', 'a', 1.5"))
    assert found == {"left": {"a": 1.5, "b": 2.0}, "right": {"3": 1.0}}
    assert [*found["left"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (yields(BOTH[0]), "'own:score' printed no score for 'right'"),
        (yields(*BOTH, "'middle', 1, 0"), "printed scores for 'middle', which it was not asked for"),
        (yields(*BOTH, "'left', 1, 0"), "example '1' of 'left' was scored before"),
        (yields(*BOTH, "'left', 2, float('nan')"), "the score of example '2' of 'left' is nan"),
        (
            yields(*BOTH, "'left', None, 0"),
            "line 3 that .* must have a text as task, a text or integer as id",
        ),
        (
            "def score(*_):\n    raise ValueError('no such data')",
            "failed with exit code 1 .* ValueError: no such data",
        ),
        ("import os\ndef score(*_):\n    os.kill(os.getpid(), 9)", "failed with signal 9 .* it said nothing"),
        ("def scores(*_): ...", "module 'own' has no attribute 'score'"),
        ("import nothing_like_it", "No module named 'nothing_like_it'"),
    ],
)
def test_a_function_that_fails_or_gives_no_scores(tmp_path, text, wrong):
    with pytest.raises(UserError, match=wrong):
        measured(tmp_path, text)


def test_all_that_a_function_said_is_kept(tmp_path):
    with refused(f"all that it said: {tmp_path / 'log'}"):
        measured(tmp_path, "def score(*_):\n    print('looking'); raise ValueError('no such data')")
    assert "looking" in (tmp_path / "log").read_text() and "Traceback" in (tmp_path / "log").read_text()


def test_a_function_that_hangs_ends_with_all_that_it_started(tmp_path):
    text = f"""
import pathlib, subprocess, time
def score(*_):
    child = subprocess.Popen(["sleep", "600"])
    pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
    time.sleep(600)
"""
    with refused("took more than 0.05 minutes for model on val; raise evaluate.minutes"):
        measured(tmp_path, text, minutes=0.05)
    assert _ends(int((tmp_path / "pid").read_text()))


def _ends(pid: int) -> bool:
    """Within ten seconds."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_what_was_started_ends_with_a_killed_owner(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/own.sh").write_text(f"echo $$ > {tmp_path / 'pid'}; sleep 600")
    code = f"""
from pathlib import Path
from mergeline.evaluation.custom.runner import run
from mergeline.evaluation.custom.settings import Evaluate
settings = Evaluate(folder={str(tmp_path / "own")!r}, command=["sh", "own.sh"], suites={{"a": ["left"]}})
run(settings, Path("model"), "val", ["left"], "cpu", Path("log"))
"""
    owner = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert owner.poll() is None
        time.sleep(0.05)
    owner.kill()
    owner.wait()
    pid = int((tmp_path / "pid").read_text())
    assert _ends(pid)


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        (["./nowhere"], "evaluate.command failed .*: ./nowhere cannot be started: No such file"),
        (["echo", "left 0.5"], "line 1 that evaluate.command printed is no JSON object .*left 0.5 --model"),
        (["sh", "-c", "echo [1]"], "is no JSON object with task, id and score: '\\[1\\]'"),
        (["true"], "evaluate.command printed no score for 'left'"),
    ],
)
def test_a_command_that_fails_or_gives_no_scores(tmp_path, command, wrong):
    with pytest.raises(UserError, match=wrong):
        measured(tmp_path, "", function=None, command=command)


def test_other_examples_for_another_model_are_refused(root):
    text = SCORE.replace("yield task, int(i),", "yield task, f'{i} {model.name}',")
    (root / "measure/score.py").write_text(text)
    with refused("'average' and the base were scored on different examples of 'left' on val"):
        went(root)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"command": ["x"]}, "name a function or a command, one of the two"),
        ({"function": None}, "name a function or a command, one of the two"),
        ({"function": "score"}, "evaluate.function"),
        ({"suites": {"left": ["a b"]}}, "evaluate.suites.left"),
        ({"minutes": 0}, "evaluate.minutes"),
        ({"measures": {"lfet": {}}}, "'lfet' is in none of the suites; did you mean 'left'?"),
        ({"gates": {"minimum_mean": 1}}, "of error, lower is better; write largest_mean in its place"),
        ({"gates": {"largest_drop": 1}}, "of error, lower is better; write largest_rise in its place"),
        (
            {"better": "higher", "gates": {"largest_rise": 1}},
            "of error, higher is better; write largest_drop in its place",
        ),
        (
            {"measures": {"left": {"better": "higher"}}, "gates": {"largest_mean": 1}},
            "of score, higher is better; write minimum_mean in its place",
        ),
    ],
)
def test_mistakes_in_params_yaml_are_blamed(root, changes, wrong):
    write(root, **changes)
    with refused("params.yaml:", wrong):
        Workspace(root / "params.yaml").params  # noqa: B018
