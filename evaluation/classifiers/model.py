"""A classifier of several tasks: one trunk, and a head for each task, as the libraries that made it build it.

Which library builds it:
    transformers    config.json has a `model_type`; the class is that of its task (AutoModelForImageClassification ...)
    timm            config.json has an `architecture` of timm's
    torchvision     `torchvision/NAME`, for its checkpoints do not say what they are
    timm            `timm/NAME`, where the checkpoint does not say it

Shape suffixes: B examples of a batch, C classes, d width of what the head takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping

from mergeline.evaluation.state import fill, load_state, refuse_unfounded_layers
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.companions import CONFIG
from mergeline.merging.checkpoints.heads import outputs
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import read_object

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = Mapping[str, Any]
Head = Mapping[str, "Tensor"]  # its tensors, by the checkpoint's names

_OF_TEXTS = ("input_ids", "attention_mask", "token_type_ids")
# Of a configuration of timm: what would load other files, or give another model.
_NOT_OURS = (
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "features_only",
)


class Classifier:
    """One module whose trunk is given one checkpoint after another, and whose head is that of the task.

    module: the trunk, in eval mode and float32; the last module of the head is replaced by the identity. It has the
    other modules of the head, if there are any, which are those of the task while it runs.
    """

    def __init__(self, module: nn.Module, heads: Mapping[str, Head]):
        """heads: task -> the tensors of its head, which may have other shapes than those of the module."""
        import torch

        self.module = module.eval().requires_grad_(False)
        device = next(self.module.parameters()).device
        self._heads = {
            task: {name: tensor.to(device, torch.float32) for name, tensor in head.items()}
            for task, head in heads.items()
        }
        self.head_names = sorted({name for head in heads.values() for name in head})
        place, self._last = self._take_last()
        self._shape: tuple[int, ...] = ()  # of what the head takes for an example
        self._of_last = {f"{place}.{n}": t for n, t in _tensors(self._last).items()}
        self._own = _tensors(self.module)
        for task, head in self._heads.items():
            if absent := sorted({*self._of_last, *(self._own.keys() & set(self.head_names))} - head.keys()):
                raise UserError(f"the head of '{task}' lacks '{absent[0]}', which others have")

    def _take_last(self) -> tuple[str, nn.Module]:
        """The last module that belongs to the head alone, which leaves its place to the identity."""
        import torch

        names, heads = _tensors(self.module), set(self.head_names)
        found = [
            (path, part)
            for path, part in self.module.named_modules()
            if path and (own := {n for n in names if n.startswith(f"{path}.")}) and own <= heads
        ]
        outermost = [
            (path, part)
            for path, part in found
            if not any(path.startswith(f"{other}.") for other, _ in found)
        ]
        if not outermost:
            raise UserError(
                f"heads: {', '.join(self.head_names[:3])} are no module of a {type(self.module).__name__}"
            )
        path, last = outermost[-1]
        self.module.set_submodule(path, torch.nn.Identity())
        return path, last

    @property
    def trunk(self) -> dict[str, Tensor]:
        """The tensors that belong to no task, themselves, by name."""
        heads = set(self.head_names)
        return {name: tensor for name, tensor in self._own.items() if name not in heads}

    def load(self, state: Mapping[str, Tensor], where: object) -> None:
        """Take over the trunk of a checkpoint; its heads are left out.

        Raises:
            UserError: a tensor of the trunk is missing, has another shape, or is none of the model's; `where` names the
                checkpoint.
        """
        import torch

        trunk, heads = self.trunk, set(self.head_names)
        if hasattr(self.module, "config"):
            from mergeline.evaluation.pretrained import named_as_inside

            held = {name: tensor for name, tensor in state.items() if name not in heads}
            state = named_as_inside(self.module, held, where, self.head_names)
        persistent = self.module.state_dict().keys()
        for name in state:
            if name not in self._own and name not in heads:
                raise UserError(f"{where}: the model has no tensor '{name}'{did_you_mean(name, trunk)}")
        with torch.no_grad():
            for name, own in trunk.items():
                if name not in state:
                    if name in persistent and own.is_floating_point():
                        raise UserError(f"{where}: lacks the tensor '{name}' of the model")
                    continue
                if state[name].shape != own.shape:
                    shapes = f"{tuple(state[name].shape)}, in the model {tuple(own.shape)}"
                    raise UserError(f"{where}: '{name}' is {shapes}")
                own.copy_(state[name])

    def features(self, batch: Batch, task: str | None) -> Tensor:
        """What the last module of the head is given, (B, d).

        batch: "images", float32 (B, 3, H, W), or what a tokenizer makes of texts. task: None for examples of several,
        where the head is one module.

        Raises:
            ValueError: it is more than one, and no task is named.
        """
        inside = [name for name in self.head_names if name in self._own]
        if inside and task is None:
            raise ValueError(f"{inside[0]} belongs to a task: run one task at a time")
        for name in inside:
            self._own[name].data = self._heads[str(task)][name]
        texts = {key: batch[key] for key in _OF_TEXTS if key in batch}
        found = self.module(**texts) if texts else self.module(batch["images"])
        features = getattr(found, "logits", found)
        if features.ndim == 3:  # a head that is given all tokens takes the first
            features = features[:, :1]
        self._shape = tuple(features.shape[1:])
        return features.flatten(1)

    def logits(self, features_Bd: Tensor, task: str) -> Tensor:
        """Of features (B, d): (B, C)."""
        for name, tensor in self._of_last.items():
            tensor.data = self._heads[task][name]
        return self._last(features_Bd.reshape(-1, *(self._shape or features_Bd.shape[1:])))

    def classes(self, task: str) -> int:
        """C: how many numbers the head of a task gives."""
        return outputs(self._heads[task])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, themselves."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def build(
    folder: Path, model: str, kind: str, head: Head, device: str, *, without_head: bool = False
) -> nn.Module:
    """The module that the checkpoint in `folder` is of, with its head.

    model: `auto`, or `torchvision/NAME` or `timm/NAME` for checkpoints that do not say it. kind: the class of
    transformers that opens such models. head: the tensors of the model's head, whose shapes tell its classes.
    without_head: the checkpoint has no head, or another one; the module's is then drawn at random.

    Raises:
        UserError: it is not said what the checkpoint is, or it does not open as that.
    """
    config = read_object(folder / CONFIG)
    library, _, name = model.partition("/")
    if model == "auto":
        if "model_type" in config:
            from mergeline.evaluation.pretrained import load_pretrained

            other: dict[str, Any] = {}
            if without_head:
                other = {"may_lack": [*head], "num_labels": outputs(head), "ignore_mismatched_sizes": True}
            return load_pretrained(folder, kind, device=device, **other)
        library, name = "timm", str(config.get("architecture", ""))
        if not name:
            raise UserError(
                f"{folder}: its {CONFIG} names no model of transformers or timm; say what it is: `model: "
                "torchvision/resnet18` or `model: timm/NAME`"
            )
    module = (_of_timm if library == "timm" else _of_torchvision)(folder, name, config, outputs(head))
    state = load_state(folder)
    if without_head:
        state = {name: tensor for name, tensor in state.items() if name not in head} | dict(head)
    fill(module, state, folder, "the model")
    return module.to(device)


def _of_timm(folder: Path, name: str, config: Mapping[str, Any], classes: int) -> nn.Module:
    import timm

    refuse_unfounded_layers(folder / CONFIG, config, len(open_checkpoint(folder).tensors))
    arguments = config.get("model_args") or {}
    if not timm.is_model(name) or set("/:") & set(name):
        raise UserError(f"{folder}: timm has no model '{name}'{did_you_mean(name, timm.list_models())}")
    if not isinstance(arguments, dict) or (odd := next((key for key in _NOT_OURS if key in arguments), None)):
        raise UserError(f"{folder / CONFIG}: model_args may not have '{odd}', which is no size of a model")
    try:
        return timm.create_model(name, pretrained=False, **{**arguments, "num_classes": classes})
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"{folder / CONFIG}: no model of timm: {' '.join(str(error).split())[:300]}"
        ) from None


def _of_torchvision(folder: Path, name: str, config: Mapping[str, Any], classes: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classifier '{name}'{did_you_mean(name, known)}")
    return models.get_model(name, weights=None, num_classes=classes)
