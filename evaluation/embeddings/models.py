"""Folders as sentence-transformers opens them: models that give a text a vector, never with code of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Container, Sequence, cast

import numpy as np

from mergeline.evaluation.pretrained import LOADING, opening, refuse_corrections
from mergeline.evaluation.state import refuse_unfounded_layers
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.companions import CONFIG
from mergeline.merging.checkpoints.components import component_folders, component_of
from mergeline.merging.checkpoints.modules import KINDS, MODULES, TRANSFORMER, module_files, read_modules
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

_SETTINGS = "sentence_bert_config.json"  # of the transformer
_TASK = "feature-extraction"
# What else it may say changes how the transformer is loaded, up to code from elsewhere.
_REFUSED = (
    "model_args",
    "model_kwargs",
    "config_args",
    "config_kwargs",
    "tokenizer_args",
    "processor_kwargs",
)
# Lies on a transformer and is not asked for where tokens are pooled.
_UNUSED = "pooler."
_GROUP = 16  # batches between two counts


@dataclass(frozen=True)
class Embedder:
    """A model in memory, in float32 and eval mode.

    prefix: what names of its transformer's tensors begin with in the checkpoint. beside: those of its other modules.
    """

    model: SentenceTransformer
    prefix: str
    beside: frozenset[str] = frozenset()

    @property
    def transformer(self) -> nn.Module:
        """The part of it whose statistics are collected and whose weights are fitted; not what stands behind it."""
        return cast("nn.Module", self.model[0].auto_model)

    def embed(
        self,
        texts: Sequence[str],
        role: str = "",
        prompt: str | None = None,
        batch_size: int = 32,
        more: Callable[[int], None] = lambda texts: None,
    ) -> np.ndarray:
        """A unit vector for each text, (N, d) float32; equal texts have the same one. Long texts go first.

        Where a model's vector is not finite, it is all zeros: like no other text, which costs the model its score.

        role: "query" or "document", for which a model may have a prompt of its own. prompt: stands before each text
        instead. more: is told of every group of texts that is done.
        """
        encode = {"query": self.model.encode_query, "document": self.model.encode_document}.get(
            role, self.model.encode
        )
        different = sorted(dict.fromkeys(texts), key=lambda text: (-len(text), text))
        counts = {text: 0 for text in different}
        for text in texts:
            counts[text] += 1
        found: dict[str, np.ndarray] = {}
        for start in range(0, len(different), _GROUP * batch_size):
            group = different[start : start + _GROUP * batch_size]
            vectors = encode(group, prompt=prompt, batch_size=batch_size, show_progress_bar=False)
            found |= zip(group, vectors)
            more(sum(counts[text] for text in group))
        x_Nd = np.stack([found[text] for text in texts]).astype(np.float32)
        x_Nd[~np.isfinite(x_Nd).all(1)] = 0
        return x_Nd / np.maximum(np.linalg.norm(x_Nd, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def refuse_other_kinds(folder: Path) -> None:
    """See by small files that a folder is a model of sentence-transformers, and opens without code of its own.

    Raises:
        UserError: it has no modules.json, or what that names is none of the modules that are known here.
    """
    modules = read_modules(folder)
    if not modules:
        raise UserError(
            f"{folder}: has no {MODULES}, so it is no model of sentence-transformers; save it with "
            "SentenceTransformer(folder).save(...)"
        )
    for module in modules:
        if not module.is_known:
            raise UserError(f"{folder}: is made with '{module.kind}'; known are {', '.join(KINDS)}")
    first, *rest = modules
    if not first.kind.endswith(f".{TRANSFORMER}") or first.folder:
        raise UserError(
            f"{folder}: begins with '{first.kind}' in '{first.folder}', not with a {TRANSFORMER} in the folder itself; "
            "save it with a newer sentence-transformers"
        )
    files = module_files(folder)
    for module in rest:
        if (
            module.kind.endswith((".Pooling", ".Dense", ".LayerNorm"))
            and f"{module.folder}/{CONFIG}" not in files
        ):
            raise UserError(f"{folder}: lacks '{module.folder}/{CONFIG}'; copy the folder whole")
    settings = read_object(folder / _SETTINGS)
    methods = settings.get("modality_config", {})
    plain = all(isinstance(m, dict) and m.get("method") == "forward" for m in methods.values())
    if (
        settings.get("transformer_task", _TASK) != _TASK
        or not plain
        or any(settings.get(k) for k in _REFUSED)
    ):
        raise UserError(
            f"{folder / _SETTINGS}: asks for more than {_TASK} by forward; save the model without "
            f"{', '.join(_REFUSED[:2])} and such"
        )


def load_model(folder: Path, device: str = "cpu") -> Embedder:
    """The model of a folder that sentence-transformers opens.

    Raises:
        UserError: as `refuse_other_kinds`; it does not open, or lacks tensors, which would be drawn at random; beside
            it lies what corrects it for tasks.
    """
    import torch
    from sentence_transformers import SentenceTransformer

    refuse_corrections(folder)
    refuse_other_kinds(folder)
    stored = open_checkpoint(folder).tensors
    refuse_unfounded_layers(folder / CONFIG, read_object(folder / CONFIG), len(stored))
    with opening(folder, "as a model of sentence-transformers"), LOADING:
        model = SentenceTransformer(
            str(folder),
            device=device,
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"dtype": torch.float32},
        )
    parts = component_folders(folder)
    beside = frozenset(name for name in stored if component_of(name, parts))
    embedder = Embedder(model.eval().requires_grad_(False), _prefix(model[0].auto_model, stored), beside)
    lacking = [
        names[0]
        for names in _parameters(embedder.transformer)
        if not names[0].startswith(_UNUSED) and not any(embedder.prefix + name in stored for name in names)
    ]
    if lacking:
        kind = type(embedder.transformer).__name__
        raise UserError(
            f"{folder}: lacks {len(lacking)} tensor(s) of a {kind}, first '{lacking[0]}': is it of that kind?"
        )
    return embedder


def _prefix(transformer: Any, stored: Container[str]) -> str:
    """What names of a checkpoint begin with before those of the transformer: "", or as of a model with a head."""
    prefix = f"{transformer.base_model_prefix}."
    names = [name for name, _ in transformer.named_parameters()]
    return prefix if sum(prefix + n in stored for n in names) > sum(n in stored for n in names) else ""


def _parameters(module: nn.Module) -> dict[tuple[str, ...], Any]:
    """The parameters of a module by their names, of which tied ones have several."""
    names: dict[int, list[str]] = {}
    own = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    return {tuple(tied): own[tied[0]] for tied in names.values()}
