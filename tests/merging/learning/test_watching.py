"""What is seen of a model while it runs: every linear map of the libraries' own models, with its inputs and outputs."""

from __future__ import annotations

from typing import Any, Callable

import pytest
import torch

from mergeline.merging.learning.watching import Applied, watched


def open_clip_tower() -> tuple[Any, Any]:
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(16, 8, 32, 2, 2, 2.0, output_dim=12), (torch.randn(3, 3, 16, 16),)


def timm_tower() -> tuple[Any, Any]:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(16, 8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    return model, (torch.randn(3, 3, 16, 16),)


def resnet() -> tuple[Any, Any]:
    from torchvision.models import resnet18

    return resnet18(num_classes=5), (torch.randn(2, 3, 32, 32),)


def transformers_model(kind: str) -> tuple[Any, Any]:
    import transformers as t

    size = {"vocab_size": 19, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "gpt2":
        config: Any = t.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, **size)
        model: Any = t.GPT2Model(config)
    else:
        size |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        if kind == "llama":
            model = t.LlamaModel(t.LlamaConfig(num_key_value_heads=1, **size))
        elif kind == "bert":
            model = t.BertModel(t.BertConfig(**size))
        else:
            config = t.MixtralConfig(num_key_value_heads=1, num_local_experts=3, **size)
            config._experts_implementation = "eager"
            model = t.MixtralModel(config)
    return model, (torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]),)


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "open_clip": open_clip_tower,
    "timm": timm_tower,
    "resnet": resnet,
    "gpt2": lambda: transformers_model("gpt2"),
    "llama": lambda: transformers_model("llama"),
    "bert": lambda: transformers_model("bert"),
    "mixtral": lambda: transformers_model("mixtral"),
}
UNSEEN = {"class_embedding", "cls_token", "pos_embed", "positional_embedding"}  # added, not multiplied


@pytest.mark.parametrize("kind", MODELS)
def test_every_linear_map_is_seen_with_what_it_takes_and_gives(kind):
    torch.manual_seed(0)
    model, inputs = MODELS[kind]()
    model.eval().requires_grad_(False)
    tensors = dict(model.named_parameters())
    seen: list[Applied] = []
    expected = model(*inputs)
    with watched(tensors, seen.append):
        found = model(*inputs)
    for a, b in zip(_tensors(expected), _tensors(found)):
        torch.testing.assert_close(a, b)
    assert {use.tensor for use in seen} == {
        name for name, p in tensors.items() if p.ndim > 1 and name.split(".")[-1] not in UNSEEN
    }
    for use in seen:
        weight = tensors[use.tensor] if use.part is None else tensors[use.tensor][use.part]
        bias = tensors.get(use.tensor.removesuffix("weight") + "bias")
        if use.kind == "embedding":
            product = weight[use.inputs]
        elif use.kind == "convolution":
            product = use.inputs @ weight.flatten(1).T + (0 if bias is None else bias)
        else:
            matrix = (
                weight if use.inputs.shape[-1] == weight.shape[0] and _transposed(use.tensor) else weight.T
            )
            product = use.inputs @ matrix + (0 if bias is None or use.part is not None else bias)
        torch.testing.assert_close(product, use.outputs, rtol=1e-4, atol=1e-5)


def test_a_slice_of_packed_experts_is_known_by_its_number():
    torch.manual_seed(0)
    model, inputs = MODELS["mixtral"]()
    seen: list[Applied] = []
    with watched(dict(model.eval().named_parameters()), seen.append), torch.no_grad():
        model(*inputs)
    parts = {use.part for use in seen if "experts" in use.tensor}
    assert parts <= {0, 1, 2} and len(parts) > 1


def test_attention_with_masks_is_the_one_of_torch():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(3, 5, 16)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(5)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    for masks in ({"attn_mask": causal}, {"key_padding_mask": padding}, {"attn_mask": causal < 0}):
        expected = attention(x, x, x, need_weights=False, **masks)[0]
        seen: list[Applied] = []
        with watched(dict(attention.named_parameters()), seen.append):
            found = attention(x, x, x, need_weights=False, **masks)[0]
        torch.testing.assert_close(expected, found)
        assert [use.tensor for use in seen] == ["in_proj_weight", "out_proj.weight"]


@pytest.mark.parametrize("kind", ["open_clip", "llama", "gpt2"])
def test_what_is_known_of_a_map_is_taken_and_nothing_else_changes(kind):
    torch.manual_seed(0)
    model, inputs = MODELS[kind]()
    model.eval().requires_grad_(False)
    tensors = dict(model.named_parameters())
    seen: dict[str, Applied] = {}
    with watched(tensors, lambda use: seen.update({use.tensor: use})):
        expected = model(*inputs)
    asked: list[str] = []
    last = [use.tensor for use in seen.values() if use.kind == "linear"][-1]

    def known(name: str, x: torch.Tensor) -> torch.Tensor | None:
        assert torch.equal(x, seen[name].inputs)
        asked.append(name)
        return None if name == last else seen[name].outputs

    for name, tensor in tensors.items():
        if name in seen and seen[name].kind == "linear" and name != last:
            tensor.zero_()  # whose outputs are not computed
    with watched(tensors, lambda use: None, known):
        found = model(*inputs)
    assert asked == [use.tensor for use in seen.values() if use.kind == "linear"]
    for a, b in zip(_tensors(expected), _tensors(found)):
        assert torch.equal(a, b)


def _transposed(name: str) -> bool:
    return ".c_" in name or name == "proj"


def _tensors(output: Any) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else [output.last_hidden_state]
