"""Adapters of tasks and routers as files: what they compute, and what is refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mergeline.merging.checkpoints.router import Router, described, read_router, write_router
from mergeline.merging.checkpoints.task_adapters import (
    TaskAdapter,
    read_task_adapter,
    refuse_other_merge,
    write_task_adapter,
)
from mergeline.merging.errors import UserError

D = 6
LINEAR = {"matrix": torch.randn(D, D), "offset": torch.randn(D)}
SURGERY = {"down": torch.randn(2, D), "up": torch.randn(D, 2)}
FEATURES = torch.randn(5, D)


def damage(path: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of a file (None: take them out), whose metadata stay."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: t for name, t in {**load_file(path), **changes}.items() if t is not None}
    save_file(tensors, path, metadata)


def written(folder: Path, kind: str, tensors: dict[str, torch.Tensor]) -> TaskAdapter:
    path = folder / "digits.safetensors"
    write_task_adapter(path, TaskAdapter(kind, "digits", "sha256:merge", tensors))
    return read_task_adapter(path, "digits")


def test_features_are_corrected_by_the_formula_of_their_kind(tmp_path):
    linear = written(tmp_path, "linear", LINEAR).features(FEATURES)
    torch.testing.assert_close(linear, FEATURES + FEATURES @ LINEAR["matrix"].T + LINEAR["offset"])
    surgery = written(tmp_path, "surgery", SURGERY).features(FEATURES)
    torch.testing.assert_close(surgery, FEATURES - torch.relu(FEATURES @ SURGERY["down"].T) @ SURGERY["up"].T)


def test_blocks_are_corrected_where_they_are_and_only_meanwhile(tmp_path):
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    inside = {"1/down": SURGERY["down"], "1/up": SURGERY["up"]}
    adapter = written(tmp_path, "surgery_v2", inside)
    plain = model(FEATURES)
    with adapter.inside(model):
        found = model(FEATURES)
    torch.testing.assert_close(
        found, plain - torch.relu(plain @ SURGERY["down"].T) @ SURGERY["up"].T, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(model(FEATURES), plain)
    with (
        pytest.raises(UserError, match="corrects '1', which the model has not"),
        adapter.inside(nn.Linear(1, 1)),
    ):
        pass


def test_what_is_for_another_task_merge_or_width_is_refused(tmp_path):
    adapter = written(tmp_path, "linear", LINEAR)
    with pytest.raises(UserError, match="is the adapter of 'digits', not of 'shapes'"):
        read_task_adapter(adapter.file, "shapes")
    with pytest.raises(UserError, match="made for another merge .sha256:merge. than this one .sha256:other."):
        refuse_other_merge(adapter, "sha256:other")
    with pytest.raises(UserError, match="corrects features of width 6, and the model's have 7"):
        adapter.features(torch.zeros(2, 7))


@pytest.mark.parametrize(
    "change",
    [
        {"matrix": torch.zeros(D, D + 1)},
        {"matrix": None},
        {"more": torch.zeros(1)},
        {"offset": torch.full((D,), float("inf"))},
        {"offset": torch.zeros(D, dtype=torch.int64)},
    ],
)
def test_a_damaged_adapter_is_refused(tmp_path, change):
    adapter = written(tmp_path, "linear", LINEAR)
    damage(adapter.file, **change)
    with pytest.raises(UserError, match="digits.safetensors: is no adapter of a known kind, or was damaged"):
        read_task_adapter(adapter.file, "digits")


def test_any_other_file_is_no_adapter_and_no_router(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="is no adapter of a task; `mergeline fit` makes one"):
        read_task_adapter(tmp_path / "other.safetensors", "other")
    with pytest.raises(UserError, match="is no router of a store; `mergeline fit` makes one"):
        read_router(tmp_path / "other.safetensors", ["a"])


def test_what_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(UserError, match="'digits' is not finite"):
        written(tmp_path, "linear", {**LINEAR, "offset": torch.full((D,), float("nan"))})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- routers


class Tokens(nn.Module):
    """Two maps of tokens, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())[:, 0]


def routed(folder: Path, kind: str, tensors: dict[str, torch.Tensor], layers: list[str]) -> Router:
    path = folder / "router.safetensors"
    write_router(path, Router(kind, ["a", "b"], "sha256:base", layers, tensors))
    return read_router(path, ["a", "b"])


def test_the_residual_of_the_first_token_outside_of_each_basis_decides(tmp_path):
    model, x = Tokens(), torch.randn(4, 3, D)
    basis = torch.stack([torch.linalg.qr(torch.randn(D, 2)).Q.T for _ in range(2)])
    router = routed(tmp_path, "residual", {"first/basis": basis, "second/basis": basis}, ["first", "second"])
    hidden = model.first(x).relu()
    expected = torch.zeros(4, 2)
    for token in (x[:, 0], hidden[:, 0]):
        for e in range(2):
            left = token - token @ basis[e].T @ basis[e]
            expected[:, e] -= torch.log(left.square().sum(1) / token.square().sum(1))
    found = router.scores(model, lambda: model(x))
    torch.testing.assert_close(found.float(), expected.detach(), rtol=1e-4, atol=1e-4)


def test_a_discriminant_sees_first_tokens_and_means_of_every_layer(tmp_path):
    model, x = Tokens(), torch.randn(4, 3, D)
    weight, offset = torch.randn(2, 4 * D), torch.randn(2)
    router = routed(tmp_path, "features", {"weight": weight, "offset": offset}, ["first", "second"])
    hidden = model.first(x).relu()
    seen = torch.cat([x[:, 0], x.mean(1), hidden[:, 0], hidden.mean(1)], 1)
    torch.testing.assert_close(described([x, hidden]).float(), seen)
    found = router.scores(model, lambda: model(x)).float()
    torch.testing.assert_close(found, (seen @ weight.T + offset).detach(), rtol=1e-4, atol=1e-4)


def test_a_router_of_other_experts_layers_or_shapes_is_refused(tmp_path):
    tensors = {"weight": torch.zeros(2, 4 * D), "offset": torch.zeros(2)}
    router = routed(tmp_path, "features", tensors, ["first", "second"])
    with pytest.raises(UserError, match="chooses among a, b, and the store holds a, c"):
        read_router(router.file, ["a", "c"])
    with pytest.raises(UserError, match="looks at 'first', which the model has not"):
        router.scores(nn.Linear(1, 1), lambda: None)
    with pytest.raises(UserError, match="is for models of another width"):
        routed(tmp_path, "features", tensors, ["first"]).scores(
            model := Tokens(), lambda: model(torch.zeros(1, 2, D))
        )
    damage(router.file, weight=torch.zeros(3, 4))
    with pytest.raises(UserError, match="is no router of a known kind, or was damaged"):
        read_router(router.file, ["a", "b"])
