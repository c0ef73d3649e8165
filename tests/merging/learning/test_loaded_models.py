"""A network is given the weights of models one after the other, of adapters what they make of the base."""

from __future__ import annotations

import torch
from peft_adapters import llama, save_adapter

from mergeline.merging.learning.models import load_base, load_model
from mergeline.merging.learning.network import Network


def test_an_adapter_is_loaded_as_what_it_makes_of_the_base(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = save_adapter(llama(), tmp_path / "adapter")
    network = Network(llama().eval(), lambda module, batch: module(batch["ids"]).logits)
    name = "model.layers.1.mlp.down_proj.weight"
    load_model(network, tmp_path / "base", tmp_path / "adapter")
    torch.testing.assert_close(network.tensors()[name], adapted[name])
    assert not torch.equal(adapted[name], before[name])
    load_base(network, tmp_path / "base")
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.tensors().items() if key in before)
