"""The experts of one mixture made fewer: groups of them merged (M-SMoE, Sub-MoE), or the least used left out.

Each layer's experts are put in groups, by hand or by statistics of the router, and every group becomes one expert; the
router has a row for each group. Everything else stays as it is. The arithmetic is in `merging.algebra.expert_groups`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Literal, Mapping, Sequence, get_args

from mergeline.merging.algebra import assignment, expert_groups, linear
from mergeline.merging.algebra.expert_groups import Groups
from mergeline.merging.algebra.low_rank_sparse import rank_for_parameters, row_count, split
from mergeline.merging.architecture.mixtures import (
    CHOSEN,
    CHOSEN_GROUPS,
    COUNTS,
    GROUPS,
    Mixture,
    Place,
    mixtures,
)
from mergeline.merging.canonical import canonical_json
from mergeline.merging.checkpoints.carried import replaced, values_in
from mergeline.merging.checkpoints.checkpoint import DTYPES, Files, open_checkpoint
from mergeline.merging.checkpoints.companions import CONFIG, WEIGHTS, read_config
from mergeline.merging.checkpoints.writer import CheckpointWriter, TensorSpec, TensorWriter
from mergeline.merging.engine.blocks import rounded
from mergeline.merging.engine.inputs import files_of, stamps
from mergeline.merging.engine.manifest import Manifest, checkpoint_metadata
from mergeline.merging.engine.output import opened, publish_all
from mergeline.merging.engine.plan import Entry, Plan, with_kept
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.engine.work import Finished, MergeJob, Progress, hashes_read, run
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.lazy import torch
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

How = Literal["mc_smoe", "sub_moe", "prune"]
Router = Literal["average", "dominant", "wide"]
STATISTICS = "experts"  # the kind of statistics that groups are found by
USAGE, LOGITS, OUTPUTS = "usage", "logits", "outputs"  # of each mixture: NAME/usage ...

_SEED = 42  # of K-means, as in Sub-MoE
_SPARSE = 0.1  # of rows, the last threshold of MC-SMoE's scripts
_SQUARES = "squares"  # what is remembered of a layer whose experts are cut


def merge_experts(
    model: Recipe | Mapping[str, Any] | str | os.PathLike,
    out: str | os.PathLike,
    *,
    method: How = "mc_smoe",
    experts: int | None = None,
    statistics: str | os.PathLike | None = None,
    groups: Mapping[str, Any] | Sequence[Sequence[int]] | None = None,
    router: Router | None = None,
    align: bool = True,
    rank: int | float | None = None,
    compress: float | None = None,
    sparse: float | None = None,
    device: str = "cpu",
    memory: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Manifest:
    """Write a mixture with fewer experts in each layer; returns its manifest.

    model: a folder or file of a causal mixture, or a recipe with the method `passthrough` and one expert, for `dtype`,
        `layout` and `shard_size`.
    method: `mc_smoe` (arXiv 2310.01334): the most used experts of a layer lead the groups, the others join the leader
        to whose router logits theirs are most alike, hidden units are matched to the leader's, and weights averaged by
        usage. `sub_moe` (2506.23266): groups by K-means of the outputs' cosine similarities, matrices of a group
        averaged by usage in the leading directions of all of them. `prune`: the most used experts as they are.
    experts: how many stay in each layer; with `router="wide"` the mean over layers, the most used of all layers
        leading. statistics: a file of `collect` (kind `experts`); without it groups must be given, and weigh their
        members alike. groups: lists of experts, for all layers or by the name of the layer's mixture, such as
        `model.layers.0.mlp`; what is in no group is left out.
    router: rows are the usage-weighted `average` of the group's (the default of `sub_moe`), or those of its most used
        expert, `dominant` (of the others); `wide` leaves the router alone and puts the group's expert in every
        member's place, as the official code of M-SMoE does: exact where several members are chosen, and no smaller.
    align: of `mc_smoe`, whether hidden units are matched before the average. The official code does not for Mixtral.
    rank: of `sub_moe`, how many directions are kept, or as a float a share of the smaller side; None for all, which is
        the average itself.
    compress: of `mc_smoe`, cut every expert that is left as MC-SMoE begins to: to the product of two factors with this
        share of a matrix's numbers, and of the rest to the share `sparse` of its rows (0.1), those of the largest mean
        magnitude. What is written is dense, and no smaller; the method `losparse` keeps the factors in a store.

    Memory is that of a few experts; bytes do not depend on workers or memory; a killed run goes on after the last
    layer that it finished. The manifest's `mixture` has the settings and the groups of each layer, and `compressed` the
    share of numbers that the factors have and the relative Frobenius error.

    Raises:
        UserError: as `merging.merge`; a model without experts or whose experts are not fully known, more experts than
            there are or fewer than a token is sent to, statistics that lack a layer, groups that are none.
    """
    plan = _plan(model, statistics)
    out = Path(out)
    settings = _Settings(method, experts, router, align, rank, groups, compress, sparse)
    layout = _Layout(plan, settings)
    with opened(
        [plan], [out], device=device, memory=memory, workers=workers, factors=None, need=layout.peak_bytes,
        lapack=True, layout=lambda _: layout, kind="mixture", force=force,
    ) as (source, [output], pool):  # fmt: skip
        job = MergeJob(source, [plan], [output.writer], [output.journal.facts])

        def write(entry: Entry) -> Finished:
            mixture = layout.led.get(entry.name)
            if mixture is not None:
                hashes, squares = _write(layout, mixture, source, output.writer)
                return Finished(entry.name, [hashes], {}, {_SQUARES: squares} if squares else {})
            if not layout.parts[entry.name]:
                return Finished(entry.name, [], hashes_read(source, entry))
            return job.write(entry)

        remembered = run(source, [output], write, pool, progress)
        output.writer.finish()
        told = {**layout.told(), **layout.compressed(remembered)}
        return publish_all([output], source, device, {"mixture": told})[0]


def _plan(
    model: Recipe | Mapping[str, Any] | str | os.PathLike, statistics: str | os.PathLike | None
) -> Plan:
    """The plan of the model as it is, with the statistics."""
    if isinstance(model, str | os.PathLike):
        model = {"method": "passthrough", "experts": {"model": Path(model)}}
    recipe = Recipe.of(model)
    plain = recipe.method == "passthrough" and len(recipe.experts) == 1 and recipe.params.get("scale", 1) == 1
    if not plain or recipe.base or recipe.stack or recipe.rules or recipe.heads:
        raise UserError("experts are merged inside one model: name it alone, as it is (merge models before)")
    plan = make_plan(recipe)
    plan.check()
    if statistics is not None:
        checkpoint = open_checkpoint(Path(statistics))
        plan.statistics[STATISTICS] = [checkpoint]
        plan.stamps |= stamps(files_of(checkpoint))
    return plan


class _Settings:
    """What was asked, checked, as far as no model is needed for it."""

    def __init__(
        self,
        method: How,
        experts: int | None,
        router: Router | None,
        align: bool,
        rank: Any,
        groups: Any,
        compress: float | None,
        sparse: float | None,
    ):
        if method not in get_args(How):
            raise UserError(f"there is no method '{method}' of experts{did_you_mean(method, get_args(How))}")
        if router is not None and router not in get_args(Router):
            raise UserError(f"router '{router}': take average, dominant or wide")
        if router == "wide" and method == "prune":
            raise UserError("router wide: what is left out has no expert to stand for it; take dominant")
        if (experts is None) == (groups is None):
            raise UserError(
                "say how many experts stay in each layer (--experts), or which become one (--groups)"
            )
        if experts is not None and (isinstance(experts, bool) or not isinstance(experts, int) or experts < 1):
            raise UserError(f"--experts {experts}: give a number from 1 on")
        if rank is not None and method != "sub_moe":
            raise UserError(f"a rank is of sub_moe; {method} has none")
        if rank is not None and (
            isinstance(rank, bool) or not rank > 0 or isinstance(rank, float) and rank > 1
        ):
            raise UserError(f"rank {rank}: give a number from 1 on, or a share above 0 and up to 1.0")
        if compress is not None and method != "mc_smoe":
            raise UserError(f"--compress is of mc_smoe; {method} leaves experts whole")
        if compress is not None and not 0 < compress <= 1:
            raise UserError(f"--compress {compress}: give a share above 0 and up to 1.0")
        if sparse is not None and (compress is None or not 0 <= sparse <= 1):
            raise UserError(f"--sparse {sparse}: give a share from 0 to 1.0, beside --compress")
        self.compress, self.sparse = compress, _SPARSE if sparse is None else sparse
        self.method, self.experts, self.groups, self.rank = method, experts, groups, rank
        self.router: Router = router or ("average" if method == "sub_moe" else "dominant")
        self.align = align and method == "mc_smoe"
        self.wide = self.router == "wide"

    def told(self) -> dict[str, Any]:
        """JSON values that say the same."""
        cut = {} if self.compress is None else {"compress": self.compress, "sparse": self.sparse}
        return {
            "method": self.method, "experts": self.experts, "router": self.router, "align": self.align,
            "rank": self.rank, "groups": self.groups, **cut,
        }  # fmt: skip

    def cut_to(self, shape: Sequence[int]) -> tuple[int, int]:
        """The rank, and the rows of the rest, that a matrix of an expert is cut to."""
        assert self.compress is not None
        return rank_for_parameters(self.compress, shape), row_count(self.sparse, shape)


@dataclass(frozen=True)
class _Group:
    """Experts that become one: who leads, and the weights of all."""

    leader: int
    members: tuple[int, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, members: Sequence[int], usage_E: Sequence[float] | None) -> _Group:
        used = [1.0 if usage_E is None else float(usage_E[e]) for e in members]
        leader = members[max(range(len(members)), key=lambda i: (used[i], -i))]
        return cls(leader, tuple(members), tuple(expert_groups.shares(used)))


class _Layout:
    """What will be written, from headers and the statistics (raises UserError if it cannot be)."""

    file = WEIGHTS

    def __init__(self, plan: Plan, settings: _Settings):
        self.plan, self.settings = plan, settings
        config = read_config(plan.donor) if plan.donor else {}
        assert plan.model is not None
        found = mixtures(plan.model, config)
        if not found:
            raise UserError(f"{_path(plan)}: has no experts of a mixture; name a mixture")
        self._check_counts(found, config)
        self.mixtures = {mixture.name: mixture for mixture in found}
        told = [n for n in values_in(config, GROUPS) if isinstance(n, int) and n > 1]
        self.router_groups = 1 if settings.wide else max(told, default=1)
        self._check_router_groups(found)
        groups = _groups(found, settings, plan, self.router_groups)
        self.groups = {name: self._in_groups(name, of) for name, of in groups.items()}
        self.count = len(next(iter(self.groups.values())))
        if settings.wide:
            self.count = len(found[0].experts)
        else:
            self._check_kept(config)
            self._check_kept_in_router_groups(config)
        self.entries = {entry.name: entry for entry in plan.entries}
        # All of a layer is written with the first of its tensors.
        self.led = {next(iter(mixture.tensors)): mixture for mixture in found}
        self.parts = {entry.name: entry.parts for entry in plan.entries}
        for mixture in found:
            specs: dict[str, TensorSpec] = {}
            for name in mixture.tensors:
                self.parts[name] = {}
                specs |= {spec.name: spec for spec in self._fewer(mixture, name)}
            self.parts[next(iter(mixture.tensors))] = specs
        self.specs = [spec for parts in self.parts.values() for spec in parts.values()]
        said = {"mixture": self.told()}
        self.metadata = checkpoint_metadata(plan) | {"mergeline.experts": canonical_json(said)}
        if not settings.wide:
            plan.configured = lambda config: replaced(config, COUNTS, self.count)

    def _check_counts(self, found: Sequence[Mixture], config: Mapping[str, Any]) -> None:
        counts = {len(mixture.experts) for mixture in found}
        if len(counts) > 1:
            raise UserError(f"layers have {sorted(counts)} experts; only models with one number are merged")
        if not config:
            raise UserError(
                f"{_path(self.plan)}: has no {CONFIG}, which says how experts are used; name a folder"
            )
        said = [n for n in values_in(config, COUNTS) if isinstance(n, int) and n > 1]
        if set(said) - counts or not said:
            raise UserError(
                f"{CONFIG} says {said or 'nothing'} of the number of experts, of which there are {counts}"
            )

    def _check_router_groups(self, found: Sequence[Mixture]) -> None:
        count, total, wanted = self.router_groups, len(found[0].experts), self.settings.experts
        if total % count:
            raise UserError(f"{CONFIG}: {total} experts are not {count} equal groups of its router; mend it")
        if wanted is not None and wanted % count:
            raise UserError(
                f"--experts {wanted}: the router chooses in {count} groups, of which each keeps the same number; give "
                f"a multiple of {count}, or take router wide"
            )

    def _check_kept_in_router_groups(self, config: Mapping[str, Any]) -> None:
        """Each group of the router keeps the same number of experts, its own, and enough for a token."""
        if self.router_groups == 1:
            return
        size = len(next(iter(self.mixtures.values())).experts) // self.router_groups
        for name, groups in self.groups.items():
            places = [sorted({e // size for e in group.members}) for group in groups]
            kept = [places.count([place]) for place in range(self.router_groups)]
            if sum(kept) < len(places) or len(set(kept)) > 1:
                raise UserError(
                    f"--groups: of '{name}': its router chooses in {self.router_groups} groups of {size} neighbouring "
                    "experts; let each list be of one of them, and as many lists of each, or take router wide"
                )
        per, least = self.count // self.router_groups, max(m.least_in_group for m in self.mixtures.values())
        if per < least:
            raise UserError(
                f"{self.count} experts are {per} in each of {self.router_groups} groups of the router, which are "
                f"scored by their best {least}; keep {least * self.router_groups} or more"
            )
        chosen, of = (
            max([1, *(n for n in values_in(config, keys) if isinstance(n, int))])
            for keys in (CHOSEN, CHOSEN_GROUPS)
        )
        if per * of < chosen:
            more = -(-chosen // of) * self.router_groups
            raise UserError(
                f"{self.count} experts: a token is sent to {chosen} in {of} groups of the router ({CONFIG}), which "
                f"have {per} each; keep {more} or more"
            )

    def _check_kept(self, config: Mapping[str, Any]) -> None:
        chosen = max((n for n in values_in(config, CHOSEN) if isinstance(n, int)), default=1)
        if self.count < chosen:
            raise UserError(
                f"{self.count} experts: a token is sent to {chosen} of them ({CONFIG}); keep {chosen} or more"
            )

    def _in_groups(self, name: str, groups: Groups) -> list[_Group]:
        usage = _statistic(self.plan, name, USAGE, len(self.mixtures[name].experts))
        return [_Group.of(group, usage) for group in groups]

    def _fewer(self, mixture: Mixture, name: str) -> Iterator[TensorSpec]:
        """What becomes of a tensor of a mixture."""
        spec, stays = self.entries[name].spec, len(mixture.experts)
        if self.settings.wide:
            yield spec
            return
        owners = [e for e, expert in enumerate(mixture.experts) for p in expert.values() if p.tensor == name]
        if name not in mixture.router and len(set(owners)) == 1:  # one expert's own
            if owners[0] < self.count:
                yield spec
            return
        shape = (spec.shape[0] // stays * self.count, *spec.shape[1:])
        yield replace(spec, shape=shape, nbytes=prod(shape) * DTYPES[spec.dtype][1])

    def slots(self, mixture: Mixture) -> list[_Group]:
        """The groups whose experts stand at the places of what is written, in order."""
        groups = self.groups[mixture.name]
        if not self.settings.wide:
            return groups
        return [next(g for g in groups if e in g.members) for e in range(len(mixture.experts))]

    @property
    def peak_bytes(self) -> int:
        """Memory of one worker, without the imports."""
        alone = [e.peak_bytes for e in self.plan.entries if self.parts[e.name] and e.name not in self.led]
        return max([*alone, *(with_kept(self._held(mixture)) for mixture in self.mixtures.values())])

    def _held(self, mixture: Mixture) -> int:
        shapes = [place.matrix.shape for place in mixture.experts[0].values()]
        held = (
            8 * 4 * sum(map(prod, shapes))
        )  # float64: the sum, a leader, a member, and the slabs of what is written
        if self.settings.align:
            held += 8 * 2 * mixture.experts[0]["up"].matrix.shape[0] ** 2
        if self.settings.rank is not None:
            held += 8 * 4 * max(rows for rows, _ in shapes) ** 2
        if self.settings.compress is not None:
            held += 8 * 4 * (max(map(prod, shapes)) + max(map(min, shapes)) ** 2)
        router = [prod(self.entries[name].spec.shape) for name in mixture.router]
        return held + 8 * 3 * max(router)

    def compressed(self, remembered: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The share of the numbers of experts that factors and rows have, and what they lose; empty if none was cut."""
        squares = [found[_SQUARES] for _, found in sorted(remembered.items()) if _SQUARES in found]
        if not squares:
            return {}
        shapes = [place.matrix.shape for m in self.mixtures.values() for place in m.experts[0].values()]
        kept = 0
        for rows, columns in shapes:
            rank, sparse = self.settings.cut_to((rows, columns))
            kept += rank * (rows + columns) + sparse * columns
        apart, size = (sum(of[i] for of in squares) for i in (0, 1))
        numbers = kept / sum(map(prod, shapes))
        return {"compressed": {"numbers": numbers, "error": (apart / size) ** 0.5 if size else 0.0}}

    def told(self) -> dict[str, Any]:
        """Settings and groups, for the manifest."""
        found = {name: [list(g.members) for g in groups] for name, groups in self.groups.items()}
        left = {
            name: sorted(set(range(len(self.mixtures[name].experts))).difference(*groups))
            for name, groups in found.items()
        }
        return {
            **self.settings.told(),
            "of": len(next(iter(self.mixtures.values())).experts),
            "merged": found,
            "left_out": {name: experts for name, experts in left.items() if experts},
        }


def _path(plan: Plan) -> Path:
    return next(iter(plan.recipe.experts.values()))


def _statistic(plan: Plan, name: str, kind: str, *shape: int) -> Any:
    """A tensor of the statistics, a float64 array; None without statistics (raises UserError for one that is none)."""
    if STATISTICS not in plan.statistics:
        return None
    [checkpoint] = plan.statistics[STATISTICS]
    key = f"{name}/{kind}"
    info = checkpoint.tensors.get(key)
    if info is None or info.shape != shape:
        found = f"has shape {list(info.shape)}, not {list(shape)}" if info else "is missing"
        more = "; collect the kind 'experts' with outputs" if kind == OUTPUTS and info is None else ""
        raise UserError(f"{checkpoint.path}: '{key}' {found}{more}")
    with Files() as files:
        value = files.elements(info, 0, prod(shape)).double().reshape(shape).numpy()
    finite = bool((abs(value) < float("inf")).all())
    if not finite or kind == USAGE and (value < 0).any():
        raise UserError(f"{checkpoint.path}: '{key}' holds what is no {kind}; collect it again")
    return value


def _groups(
    found: Sequence[Mixture], settings: _Settings, plan: Plan, router_groups: int
) -> dict[str, Groups]:
    """The groups of every mixture, by hand or by the statistics; the latter each inside of a group of the router."""
    if settings.groups is not None:
        return _given(found, settings)
    if STATISTICS not in plan.statistics:
        raise UserError(
            "experts are put in groups by statistics: name their file (--statistics), or --groups"
        )
    total = len(found[0].experts)
    wanted = settings.experts
    assert wanted is not None
    if wanted > total:
        raise UserError(f"--experts {wanted}: there are {total} in a layer; keep as many, or fewer")
    usages = [_statistic(plan, mixture.name, USAGE, total) for mixture in found]
    if settings.wide and settings.method == "mc_smoe":
        leaders = expert_groups.dominants(usages, wanted)
        alike = [expert_groups.cosines(_statistic(plan, m.name, LOGITS, total, total)) for m in found]
        return {m.name: expert_groups.joined(s, lead) for m, s, lead in zip(found, alike, leaders)}
    size, kept = total // router_groups, wanted // router_groups

    def grouped(mixture: Mixture, usage_E: Any) -> Groups:
        kind = {"mc_smoe": LOGITS, "sub_moe": OUTPUTS}.get(settings.method)
        held_EE: Any = _statistic(plan, mixture.name, kind, total, total) if kind else None
        groups: Groups = []
        for start in range(0, total, size):
            own = slice(start, start + size)
            leaders = expert_groups.most_used(usage_E[own], kept)
            if settings.method == "prune":
                part = [[e] for e in sorted(leaders)]
            elif settings.method == "sub_moe":
                part = expert_groups.clustered(1 - held_EE[own], kept, _SEED)
            else:
                part = expert_groups.joined(expert_groups.cosines(held_EE)[own, own], leaders)
            groups += [[start + e for e in group] for group in part]
        return groups

    return {m.name: grouped(m, usage) for m, usage in zip(found, usages)}


def _given(found: Sequence[Mixture], settings: _Settings) -> dict[str, Groups]:
    """The groups that were given (raises UserError where they are none)."""
    given, names = settings.groups, [mixture.name for mixture in found]
    by_name = given if isinstance(given, Mapping) else dict.fromkeys(names, given)
    for name in by_name:
        if name not in names:
            raise UserError(f"--groups: there is no mixture '{name}'{did_you_mean(str(name), names)}")
    groups: dict[str, Groups] = {}
    for mixture in found:
        if mixture.name not in by_name:
            raise UserError(f"--groups: says nothing of '{mixture.name}'; give its groups, too")
        lists, total = by_name[mixture.name], len(mixture.experts)
        members = [e for group in lists for e in group] if _are_lists(lists) else [None]
        known = [e for e in members if isinstance(e, int) and not isinstance(e, bool) and 0 <= e < total]
        if len(known) < len(members) or len(set(known)) < len(known):
            raise UserError(
                f"--groups: of '{mixture.name}': give lists of its experts, 0 to {total - 1}, each in one list at most"
            )
        if settings.wide and len(members) < total:
            raise UserError(f"--groups: of '{mixture.name}': router wide needs every expert in a group")
        groups[mixture.name] = expert_groups.in_order(lists)
    counts = {len(group) for group in groups.values()}
    if len(counts) > 1 and not settings.wide:
        raise UserError(
            f"--groups: {sorted(counts)} groups in different layers; {CONFIG} has one number for all"
        )
    if settings.method == "prune" and any(len(g) > 1 for layer in groups.values() for g in layer):
        raise UserError("--groups: prune keeps experts as they are; give lists of one, or take mc_smoe")
    return groups


def _are_lists(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(g, list | tuple) and g for g in value)
    )


# ---------------------------------------------------------------------------------------------- writing


def _write(
    layout: _Layout, mixture: Mixture, source: FileInputs, writer: CheckpointWriter
) -> tuple[dict[str, str], list[float]]:
    """Write the experts and the router of one layer; the hashes of what was written, and what was cut of experts.

    The latter are sums of squares over all groups, of what was lost and of what there was; none if nothing was cut.
    """
    squares: list[float] = [] if layout.settings.compress is None else [0.0, 0.0]
    sinks: dict[str, TensorWriter] = {}
    hashes: dict[str, str] = {}
    left = {name: prod(spec.shape) for name, spec in layout.parts[next(iter(mixture.tensors))].items()}

    def append(name: str, value: Tensor) -> None:
        spec = writer.specs[name]
        if name not in sinks:
            sinks[name] = writer.open(name)
        sinks[name].append(rounded(value, spec))
        left[name] -= value.numel()
        if not left[name]:
            hashes[name] = sinks.pop(name).close()

    before: tuple[_Group, dict[str, Tensor]] | None = None
    for slot, group in enumerate(layout.slots(mixture)):
        if before is None or before[0] is not group:
            before = group, _merged(layout, mixture, group, source)
            if squares:
                before = group, _cut(layout.settings, before[1], squares)
        slabs: dict[tuple[str, int], Tensor] = {}  # stretches of tensors, by where they begin
        for part, matrix_MN in before[1].items():
            place = mixture.experts[slot][part]
            at = place.tensor, place.matrix.start
            if at not in slabs:
                slabs[at] = torch.empty(place.matrix.slab, dtype=torch.float64, device=source.device)
            place.matrix.put(slabs[at], matrix_MN)
        for (name, _), slab_AB in sorted(slabs.items(), key=lambda item: item[0]):
            append(name, slab_AB)
    for name in mixture.router:
        append(name, _rows(layout, mixture, name, source))
    assert not sinks, sorted(sinks)
    return hashes, squares


def _cut(settings: _Settings, expert: Mapping[str, Tensor], squares: list[float]) -> dict[str, Tensor]:
    """The matrices (M, N) of an expert as factors and rows give them; adds to `squares` what is lost, and was there."""
    found = {}
    for part, matrix_MN in expert.items():
        found[part] = split(matrix_MN, *settings.cut_to(matrix_MN.shape)).dense()
        squares[0] += float((found[part] - matrix_MN).square().sum())
        squares[1] += float(matrix_MN.square().sum())
    return found


_MODEL = 0  # the only expert of the plan


def _read(layout: _Layout, place: Place, source: FileInputs) -> Tensor:
    """A matrix (M, N), float64."""
    origin = source.experts[_MODEL]
    return place.matrix.read(lambda start, stop: source.read(origin, place.tensor, start, stop)).double()


def _merged(layout: _Layout, mixture: Mixture, group: _Group, source: FileInputs) -> dict[str, Tensor]:
    """What the experts of a group become: its matrices (M, N) by part, float64. One member is held beside the sum."""
    settings = layout.settings

    def of(expert: int) -> dict[str, Tensor]:
        return {part: _read(layout, place, source) for part, place in mixture.experts[expert].items()}

    leader = of(group.leader)
    if len(group.members) == 1:
        return leader
    own = group.weights[group.members.index(group.leader)]
    sums = {part: matrix_MN * own for part, matrix_MN in leader.items()}
    cut = settings.rank is not None
    grams = {part: linear.outer(m) for part, m in leader.items()} if cut else {}
    for expert, weight in zip(group.members, group.weights):
        if expert == group.leader:
            continue
        found = of(expert)
        if settings.align:
            order_I = assignment.matched(_by_unit(leader), _by_unit(found)).to(source.device)
            found = {part: m[:, order_I] if part == "down" else m[order_I] for part, m in found.items()}
        for part, matrix_MN in found.items():
            sums[part].add_(matrix_MN, alpha=weight)
            if cut:
                grams[part] += linear.outer(matrix_MN)
    if not cut:
        return sums
    return {
        part: expert_groups.projected(m, grams[part], _rank(settings.rank, m)) for part, m in sums.items()
    }


def _by_unit(expert: Mapping[str, Tensor]) -> list[Tensor]:
    """The matrices of an expert with a row for each hidden unit."""
    return [m.T if part == "down" else m for part, m in sorted(expert.items())]


def _rank(rank: Any, matrix_MN: Tensor) -> int:
    return linear.rank_of(rank, matrix_MN.shape) if isinstance(rank, float) else int(rank)


def _rows(layout: _Layout, mixture: Mixture, name: str, source: FileInputs) -> Tensor:
    """A tensor of the router with a row for each expert of what is written."""
    origin, spec = source.experts[_MODEL], layout.entries[name].spec
    rows_EN = source.read(origin, name, 0, prod(spec.shape)).double().reshape(spec.shape)
    if layout.settings.wide:
        return rows_EN
    groups = layout.groups[mixture.name]
    if layout.settings.router == "dominant":
        return rows_EN[[group.leader for group in groups]]
    weighed = [sum(w * rows_EN[e] for e, w in zip(group.members, group.weights)) for group in groups]
    return torch.stack(weighed)  # type: ignore[arg-type]
