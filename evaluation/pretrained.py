"""Folders as transformers opens them: models, tokenizers and processors, never with code of their own."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Mapping, Sequence

from mergeline.evaluation.state import refuse_unfounded_layers
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.companions import CONFIG
from mergeline.merging.checkpoints.router import ROUTER
from mergeline.merging.checkpoints.task_adapters import ADAPTERS
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

LOADING = threading.Lock()  # transformers changes global state while it builds a model


def load_pretrained(
    folder: Path,
    kind: str,
    dtype: str = "float32",
    device: str = "cpu",
    may_lack: Sequence[str] = (),
    **more: Any,
) -> Any:
    """The model of a folder, in eval mode and without gradients.

    kind: the class of transformers that opens it, such as AutoModelForSequenceClassification. may_lack: names of
    tensors that the caller brings, as fnmatch patterns. more: for from_pretrained.

    Raises:
        UserError: it does not open, or not without code of its own; it lacks tensors, which would be drawn at random.
    """
    config = read_object(folder / CONFIG)
    refuse_unfounded_layers(folder / CONFIG, config, len(open_checkpoint(folder).tensors))
    with opening(folder, "as a model"), LOADING:
        model, told = _class(kind).from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **more,
        )
    lacking = sorted(
        name for name in told["missing_keys"] if not any(fnmatchcase(name, pattern) for pattern in may_lack)
    )
    if lacking:
        raise UserError(
            f"{folder}: lacks {len(lacking)} tensor(s) of a {type(model).__name__}, first '{lacking[0]}': is it of "
            "that kind?"
        )
    return model.eval().requires_grad_(False).to(device)


def named_as_inside(
    model: Any, state: Mapping[str, Tensor], where: object, may_lack: Sequence[str]
) -> dict[str, Tensor]:
    """The tensors of a checkpoint by the names that a model of transformers has for them while it runs.

    transformers keeps the names of some checkpoints (of ViT, for one) and has others inside. may_lack: names of tensors
    that need not be there.

    Raises:
        UserError: the checkpoint, which `where` names, does not fit the model.
    """
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]} | set(may_lack)
    if state.keys() <= names:
        return dict(state)
    with opening(where, "as a model"), LOADING:
        made, told = type(model).from_pretrained(
            None, config=model.config, state_dict=dict(state), output_loading_info=True
        )
    odd = [*sorted(told["unexpected_keys"]), *sorted(set(told["missing_keys"]) - set(may_lack))]
    if odd:
        raise UserError(
            f"{where}: does not fit a {type(model).__name__}: tensor '{odd[0]}' is missing, or not its"
        )
    lacking = set(told["missing_keys"])
    own = [*made.named_parameters(), *made.named_buffers()]
    return {name: tensor.detach() for name, tensor in own if name not in lacking}


def names_inside(model: Any, state: Mapping[str, Tensor]) -> dict[str, str] | None:
    """The names of a checkpoint's tensors by those that they have in a model of transformers while it runs.

    Of those that differ alone; None where a tensor is made of several, or is turned. state: of one checkpoint.
    """
    import torch

    names = [*state]
    marked = {name: _marked(i, state[name].shape) for i, name in enumerate(names)}
    with opening("the model", "with the names of its checkpoints"), LOADING:
        made = type(model).from_pretrained(
            None, config=model.config, state_dict=dict(marked), dtype=torch.float32
        )
    found, persistent = {}, made.state_dict().keys()
    for inside, tensor in [*made.named_parameters(), *made.named_buffers()]:
        if inside not in persistent or not tensor.is_floating_point():
            continue
        place = int(tensor.flatten()[0]) - 1
        if not (0 <= place < len(names) and torch.equal(tensor.detach(), marked[names[place]])):
            return None
        if names[place] != inside:
            found[inside] = names[place]
    return found


def _marked(number: int, shape: Sequence[int]) -> Tensor:
    """A tensor that no other is: number + 1, and a half more in the first row after its first entry."""
    import torch

    found = torch.full(tuple(shape), number + 1.0)
    if found.ndim > 1:
        found[0].flatten()[1:] += 0.5
    return found


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder (raises UserError)."""
    with opening(folder, "with a tokenizer"):
        found = _class("AutoTokenizer").from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    # Where its files are missing, transformers may make one that knows no words.
    files = [name for name in dict(found.vocab_files_names).values() if isinstance(name, str)]
    if files and not any((folder / name).is_file() for name in files):
        raise UserError(
            f"{folder}: has no tokenizer ({' or '.join(sorted(set(files)))}); put its files beside the weights"
        )
    return found


def load_processor(folder: Path) -> Any:
    """The processor of a folder, of images and texts (raises UserError)."""
    with opening(folder, "with a processor"):
        return _class("AutoProcessor").from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def side_by_side(rows: Sequence[Sequence[int]], device: Any, pad: int = 0) -> dict[str, Tensor]:
    """Rows of tokens, the shorter ones padded on the right: "input_ids" and "attention_mask", int64 (B, L)."""
    import torch

    ids = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def refuse_corrections(folder: Path) -> None:
    """Raises UserError if beside a model lies what corrects it for tasks, which transformers would leave out."""
    if (folder / ADAPTERS).is_dir() or (folder / ROUTER).is_file():
        raise UserError(
            f"{folder}: has adapters of tasks, or a router, with which only image models are measured; merge by the "
            "inner method alone"
        )


def _class(name: str) -> Any:
    """A class of transformers, by its name.

    The package puts another module in its own place while it is imported; a thread that waits for that would go on
    with the first, which has no classes.
    """
    import_module("transformers")
    return getattr(sys.modules["transformers"], name)


@contextmanager
def opening(folder: object, what: str) -> Iterator[None]:
    """Turn what transformers says of a folder that it does not open into a UserError of one line."""
    _be_quiet()
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: opens only with code of its own, which is never run; save it as a kind of model that "
                "transformers has"
            ) from None
        raise UserError(f"{folder}: does not open {what} ({' '.join(str(error).split())[:300]})") from None


@cache
def _be_quiet() -> None:
    import logging

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
