import json
import shutil

import numpy as np
import pytest
import torch
from places import SAMPLES
from safetensors.torch import load_file, save_file
from soon import soon

from mergeline.evaluation import datasets
from mergeline.evaluation.clip.suite import load_suite
from mergeline.evaluation.clip.zero_shot import Evaluator, batches, build_heads, load_config
from mergeline.evaluation.state import load_state
from mergeline.merging.errors import UserError

BASE = SAMPLES / "base"
SUITE = load_suite(SAMPLES / "suite.yaml")
FEW = ["digits", "shapes"]

# Test accuracy on all images, from the README of the sample family.
ZERO_SHOT = {"fashion": 0.714, "digits": 0.266, "latin": 0.435, "hiragana": 0.306}
ZERO_SHOT |= {"arabic": 0.549, "cyrillic": 0.340, "textures": 0.364, "shapes": 0.206}
EXPERT = {"fashion": 0.833, "digits": 0.973, "latin": 0.895, "hiragana": 0.969}
EXPERT |= {"arabic": 0.884, "cyrillic": 0.926, "textures": 0.946, "shapes": 0.994}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for task in SUITE.tasks:
        datasets.prepare(str(SAMPLES / f"data/{task}.npz"), root / task, 36)
    return {task: datasets.load(root / task) for task in SUITE.tasks}


@pytest.fixture(scope="module")
def heads():
    return build_heads(BASE, SUITE, {})


@pytest.fixture(scope="module")
def evaluator(heads, data):
    return Evaluator(BASE, heads, data)


def expert(task):
    return load_state(SAMPLES / f"experts/{task}.safetensors")


def accuracy(predictions, data, split):
    return {task: (classes == data[task].split(split)[1]).mean() for task, classes in predictions.items()}


def test_heads_are_unit_vectors_one_a_class(heads):
    for task, head in heads.items():
        assert head.shape == (len(SUITE.tasks[task].classnames), 128) and head.dtype == torch.float32
        torch.testing.assert_close(head.norm(dim=1), torch.ones(len(head)))


def changed_base(folder, **text):
    """The base with other settings of its text tower."""
    shutil.copytree(BASE, folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= text
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def test_code_of_a_tokenizer_is_not_run(tmp_path, monkeypatch):
    """Not even where the checkpoint's own settings say that its code is to be trusted."""
    base = changed_base(
        tmp_path / "base", hf_tokenizer_name="org/evil", tokenizer_kwargs={"trust_remote_code": True}
    )
    own = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(own))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("it asks whether to run code"))
    with pytest.raises(UserError, match="its tokenizer does not open"):
        build_heads(base, SUITE, {})
    assert not (tmp_path / "ran").exists()


def test_a_text_tower_of_a_hub_is_refused(tmp_path):
    with pytest.raises(UserError, match="text_cfg takes 'org/evil' from a hub"):
        build_heads(changed_base(tmp_path / "base", hf_model_name="org/evil"), SUITE, {})


@pytest.mark.parametrize("layers", [10**9, [1, 10**9]])
def test_layers_without_weights_are_not_built(layers, tmp_path):
    with soon(), pytest.raises(UserError, match="layers is .* and the weights have .* tensors"):
        build_heads(changed_base(tmp_path / "base", layers=layers), SUITE, {})


def test_heads_follow_the_protocol(heads):
    """Normalise each template's features, average, normalise."""
    import open_clip

    model = open_clip.CLIP(**load_config(BASE)["model_cfg"]).eval()
    model.load_state_dict(load_state(BASE))
    tokenizer = open_clip.get_tokenizer(f"local-dir:{BASE}")
    texts = tokenizer([template.format("star") for template in SUITE.tasks["shapes"].templates])
    with torch.inference_mode():
        mean = model.encode_text(texts, normalize=True).mean(0)
    torch.testing.assert_close(heads["shapes"][3], mean / mean.norm(), atol=1e-6, rtol=0)


def test_class_names_of_the_dataset_fill_in_for_the_suite(heads):
    spec = SUITE.tasks["shapes"]
    unnamed = SUITE.model_copy(update={"tasks": {"shapes": spec.model_copy(update={"classnames": None})}})
    filled = build_heads(BASE, unnamed, {"shapes": spec.classnames})
    torch.testing.assert_close(filled["shapes"], heads["shapes"])
    with pytest.raises(UserError, match="shapes: the dataset names no classes"):
        build_heads(BASE, unnamed, {"shapes": None})


def test_zero_shot_accuracies_are_those_of_the_sample_family(evaluator, data):
    assert accuracy(evaluator.predict({}, "test", list(data)), data, "test") == pytest.approx(
        ZERO_SHOT, abs=0.006
    )


def test_expert_accuracies_are_those_of_the_sample_family(evaluator, data):
    scores = {}
    for task in EXPERT:
        scores |= accuracy(evaluator.predict(expert(task), "test", [task]), data, "test")
    assert scores == pytest.approx(EXPERT, abs=0.006)


def test_predictions_are_those_of_open_clip(evaluator, heads, data):
    import open_clip

    model = open_clip.CLIP(**load_config(BASE)["model_cfg"]).eval()
    model.load_state_dict(load_state(BASE) | expert("digits"))
    x = torch.tensor(data["digits"].split("val")[0]).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        scores = model.encode_image((x - 0.5) / 0.25, normalize=True) @ heads["digits"].T
    predicted = evaluator.predict(expert("digits"), "val", ["digits"])["digits"]
    assert predicted.dtype == np.int32
    best, chosen = scores.max(1).values, scores[range(len(scores)), predicted]
    torch.testing.assert_close(chosen, best, atol=1e-5, rtol=0)


def test_nothing_of_an_earlier_model_stays(evaluator):
    first = evaluator.predict({}, "val", FEW)
    half = {name: value for name, value in expert("shapes").items() if "resblocks.1." in name}
    changed = evaluator.predict(half, "val", FEW)
    again = evaluator.predict({}, "val", FEW[::-1])
    assert any((first[t] != changed[t]).any() for t in FEW)
    assert all(np.array_equal(first[t], again[t]) for t in FEW)


def test_a_whole_checkpoint_of_any_float_type_can_be_measured(evaluator):
    whole = {name: value.double() for name, value in (load_state(BASE) | expert("digits")).items()}
    one, other = (
        evaluator.predict(state, "val", ["digits"])["digits"] for state in (whole, expert("digits"))
    )
    assert np.array_equal(one, other)


def test_an_image_tower_alone_is_base_enough(tmp_path, heads, data, evaluator):
    shutil.copy(BASE / "open_clip_config.json", tmp_path)
    shutil.copy(SAMPLES / "experts/digits.safetensors", tmp_path / "model.safetensors")
    alone = Evaluator(tmp_path, heads, {"digits": data["digits"]}).predict({}, "val", ["digits"])
    assert np.array_equal(alone["digits"], evaluator.predict(expert("digits"), "val", ["digits"])["digits"])
    with pytest.raises(UserError, match="'ln_final.bias' is missing"):
        build_heads(tmp_path, SUITE, {})


def test_batches_are_all_examples_in_their_order(data):
    labels = torch.cat([batch["labels"] for batch in batches(BASE, data["shapes"], "val", "shapes")])
    assert np.array_equal(labels, data["shapes"].split("val")[1])


def test_towers_that_are_read_out_elsewhere_are_left_alone():
    import open_clip

    from mergeline.evaluation.clip.zero_shot import _skip_unused_tokens

    config = json.loads(json.dumps(load_config(BASE)["model_cfg"]))
    images = torch.randn(3, 3, 36, 36)
    for change in (
        {},
        {"pool_type": "avg"},
        {"attentional_pool": True},
        {"ls_init_value": 0.5},
        {"qk_norm": True},
    ):
        config["vision_cfg"] |= change
        visual = open_clip.CLIP(**config).eval().visual
        with torch.inference_mode():
            before = visual(images)
            _skip_unused_tokens(visual)
            torch.testing.assert_close(visual(images), before, atol=1e-5, rtol=1e-5)


def test_tensors_that_do_not_belong_are_named(evaluator):
    zero = torch.zeros(1)
    with pytest.raises(UserError, match="no tensor 'visual.pro'; did you mean 'visual.proj'"):
        evaluator.predict({"visual.pro": zero}, "val", FEW)
    with pytest.raises(UserError, match=r"'visual.proj' is \(1,\), in the base \(192, 128\)"):
        evaluator.predict({"visual.proj": zero}, "val", FEW)


def test_heads_and_data_must_fit_the_model(tmp_path, heads, data):
    one = {"shapes": data["shapes"]}
    with pytest.raises(UserError, match="shapes: there is no head"):
        Evaluator(BASE, {}, one)
    with pytest.raises(UserError, match="64 dimensions, the model 128"):
        Evaluator(BASE, {"shapes": torch.zeros(12, 64)}, one)
    with pytest.raises(UserError, match="label 11 in val, but the suite names 5 classes"):
        Evaluator(BASE, {"shapes": heads["shapes"][:5]}, one)
    datasets.prepare(str(SAMPLES / "data/digits.npz"), tmp_path / "small", 24)
    with pytest.raises(UserError, match=r"images are \(24, 24\), the model takes \(36, 36\)"):
        Evaluator(BASE, heads, {"digits": datasets.load(tmp_path / "small")})


# Files


def write_base(folder, config=None, state=None):
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(config or (BASE / "open_clip_config.json").read_text())
    save_file(state or load_file(BASE / "model.safetensors"), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "config, expected",
    [
        ("{", "not valid JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "'model_cfg' must hold"),
        (
            '{"model_cfg": {"embed_dim": 128, "vision_cfg": {"witdh": 3}, "text_cfg": {}}}',
            "unexpected keyword",
        ),
        ('{"model_cfg": {"embed_dim": 128, "vision_cfg": 1, "text_cfg": 2}}', "no model of open_clip"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path, config, expected):
    with pytest.raises(UserError, match=expected) as error:
        Evaluator(write_base(tmp_path / "base", config), {}, {})
    assert "open_clip_config.json" in str(error.value) and "\n" not in str(error.value)


def test_a_base_must_fit_its_configuration(tmp_path):
    state = load_file(BASE / "model.safetensors")
    with pytest.raises(UserError, match="has no tensor 'visual.extra'"):
        Evaluator(write_base(tmp_path / "a", state=state | {"visual.extra": torch.zeros(1)}), {}, {})
    with pytest.raises(UserError, match=r"'visual.proj' is \(2,\), by open_clip_config.json \(192, 128\)"):
        Evaluator(write_base(tmp_path / "b", state=state | {"visual.proj": torch.zeros(2)}), {}, {})


def test_a_model_that_is_no_clip_is_refused(tmp_path):
    save_file({"blocks.0.attn.qkv.weight": torch.ones(6, 2)}, tmp_path / "model.safetensors")
    said = "has no open_clip_config.json; only CLIP models of open_clip are evaluated"
    with pytest.raises(UserError, match=said):
        Evaluator(tmp_path, {}, {})


def test_shards_are_put_together(tmp_path):
    state = expert("digits")
    names = sorted(state)
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: state[name] for name in names if weight_map[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    loaded = load_state(tmp_path)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in names)

    index.write_text(json.dumps({"weight_map": weight_map | {"gone": "part-0.safetensors"}}))
    with pytest.raises(UserError, match="'gone' is in 'part-0.safetensors', where it is not"):
        load_state(tmp_path)
    for bad in ("../part-0.safetensors", "/etc/passwd", "part-0.bin", "."):
        index.write_text(json.dumps({"weight_map": {"a": bad}}))
        with pytest.raises(UserError, match="only plain file names|which is missing"):
            load_state(tmp_path)
    index.write_text(json.dumps({"weight_map": ["part-0.safetensors"]}))
    with pytest.raises(UserError, match="is not a shard index"):
        load_state(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x00" * 100])
def test_damaged_weights_are_named(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors: (the header does not fit|malformed)"):
        load_state(tmp_path)
    with pytest.raises(UserError, match="needs model.safetensors"):
        load_state(tmp_path.parent)
