"""Transplant a vocabulary: a model under the tokenizer of another one, the donor.

A token that both have keeps its rows. A row of a new token is approximated as the donor has it: orthogonal matching
pursuit writes the donor's row as a sum of few rows of tokens that both have, and the same sum of the model's rows is
the new row (Goddard & Fernandes Neto 2025, arXiv 2506.06607). The output matrix is done the same way by itself.

Shape suffixes: B new tokens of a batch, N tokens that both have, D width of an embedding, K rows of a sum.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Sequence

from mergeline.merging.architecture import Role, describe
from mergeline.merging.canonical import canonical_json
from mergeline.merging.checkpoints.adapters import is_adapter
from mergeline.merging.checkpoints.carried import carry
from mergeline.merging.checkpoints.checkpoint import DTYPES, Checkpoint, Files, TensorInfo, open_checkpoint
from mergeline.merging.checkpoints.companions import CONFIG, TOKENIZER, read_config
from mergeline.merging.checkpoints.components import component_folders
from mergeline.merging.checkpoints.quantised.formats import dequantised
from mergeline.merging.checkpoints.tied import without_tied_head
from mergeline.merging.checkpoints.tokens import TOKENIZER_FILES, meanings
from mergeline.merging.checkpoints.vocabulary import by_token, read_vocabulary
from mergeline.merging.checkpoints.writer import CheckpointWriter, TensorSpec, TensorWriter
from mergeline.merging.engine.inputs import files_of, refuse_changed, stamps
from mergeline.merging.engine.machine import one_thread, worker_count
from mergeline.merging.engine.manifest import (
    Manifest,
    described_output,
    is_single,
    origin_of,
    publish_files,
    versions,
)
from mergeline.merging.engine.places import refuse_place
from mergeline.merging.errors import UserError
from mergeline.merging.files import json_bytes, read_object, staged
from mergeline.merging.lazy import torch
from mergeline.merging.reading import safe_name

if TYPE_CHECKING:
    from torch import Tensor

NEIGHBOURS = 64  # rows of a sum, as mergekit-tokensurgeon takes
_BATCH = 64  # new tokens at once: of a size of its own, so that bits do not depend on workers or memory
_AHEAD = 64  # batches that are begun before the first is written
_CHUNK = 1 << 22  # elements that are copied at once
_NOTHING_LEFT = 1e-6  # of a row's norm: what remains is rounding
_GENERATION = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class _Tokens:
    """Where each row of the output comes from.

    same: ids of the donor -> ids of the model, of tokens that both have. new: other ids of the donor's tokens. rows: of
    the output; those that are in neither are of no token, and 0.
    """

    rows: int
    same: dict[int, int]
    new: list[int]


@dataclass(frozen=True)
class _Points:
    """The rows of the tokens that both have, in the order of the donor's ids: (N, D) of the donor and of the model."""

    donor_ND: Tensor = field(repr=False)
    model_ND: Tensor = field(repr=False)


def transplant(
    model: str | os.PathLike,
    donor: str | os.PathLike,
    out: str | os.PathLike,
    *,
    neighbours: int = NEIGHBOURS,
    shard_size: int | None = None,
    workers: int | None = None,
    memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    force: bool = False,
) -> Manifest:
    """Write `model` with the vocabulary and tokenizer of `donor` into the folder `out`; returns its manifest.

    neighbours: of how many rows a new row is the sum, at most. memory: bytes that may be taken; None: what it takes.
    Memory holds the rows that both have once from each model, in float32. Bytes do not depend on workers or memory.
    The manifest's `transplanted` says how many tokens are the same and how many are new.

    Raises:
        UserError: no folders of models with a tokenizer.json, quantised weights, embeddings that have no counterpart in
            the donor, no token that both have, files that change while they are read, an `out` that holds something
            else (`force` as with `merging.merge`).
    """
    model, donor, out = Path(model), Path(donor), Path(out)
    if type(neighbours) is not int or neighbours < 1:
        raise UserError(f"neighbours: {neighbours} is no whole number above 0")
    if is_single(out):
        raise UserError(f"{out}: a tokenizer lies beside the weights; name a folder")
    opened, given = _opened(model), _opened(donor)
    before = stamps(file for checkpoint in (opened, given) for file in files_of(checkpoint))
    refuse_place(out, [model, donor, *before], "transplant", force)
    tokens = _matched(opened, given)
    pairs = _counterparts(opened, given)
    specs = [_spec(info, tokens.rows if info.name in pairs else None) for info in opened.tensors.values()]
    need = max(_need(opened.tensors[name], of, tokens, neighbours) for name, of in pairs.items())
    workers = worker_count(need, workers, memory)
    asked = {"neighbours": neighbours, "shard_size": shard_size}
    metadata = {"format": "pt", "mergeline.transplant": canonical_json(asked)}
    with staged(out) as folder, one_thread(), Files() as files, ThreadPoolExecutor(workers) as pool:
        writer = CheckpointWriter(folder, specs, metadata, shard_size)
        for done, spec in enumerate(specs, 1):
            info, sink = opened.tensors[spec.name], writer.open(spec.name)
            if spec.name in pairs:
                _write_rows(sink, info, pairs[spec.name], tokens, neighbours, files, pool)
            else:
                for start in range(0, prod(info.shape), _CHUNK):
                    sink.append(files.elements(info, start, min(start + _CHUNK, prod(info.shape))))
            sink.close()
            if progress:
                progress(done, len(specs))
        writer.finish()
        transplanted = {
            "model": origin_of(out, model, opened.stored.digest()),
            "donor": origin_of(out, donor, given.stored.digest()),
            **asked,
            "tokens": {"same": len(tokens.same), "new": len(tokens.new), "rows": tokens.rows},
        }
        _lay_beside(model, donor, specs, tokens, writer.folder)
        manifest: Manifest = {
            "format": 1,
            "transplanted": transplanted,
            "output": described_output(writer),
            "versions": versions(),
        }
        refuse_changed(before)
        publish_files(manifest, writer, out)
    return manifest


def _opened(path: Path) -> Checkpoint:
    """A model with a vocabulary (raises UserError)."""
    if not path.is_dir():
        raise UserError(f"{path}: needs a folder, with a {TOKENIZER} beside the weights")
    if component_folders(path):
        raise UserError(f"{path}: is of several components; name the folder of one model")
    checkpoint = open_checkpoint(path)
    if checkpoint.settings is not None or is_adapter(checkpoint) or dequantised(checkpoint)[1]:
        raise UserError(
            f"{path}: is quantised or an adapter; merge it with `passthrough`, and take what that writes"
        )
    return without_tied_head(checkpoint)


def _matched(model: Checkpoint, donor: Checkpoint) -> _Tokens:
    """The tokens of the donor that the model has, too: by what they stand for (raises UserError)."""
    known, wanted = read_vocabulary(model), read_vocabulary(donor)
    for checkpoint, found in ((model, known), (donor, wanted)):
        if found is None:
            raise UserError(
                f"{checkpoint.path}: has no {TOKENIZER} that tells the rows of its embeddings; put it there"
            )
    assert known is not None and wanted is not None
    if wanted.beyond:
        raise UserError(
            f"{donor.path}: {len(wanted.beyond)} token(s) of its tokenizer have ids beyond its {wanted.rows} rows, "
            f"{wanted.beyond[0]!r} first, and nothing to make rows of; resize its embeddings to the tokenizer"
        )
    ids = {meaning: id for id, meaning in reversed(meanings(model.path, known.ids).items())}
    same, new = {}, []
    for id, meaning in meanings(donor.path, wanted.ids).items():
        if meaning in ids:
            same[id] = ids[meaning]
        else:
            new.append(id)
    if not same:
        raise UserError(f"{donor.path}: its tokenizer has no token in common with that of {model.path}")
    return _Tokens(max(wanted.ids.values()) + 1, dict(sorted(same.items())), sorted(new))


def _counterparts(model: Checkpoint, donor: Checkpoint) -> dict[str, TensorInfo]:
    """The donor's tensor for each of the model's with a row for every token: of its name, or of its role.

    Raises:
        UserError: there is none, or several.
    """
    roles, theirs = (
        describe({n: i.shape for n, i in c.tensors.items()}, read_config(c.path)).tensors
        for c in (model, donor)
    )
    of_donor, found = by_token(donor), dict[str, TensorInfo]()
    for name, info in by_token(model).items():
        role = roles[name].role
        alike = [n for n in of_donor if theirs[n].role is role and len(of_donor[n].shape) == len(info.shape)]
        if not alike and role is Role.HEAD:  # its output matrix is its embedding
            alike = [n for n in of_donor if theirs[n].role is Role.EMBEDDING]
        if len(info.shape) == 1:
            alike = alike or [name]  # rows of known tokens stay, others are 0: nothing is read of the donor
        chosen = name if name in alike else alike[0] if len(alike) == 1 else None
        if chosen is None or len(info.shape) > 2:
            raise UserError(
                f"{donor.path}: has {len(alike) or 'no'} tensors that are there what '{name}' is in {model.path}; take "
                "a donor of the same kind"
            )
        found[name] = of_donor.get(chosen, info)
    if not found:
        raise UserError(f"{model.path}: has no embeddings, so that it has no vocabulary")
    wrong = next((i for i in (*found.values(), *(model.tensors[n] for n in found)) if not i.is_float), None)
    if wrong:
        raise UserError(f"{wrong.file}: '{wrong.name}' is {wrong.dtype}, and embeddings are floats")
    return found


def _spec(info: TensorInfo, rows: int | None) -> TensorSpec:
    shape = info.shape if rows is None else (rows, *info.shape[1:])
    return TensorSpec(info.name, info.dtype, shape, prod(shape) * DTYPES[info.dtype][1])


def _need(info: TensorInfo, donor: TensorInfo, tokens: _Tokens, neighbours: int) -> int:
    """Memory of one worker, without what all of them share."""
    width = max(prod(info.shape[1:]), prod(donor.shape[1:]))
    return 8 * _BATCH * (len(tokens.same) + (min(neighbours, len(tokens.same)) + 8) * width)


def _write_rows(
    sink: TensorWriter,
    info: TensorInfo,
    donor: TensorInfo,
    tokens: _Tokens,
    neighbours: int,
    files: Files,
    pool: ThreadPoolExecutor,
) -> None:
    """Write the rows of one tensor, in the order of the donor's ids."""
    dtype = getattr(torch, DTYPES[info.dtype][0])
    new: Iterator[Tensor] = iter(())
    batches = [tokens.new[i : i + _BATCH] for i in range(0, len(tokens.new), _BATCH)]
    if len(info.shape) == 2 and batches:
        points = _Points(
            _rows(files, donor, list(tokens.same)).float(),
            _rows(files, info, [*tokens.same.values()]).float(),
        )
        new = _in_order(
            pool, lambda ids: _approximated(_rows(files, donor, ids), points, neighbours), batches
        )
    made, waiting = dict[int, "Tensor"](), iter(batches)
    width = prod(info.shape[1:])
    step = max(_CHUNK // max(width, 1), 1)
    wanted = set(tokens.new)
    for first in range(0, tokens.rows, step):
        last = min(first + step, tokens.rows)
        block = torch.zeros((last - first, width), dtype=dtype)
        kept = [id for id in range(first, last) if id in tokens.same]
        if kept:
            block[[id - first for id in kept]] = _rows(files, info, [tokens.same[id] for id in kept])
        for id in (id for id in range(first, last) if id in wanted) if len(info.shape) == 2 else ():
            if id not in made:
                made = dict(zip(next(waiting), next(new)))
            block[id - first] = made[id].to(dtype)
        if not torch.isfinite(block).all():
            raise UserError(f"tensor '{info.name}': a row is NaN or Inf, or overflows {info.dtype}")
        sink.append(block)


def _in_order(
    pool: ThreadPoolExecutor, action: Callable[[list[int]], Tensor], batches: Sequence[list[int]]
) -> Iterator[Tensor]:
    """Results in order, few of them ahead of who takes them."""
    waiting = iter(batches)
    running = [pool.submit(action, batch) for _, batch in zip(range(_AHEAD), waiting)]
    while running:
        result = running.pop(0).result()
        running += [pool.submit(action, batch) for _, batch in zip([0], waiting)]
        yield result


def _rows(files: Files, info: TensorInfo, rows: Sequence[int]) -> Tensor:
    """These rows of a tensor, in its dtype."""
    width = prod(info.shape[1:])
    found, at = torch.empty((len(rows), width), dtype=getattr(torch, DTYPES[info.dtype][0])), 0
    while at < len(rows):
        end = at + 1
        while end < len(rows) and rows[end] == rows[end - 1] + 1:
            end += 1
        read = files.elements(info, rows[at] * width, (rows[at] + end - at) * width)
        found[at:end] = read.reshape(-1, width)
        at = end
    return found


def _approximated(target_BD: Tensor, points: _Points, neighbours: int) -> Tensor:
    """The model's rows of new tokens, (B, D) in float64. target_BD: those of the donor."""
    chosen_BK, coefficients_BK = matching_pursuit(target_BD.double(), points.donor_ND, neighbours)
    return torch.einsum("bk,bkd->bd", coefficients_BK, points.model_ND[chosen_BK].double())


def matching_pursuit(target_BD: Tensor, points_ND: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit: rows (B, K) of the points, and coefficients (B, K) of what is nearest to a target.

    One after the other, that point is taken whose inner product with what remains of the target is largest; what
    remains is orthogonal to all that were taken. Where nothing remains, coefficients are 0. target_BD: float64.
    points_ND: float32, in which inner products are; the rest is float64. K: `count`, or N if that is less.
    """
    (size, width), count = target_BD.shape, min(count, len(points_ND))
    basis_BKD = target_BD.new_zeros((size, count, width))
    triangle_BKK = target_BD.new_zeros((size, count, count))
    chosen_BK = torch.zeros((size, count), dtype=torch.long)
    everyone, taken_BN = torch.arange(size), torch.zeros((size, len(points_ND)), dtype=torch.bool)
    rest_BD, norm_B = target_BD.clone(), target_BD.norm(dim=1)
    for k in range(count):
        products_BN = (rest_BD.float() @ points_ND.T).abs_().masked_fill_(taken_BN, -1.0)
        chosen_B = products_BN.argmax(1)
        chosen_BK[:, k], taken_BN[everyone, chosen_B] = chosen_B, True
        point_BD = points_ND[chosen_B].double()
        along_BK = torch.einsum("bkd,bd->bk", basis_BKD, point_BD)
        new_BD = point_BD - torch.einsum("bk,bkd->bd", along_BK, basis_BKD)
        again_BK = torch.einsum("bkd,bd->bk", basis_BKD, new_BD)  # once more, against rounding
        new_BD -= torch.einsum("bk,bkd->bd", again_BK, basis_BKD)
        length_B = new_BD.norm(dim=1)
        counts_B = (length_B > _NOTHING_LEFT * point_BD.norm(dim=1)) & (
            rest_BD.norm(dim=1) > _NOTHING_LEFT * norm_B
        )
        basis_BKD[:, k] = torch.where(counts_B[:, None], new_BD / length_B[:, None].clamp(min=1e-300), 0.0)
        triangle_BKK[:, :, k] = torch.where(counts_B[:, None], along_BK + again_BK, 0.0)
        triangle_BKK[:, k, k] = torch.where(counts_B, length_B, 1.0)
        rest_BD -= (basis_BKD[:, k] * rest_BD).sum(1, keepdim=True) * basis_BKD[:, k]
    along_BK = torch.einsum("bkd,bd->bk", basis_BKD, target_BD)
    solved_BK1 = torch.linalg.solve_triangular(triangle_BKK, along_BK[:, :, None], upper=True)
    return chosen_BK, solved_BK1[:, :, 0]


def _lay_beside(model: Path, donor: Path, specs: Sequence[TensorSpec], tokens: _Tokens, folder: Path) -> None:
    """The model's configuration, with the donor's vocabulary, and the donor's tokenizer."""
    carry(model, specs, folder)
    for path in [path for path in folder.iterdir() if path.is_file() and _of_tokenizer(path.name)]:
        path.unlink()
    for path in sorted(donor.iterdir()):
        if path.is_file() and _of_tokenizer(path.name):
            (folder / path.name).write_bytes(safe_name(donor, path.name, donor).read_bytes())
    for name in (CONFIG, _GENERATION):
        config, theirs = read_object(folder / name), read_object(donor / name)
        if config:
            (folder / name).write_bytes(json_bytes(_with_vocabulary(config, theirs, tokens.rows)))


def _of_tokenizer(name: str) -> bool:
    return name in TOKENIZER_FILES or name.endswith((".jinja", ".tiktoken"))


def _with_vocabulary(config: Mapping[str, Any], donor: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A configuration, and its parts, with the donor's number of tokens and ids of special tokens."""
    text = donor.get("text_config")
    told = {**(text if isinstance(text, dict) else {}), **donor}
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key == "vocab_size":
            found[key] = rows
        elif key in _IDS:
            found[key] = told.get(key)
        elif isinstance(value, dict) and key in ("text_config", "decoder", "encoder"):
            found[key] = _with_vocabulary(value, told, rows)
        else:
            found[key] = value
    return found
