"""Decision Transformers as transformers opens them: the head of a task on a trunk, and the actions of both.

Shape suffixes: B episodes, T steps, s numbers of a state, A of an action, d width of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Collection, Mapping

from mergeline.evaluation.policies.environments import Facts
from mergeline.evaluation.policies.settings import Task
from mergeline.evaluation.pretrained import load_pretrained, refuse_corrections
from mergeline.merging.checkpoints.companions import CONFIG
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_KIND = "decision_transformer"
# What tensors do not say of a trunk: a head learned with its expert's.
_TRUNK = (
    "num_attention_heads",
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
)


def refuse_other_kinds(folder: Path) -> None:
    """Raises UserError if a checkpoint's configuration does not say that it is a Decision Transformer."""
    kind = read_object(folder / CONFIG).get("model_type", "unknown")
    if kind != _KIND:
        raise UserError(
            f"{folder}: is of type {kind}, no {_KIND}, which `policies:` measures; for others write `evaluate:`"
        )


def load_model(folder: Path, device: str = "cpu", heads: Collection[str] = ()) -> Any:
    """The Decision Transformer of a folder, in eval mode.

    heads: names of tensors that it may lack, as a merge does.

    Raises:
        UserError: it is of another kind, or does not open; beside it lies what corrects it for tasks.
    """
    refuse_corrections(folder)
    refuse_other_kinds(folder)
    return load_pretrained(folder, "DecisionTransformerModel", device=device, may_lack=sorted(heads))


class Policy:
    """The head of an expert, for one task, on whatever trunk it is put.

    model: the expert. heads: the names of its tensors that are its own. facts: what the environment takes and gives.

    Raises:
        UserError: the head is for other states or actions, or for shorter episodes; its normalisation does not fit.
    """

    def __init__(self, name: str, task: Task, facts: Facts, model: Any, heads: Collection[str], where: Path):
        import torch

        config = model.config
        for what, own, asked in (
            ("states", config.state_dim, facts.states),
            ("actions", config.act_dim, facts.actions),
        ):
            if own != asked:
                raise UserError(
                    f"{where}: its head is for {what} of {own} number(s), and {task.environment}, the environment of "
                    f"'{name}', has {asked}"
                )
        if facts.steps > config.max_ep_len:
            raise UserError(
                f"{where}: knows episodes of {config.max_ep_len} steps at most, and those of '{name}' have "
                f"{facts.steps}; add max_steps: {config.max_ep_len}"
            )
        self.task, self.facts, self.model = task, facts, model
        device = model.embed_return.weight.device
        ways = {"mean": ("state_mean", 0.0), "std": ("state_std", 1.0)}
        self.mean, self.std = (
            torch.tensor(
                _normaliser(getattr(task, key), config, own, usual, facts.states, where), device=device
            )
            for key, (own, usual) in ways.items()
        )
        if not bool((self.std > 0).all()):
            raise UserError(
                f"{where}: its state_std must be more than 0 in {CONFIG}; write std in params.yaml"
            )
        parameters = dict(model.named_parameters())
        self._inside = {name: parameters[name].detach() for name in heads if name.startswith("encoder.")}

    def put_on(self, trunk: Any) -> None:
        """From now on this head is run on the trunk of another model, which both share.

        Raises:
            UserError: it is another kind of trunk.
        """
        for key in _TRUNK:
            own, other = (getattr(model.config, key) for model in (self.model, trunk))
            if own != other:
                raise UserError(
                    f"the trunk has {key} {other}, and that of a head's expert {own}; they do not fit"
                )
        self.model.encoder = trunk.encoder
        parameters = dict(self.model.named_parameters())
        for name, tensor in self._inside.items():
            parameters[name].data = tensor

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The last hidden states at the states of a batch, (B, T, d), from which actions are predicted.

        batch: "states" (B, T, s), "actions" (B, T, A), "returns_to_go" (B, T, 1), all as the environment has them,
        "timesteps" int64 (B, T), and maybe "attention_mask" (B, T).
        """
        import torch

        timesteps = batch["timesteps"]
        mask = batch.get("attention_mask")
        found = self.model(
            states=(batch["states"] - self.mean) / self.std,
            actions=batch["actions"],
            returns_to_go=batch["returns_to_go"] / self.task.scale,
            timesteps=timesteps,
            attention_mask=torch.ones_like(timesteps) if mask is None else mask,
            return_dict=True,
        )
        return found.last_hidden_state[:, 1::3]

    def predicted(self, hidden: Tensor) -> Tensor:
        """What the head makes of hidden states (..., d): (..., A), logits of discrete actions."""
        return self.model.predict_action(hidden)

    def next_actions(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """What is predicted for the last step of each episode, float32 (B, A); `batch` as in `hidden`, float32."""
        import torch

        given = {key: torch.from_numpy(value).to(self.mean.device) for key, value in batch.items()}
        with torch.inference_mode():
            return self.predicted(self.hidden(given)[:, -1]).float().cpu().numpy()


def _normaliser(
    given: list[float] | None, config: Any, key: str, usual: float, states: int, where: Path
) -> list[float]:
    """Numbers by which states are normalised: of params.yaml, or of the configuration."""
    found = given if given is not None else getattr(config, key, None)
    if found is None:
        return [usual] * states
    if (
        not isinstance(found, list)
        or len(found) != states
        or not all(isinstance(x, int | float) for x in found)
    ):
        place = "params.yaml" if given is not None else f"{CONFIG} ({key})"
        raise UserError(f"{where}: {place} must have {states} numbers by which states are normalised")
    return [float(x) for x in found]
