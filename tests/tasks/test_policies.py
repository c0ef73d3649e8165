"""Decision Transformers through the whole pipeline: heads, episodes, leaderboard, learning, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import refused
from fresh_workspace import fresh_workspace
from ruamel.yaml import YAML
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file
from small_policies import save_policy, trajectories
from toy_workspace import run_all

pytest.importorskip("gymnasium")

from mergeline.merging.export import export_task  # noqa: E402
from mergeline.merging.learning.collect import collect  # noqa: E402
from mergeline.merging.learning.gathering import Gathering  # noqa: E402
from mergeline.tasks.dvc_yaml import dvc_yaml  # noqa: E402
from mergeline.tasks.fit import examples_of  # noqa: E402
from mergeline.tasks.modalities import modality_named  # noqa: E402
from mergeline.tasks.new_workspace import init_workspace  # noqa: E402
from mergeline.tasks.publish import publish  # noqa: E402
from mergeline.tasks.workspace import Workspace  # noqa: E402

SIZES = {"cart": (4, 2), "swing": (3, 1)}
PARAMS: dict[str, Any] = {
    "name": "policies",
    "seed": 0,
    "checkpoints": {
        "layout": "as_is",
        "files": {n: f"in/{n}" for n in ("base", "carts", "swing")},
        "uris": {},
    },
    "base": "base",
    "experts": ["carts", "swing"],
    "policies": {
        "heads": "auto",
        "tasks": {
            "cart": {
                "environment": "CartPole-v1",
                "target_return": 30,
                "floor": 8,
                "context": 3,
                "max_steps": 30,
            },
            "swing": {
                "environment": "Pendulum-v1",
                "target_return": -10,
                "floor": -300,
                "scale": 50,
                "context": 2,
                "max_steps": 20,
                "std": [1, 1, 4],
            },
        },
        "suites": {"carts": ["cart"]},
        "trajectories": {"files": {"cart": "in/cart.npz", "swing": "in/swing.npz"}},
        "episodes": {"val": 3, "test": 5},
        "batch_size": 4,
    },
    "merges": {
        "average": {"method": "average"},
        "sum": {"method": "task_arithmetic", "search": {"scale": [0.5, 0.8]}},
    },
    "gates": {"minimum_mean": -9.0, "minimum_gain": 0.0, "largest_drop": 9.0},
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a base and two experts, and trajectories of their tasks."""
    root = tmp_path_factory.mktemp("policies")
    base = save_policy(root / "in/base", 0, 6, 5)
    for seed, (name, sizes) in enumerate(zip(("carts", "swing"), SIZES.values())):
        save_policy(root / "in" / name, seed + 1, *sizes, base, state_mean=[0.1] * sizes[0])
    for task, (states, actions) in SIZES.items():
        np.savez(root / "in" / f"{task}.npz", **trajectories(states, actions, task == "cart"))
    return root


def write(root: Path, **changes: Any) -> None:
    YAML().dump({**PARAMS, **changes}, root / "params.yaml")


@pytest.fixture
def root(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace in which nothing has run, as the current folder."""
    return fresh_workspace(family, PARAMS, tmp_path, monkeypatch)


def played(model: Any, task: str, seed: int) -> tuple[float, int]:
    """The return and length of an episode, step by step, with every input written out."""
    import gymnasium

    settings = PARAMS["policies"]["tasks"][task]
    scale, context = settings.get("scale", 1.0), settings["context"]
    std = torch.tensor(settings.get("std", [1.0] * SIZES[task][0]))
    env = gymnasium.make(settings["environment"], max_episode_steps=settings["max_steps"])
    state, _ = env.reset(seed=seed)
    states, actions, to_go = [state], [np.zeros(SIZES[task][1])], [settings["target_return"]]
    total = 0.0
    while True:
        last = range(len(states))[-context:]
        with torch.no_grad():
            predicted = model(
                states=((torch.tensor(np.array(states))[last] - 0.1) / std)[None],
                actions=torch.tensor(np.array(actions), dtype=torch.float32)[last][None],
                returns_to_go=torch.tensor(to_go)[last][None, :, None] / scale,
                timesteps=torch.tensor([*last])[None],
                attention_mask=torch.ones(1, len(last)),
            ).action_preds[0, -1]
        if task == "cart":
            action: Any = int(predicted.argmax())
            actions[-1] = np.eye(2)[action]
        else:
            actions[-1] = action = predicted.clip(-2, 2).numpy()
        state, reward, ended, cut, _ = env.step(action)
        total += float(reward)
        if ended or cut:
            return total, len(states)
        states.append(state)
        actions.append(np.zeros(SIZES[task][1]))
        to_go.append(settings["target_return"] - total)


def under_the_head(trunk: Path, expert: Path) -> Any:
    """An expert's model, with the trunk of another checkpoint."""
    from transformers import DecisionTransformerModel

    model = DecisionTransformerModel.from_pretrained(expert)
    kept = {k: t for k, t in load_torch(trunk / "model.safetensors").items() if k.startswith("encoder.")}
    assert len(kept) > 20
    model.load_state_dict(kept, strict=False)
    return model


# ---------------------------------------------------------------------------------------------- the pipeline


@pytest.mark.usefixtures("anywhere")
def test_the_whole_pipeline_plays_episodes_under_each_experts_head(root, mlflow_database):
    mlflow_database(root)
    workspace = run_all(root)
    board = json.loads((root / "build/leaderboard/leaderboard.json").read_text())
    rows = {row["name"]: row for row in board["rows"]}
    assert (board["modality"], board["measure"], board["tasks"]) == (
        "policies",
        "normalised return",
        ["cart", "swing"],
    )
    assert board["policies"]["seeds"] == {"val": [0, 3], "test": [1000000, 1000005]}
    owners = {"cart": "carts", "swing": "swing"}
    for name, trunks in {
        "base": dict.fromkeys(owners, "in/base"),
        "experts": {"cart": "in/carts", "swing": "in/swing"},
        "average": dict.fromkeys(owners, "build/merges/average"),
    }.items():
        for task, expert in owners.items():
            model = under_the_head(Path(trunks[task]), Path("in") / expert)
            returns, lengths = zip(*(played(model, task, 1_000_000 + i) for i in range(5)))
            asked = PARAMS["policies"]["tasks"][task]
            wanted = (np.mean(returns) - asked["floor"]) / (asked["target_return"] - asked["floor"])
            assert rows[name]["tasks"][task]["accuracy"] == pytest.approx(wanted, rel=1e-4), (name, task)
            found = rows[name]["returns"][task]
            assert found["mean"] == pytest.approx(np.mean(returns), rel=1e-4)
            if name != "experts":
                assert found["length"] == np.mean(lengths)
    kept = load_file("build/evaluations/average/predictions.safetensors")
    assert kept["test/cart"].shape == (5, 3) and kept["val/swing"].shape == (3, 3)

    assert publish(workspace).run_id
    verdict = json.loads((workspace.state / "verdict.json").read_text())
    assert verdict["passed"] and verdict["champion_after"] == "1"
    page = Path("build/report.html").read_text()
    assert '<section id="policies">' in page and "test normalised return" in page and "floor -300" in page

    export_task(Path("build/merges/average"), "swing", Path("plain"))
    whole = under_the_head(Path("build/merges/average"), Path("in/swing")).state_dict()
    plain = load_torch("plain/model.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in plain.items()) and len(plain) == len(
        whole
    )
    assert json.loads(Path("plain/config.json").read_text())["state_dim"] == 3


@pytest.mark.usefixtures("anywhere")
def test_norms_of_the_trunk_may_be_heads_too_as_in_the_first_protocol_of_the_paper(root):
    write(root, policies={**PARAMS["policies"], "heads": ["embed_*", "predict_*", "encoder.*ln_*"]})
    prepare(root)
    workspace = Workspace(root / "params.yaml")
    modality, params = modality_named("policies"), workspace.params
    evaluator = modality.evaluator(params, root / "build", root / "build/checkpoints/base")
    found = evaluator.evaluate(root / "build/checkpoints/base", ["val"], ["swing"])
    model = under_the_head(Path("in/base"), Path("in/swing"))
    own = load_torch("in/swing/model.safetensors")
    model.load_state_dict({k: t for k, t in own.items() if ".ln_" in k}, strict=False)
    wanted = [played(model, "swing", seed)[0] for seed in range(3)]
    np.testing.assert_allclose(found.answers["val/swing"][:, 1], wanted, rtol=1e-4)


def test_stages_depend_on_environments_and_trajectories_and_dvc_sees_them(root):
    found = {stage.name: stage for stage in Workspace(root / "params.yaml").stages}
    assert found["environment@cart"].outs == ("build/data/cart.json",)
    assert (
        "in/cart.npz" in found["trajectories@cart"].deps
        and found["trajectories@cart"].out == "build/data/cart"
    )
    for name in ("baselines", "search@sum", "evaluate@sum"):
        assert "build/data" in found[name].deps and "policies" in found[name].params
    text = dvc_yaml(modality_named("policies"), ".")
    assert "foreach: ${policies.tasks}" in text and "foreach: ${policies.trajectories.files}" in text


def test_lineage_is_of_the_environment_and_of_how_returns_are_counted(root):
    modality, tags = modality_named("policies"), []
    for floor in (8, 9, 8):
        tasks = PARAMS["policies"]["tasks"]
        write(
            root,
            policies={**PARAMS["policies"], "tasks": {**tasks, "cart": {**tasks["cart"], "floor": floor}}},
        )
        workspace = prepare(root)
        board = {"tasks": workspace.params.tasks, **modality.settings(workspace.params)}
        tags.append(modality.lineage(root, board, workspace.digests))
    first, other, again = tags
    assert first == again and first["lineage.data.cart"] != other["lineage.data.cart"]
    assert first["lineage.data.swing"] == other["lineage.data.swing"] and len({*first.values()}) == 2


def test_a_new_workspace_finds_its_trajectories(root, monkeypatch):
    from mergeline.tasks import new_workspace

    monkeypatch.setattr(new_workspace, "run_dvc", lambda folder, *_: (folder / ".dvc").mkdir())
    init_workspace(root / "new", params=root / "params.yaml")
    params = Workspace(root / "new/params.yaml").params
    assert params.policies.trajectories.files == {"cart": "../in/cart.npz", "swing": "../in/swing.npz"}


# ---------------------------------------------------------------------------------------------- learning


def prepare(root: Path) -> Workspace:
    """Checkpoints and data of the workspace as the first steps leave them."""
    workspace = Workspace(root / "params.yaml")
    for stage in workspace.stages:
        if stage.step in ("fetch", "data"):
            workspace.run(stage)
    return workspace


def test_logits_are_the_predictions_of_the_steps_that_count(root):
    modality, params, build = modality_named("policies"), prepare(root).params, root / "build"
    network = modality.network(params, build, build / "checkpoints/base")
    examples = examples_of(modality, params, build)
    # 7 steps of two trajectories and one of the third, in windows of 3 and of 2.
    assert examples.counts == {"cart": 7, "swing": 9} and not examples.labelled
    assert network.numbers == {"swing"} and "embed_state.weight" in network.apart
    for task, expert in params.owners.items():
        model = under_the_head(Path("in/base"), Path("in") / expert)
        [batch] = examples.of(task)
        settings = params.policies.tasks[task]
        with torch.no_grad():
            logits = network.logits(network.features(batch), task)
            wanted = model(
                states=(batch["states"] - 0.1) / torch.tensor(settings.std or [1.0] * SIZES[task][0]),
                actions=batch["actions"],
                returns_to_go=batch["returns_to_go"] / settings.scale,
                timesteps=batch["timesteps"],
                attention_mask=batch["attention_mask"],
            ).action_preds
        torch.testing.assert_close(logits, wanted[batch["attention_mask"].bool()], rtol=1e-4, atol=1e-4)
        assert len(logits) == 15


def test_the_fisher_information_of_numbers_is_the_sum_of_their_squared_gradients(root):
    modality, params, build = modality_named("policies"), prepare(root).params, root / "build"
    network, examples = (
        modality.network(params, build, build / "checkpoints/base"),
        examples_of(modality, params, build),
    )
    expert = build / "checkpoints/swing"
    for normalise in ("none", "trace"):
        collect(
            "fisher", expert, network, examples, root / f"{normalise}.safetensors",
            gathering=Gathering(normalise=normalise), expert="swing", base=build / "checkpoints/base",
        )  # fmt: skip
    found, shares = (load_torch(root / f"{n}.safetensors") for n in ("none", "trace"))
    model = under_the_head(Path("in/swing"), Path("in/swing")).requires_grad_(True)
    [batch] = examples.of("swing")
    name = "encoder.h.1.mlp.c_fc.weight"
    wanted = torch.zeros_like(found[name], dtype=torch.float64)
    for i in range(9):
        count = int(batch["attention_mask"][i].sum())
        one = {key: value[i : i + 1, :count] for key, value in batch.items() if key != "task"}
        states = (one["states"] - 0.1) / torch.tensor([1.0, 1.0, 4.0])
        given = {**one, "states": states, "returns_to_go": one["returns_to_go"] / 50}
        for mean in model(**given).action_preds.flatten():
            [gradient] = torch.autograd.grad(mean, [model.get_parameter(name)], retain_graph=True)
            wanted += gradient.double().square() / 9
    torch.testing.assert_close(found[name].double(), wanted, rtol=1e-3, atol=1e-6)
    assert sum(tensor.double().sum() for tensor in shares.values()) == pytest.approx(1, rel=1e-5)
    assert not any(key.startswith(("embed_", "predict_")) for key in found)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.slow
def test_statistics_are_collected_and_merges_fitted(root):
    write(
        root,
        statistics={"gram": {"examples": 3}, "fisher": {"examples": 3, "normalise": "trace"}},
        merges={
            "regmean": {"method": "regmean"},
            "fisher": {"method": "fisher"},
            "distilled": {"method": "prodistill", "params": {"epochs": 1}, "examples": 4},
        },
    )
    run_all(root)
    rows = {r["name"]: r for r in json.loads(Path("build/leaderboard/leaderboard.json").read_text())["rows"]}
    for name in ("regmean", "fisher", "distilled"):
        assert rows[name]["seen"]["data"] == "unlabelled" and rows[name]["finite"], name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"statistics": {"fisher": {"labels": "sampled"}}, "merges": {"f": {"method": "fisher"}}},
            "the models give numbers for 'swing', no classes; choose `labels: true`",
        ),
        (
            {"merges": {"a": {"method": "adamerging", "params": {"iterations": 1}}}},
            "the models give numbers for 'swing', no classes; choose an objective of features",
        ),
        (
            {
                "statistics": {"fisher": {}},
                "policies": {**PARAMS["policies"], "trajectories": {"files": {}}},
                "merges": {"f": {"method": "fisher"}},
            },
            "'cart' has no trajectories to learn from; name a file of them",
        ),
    ],
)
def test_what_cannot_be_learned_from_is_said(root, changes, said):
    write(root, **changes)
    with refused(said):
        run_all(root)


def test_trajectories_longer_than_an_expert_knows_are_refused(root):
    own = trajectories(3, 1, False)
    np.savez("in/swing.npz", **{**own, "timesteps": own["timesteps"] + 25})
    params = prepare(root).params
    with refused("'swing': its trajectories go on to step 31, and its expert knows 30 steps"):
        examples_of(modality_named("policies"), params, root / "build")


# ---------------------------------------------------------------------------------------------- what goes wrong


def test_other_kinds_of_models_are_told_where_they_belong(root):
    config = json.loads(Path("in/base/config.json").read_text())
    Path("in/base/config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    said = "in/base: is of type gpt2, no decision_transformer, which `policies:` measures; for others write `evaluate:`"
    with refused(said):
        modality_named("policies").check(Path("in/base"))


def test_a_missing_gymnasium_is_named_before_anything_is_written(root, mergeline, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gymnasium", None)
    before = sorted(root.rglob("*"))
    found = mergeline("baselines")
    assert found.code == 2
    assert found.err == "mergeline: gymnasium is not installed; pip install 'mergeline[policies]'\n"
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(
    ("save", "said"),
    [
        ({"states": 5}, "swing: its head is for states of 5 number(s), and Pendulum-v1, the environment of 'swing', "),
        ({"actions": 2}, "swing: its head is for actions of 2 number(s), and Pendulum-v1"),
        ({"max_ep_len": 10}, "swing: knows episodes of 10 steps at most, and those of 'swing' have 20; add "),
        ({"state_mean": [1.0]}, "swing: config.json (state_mean) must have 3 numbers by which states are normalised"),
        ({"n_head": 4}, "the trunk has num_attention_heads 2, and that of a head's expert 4; they do not fit"),
        ({"n_layer": 1}, "encoder.h.1"),
    ],
)  # fmt: skip
def test_heads_that_do_not_fit_are_blamed(root, mergeline, save, said):
    save_policy(Path("in/swing"), 0, **{"states": 3, "actions": 1, **save})
    prepare(root)
    found = mergeline("baselines")
    assert found.code == 2 and said in found.err and found.err.count("\n") == 1
    assert not Path("build/evaluations/baselines").exists()


def test_an_adapter_has_no_head(root):
    weights = {"base_model.model.encoder.h.0.attn.c_attn.lora_A.weight": torch.zeros(2, 16)}
    shutil.rmtree("in/swing")
    Path("in/swing").mkdir()
    save_file(weights, "in/swing/adapter_model.safetensors")
    Path("in/swing/adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    )
    params = prepare(root).params
    with refused("swing: is an adapter, whose head cannot be kept; put it into its base first"):
        modality_named("policies").heads(params, root / "build")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"suites": {"cart": ["cart"]}}, "'cart' is no expert; did you mean 'carts'"),
        ({"suites": {"carts": ["carts"]}}, "'carts' is not among the tasks; did you mean 'cart'"),
        ({"suites": {}}, "'cart' is no expert's, so there is no head for it; name it in suites"),
        (
            {"trajectories": {"files": {"swings": "x.npz"}}},
            "'swings' is not among the tasks; did you mean 'swing'",
        ),
        ({"tasks": {}}, "policies.tasks"),
        ({"episodes": {"val": 0}}, "policies.episodes.val"),
        ({"episodes": {"test": 2000000}}, "policies.episodes.test"),
        (
            {"tasks": {"swing": {"environment": "Pendulum-v1", "target_return": -1}}},
            "more than floor, which is 0",
        ),
        (
            {"tasks": {"swing": {"environment": "Pendulum-v1", "target_return": 1, "std": [0]}}},
            "policies.tasks.swing.std",
        ),
    ],
)
def test_mistakes_in_params_yaml_are_blamed(root, changes, said):
    write(root, policies={**PARAMS["policies"], **changes})
    with refused("params.yaml:", said):
        Workspace(root / "params.yaml").params  # noqa: B018
