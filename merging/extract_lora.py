"""A merge, or one fine-tune, as a LoRA adapter: low-rank factors of what it adds to its base.

Of adapters, a method that merges what they add as factors (weighted sums, `core_space`, `knots`) is never multiplied
out: its factors are recompressed. Any other merge is decomposed, matrix by matrix. Both are the best approximation of
the chosen rank.

Shape suffixes: M rows and N columns (all dimensions but the first) of the base's tensor, K the adapter's rank.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Literal, Mapping, Sequence

from mergeline.merging.algebra import decompositions, linear
from mergeline.merging.architecture import Role, in_memory, memory_name
from mergeline.merging.canonical import canonical_json
from mergeline.merging.checkpoints.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PREFIX,
    AdaptedTensor,
    added_rank,
    is_adapter,
)
from mergeline.merging.checkpoints.checkpoint import DTYPES, Checkpoint
from mergeline.merging.checkpoints.companions import WEIGHTS, hub_id, read_config, source_of
from mergeline.merging.checkpoints.components import component_of
from mergeline.merging.checkpoints.writer import CheckpointWriter, TensorSpec
from mergeline.merging.engine.blocks import merged_blocks, rounded
from mergeline.merging.engine.manifest import Manifest, checkpoint_metadata
from mergeline.merging.engine.output import opened, publish_all
from mergeline.merging.engine.plan import Entry, Plan
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.engine.work import Finished, Progress, found_for, hashes_read, run
from mergeline.merging.errors import UserError
from mergeline.merging.files import json_bytes, read_object
from mergeline.merging.lazy import torch
from mergeline.merging.methods.bound import Bound
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

Rank = int | float | Literal["cat"] | None
# Mixtures whose experts PEFT 0.21 packs as transformers 5 does, from factors of each (not those of Qwen2-MoE, whose
# factors it leaves out silently); it takes modules of these names for experts' there.
_PACKED_BY_PEFT = (
    "mixtral", "minimax", "qwen3_moe", "qwen3_next", "afmoe", "deepseek_v2", "deepseek_v3", "dots1",
    "glm4_moe", "hunyuan_v1_moe", "flex_olmo", "olmoe", "cohere2_moe", "solar_open", "longcat_flash",
)  # fmt: skip
_NAMES_OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_GROUPED = ("resnext", "regnet", "seresnext", "efficientnet", "mobilenet", "convnext")


def extract_lora(
    recipe: Recipe | Mapping[str, Any] | Plan,
    out: str | os.PathLike,
    *,
    rank: Rank = None,
    modules_to_save: Sequence[str] = (),
    device: str = "cpu",
    memory: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    factors: str | os.PathLike | None = None,
    force: bool = False,
) -> Manifest:
    """Write what a recipe's merge adds to its base as one adapter; of one fine-tune, with the method `average`.

    out: a folder that PEFT reads, or a `*.safetensors` file of bare factors, `NAME.lora_A` and `NAME.lora_B`.
    rank: a number of directions, or as a float a share of min(M, N) of each matrix, as CART counts it; no matrix gets
        more than it has, or than the adapters have that it is made of. None: all of them, where they are known. "cat":
        of adapters alone, their factors one after the other, as PEFT's `combination_type="cat"`: exact, and their ranks
        add up. Adapters without a base are merged so.
    modules_to_save: shell patterns of names of modules that a folder keeps whole, if no factors are made of them.

    Factors are made of the weights of linear layers and convolutions in numbered blocks, and of what any expert is an
    adapter of. Modules have the names that transformers 5 gives them, which may not be those of the base's files.
    Modules that an adapter itself keeps whole are kept whole. Everything else is left out. Factors are float32, or the
    recipe's dtype, with a scaling of 1.

    The rest is as with `merging.merge`: bytes do not depend on workers, memory or factors, memory is bounded, and a
    killed run goes on where it was (what is left out is measured again). The manifest's `adapter` has, of every
    matrix, its rank and the share of the squared norm of its update that is held, and how much was left out.

    Raises:
        UserError: as `merging.merge`; no base, a rank that is missing or none, vocabularies that differ, nothing to
            make factors of.
    """
    plan, out = recipe if isinstance(recipe, Plan) else make_plan(recipe), Path(out)
    plan.check()
    layout = _Layout(plan, rank, tuple(modules_to_save), bare=out.suffix == ".safetensors")
    with opened(
        [plan], [out], device=device, memory=memory, workers=workers, factors=factors,
        need=max(map(layout.peak_bytes, plan.entries)), lapack=True, layout=lambda _: layout,
        kind="adapter", force=force,
    ) as (source, [output], pool):  # fmt: skip
        writer, facts = output.writer, output.journal.facts

        def write(entry: Entry) -> Finished:
            hashes, energy = _write(layout, entry, source, writer, facts)
            return Finished(entry.name, [hashes], hashes_read(source, entry), energy)

        found = run(source, [output], write, pool, progress)
        writer.finish()
        if not layout.bare:
            (writer.folder / ADAPTER_CONFIG).write_bytes(json_bytes(layout.config()))
        more = {"adapter": layout.settings | layout.held(found)}
        return publish_all([output], source, device, more)[0]


@dataclass(frozen=True)
class _Factors:
    """Of one matrix: PEFT's name of its module, the rank, and how PEFT has it.

    exact: it is merged as factors. transposed: A is (K, M) and B (N, K). embedding: PEFT has other names for it.
    """

    module: str
    rank: int
    exact: bool
    transposed: bool = False
    embedding: bool = False


class _Layout:
    """What an adapter of a plan will hold, from headers alone (raises UserError if it cannot be made)."""

    def __init__(self, plan: Plan, rank: Rank, modules_to_save: tuple[str, ...], bare: bool):
        self.plan, self.bare = plan, bare
        if plan.adapter_only and not bare and rank is None:
            rank = "cat"
        self.cat = rank == "cat"
        self.settings = {"rank": rank, "modules_to_save": list(modules_to_save)}
        self.file = WEIGHTS if bare else ADAPTER_WEIGHTS
        self.base = _checked_base(plan, rank, modules_to_save, bare)
        self._model = read_config(self.base.folder) if self.base else {}
        # Those of adapters without a base are PEFT's already.
        self._named = {} if bare or not self.base else self._model
        self._causal = plan.model is not None and plan.model.causal
        self.factors: dict[str, _Factors] = {}
        for entry in plan.entries:
            if self.changes(entry) and self._is_decomposed(entry):
                self.factors[entry.name] = self._factors_of(entry, rank)
        self._even_experts()
        if not self.factors:
            raise UserError(
                "no matrix of a linear layer or convolution in a numbered block is merged: nothing to make a LoRA of"
            )
        self.saved = [] if bare else self._saved(modules_to_save)
        self.parts = {entry.name: self._parts(entry) for entry in plan.entries}
        self.specs = [spec for parts in self.parts.values() for spec in parts.values()]
        self.metadata = checkpoint_metadata(plan) | {"mergeline.adapter": canonical_json(self.settings)}

    @staticmethod
    def changes(entry: Entry) -> bool:
        """Whether the merge may change a tensor of the base: not what it copies, or what no adapter touches."""
        if entry.bound is None or not prod(entry.spec.shape):
            return False
        scaled = not entry.bound.gives_factors and any(
            b.reference == "none" and not b.inner for b in entry.bound.chain
        )
        return scaled or any(info is not entry.base for info in entry.sources.values())

    def _is_decomposed(self, entry: Entry) -> bool:
        """Whether factors are made of it: PEFT has them of a module's `weight` alone."""
        if not (len(entry.spec.shape) == 2 if self.bare else entry.name.endswith(".weight")):
            return False
        if self._is_expert(entry.name) and self._model.get("model_type") not in _PACKED_BY_PEFT:
            return False
        if any(isinstance(info, AdaptedTensor) for info in entry.sources.values()):
            return True
        if len(entry.spec.shape) > 2 and self._has_groups():
            return False
        return len(entry.header.matrices("block_linear", not self.bare)) == 1

    def _is_expert(self, name: str) -> bool:
        """Whether it is a single expert's, where transformers packs all of them."""
        return in_memory(name, self._named).expert is not None

    def _even_experts(self) -> None:
        """Give all experts the rank of the largest, as PEFT can pack them alone; zeros fill the others."""
        experts = {name: factors for name, factors in self.factors.items() if self._is_expert(name)}
        most = max((factors.rank for factors in experts.values()), default=0)
        self.factors |= {name: replace(factors, rank=most) for name, factors in experts.items()}
        self._expert_rank = most

    def _has_groups(self) -> bool:
        """Whether convolutions are of groups, of which PEFT's factors have another shape."""
        kind = f"{self._model.get('model_type')} {self._model.get('architecture')}".lower()
        return any(word in kind for word in _GROUPED)

    def _saved(self, patterns: Sequence[str]) -> list[str]:
        """The modules that are kept whole: as asked for, or because an adapter among the experts does.

        None that factors are made of, or that holds other modules; and no embedding that is the output matrix, too,
        which PEFT would leave as the base has it.
        """
        entries = [entry for entry in self.plan.entries if self.changes(entry)]
        not_whole = {_module(entry) for entry in entries if entry.name in self.factors} | {""}
        for entry in entries:
            parts = _module(entry).split(".")
            not_whole |= {".".join(parts[:i]) for i in range(1, len(parts))}
        free = [entry for entry in entries if _module(entry) not in not_whole]
        fit = {_module(entry) for entry in free if not self._is_tied(entry)}
        asked = {pattern: {module for module in fit if fnmatchcase(module, pattern)} for pattern in patterns}
        for pattern, modules in asked.items():
            if not modules:
                raise UserError(f"--modules-to-save {pattern}: no module of such a name can be kept whole")
        return sorted(set().union(*asked.values(), (_module(e) for e in free if self._is_saved(e))))

    def _is_tied(self, entry: Entry) -> bool:
        """Whether it is an embedding that is the output matrix, too."""
        base = self.base.tensors if self.base else {}
        headless = self._causal and not any(name.endswith("lm_head.weight") for name in base)
        return (
            headless and len(entry.spec.shape) == 2 and entry.spec.shape[0] == self._model.get("vocab_size")
        )

    def _is_saved(self, entry: Entry) -> bool:
        """Whether an expert is an adapter that keeps it whole."""
        return any(
            is_adapter(self.plan.experts[name].stored)
            and info is not entry.base
            and not isinstance(info, AdaptedTensor)
            for name, info in entry.sources.items()
        )

    def _factors_of(self, entry: Entry, rank: Rank) -> _Factors:
        ranks = [added_rank(info, entry.base) for info in entry.sources.values()]
        known = [rank for rank in ranks if rank is not None]
        exact = _bound(entry).gives_factors and len(known) == len(ranks)
        if self.cat and not exact:
            raise UserError(
                f"'{entry.name}' is no weighted sum of adapters, whose factors could stand one after the other: give a "
                "number as rank"
            )
        if rank is None and not exact:
            raise UserError(
                f"the rank of what {self.plan.recipe.method} adds to '{entry.name}' is not known: "
                "give --rank, a number or a share such as 0.04"
            )
        rows, columns = entry.spec.shape[0], prod(entry.spec.shape[1:])
        asked = linear.rank_of(rank, (rows, columns)) if isinstance(rank, float) else rank
        asked = None if isinstance(asked, str) else asked
        most = sum(known) if self.cat else min(rows, columns, *([sum(known)] if exact else []))
        adapted = next((i for i in entry.sources.values() if isinstance(i, AdaptedTensor)), None)
        return _Factors(
            module=self._peft_name(adapted and adapted.module or _module(entry)),
            rank=most if asked is None else min(asked, most),
            exact=exact,
            transposed=not self.bare and (adapted.transposed if adapted else entry.header.role.transposed),
            embedding=adapted is not None and adapted.is_embedding,
        )

    def _peft_name(self, module: str) -> str:
        """What a module is called in the model; experts that are packed there keep the names that PEFT knows."""
        place = in_memory(f"{module}.weight", self._named)
        return module if place.expert is not None else place.name.removesuffix(".weight")

    def _parts(self, entry: Entry) -> dict[str, TensorSpec]:
        """What is written of a tensor, A before B."""
        spec, factors = entry.spec, self.factors.get(entry.name)
        if factors is None:
            if _module(entry) not in self.saved or not self.changes(entry):
                return {}
            name = PREFIX + memory_name(spec.name, self._named)
            return {name: TensorSpec(name, spec.dtype, spec.shape, spec.nbytes)}
        if self.bare:
            names = [f"{spec.name}.lora_{side}" for side in "AB"]
        elif factors.embedding:
            names = [f"{PREFIX}{factors.module}.lora_embedding_{side}" for side in "AB"]
        else:
            names = [f"{PREFIX}{factors.module}.lora_{side}.weight" for side in "AB"]
        k, (rows, *rest) = factors.rank, spec.shape
        shapes = [(k, *rest), (rows, k, *[1] * (len(rest) - 1))]
        if factors.transposed:
            shapes = [(k, rows), (prod(rest), k)]
        wide = spec.dtype == "F64"
        dtype = spec.dtype if self.plan.recipe.dtype not in (None, "widest") or wide else "F32"
        return {
            name: TensorSpec(name, dtype, shape, prod(shape) * DTYPES[dtype][1])
            for name, shape in zip(names, shapes)
        }

    def peak_bytes(self, entry: Entry) -> int:
        """Memory that a tensor takes, without the imports."""
        factors = self.factors.get(entry.name)
        if factors is None:
            return entry.peak_bytes
        rows, columns = entry.spec.shape[0], prod(entry.spec.shape[1:])
        if factors.exact:
            count = sum(added_rank(info, entry.base) or 0 for info in entry.sources.values())
            return entry.peak_bytes + 8 * 6 * (rows + columns) * count
        return entry.peak_bytes + 8 * (3 * rows * columns + 4 * min(rows, columns) ** 2)

    def config(self) -> dict[str, Any]:
        """`adapter_config.json`, with alpha = rank everywhere: a scaling of 1."""
        modules = {f.module: f.rank for name, f in self.factors.items() if not self._is_parameter(name, f)}
        parameters = {
            f"{f.module}.weight": f.rank for name, f in self.factors.items() if self._is_parameter(name, f)
        }
        ranks = modules | parameters
        usual = self._expert_rank or Counter(ranks.values()).most_common(1)[0][0]
        differ = {f"^{module}": rank for module, rank in sorted(ranks.items()) if rank != usual}
        linear = [f for f in self.factors.values() if not f.embedding]
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if self._causal else None,
            "base_model_name_or_path": self._base_name(),
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": differ,
            "alpha_pattern": differ,
            "target_modules": sorted(modules),
            **({"target_parameters": sorted(parameters)} if parameters else {}),
            "modules_to_save": [self._peft_name(module) for module in self.saved] or None,
            "fan_in_fan_out": any(factors.transposed for factors in linear),
            "bias": "none",
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def _is_parameter(self, name: str, factors: _Factors) -> bool:
        """Whether PEFT wraps a weight, not its module: a router's, and what it would take for an expert's."""
        if self._is_expert(name) or not self._named:
            return False
        is_router = self.plan.model is not None and self.plan.model.tensors[name].role is Role.ROUTER
        last = factors.module.rpartition(".")[2]
        return is_router or self._expert_rank > 0 and last in _NAMES_OF_EXPERTS

    def _base_name(self) -> str | None:
        """What the adapter is for; of adapters without a base what all of them say."""
        if self.base is None:
            said = [read_object(c.folder / ADAPTER_CONFIG) for c in self.plan.experts.values()]
            names = [config.get("base_model_name_or_path") for config in said]
            return names[0] if isinstance(names[0], str) and len(set(map(str, names))) == 1 else None
        base = self.base.path
        return hub_id(source_of(base)) or (str(base) if base.is_dir() else None)

    def held(self, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """How much of the update is in the adapter, for the manifest."""
        left = [name for name, parts in self.parts.items() if not parts and found[name]]
        whole = sum(energy["of"] for energy in found.values() if energy)
        lost = sum(found[name]["of"] for name in left)
        largest = max(left, key=lambda name: found[name]["of"], default=None)
        return {
            "energy": _share(sum(energy["held"] for energy in found.values() if energy), whole),
            "left_out": {
                "tensors": sum(found[name]["of"] > 0 for name in left),
                "energy": _share(lost, whole) if lost else 0.0,
                "largest": largest if lost else None,
            },
            "matrices": {
                name: {"rank": factors.rank, "energy": _share(found[name]["held"], found[name]["of"])}
                for name, factors in self.factors.items()
            },
        }


def _checked_base(plan: Plan, rank: Rank, modules_to_save: Sequence[str], bare: bool) -> Checkpoint | None:
    """The base of a plan that an adapter can be made of, None of adapters alone (raises UserError if none can)."""
    if plan.base is None and not plan.adapter_only:
        raise UserError("an adapter adds to a base: name it (--base, `base:`)")
    if plan.stack:
        raise UserError("an adapter adds to the base's own layers, and a stack has others; merge it instead")
    if isinstance(rank, str) and rank != "cat":
        raise UserError(f"rank '{rank}': give a number from 1 on, a share above 0 and up to 1.0, or cat")
    if (
        rank is not None
        and not isinstance(rank, str)
        and (isinstance(rank, bool) or not rank > 0 or isinstance(rank, float) and rank > 1)
    ):
        raise UserError(f"rank {rank}: give a number from 1 on, or a share above 0 and up to 1.0")
    if plan.alignment:
        raise UserError("the vocabularies differ, and an adapter has the base's alone; align them first")
    if plan.recipe.shard_size:
        raise UserError("an adapter is one file; leave --shard-size out")
    if (
        not bare
        and plan.components
        and all(component_of(entry.name, plan.components) for entry in plan.entries)
    ):
        raise UserError(
            f"the base is a pipeline ({', '.join(plan.components)}), and an adapter of PEFT is of one model: name the "
            "folder of one as base, or write a file of factors"
        )
    if bare and modules_to_save:
        raise UserError(
            "a file of factors keeps no modules whole; name a folder, or leave --modules-to-save out"
        )
    return plan.base


def _bound(entry: Entry) -> Bound:
    """What merges a tensor that is not copied."""
    assert entry.bound is not None, entry.name
    return entry.bound


def _module(entry: Entry) -> str:
    """The module that a tensor belongs to."""
    return entry.name.rpartition(".")[0]


def _share(part: float, whole: float) -> float:
    return round(min(part / whole, 1.0), 6) if whole > 0 else 1.0


def _write(
    layout: _Layout, entry: Entry, source: FileInputs, writer: CheckpointWriter, facts: Any
) -> tuple[dict[str, str], dict[str, float]]:
    """Write what is kept of a tensor; the hashes, and the squared norm `of` its update, and what is `held` of it."""
    parts, factors = layout.parts[entry.name], layout.factors.get(entry.name)
    if entry.action == "copy":
        for _ in source.copied(list(entry.origins), entry.name, largest=False):
            pass
    if not layout.changes(entry):
        return {}, {}
    facts = found_for(entry, facts)
    if factors is None:
        return _write_whole(entry, source, writer, parts, facts)
    if layout.cat:
        left_MK, right_KN = _factors_of(entry, source, facts)
        lacking = factors.rank - len(right_KN)
        left_MK = torch.nn.functional.pad(left_MK, (0, lacking))
        right_KN = torch.nn.functional.pad(right_KN, (0, 0, 0, lacking))
        of = held = float(((left_MK.T @ left_MK) * (right_KN @ right_KN.T)).sum())
    else:
        make = _recompressed if factors.exact else _decomposed
        u_MK, s_K, v_NK, of = make(entry, source, facts, factors.rank)
        left_MK, right_KN = decompositions.balanced(u_MK, s_K, v_NK)
        held = float(s_K.square().sum())
    if factors.transposed:
        left_MK, right_KN = right_KN.T, left_MK.T
    hashes = {}
    for (name, spec), factor in zip(parts.items(), (right_KN, left_MK)):
        sink = writer.open(name)
        sink.append(rounded(factor, spec))
        hashes[name] = sink.close()
    return hashes, {"of": of, "held": held}


def _write_whole(
    entry: Entry, source: FileInputs, writer: CheckpointWriter, parts: Mapping[str, TensorSpec], facts: Any
) -> tuple[dict[str, str], dict[str, float]]:
    """The same of a tensor that is kept whole, or left out."""
    sinks = [(writer.open(name), spec) for name, spec in parts.items()]
    of = 0.0
    for update, merged in _updates(entry, source, facts):
        of += float(update.square().sum())
        for sink, spec in sinks:
            sink.append(rounded(merged, spec))
    return {spec.name: sink.close() for sink, spec in sinks}, {"of": of, "held": of if sinks else 0.0}


def _updates(entry: Entry, source: FileInputs, facts: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """What the merge adds to each stretch of the base's elements, float64, and what it makes of them."""
    start = 0
    for _, block in merged_blocks(source.view(entry), [_bound(entry)], [facts]):
        merged = block.reshape(-1)
        stop = start + len(merged)
        yield merged.double() - source.read("base", entry.name, start, stop), merged
        start = stop


# U (M, K), s (K,), V (N, K), and the squared norm of all
Triplets = tuple["Tensor", "Tensor", "Tensor", float]


def _decomposed(entry: Entry, source: FileInputs, facts: Any, rank: int) -> Triplets:
    """The leading singular triplets of what the merge adds, which is formed."""
    shape = entry.spec.shape[0], prod(entry.spec.shape[1:])
    tau_MN = torch.empty(shape, dtype=torch.float64, device=source.device)
    flat, start = tau_MN.view(-1), 0
    for update, _ in _updates(entry, source, facts):
        flat[start : start + len(update)] = update
        start += len(update)
    _, q_RK = decompositions.leading(linear.gram(tau_MN), rank)
    return *decompositions.triplets(tau_MN, q_RK), float(flat.square().sum())


def _factors_of(entry: Entry, source: FileInputs, facts: Any) -> tuple[Tensor, Tensor]:
    """(M, L) and (L, N), whose product is what a merge of factors adds."""
    view, bound = source.view(entry), _bound(entry)
    look = bound.look_at_tensor(view, facts)
    [x] = view.blocks("tensor")
    return bound.as_factors(x, facts, look)


def _recompressed(entry: Entry, source: FileInputs, facts: Any, rank: int) -> Triplets:
    """The same of a merge of factors, which is not formed; zeros beyond the rank that it has."""
    u_ML, s_L, v_NL = decompositions.recompressed(*_factors_of(entry, source, facts))
    lacking = max(rank - len(s_L), 0)
    u_MK, s_K, v_NK = (torch.nn.functional.pad(part, (0, lacking))[..., :rank] for part in (u_ML, s_L, v_NL))
    return u_MK, s_K, v_NK, float(s_L.square().sum())
