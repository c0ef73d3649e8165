"""What Mergeline makes of mergekit's own recipes: the merges of its tests, and the files of its examples.

    python mergekit_recipes.py --checkout MERGEKIT --peer PEERS/mergekit --work FOLDER [--results mergekit_recipes]

CHECKOUT is a git checkout or a source distribution of mergekit, of the version in the environment PEERS/mergekit
(setup_peers.sh). Its tests run there, and every merge of theirs is recorded; of the examples, whose models have
billions of parameters, each model becomes a small Llama of as many layers. Mergeline then reads the same files.

Equal: the same tensors within rounding, the same number of layers and size of the vocabulary, the same tokens, the same
chat. Of what is drawn at random, which cannot be equal, names, shapes and dtypes are compared. `docs/mergekit.md` shows
the last counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from compare import Tensors
from measure import HERE, save

from mergeline.merging import merge
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.errors import UserError
from mergeline.merging.recipes.loading import load_recipe

_RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
# float32's rounding: mergekit computes norms and angles in it; of arcee_fusion the threshold, too, is noise there.
_NEAR, _NOISE = 5e-6, {"arcee_fusion": 2e-3}
_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "num_layers")


def record_tests(a: argparse.Namespace, into: Path) -> None:
    """Run mergekit's tests, and keep what they merge."""
    tests = [
        path
        for path in sorted((a.checkout / "tests").glob("test_*.py"))
        if "run_and_check_merge" in path.read_text()
    ]
    environment = {**os.environ, "RECORD_INTO": str(into), "PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"}
    command = [
        a.peer / "bin" / "python",
        "-m",
        "pytest",
        "-q",
        "-p",
        "peer_mergekit",
        f"--basetemp={a.work / 'models'}",
    ]
    subprocess.run([*command, *tests], cwd=a.checkout, env=environment, check=True)


def record_examples(a: argparse.Namespace, into: Path) -> None:
    """Merge the examples of small models."""
    for example in sorted((a.checkout / "examples").glob("*.yml")):
        config = yaml.safe_load(example.read_text())
        models = sorted(_models(config))
        layers = max([2, *_ends(config)])
        places = {model: str(a.work / "examples" / f"{example.stem}-{i}") for i, model in enumerate(models)}
        for number, place in enumerate(places.values()):
            _small_llama(Path(place), layers, number)
        text = yaml.safe_dump(_renamed(config, places), sort_keys=False)
        (a.work / f"{example.stem}.yml").write_text(text)
        command = [
            a.peer / "bin" / "python",
            HERE / "peer_mergekit.py",
            a.work / f"{example.stem}.yml",
            into / example.stem,
        ]
        subprocess.run(command, check=False)


def _models(part: Any) -> set[str]:
    """The models that a configuration names."""
    if isinstance(part, list):
        return {model for one in part for model in _models(one)}
    if not isinstance(part, dict):
        return set()
    own = {part[key] for key in ("model", "base_model") if isinstance(part.get(key), str)}
    return own | {model for value in part.values() for model in _models(value)}


def _ends(part: Any) -> list[int]:
    """Where the slices of a configuration end."""
    if isinstance(part, list):
        return [end for one in part for end in _ends(one)]
    if not isinstance(part, dict):
        return []
    return [*part.get("layer_range", [])[1:], *(end for value in part.values() for end in _ends(value))]


def _renamed(part: Any, places: dict[str, str]) -> Any:
    if isinstance(part, dict):
        return {k: places.get(v, v) if isinstance(v, str) else _renamed(v, places) for k, v in part.items()}
    return [_renamed(one, places) for one in part] if isinstance(part, list) else part


def _small_llama(place: Path, layers: int, seed: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers)).save_pretrained(place)


def outcome(folder: Path) -> tuple[str, str]:
    """`equal`, `refused`, `different`, `random` or `option`, and what is to say of it."""
    config = yaml.safe_load((folder / "mergekit.yml").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        option = "mergekit ran with --unsafe-truncate-embeddings, which no recipe says"
        truncated = (folder / "truncated").exists()
        try:
            plan = make_plan(load_recipe(folder / "mergekit.yml", Path))
            plan.check()
            merge(plan, out)
        except UserError as error:
            return ("option", option) if truncated else ("refused", str(error).replace(str(folder), ""))
        random = config["merge_method"] in _RANDOM
        if problem := _differs(folder / "expected", out, config["merge_method"]):
            return ("option", option) if truncated else ("random" if random else "different", problem)
        return ("random" if random else "equal"), ""


def _differs(expected: Path, out: Path, method: str) -> str | None:
    """What is not equal, in a sentence."""
    theirs, ours = Tensors(expected), Tensors(out)
    own = {_in_memory(name): name for name in ours.names()}
    left_out = sorted(set(own) - {*map(_in_memory, theirs.names())})
    if left_out and {*map(_in_memory, theirs.names())} < set(own):  # of models of several towers
        apart = [n for n in theirs.names() if not _near(theirs[n], ours[own[_in_memory(n)]], method)]
        return f"mergekit leaves {len(left_out)} tensors out, first {left_out[0]}; of the others {len(apart)} differ"
    lacking, more = (sorted(set(x.names()) - set(y.names())) for x, y in ((theirs, ours), (ours, theirs)))
    if lacking or more:
        return f"lacks {lacking[:2]} ({len(lacking)}), has {more[:2]} ({len(more)}) more"
    beyond = elements = 0
    largest = 0.0
    for name in theirs.names():
        a, b = theirs[name], ours[name]
        if a.shape != b.shape:
            return f"{name}: {tuple(b.shape)}, mergekit's {tuple(a.shape)}"
        apart = (a.double() - b.double()).abs() / a.double().abs().clamp(min=1.0)
        largest, elements = max(largest, float(apart.max())), elements + a.numel()
        beyond += int((apart > _NEAR).sum())
        if a.dtype != b.dtype:
            return f"{name}: {b.dtype}, mergekit's {a.dtype}"
    if method not in _RANDOM and beyond > _NOISE.get(method, 0.0) * elements:
        return f"{beyond} of {elements} elements are up to {largest:.1e} apart"
    return _config_differs(expected, out) or _tokenizer_differs(expected, out)


def _near(a: torch.Tensor, b: torch.Tensor, method: str) -> bool:
    beyond = (a.double() - b.double()).abs() > _NEAR * a.double().abs().clamp(min=1.0)
    return (
        method in _RANDOM or a.shape == b.shape and int(beyond.sum()) <= _NOISE.get(method, 0.0) * a.numel()
    )


def _in_memory(name: str) -> str:
    """A tensor's name in transformers 5, whose models of several towers are called otherwise on disk."""
    name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    return re.sub(r"^(vision_tower|multi_modal_projector)\.", r"model.\1.", name)


def _config_differs(expected: Path, out: Path) -> str | None:
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (expected, out))
    for key in (*_LAYERS_KEYS, "vocab_size"):
        if theirs.get(key) != ours.get(key):
            return f"config.json: {key} is {ours.get(key)}, mergekit's {theirs.get(key)}"
    return None


def _tokenizer_differs(expected: Path, out: Path) -> str | None:
    if not (expected / "tokenizer.json").is_file():
        return None
    from transformers import AutoTokenizer

    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (expected, out))
    if theirs.get_vocab() != ours.get_vocab():
        odd = sorted(set(theirs.get_vocab().items()) ^ set(ours.get_vocab().items()))
        return f"tokenizer: {len(odd)} tokens or ids differ, {odd[:3]}"
    talk = [{"role": role, "content": f"a {role}"} for role in ("user", "assistant", "user")]
    rendered = [t.chat_template and t.apply_chat_template(talk, tokenize=False) for t in (theirs, ours)]
    return f"tokenizer: {rendered[0]!r} and {rendered[1]!r}" if rendered[0] != rendered[1] else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, required=True, help="mergekit's source, with tests")
    parser.add_argument("--peer", type=Path, required=True, help="mergekit's virtual environment")
    parser.add_argument("--work", type=Path, required=True, help="where models and merges are kept")
    parser.add_argument("--again", action="store_true", help="take what was recorded into --work before")
    parser.add_argument("--results", default="mergekit_recipes", help="the name of the results' file")
    a = parser.parse_args()
    a.checkout, a.peer, a.work = a.checkout.resolve(), a.peer.absolute(), a.work.resolve()
    into = a.work / "recorded"
    if not a.again:
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        record_tests(a, into)
        record_examples(a, into)
    rows = []
    for folder in sorted(into.iterdir()):
        found, why = outcome(folder)
        test = (folder / "test.txt").read_text()
        name = Path(test).name if test.endswith(".yml") else test.rpartition("::")[2]
        rows.append({"merge": folder.name, "of": name, "outcome": found, "why": why})
        print(f"{folder.name}  {found:9}  {name}  {why}", flush=True)
    save(a.results, rows, ("merge",))
    print(dict(Counter(row["outcome"] for row in rows)))


if __name__ == "__main__":
    main()
