"""Zero-shot classification with CLIP models: heads from the text tower, predictions of image towers.

A base is a folder of open_clip: open_clip_config.json, and model.safetensors or shards with their index.
Its text tower makes the heads once; the models that are measured share them, and differ in the image tower.
https://github.com/mlfoundations/open_clip
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Sequence

import numpy as np

from mergeline.evaluation.clip.screening import Screen, has_bfloat16
from mergeline.evaluation.clip.suite import Suite
from mergeline.evaluation.datasets import Dataset
from mergeline.evaluation.pixels import Pixels
from mergeline.evaluation.splits import SPLITS
from mergeline.evaluation.state import fill, load_state, refuse_unfounded_layers
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import read_object

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergeline.merging.checkpoints.router import Router
    from mergeline.merging.checkpoints.task_adapters import TaskAdapter

CONFIG = "open_clip_config.json"
TOWER = "visual."  # what the names of the image tower's tensors begin with
_BATCH = 100


def load_config(folder: Path | str) -> dict[str, Any]:
    """{"model_cfg", "preprocess_cfg"} of open_clip_config.json; pixel mean and std default to OpenAI's.

    Raises:
        UserError: missing, not JSON, or not a model configuration of open_clip.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(
            f"{folder}: has no {CONFIG}; only CLIP models of open_clip are evaluated: name the folder of one as "
            "the base, or open_clip://ARCHITECTURE/TAG"
        )
    config = read_object(path)
    model = config.get("model_cfg")
    if not isinstance(model, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model.keys():
        raise UserError(
            f"{path}: 'model_cfg' must hold embed_dim, vision_cfg and text_cfg; only CLIP models of open_clip are "
            "evaluated"
        )
    return {"model_cfg": model, "preprocess_cfg": config.get("preprocess_cfg") or {}}


def build_heads(
    base: Path | str, suite: Suite, classnames: Mapping[str, list[str] | None], device: str = "cpu"
) -> dict[str, Tensor]:
    """The zero-shot head (C, d) of every task, float32: a row is the unit vector of a class.

    The class name is put into every template of the task; the normalised text features are averaged and
    normalised again (Radford et al., 2021). `classnames` are the datasets' own, for where the suite has none.

    Raises:
        UserError: the base cannot be loaded, or a task's class names are known neither to suite nor dataset.
    """
    import open_clip
    import torch

    names = {task: spec.classnames or classnames.get(task) for task, spec in suite.tasks.items()}
    if unnamed := [task for task in names if not names[task]]:
        raise UserError(f"{unnamed[0]}: the dataset names no classes; add classnames to the suite")
    model = _build_model(Path(base)).to(device)
    tokenizer = _tokenizer(Path(base))
    heads = {}
    with torch.inference_mode():
        for task, spec in suite.tasks.items():
            columns = open_clip.build_zero_shot_classifier(
                model, tokenizer, names[task], spec.templates, device=device
            )
            heads[task] = columns.T.contiguous().cpu()
    return heads


def pixels_of(config: Mapping[str, Any], device: torch.device | str) -> Pixels:
    """How the image tower of a configuration takes images."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    settings = config["preprocess_cfg"]
    mean, std = settings.get("mean", OPENAI_DATASET_MEAN), settings.get("std", OPENAI_DATASET_STD)
    return Pixels(mean, std, device)


def batches(
    base: Path | str, data: Dataset, split: str, task: str, device: str = "cpu", batch_size: int = _BATCH
) -> Iterator[dict[str, Any]]:
    """The examples of a split of a task, in their order.

    "task", its name; "images", float32 (B, 3, H, W), as the image tower takes them; "labels", int64 (B), if they have
    any.
    """
    import torch

    pixels = pixels_of(load_config(base), device)
    x, y = data.split(split)
    labelled = bool((y >= 0).all())
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        batch = {"task": task, "images": pixels(x[part])}
        if labelled:
            batch["labels"] = torch.from_numpy(y[part].copy()).to(device)
        yield batch


class Evaluator:
    """Predicts with any number of image towers of one architecture, in float32; the model is built once.

    Where bfloat16 is faster it finds most of the same classes (screening.py).

    base: folder of the base model (its text tower may be missing). heads: (C, d) for each task. data: a
    prepared dataset for each task. batch_size: may change the last bits of features; with 100 small images,
    activations fit a core's cache.

    Raises:
        UserError: base, heads and data do not fit one another.
    """

    def __init__(
        self,
        base: Path | str,
        heads: Mapping[str, Tensor],
        data: Mapping[str, Dataset],
        device: str = "cpu",
        batch_size: int = _BATCH,
    ):
        import torch

        self.device, self.batch_size, self.data = torch.device(device), batch_size, data
        self._config = load_config(base)
        model = _build_model(Path(base), required=TOWER)
        self._names = set(model.state_dict())
        self._visual: Any = model.visual.to(self.device)
        self._base = {name: value.clone() for name, value in self._visual.state_dict().items()}
        _skip_unused_tokens(self._visual)
        self._pixels = pixels_of(self._config, self.device)
        self._screen = Screen(self._visual, self._pixels, batch_size) if has_bfloat16(self.device) else None
        self._heads = {t: head.to(self.device, torch.float32) for t, head in heads.items()}
        for task in data:
            self._check(task)

    def predict(
        self,
        state: Mapping[str, Tensor],
        split: str,
        tasks: Sequence[str],
        more: Callable[[int], None] = lambda examples: None,
        adapters: Mapping[str, TaskAdapter] = MappingProxyType({}),
        around: Callable[[Any, str], AbstractContextManager[Any]] | None = None,
        part: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """The predicted class, int32 (N), of every image of a split ("val" or "test") of each task.

        `state` holds tensors by the names of the base. Those of the image tower that it lacks stay the
        base's; those of the text tower are not used, for the heads are fixed. `more` is told how many images were done.
        `adapters` correct the tower on images of their tasks. `around` is entered with the tower and the name of a task
        while it is run on that one's images. `part`: of each task the numbers of those images alone that are predicted.

        Raises:
            UserError: `state` holds a tensor that the base has not, or has in another shape; an adapter is of another
                model.
        """
        import torch

        self._load(state)
        images = {task: self.data[task].split(split)[0] for task in tasks}
        if part is not None:
            images = {task: x[part[task]] for task, x in images.items()}
        if not adapters and not around:
            return self._predict_plain(images, more)
        found = {}
        for task, x in images.items():
            adapter = adapters.get(task)
            running = around(self._visual, task) if around else nullcontext()
            with torch.inference_mode(), running, adapter.inside(self._visual) if adapter else nullcontext():
                found[task] = self._predict(task, x, more, adapter)
        return found

    def predict_routed(
        self,
        states: Sequence[Callable[[], Mapping[str, Tensor]]],
        heads: Sequence[str],
        routes: Mapping[str, np.ndarray],
        split: str,
        more: Callable[[int], None] = lambda examples: None,
    ) -> dict[str, np.ndarray]:
        """The predicted class, int32 (N), of every image of a split, where the expert is found for each image.

        states: gives the tensors of each of E experts, one of which is in memory at a time. heads: the task of each
        expert. routes: task -> which expert each of its images is given to, (N) of 0 to E-1. A class is -1, which is
        no image's, where the expert is of another task: it is then told apart by another task's classes.
        """
        found = {task: np.full(len(route), -1, np.int32) for task, route in routes.items()}
        for e, state in enumerate(states):
            if not any((route == e).any() for route in routes.values()):
                continue
            self._load(state())
            for task, route in routes.items():
                given = np.flatnonzero(route == e)
                if heads[e] != task:
                    more(len(given))
                    continue
                own = {task: self.data[task].split(split)[0][given]}
                found[task][given] = self._predict_plain(own, more)[task]
        return found

    def routes(self, tower: Any, router: Router, split: str, tasks: Sequence[str]) -> dict[str, np.ndarray]:
        """The expert, int64 (N), that a router chooses for every image of a split of each task.

        tower: the image tower of the base that the router was made for (`build_tower`).
        """
        import torch

        found = {}
        for task in tasks:
            x, chosen = self.data[task].split(split)[0], []
            for start in range(0, len(x), self.batch_size):
                pixels = self._pixels(x[start : start + self.batch_size])
                with torch.inference_mode():
                    chosen.append(router.scores(tower, partial(tower, pixels)).argmax(1).cpu().numpy())
            found[task] = np.concatenate(chosen)
        return found

    def _load(self, state: Mapping[str, Tensor]) -> None:
        import torch

        tower, own = self._tower(state), self._visual.state_dict()
        with torch.no_grad():
            for name, value in tower.items():
                own[name].copy_(value)
        if self._screen:
            self._screen.load()

    def _tower(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the image tower by its own names: those of `state`, or else the base's (raises UserError)."""
        for name in state:
            if name not in self._names:
                raise UserError(f"the base has no tensor '{name}'{did_you_mean(name, self._names)}")
        tower = {name: state.get(f"visual.{name}", own) for name, own in self._base.items()}
        for name, value in tower.items():
            if value.shape != self._base[name].shape:
                shapes = f"{tuple(value.shape)}, in the base {tuple(self._base[name].shape)}"
                raise UserError(f"'visual.{name}' is {shapes}")
        return tower

    def _predict_plain(
        self, images: Mapping[str, np.ndarray], more: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """By the tower with nothing added: the same where bfloat16 is faster, and helps."""
        import torch

        with torch.inference_mode():
            if not (images and self._screen and self._screen.pays):
                return {task: self._predict(task, x, more) for task, x in images.items()}
            features = self._screen.features(images, self._heads, more)
            return {task: self._classes(own, task) for task, own in features.items()}

    def _predict(
        self, task: str, x: np.ndarray, more: Callable[[int], None], adapter: TaskAdapter | None = None
    ) -> np.ndarray:
        predictions = np.empty(len(x), np.int32)
        for start in range(0, len(x), self.batch_size):
            part = slice(start, start + self.batch_size)
            features = self._visual(self._pixels(x[part]))
            predictions[part] = self._classes(adapter.features(features) if adapter else features, task)
            more(len(features))
        return predictions

    def _classes(self, features: Tensor, task: str) -> np.ndarray:
        """Those with the largest cosines, int32 (B), of features (B, d)."""
        import torch
        from torch.nn.functional import normalize

        cosines = normalize(features, dim=-1) @ self._heads[task].T
        return cosines.argmax(1).to(torch.int32).cpu().numpy()

    def _check(self, task: str) -> None:
        """Say at once what would otherwise fail, or silently mislead, in the middle of an evaluation."""
        if task not in self._heads:
            raise UserError(f"{task}: there is no head for this task; add it to the suite")
        (classes, width), model = self._heads[task].shape, self._config["model_cfg"]
        if width != model["embed_dim"]:
            raise UserError(f"{task}: the head has {width} dimensions, the model {model['embed_dim']}")
        size = model["vision_cfg"].get("image_size", 224)
        size = (size, size) if isinstance(size, int) else tuple(size)
        for split in SPLITS:
            x, y = self.data[task].split(split)
            if x.shape[1:3] != size:
                raise UserError(f"{task}: images are {x.shape[1:3]}, the model takes {size}; set image_size")
            if y.max() >= classes:
                raise UserError(f"{task}: label {y.max()} in {split}, but the suite names {classes} classes")


def build_tower(base: Path | str, device: str = "cpu") -> tuple[Any, float]:
    """The image tower of a folder, float32, for inference, and the scale of its cosines; its text tower may be missing.

    Raises:
        UserError: it is no model of open_clip.
    """
    model = _build_model(Path(base), required=TOWER)
    return model.visual.to(device), float(model.logit_scale.exp())


def _build_model(base: Path, required: str = "") -> Any:
    """The model of a folder, float32, for inference; only names that start with `required` must be there."""
    import open_clip

    config = dict(load_config(base)["model_cfg"])
    state = load_state(base)
    _refuse_foreign_towers(base, config)
    refuse_unfounded_layers(base / CONFIG, config, len(state))
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    try:
        model = kind(**config)
    except (TypeError, ValueError, AttributeError, AssertionError, RuntimeError, OSError) as error:
        raise UserError(f"{base / CONFIG}: no model of open_clip: {' '.join(str(error).split())}") from None
    fill(model, state, base, CONFIG, required)
    return model.eval().requires_grad_(False)


def _refuse_foreign_towers(base: Path, config: Mapping[str, Any]) -> None:
    """A tower that a checkpoint names on a hub would be downloaded, and might run code (raises UserError)."""
    for part, key, is_foreign in (
        ("text_cfg", "hf_model_name", bool),
        ("vision_cfg", "timm_model_name", lambda name: ":" in str(name)),
    ):
        name = config[part].get(key) if isinstance(config[part], dict) else None
        if is_foreign(name):
            raise UserError(
                f"{base / CONFIG}: {part} takes {name!r} from a hub; only towers that open_clip has are evaluated"
            )


def _tokenizer(base: Path) -> Any:
    """The tokenizer of a folder, without code of its own (raises UserError if it does not open so)."""
    import open_clip

    # Of the settings for transformers' tokenizers, which are the checkpoint's, one would run code.
    foreign = load_config(base)["model_cfg"]["text_cfg"].get("hf_tokenizer_name")
    settings = {"trust_remote_code": False} if foreign else {}
    try:
        return open_clip.get_tokenizer(f"local-dir:{base}", **settings)
    except (TypeError, ValueError, AttributeError, KeyError, OSError, ImportError) as error:
        raise UserError(
            f"{base}: its tokenizer does not open: {' '.join(str(error).split())[:300]}"
        ) from None


def _skip_unused_tokens(visual: Any) -> None:
    """In the last block of a ViT that is read out at its class token, compute that token alone.

    The result is the same but for rounding; a model of four layers becomes a quarter faster.
    """
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if type(visual) is not VisionTransformer or visual.pool_type != "tok" or visual.attn_pool is not None:
        return
    last = visual.transformer.resblocks[-1]
    if type(last) is ResidualAttentionBlock and visual.transformer.batch_first and not visual.output_tokens:
        last.forward = partial(_class_token, last)


def _class_token(block: Any, x: Tensor, attn_mask: None = None) -> Tensor:
    """ResidualAttentionBlock.forward for the first of the tokens (B, tokens, d): (B, 1, d)."""
    tokens = block.ln_1(x)
    x = x[:, :1] + block.ls_1(block.attention(tokens[:, :1], tokens, tokens))
    return x + block.ls_2(block.mlp(block.ln_2(x)))
