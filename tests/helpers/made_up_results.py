"""Results of a pipeline as its steps leave them, made up."""

import itertools


def made_up(tasks=("digits", "shapes", "latin"), merges=("average", "ties", "cart"), experts=None):
    """Results as the steps leave them: arguments of `draw_all`. `experts`: tasks that have one (all)."""
    experts = tasks if experts is None else experts
    merged = experts or ["other"]
    own = {task: 0.9 + 0.01 * i for i, task in enumerate(experts)}

    def row(name, kind, accuracy):
        mean = sum(accuracy.values()) / len(accuracy)
        scores = {
            task: {"accuracy": a, "lower": a - 0.03, "upper": a + 0.03, "n": 400, "normalised": None}
            for task, a in accuracy.items()
        }
        for task in own.keys() & scores.keys():
            scores[task]["normalised"] = accuracy[task] / own[task]
        known = [score["normalised"] for score in scores.values() if score["normalised"] is not None]
        return {
            "name": name,
            "kind": kind,
            "val_mean": mean,
            "mean": mean,
            "lower": mean - 0.01,
            "upper": mean + 0.01,
            "normalised": sum(known) / len(known) if known else None,
            "worst_task": min(accuracy.values()),
            "tasks": scores,
        }

    def merge(name, i):
        found = searches[name]
        facts = {"method": name, "params": found["chosen"], "searched": len(found["points"])}
        facts |= {"digest": f"sha256:{i:064x}", "bytes": 10_456_320, "norm_ratio": 1.5, "finite": True}
        accuracy = {task: 0.4 + 0.2 * i / len(merges) + 0.01 * j for j, task in enumerate(tasks)}
        return row(name, "merge", accuracy) | facts

    searches = {name: search(name) for name in merges}
    rows = [row("base", "base", {task: 0.3 for task in tasks})]
    rows += [row("experts", "experts", own)] if own else []
    rows += [merge(name, i) for i, name in enumerate(merges)]
    board = {
        "pipeline": "sample",
        "measure": "accuracy",
        "tasks": list(tasks),
        "candidate": merges[-1],
        "rows": rows,
        "pairs": [
            {"a": a, "b": b, "difference": -0.05, "lower": -0.06, "upper": -0.04, "p": 0.0001}
            for a, b in itertools.combinations(merges, 2)
        ],
        "lineage": {
            "base": {"name": "base", "source": "samples/base", "digest": f"sha256:{7:064x}"},
            "experts": {name: {"source": f"samples/{name}", "digest": f"sha256:{8:064x}"} for name in merged},
        },
    }
    return {"leaderboard": board, "searches": searches, "description": description(merged)}


def search(name):
    """cart searched rank and scale, ties searched scale, other names nothing; the best mean is 0.7."""
    grids = {"cart": {"rank": [0.04, 0.16, 0.64], "scale": [1.0, 2.0]}, "ties": {"scale": [0.5, 1.0, 2.0]}}
    chosen = {"cart": {"rank": 0.16, "scale": 2.0}, "ties": {"scale": 1.0}}.get(name, {})
    points = []
    for values in itertools.product(*grids[name].values()) if chosen else ():
        params = dict(zip(chosen, values))
        mean = 0.7 - sum(abs(params[key] - chosen[key]) for key in chosen) / 10
        points.append({"params": params, "mean": mean, "tasks": {}})
    return {"method": name, "points": points, "chosen": chosen}


def description(experts):
    count = len(experts)
    return {
        "reference": "pretrained",
        "experts": {
            name: {
                "norm": 7.0,
                "relative_norm": 0.05,
                "alignment_with_base": 0.998,
                "energy_by_block": {"outside blocks": 0.1, "block 0": 0.9},
                "energy_in_leading_directions": {"0.01": 0.2, "1": 1.0},
            }
            for name in experts
        },
        "cosine": [[1.0 if i == j else 0.02 * (i + j) for j in range(count)] for i in range(count)],
        "sign_conflict": [[0.0 if i == j else 0.49 for j in range(count)] for i in range(count)],
        "tensor_norms": {},
    }
