"""Models that predict something of every pixel, as the libraries that made them build them.

Which library builds one, and what it is then:
    transformers    its config.json names the class, under `architectures`: *ForSemanticSegmentation (also for normals,
                    images and distances: of so many channels), *ForDepthEstimation, *ForImageSuperResolution
    torchvision     `torchvision/NAME`, a model of segmentation, such as deeplabv3_resnet50

Shape suffixes: B images of a batch, K channels of the predictions, H x W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping

from mergeline.evaluation.dense_prediction.metrics import Target
from mergeline.evaluation.state import fill, load_state
from mergeline.merging.architecture.classes import classes_of
from mergeline.merging.checkpoints.companions import CONFIG
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import read_object

if TYPE_CHECKING:
    from torch import Tensor, nn

# What the name of a class of transformers ends in -> the class that opens it.
_KINDS = {
    "ForSemanticSegmentation": "AutoModelForSemanticSegmentation",
    "ForDepthEstimation": "AutoModelForDepthEstimation",
    "ForImageSuperResolution": "AutoModelForImageToImage",
}
_OUTPUTS = ("logits", "predicted_depth", "reconstruction")
_CHANNELS: Mapping[Target, tuple[int, ...]] = {
    "mask": (1, 2),
    "distances": (1,),
    "normals": (3,),
    "images": (3,),
}  # that say it; of labels, one a class


class Predictor:
    """The model of an expert, whose trunk is given one checkpoint after another."""

    def __init__(self, module: nn.Module, head: Mapping[str, Tensor]):
        """head: the tensors that stay the expert's, by the checkpoint's names."""
        self._module, self._head = module.eval().requires_grad_(False), head

    def load(self, state: Mapping[str, Tensor], where: object) -> None:
        """Take over the trunk of a checkpoint, which `where` names (raises UserError where it does not fit)."""
        whole = {**state, **self._head}
        if hasattr(self._module, "config"):
            from mergeline.evaluation.pretrained import named_as_inside

            whole = named_as_inside(self._module, whole, where, ())
        fill(self._module, whole, where, "the model")

    def predicted(self, images_B3HW: Tensor) -> Tensor:
        """What it says of every pixel, (B, K, H, W); maps of another size than the images are resized bilinearly."""
        import torch.nn.functional as F

        found: Any = self._module(images_B3HW)
        found = found["out"] if isinstance(found, dict) and "out" in found else _map(found)
        maps = (found[:, None] if found.ndim == 3 else found).float()
        size = images_B3HW.shape[2:]
        if maps.shape[2:] == size:
            return maps
        return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def _map(found: Any) -> Tensor:
    return next(getattr(found, name) for name in _OUTPUTS if getattr(found, name, None) is not None)


def open_predictor(folder: Path, model: str, head: Mapping[str, Tensor], device: str) -> Predictor:
    """The model of an expert's folder.

    model: `auto`, or `torchvision/NAME` for checkpoints that do not say what they are. head: the expert's own tensors.

    Raises:
        UserError: it is not said what the checkpoint is, or it does not open as that.
    """
    library, _, name = model.partition("/")
    if library == "torchvision":
        return Predictor(_of_torchvision(folder, name, head).to(device), head)
    from mergeline.evaluation.pretrained import load_pretrained

    return Predictor(load_pretrained(folder, _kind(folder), device=device), head)


def _kind(folder: Path) -> str:
    named = classes_of(read_object(folder / CONFIG)) or ["none"]
    for ending, kind in _KINDS.items():
        if named[0].endswith(ending):
            return kind
    raise UserError(
        f"{folder}: its {CONFIG} names the class {named[0]}, which predicts nothing of every pixel; expected are "
        f"{', '.join('*' + ending for ending in _KINDS)}, or `model: torchvision/deeplabv3_resnet50`"
    )


def _of_torchvision(folder: Path, name: str, head: Mapping[str, Tensor]) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models.segmentation)
    if name not in known:
        raise UserError(f"torchvision has no segmentation model '{name}'{did_you_mean(name, known)}")
    state = load_state(folder)
    small = name.startswith("lraspp")
    last = "classifier.low_classifier.weight" if small else "classifier.4.weight"
    if last not in head:
        raise UserError(f"{folder}: '{last}' is not among its heads; write heads: ['*classifier.*']")
    more = {} if small else {"aux_loss": any(key.startswith("aux_classifier.") for key in state)}
    module = models.get_model(
        name, weights=None, weights_backbone=None, num_classes=head[last].shape[0], **more
    )
    fill(module, state, folder, "the model")
    return module


def refuse_channels(task: str, target: Target, channels: int, classes: int) -> None:
    """Raises UserError unless so many channels can say what is asked for.

    classes: of the data, where these are labels.
    """
    wanted = _CHANNELS.get(target)
    if wanted is None and channels < max(classes, 2):
        raise UserError(
            f"{task}: the head of its expert has {channels} classes, and the labels of its data go to {classes - 1}"
        )
    if wanted is not None and channels not in wanted:
        numbers = " or ".join(map(str, wanted))
        raise UserError(
            f"{task}: the head of its expert gives {channels} map(s), and {target} need {numbers}"
        )
