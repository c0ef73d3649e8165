"""Progressive least squares: the linear maps of a merge solved for in the order in which they are applied.

Every example passes twice: through its task's own expert, and through the merged model as it stands. Map by map,

    [W b] = argmin  sum_t 1/n_t sum_rows w |W x + b - y|^2  +  ridge * mean(diag G) * tr(([W b] - [W0 b0]) R (...)^T)

is put in place before the next is solved, so that later maps see what earlier ones still get wrong. x are the map's
inputs in the merged model, w the weight of a token, n_t the sum of w, G = sum_t 1/n_t sum w [x 1]^T [x 1], and W0, b0
the start. Targets y are what the expert's map gives on the expert's own stream; where a map writes to the residual
stream, what is missing there to the expert's, so that errors do not add up. R is 1 on the bias and
sum_t tau_t^T tau_t / |tau_t|^2 + floor on the weight, of mean diagonal 1: inputs that task vectors act on stay nearer
to the start. With `errors`, those of each task count by what its expert's features, or classes, feel of them (see
sensitivity.py).

RegMean (2212.09849) is the same with y = W_t x on the experts' inputs, RegMean++ (2508.03121) with those of the
experts' blocks on the merged stream.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Literal, Mapping, Sequence, TypeVar

from mergeline.merging.api import merge
from mergeline.merging.architecture import Role, TensorRole
from mergeline.merging.checkpoints.checkpoint import Files, open_checkpoint
from mergeline.merging.engine.machine import workers_of_one_thread
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.engine.work import Count
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.learning.contract import Job, inner_recipe
from mergeline.merging.learning.sensitivity import sensitivities, weighted_minimum
from mergeline.merging.learning.spaces import SOLVED, load_tensors, replacing, write_tensors
from mergeline.merging.learning.squares import NOT_FINITE, ROWS, mirrored, strips
from mergeline.merging.learning.stages import Stage, Stream, stages_of
from mergeline.merging.learning.watching import Applied, watched
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")
Target = Literal["residual", "branch", "own"]
Errors = Literal["alike", "features", "classes"]

_WRITERS = (Role.ATTENTION_OUTPUT, Role.MLP_DOWN)
_EVERY_TOKEN = (Role.KEY, Role.VALUE)  # of the last block, what other tokens than the first are needed for
_PACKED = (Role.QKV_THIRDS, Role.QKV_GROUPED)
_EXACT = 1e-3  # ridges below do not hide the roundings of float32
_WORKERS = 2  # tasks at a time, each with sums of its own
_JITTER = 1e-12  # of the mean diagonal: what examples leave undecided stays at the start
_OUTSIDE = "it is outside of the blocks, which alone are solved for"
_START, _STAGES = "start", "stages"


@dataclass(frozen=True)
class Settings:
    """What is solved for, and how near to the start.

    target: see the module. ridge: in mean diagonals of G. floor: of the metric R. first_token: the weight of the token
    that a model is read out at, where it is read out at the first alone. nondiagonal: what off-diagonal entries of Gram
    matrices are multiplied by (of `own`). errors: what those of outputs count by; draws: by how many directions
    that is found (see sensitivity.py).
    """

    target: Target = "residual"
    ridge: float = 1.0
    floor: float = 0.1
    first_token: float = 16.0
    nondiagonal: float = 1.0
    errors: Errors = "alike"
    draws: int = 4


def solve(job: Job, inner: str, inner_params: Mapping[str, Any], settings: Settings) -> Recipe:
    """Solve for the maps of a merge, around what `inner` makes of the experts; the recipe of the result.

    inner: a method, or a learned one, which is fitted to the same examples first.

    What cannot be solved for keeps the start's weights: `notes["kept"]` of the job says which and why.
    """
    folder = job.folder
    begun = inner_recipe(job, inner, inner_params)
    start = begun.model_copy(update={"dtype": "float32", "shard_size": None})
    if not (folder / _START).exists():
        merge(start, folder / _START, device=job.device)
    with FileInputs(make_plan(start)) as source, torch.no_grad():
        fitted = _Fit(job, settings, source, folder)
        fitted.run()
    job.notes["kept"] = fitted.kept
    job.notes["branch"] = fitted.branches
    if settings.errors != "alike":
        job.notes["unweighted"] = sorted((fitted.trained & fitted.solved.keys()) - fitted.felt_by_all())
    job.notes["settings"] = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    matrices = [name for name in fitted.kept if name in fitted.trained]
    if matrices:
        more = f" and {len(matrices) - 1} more" if len(matrices) > 1 else ""
        job.say(f"'{matrices[0]}'{more} stay as {inner} makes them: {fitted.kept[matrices[0]]}")
    return replacing(begun, fitted.solved, folder / SOLVED)


# ---------------------------------------------------------------------------------------------- the maps of a stage


@dataclass(frozen=True)
class _Map:
    """A linear map that is solved for.

    weight, bias: names. shape: (M, N). transposed: the weight is (N, M). anchor: for what writes to the residual
    stream, what it is added to: "stream", the running sum from the stage's input on, or the input of the map of that
    name. beside: of the last convolution of a ResNet's block, what it is added to behind its norm: "stream", the
    block's input, or what the convolution of that name, on the shortcut, gives. norm: the BatchNorm that
    follows, by the prefix of its tensors; eps, its own. offset: positions that are added to what it gives. first: of
    the last block, whether only the first token matters to what it gives; a number: to those first rows.
    """

    weight: str
    bias: str | None
    kind: str
    shape: tuple[int, int]
    transposed: bool
    anchor: str | None = None
    beside: str | None = None
    norm: str | None = None
    eps: float = 0.0
    offset: str | None = None
    first: bool | int = False

    def matrix(self, stored: Tensor) -> Tensor:
        """The weight as (M, N)."""
        return stored.T if self.transposed else stored.reshape(self.shape)

    def stored(self, matrix_MN: Tensor, like: Tensor) -> Tensor:
        return (matrix_MN.T if self.transposed else matrix_MN).reshape(like.shape).to(like)


class _Reached(Exception):
    """The map that was waited for was applied."""


def _zeros(outputs: int, inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """G (N + 1, N + 1) and C (M, N + 1) of nothing yet, float64."""
    gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
    return gram, gram.new_zeros(outputs, inputs + 1)


class _Sums:
    """Of the rows of one task: sums of w [x 1]^T [x 1], (N + 1, N + 1), of w y^T [x 1], (M, N + 1), and of w; float64.

    exact: whether products are float64, too, or float32 of some thousand rows at a time, which a ridge hides.
    """

    def __init__(self, outputs: int, inputs: int, exact: bool, device: torch.device):
        self.gram, self.cross = _zeros(outputs, inputs, device)
        self.weight = 0.0
        self._dtype = torch.float64 if exact else torch.float32

    def add(self, x_RN: Tensor, y_RM: Tensor | None, w_R: Tensor | None) -> None:
        """More rows (R): inputs, targets if they are not `own` ones (see `means`), and weights, 1 if there are none."""
        for start in range(0, len(x_RN), ROWS):
            rows = slice(start, start + ROWS)
            self._add(x_RN[rows], None if y_RM is None else y_RM[rows], None if w_R is None else w_R[rows])

    def _add(self, x_RN: Tensor, y_RM: Tensor | None, w_R: Tensor | None) -> None:
        inputs = x_RN.shape[1]
        x_RN = x_RN.to(self._dtype)
        weighted_RN = x_RN if w_R is None else x_RN * w_R.to(self._dtype)[:, None]
        total = float(len(x_RN)) if w_R is None else float(w_R.double().sum())
        for rows, columns, product in strips(x_RN, weighted_RN):
            self.gram[rows, columns] += product
        self.gram[:inputs, -1] += weighted_RN.sum(0, dtype=torch.float64)
        self.gram[-1, -1] += total
        self.weight += total
        if y_RM is not None:
            y_RM = y_RM.to(self._dtype)
            self.cross[:, :-1] += y_RM.T @ weighted_RN
            if w_R is not None:
                y_RM = y_RM * w_R.to(self._dtype)[:, None]
            self.cross[:, -1] += y_RM.sum(0, dtype=torch.float64)

    def means(self, own_MK: Tensor | None = None, nondiagonal: float = 1.0) -> tuple[Tensor, Tensor]:
        """G and C over the sum of weights. own: targets are own [x 1]."""
        gram_KK = mirrored(self.gram / self.weight)
        if nondiagonal != 1:
            gram_KK = (gram_KK * nondiagonal).diagonal_scatter(gram_KK.diagonal())
        return gram_KK, self.cross / self.weight if own_MK is None else own_MK @ gram_KK


class _System:
    """Normal equations of one map: the tasks' G (N + 1, N + 1) and C (M, N + 1), each as heavy as any other's.

    tasks: where outputs are weighted, each one's own G, C and weights H (M, M).
    """

    def __init__(self, outputs: int, inputs: int, device: torch.device):
        self.gram, self.cross = _zeros(outputs, inputs, device)
        self.tasks: list[tuple[Tensor, Tensor, Tensor]] = []

    def include(
        self,
        task: _Sums,
        own_MK: Tensor | None = None,
        nondiagonal: float = 1.0,
        weights_MM: Tensor | None = None,
    ) -> None:
        if task.weight > 0:
            gram_KK, cross_MK = task.means(own_MK, nondiagonal)
            self.gram += gram_KK
            self.cross += cross_MK
            if weights_MM is not None:
                self.tasks.append((gram_KK, cross_MK, weights_MM))

    def minimum(self, start_MK: Tensor, ridge: float, metric_KK: Tensor) -> Tensor:
        """P (M, K), K = N or N + 1 as the start has it, float64."""
        width = start_MK.shape[1]
        plain_MK = minimum(self.gram[:width, :width], self.cross[:, :width], start_MK, ridge, metric_KK)
        if not self.tasks:
            return plain_MK
        parts = [
            (gram_KK[:width, :width], cross_MK[:, :width], h_MM) for gram_KK, cross_MK, h_MM in self.tasks
        ]
        return weighted_minimum(parts, start_MK, ridge, metric_KK)


def minimum(
    gram_KK: Tensor, cross_MK: Tensor, start_MK: Tensor, ridge: float, metric_KK: Tensor | None = None
) -> Tensor:
    """argmin over P (M, K) of tr(P G P^T) - 2 <C, P> + ridge * mean(diag G) * tr((P - P0) R (P - P0)^T), float64.

    metric: R (K, K), the identity unless given. Directions that G and the ridge leave undecided stay at P0.

    Raises:
        UserError: NaN or Inf in G or C.
    """
    if not bool(torch.isfinite(gram_KK).all() and torch.isfinite(cross_MK).all()):
        raise UserError(NOT_FINITE)
    size = float(gram_KK.diagonal().mean())
    if not size > 0:
        return start_MK.clone()
    one_KK = torch.eye(len(gram_KK), dtype=torch.float64, device=gram_KK.device)
    left_KK = gram_KK + ridge * size * (one_KK if metric_KK is None else metric_KK)
    right_MK = cross_MK - start_MK @ gram_KK
    jitter = 0.0 if ridge else _JITTER
    while True:
        lower_KK, failed = torch.linalg.cholesky_ex(left_KK + jitter * size * one_KK)
        if not failed:
            return start_MK + torch.cholesky_solve(right_MK.T, lower_KK).T
        jitter = max(_JITTER, 100 * jitter)


def metric_of(
    taus: Iterator[Tensor], inputs: int, floor: float, device: torch.device | str = "cpu"
) -> Tensor:
    """R (N, N): sum of tau^T tau / |tau|^2 over task vectors (M, N), plus `floor`, of mean diagonal 1."""
    found_NN = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
    for tau_MN in taus:
        if (size := float(tau_MN.square().sum())) > 0:
            found_NN.addmm_(tau_MN.T, tau_MN, alpha=1 / size)
    mean = float(found_NN.diagonal().mean())
    one_NN = torch.eye(inputs, dtype=torch.float64, device=device)
    return (found_NN / mean + floor * one_NN) / (1 + floor) if mean > 0 else one_NN


class _Fit:
    """One pass over a model; `solved`, and `kept`: what was left, and why."""

    def __init__(self, job: Job, settings: Settings, source: FileInputs, folder: Path):
        plan = source.plan
        assert plan.model is not None
        self.job, self.settings, self.source, self.folder = job, settings, source, folder
        self.network, self.examples = job.network, job.examples
        self.roles: Mapping[str, TensorRole] = plan.model.tensors
        self.own = {name: t for name, t in self.network.tensors().items() if t.is_floating_point()}
        self.device = next(iter(self.own.values())).device
        self.merged = {entry.name for entry in plan.merged}
        self.tasks = [(task, expert) for expert in plan.experts for task in self.examples.tasks_of(expert)]
        self.tasks = [(task, expert) for task, expert in self.tasks if self.examples.count(task)]
        self.solved: dict[str, Tensor] = {}
        self.kept: dict[str, str] = {}
        self.branches: list[str] = []
        self._start = open_checkpoint(folder / _START)
        self._start_files = Files()
        self.first_only = False
        self.felt: dict[str, dict[str, Tensor]] = {}  # of each task, what `sensitivities` gives
        self._applied: set[str] = set()

    @property
    def trained(self) -> set[str]:
        """What is multiplied by inputs: of this, what is kept must be said."""
        added = (Role.POSITION, Role.TOKEN, Role.NORM, Role.BIAS, Role.SCALE, Role.CONSTANT)
        return {
            name for name in self.own
            if name in self.merged and self.own[name].ndim > 1 and self.roles[name].role not in added
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------ weights

    def _read(self, origin: str, name: str) -> Tensor:
        """A tensor of an expert, the base or the start, float32; the base's where an expert has none."""
        shape = self.own[name].shape
        if origin == "start":
            if name in self._start.tensors:
                info = self._start.tensors[name]
                found = info.read(self._start_files.elements, 0, shape.numel())
                return found.reshape(shape).to(self.device, torch.float32)
            origin = "base"
        elif origin != "base" and name not in self.source.plan.experts[origin].tensors:
            origin = "base"
        found = self.source.read(origin, name, 0, shape.numel())
        return found.reshape(shape).to(self.device, torch.float32)

    def _load(self, stage: Stage, origin: str) -> None:
        """Put the weights of a stage in place: an expert's, or (`start`) those of the merge as it stands."""
        known = self._known(origin)
        self.network.load(
            {
                name: self.solved[name]
                if origin == "start" and name in self.solved
                else self._read(origin, name)
                for name in stage.tensors
                if name in known
            }
        )

    def _known(self, origin: str) -> set[str]:
        base = self.source.plan.base
        found = set(base.tensors) if base else set()
        return found | set(
            self._start.tensors if origin == "start" else self.source.plan.experts[origin].tensors
        )

    # ------------------------------------------------------------------------------------------ the pass

    def run(self) -> None:
        with self._start_files:
            whole = Stage("model", list(self.own), lambda stream: stream)
            self._feel(whole)
            self._load(whole, "start")
            probe = next(iter(self.examples.of(self.tasks[0][0])))
            stages = stages_of(self.network, probe)
            self.first_only = len(stages) > 1 and self._reads_first_token(stages, probe)
            streams = {task: [Stream(batch) for batch in self.examples.of(task)] for task, _ in self.tasks}
            experts = (
                {} if self.settings.target == "own" else {task: list(own) for task, own in streams.items()}
            )
            trial = Stream(probe)
            for k, stage in enumerate(stages):
                last, inside = k == len(stages) - 1, 0 < k < len(stages) - 1
                alone = not inside and len(stages) > 1  # what is around blocks is run by replacing them
                self._load(stage, "start")
                maps, trial = self._maps(stage, trial, k == len(stages) - 2)
                path = self.folder / _STAGES / f"{k:04d}.safetensors"
                if path.is_file():
                    self.solved |= load_tensors(path)
                    self._advance_experts(stage, experts)
                    self._load(stage, "start")
                    if not last:
                        self._advance(stage, streams, alone)
                else:
                    if self.settings.target == "own":
                        self._solve_own(stage, maps, streams, inside, last)
                    else:
                        self._solve(stage, maps, streams, experts, alone, last)
                    path.parent.mkdir(exist_ok=True)
                    write_tensors(path, {n: self.solved[n] for n in self._names(maps) if n in self.solved})
                if self.job.progress:
                    done, every = Count.of(k + 1, 0), Count.of(len(stages), 0)
                    self.job.progress(done, every)
            for name in sorted(self.trained - set(self.solved) - set(self.kept)):
                self.kept[name] = "no linear map was seen to use it"

    def _feel(self, whole: Stage) -> None:
        """Find what each expert feels of errors, if they are to count by it."""
        if (errors := self.settings.errors) == "alike":
            return
        for task, expert in self.tasks:
            self._load(whole, expert)
            batches, seed = self.examples.of(task), self.job.recipe.seed
            self.felt[task] = sensitivities(self.network, batches, task, errors, self.settings.draws, seed)

    def felt_by_all(self) -> set[str]:
        """The maps of whose outputs every task feels errors: only these can be weighted."""
        return set.intersection(*map(set, self.felt.values())) if self.felt else set()

    def _names(self, maps: Sequence[_Map]) -> set[str]:
        found = {name for m in maps for name in (m.weight, m.bias) if name}
        return found | {f"{m.norm}.bias" for m in maps if m.norm}

    def _advance_experts(self, stage: Stage, experts: dict[str, list[Stream]]) -> None:
        for task, expert in self.tasks:
            if task in experts:
                self._load(stage, expert)
                experts[task] = [self._run(stage, stream, {}) for stream in experts[task]]

    def _reads_first_token(self, stages: Sequence[Stage], batch: Any) -> bool:
        """Whether what comes after the last block depends on the first token alone."""
        stream = Stream(batch)
        for stage in stages[:-1]:
            stream = stage.run(stream)
        hidden = stream.hidden
        if hidden is None or hidden.ndim != 3 or hidden.shape[1] < 2:
            return False
        other = hidden.clone()
        other[:, 1:] = other[:, 1:].flip(-1) + 1
        found = [stages[-1].run(stream.moved(h)).hidden for h in (hidden, other)]
        return found[0] is not None and found[1] is not None and torch.equal(found[0], found[1])

    # ------------------------------------------------------------------------------------------ what there is

    def _maps(self, stage: Stage, stream: Stream, last_block: bool) -> tuple[list[_Map], Stream]:
        """The maps of a stage that can be solved for, in the order in which they are applied."""
        seen: list[Applied] = []
        norms: list[tuple[str, Any, Tensor, Tensor]] = []
        copies: list[Tensor] = []

        def see(applied: Applied) -> None:
            seen.append(applied)
            copies.append(applied.outputs.clone())

        def note(name: str) -> Callable[..., None]:
            return lambda module, args: norms.append((name, module, args[0], args[0].clone()))

        handles = [
            module.register_forward_pre_hook(note(name))
            for name, module in self.network.module.named_modules()
            if "norm" in type(module).__name__.lower()
        ]
        try:
            with self._watched(stream, see):
                after = stage.run(stream)
        finally:
            for handle in handles:
                handle.remove()
        uses = Counter(applied.tensor for applied in seen)
        found: list[tuple[_Map, Tensor, Tensor]] = []
        for applied, output in zip(seen, copies):
            name = applied.tensor
            if name not in self.merged or name in self._applied or name not in stage.tensors:
                continue
            why = self._refused(applied, uses[name])
            made = None if why else self._understood(applied, output)
            if made is None:
                self.kept[name] = why or "what it computes is no product of its input and itself"
                continue
            made = replace(made, first=self._first(name) if self.first_only and last_block else False)
            for prefix, module, given, _ in norms:
                if hasattr(module, "running_mean") and given.data_ptr() == applied.outputs.data_ptr():
                    norm = self.network.stored(f"{prefix}.weight").removesuffix(".weight")
                    made = replace(made, norm=norm, eps=module.eps)
            found.append((made, applied.inputs, output))
        self._applied |= {applied.tensor for applied in seen}
        if self.settings.target == "residual":
            found = self._anchored(stream, after, found, [copy for *_, copy in norms])
            found = self._on_shortcuts(stream, after, found)
        return [made for made, *_ in found], after

    def _refused(self, applied: Applied, uses: int) -> str | None:
        if applied.kind == "embedding" or self.roles[applied.tensor].by_token:
            return "it has a row for each token of a vocabulary"
        if applied.part is not None:
            return "its experts do not see the same tokens in two models"
        if uses > 1:
            return "it is used more than once"
        return None

    def _understood(self, applied: Applied, output: Tensor) -> _Map | None:
        """How a weight is used, tried on numbers; None if it is not understood."""
        weight = self.own[applied.tensor]
        x_RN, y_RM = applied.inputs.flatten(0, -2)[:64], output.flatten(0, -2)[:64]
        named = applied.tensor.removesuffix("weight") + "bias"
        biases = [name for name in (named, None) if name is None or name in self.own]
        for transposed in (False, True) if weight.ndim == 2 else (False,):
            matrix_MN = weight.T if transposed else weight.flatten(1)
            if matrix_MN.shape != (y_RM.shape[1], x_RN.shape[1]):
                continue
            for bias in biases:
                made_RM = x_RN @ matrix_MN.T + (0 if bias is None else self.own[bias])
                if torch.allclose(made_RM, y_RM, rtol=1e-3, atol=1e-4 * float(y_RM.abs().max())):
                    if bias is not None and bias not in self.merged:
                        return None
                    role, offset = self.roles[applied.tensor].role, None
                    if role is Role.PATCH_EMBEDDING:
                        offset = self._positions(output)
                    shape = (int(matrix_MN.shape[0]), int(matrix_MN.shape[1]))
                    return _Map(applied.tensor, bias, applied.kind, shape, transposed, offset=offset)
        return None

    def _positions(self, output: Tensor) -> str | None:
        """The positions that are added to patches (B, P, M): of as many or more tokens, of the same width."""
        for name, tensor in self.own.items():
            role = self.roles[name].role if name in self.roles else None
            if role is Role.POSITION and tensor.shape[-1] == output.shape[-1]:
                if tensor.numel() // tensor.shape[-1] >= output.shape[1]:
                    return name
        return None

    def _first(self, name: str) -> bool | int:
        role = self.roles[name]
        if role.role in _EVERY_TOKEN:
            return False
        if role.role in _PACKED:
            return role.query_rows if role.query_rows is not None and not role.transposed else False
        return True

    def _anchored(
        self, before: Stream, after: Stream, found: list[tuple[_Map, Tensor, Tensor]], norms: list[Tensor]
    ) -> list[tuple[_Map, Tensor, Tensor]]:
        """The same, where a map writes to the residual stream with what it is added to, as numbers say."""
        writers = [i for i, (made, *_) in enumerate(found) if self.roles[made.weight].role in _WRITERS]
        stream, total = before.hidden, before.hidden
        for i in writers:
            total = total + found[i][2] if total is not None and total.shape == found[i][2].shape else None
        at_end = total is not None and after.hidden is not None and _same(total, after.hidden)
        shown = [*norms, *([after.hidden] if after.hidden is not None else [])]
        for i in writers:
            made, inputs, output = found[i]
            if stream is not None and stream.shape == output.shape:
                stream = stream + output
                if at_end or any(_same(stream, x) for x in shown):
                    found[i] = (replace(made, anchor="stream"), inputs, output)
                    continue
            stream = None  # which the others add to something else
            for earlier, x, _ in found[:i]:
                if x.shape == output.shape and any(_same(x + output, norm) for norm in norms):
                    found[i] = (replace(made, anchor=earlier.weight), inputs, output)
                    break
            else:
                self.branches.append(made.weight)
        return found

    def _on_shortcuts(
        self, before: Stream, after: Stream, found: list[tuple[_Map, Tensor, Tensor]]
    ) -> list[tuple[_Map, Tensor, Tensor]]:
        """The same, where the sum of a convolution's and the shortcut's norms is what leaves a ResNet's block."""
        if after.hidden is None or after.hidden.ndim != 4:
            return found
        end, normed = _places(after.hidden), {}
        for i, (made, _, output) in enumerate(found):
            if made.norm and output.shape == end.shape:
                shift, factor = self._affine(made)
                normed[i] = output * factor + shift
        entered = before.hidden
        if entered is not None and entered.shape == after.hidden.shape:
            for i, own in normed.items():
                if _same((own + _places(entered)).relu(), end):
                    found[i] = (replace(found[i][0], beside="stream"), *found[i][1:])
                    return found
        for i, j in combinations(normed, 2):
            if _same((normed[i] + normed[j]).relu(), end):
                shortcut, writer = (i, j) if i == 0 else (j, i)
                corrects = (replace(found[writer][0], beside=found[shortcut][0].weight), *found[writer][1:])
                # The shortcut first: what it gives depends on the block's input alone.
                rest = [each for k, each in enumerate(found) if k not in (i, j)]
                place = sum(k < writer and k != shortcut for k in range(len(found)))
                return [*rest[:place], found[shortcut], corrects, *rest[place:]]
        return found

    # ------------------------------------------------------------------------------------------ solving

    def _solve(
        self,
        stage: Stage,
        maps: list[_Map],
        streams: dict[str, list[Stream]],
        experts: dict[str, list[Stream]],
        alone: bool,
        last: bool,
    ) -> None:
        """Solve for the maps of a stage one after the other; all streams move on, but those at the end."""
        targets: dict[str, list[dict[str, Tensor]]] = {}
        for task, expert in self.tasks:
            self._load(stage, expert)
            found = [self._targets(stage, maps, stream) for stream in experts[task]]
            experts[task], targets[task] = [moved for moved, _ in found], [own for _, own in found]
        self._load(stage, "start")
        given: dict[str, list[dict[str, Tensor]]] = {task: [{} for _ in own] for task, own in targets.items()}
        for m in maps:
            groups = self._groups(m)
            systems = [_System(rows.stop - rows.start, m.shape[1], self.device) for rows, _ in groups]

            def summed(task: str, m: _Map = m, groups: list[tuple[slice, bool]] = groups) -> list[_Sums]:
                exact = self.settings.ridge < _EXACT
                sums = [_Sums(rows.stop - rows.start, m.shape[1], exact, self.device) for rows, _ in groups]
                for stream, own, known in zip(streams[task], targets[task], given[task]):
                    x, y = self._rows(stage, maps, m, stream, own.pop(m.weight), known)
                    w = self._weights(stream, x)
                    for (rows, first), each in zip(groups, sums):
                        each.add(*_flat(x, y[..., rows], w, first))
                return sums

            weighted = m.weight in self.felt_by_all()
            for (task, _), of_task in zip(self.tasks, self._by_task(summed, alone)):
                h_MM = self.felt[task][m.weight] if weighted else None
                for (rows, _), system, sums in zip(groups, systems, of_task):
                    system.include(sums, weights_MM=None if h_MM is None else h_MM[rows, rows])
            self._put(m, groups, systems)
        if not last:
            self._advance(stage, streams, alone, given)

    def _advance(
        self,
        stage: Stage,
        streams: dict[str, list[Stream]],
        alone: bool,
        given: Mapping[str, list[dict[str, Tensor]]] | None = None,
    ) -> None:
        """Bring the merged model's streams to the next stage. given: outputs of its maps, as `_rows` finds them."""

        def moved(task: str) -> list[Stream]:
            known = given[task] if given else [{} for _ in streams[task]]
            return [self._run(stage, stream, own) for stream, own in zip(streams[task], known)]

        for (task, _), found in zip(self.tasks, self._by_task(moved, alone)):
            streams[task] = found

    def _watched(
        self,
        stream: Stream,
        see: Callable[[Applied], None],
        known: Callable[[str, Tensor], Tensor | None] | None = None,
    ) -> AbstractContextManager[None]:
        """As `watched`; rows of all tokens (B * L, N), which GPT-2 and routers make, become (B, L, N)."""
        hidden = stream.hidden
        tokens = hidden.shape[:2] if hidden is not None and hidden.ndim == 3 and hidden.shape[1] > 1 else None
        if tokens is None:
            return watched(self.own, see, known)

        def by_token(x: Tensor) -> Tensor:
            return x.unflatten(0, tokens) if x.ndim == 2 and len(x) == tokens.numel() else x

        def see_by_token(applied: Applied) -> None:
            see(applied._replace(inputs=by_token(applied.inputs), outputs=by_token(applied.outputs)))

        def known_by_token(name: str, x: Tensor) -> Tensor | None:
            found = known(name, by_token(x)) if known else None
            return None if found is None else found.reshape(*x.shape[:-1], found.shape[-1])

        return watched(self.own, see_by_token, known_by_token if known else None)

    def _run(self, stage: Stage, stream: Stream, given: Mapping[str, Tensor]) -> Stream:
        """A stream through a stage whose weights are in place; watched, for attention is rounded in another way."""
        with self._watched(stream, lambda applied: None, lambda name, inputs: given.get(name)):
            return stage.run(stream)

    def _by_task(self, work: Callable[[str], Result], alone: bool) -> Iterator[Result]:
        """What `work` makes of each task, in their order. alone: one after the other; else some at a time."""
        tasks = [task for task, _ in self.tasks]
        if alone:
            yield from map(work, tasks)
            return

        def quietly(task: str) -> Result:
            with torch.no_grad():  # is of a thread, as is the number of its threads
                return work(task)

        with workers_of_one_thread(_WORKERS) as pool:
            for start in range(0, len(tasks), _WORKERS):
                yield from pool.map(quietly, tasks[start : start + _WORKERS])

    def _groups(self, m: _Map) -> list[tuple[slice, bool]]:
        """Rows of a map that are fitted to the same tokens, and whether to the first alone."""
        if isinstance(m.first, bool):
            return [(slice(0, m.shape[0]), m.first)]
        return [(slice(0, m.first), True), (slice(m.first, m.shape[0]), False)]

    def _targets(self, stage: Stage, maps: list[_Map], stream: Stream) -> tuple[Stream, dict[str, Tensor]]:
        """What an expert, whose weights are in place, makes of a batch: see `_rows` for what is kept of each map."""
        by_name, inputs, found = {m.weight: m for m in maps}, {}, {}
        written = stream.hidden

        def see(applied: Applied) -> None:
            nonlocal written
            m = by_name.get(applied.tensor)
            if m is None:
                return
            inputs[m.weight], y = applied.inputs, applied.outputs
            if m.anchor == "stream":
                assert written is not None
                written = y = written + y
            elif m.anchor:
                y = inputs[m.anchor] + y
            elif m.norm:
                shift, factor = self._affine(m)
                y = y * factor + shift
            elif m.offset:
                y = y + self._patch_positions(m, y)
            found[m.weight] = (y[:, :1] if m.first is True and y.ndim == 3 else y).clone()

        with self._watched(stream, see):
            after = stage.run(stream)
        sums = {m.weight: found[m.weight] + self._beside(m, stream, found) for m in maps if m.beside}
        return after, found | sums

    def _beside(self, m: _Map, stream: Stream, found: Mapping[str, Tensor]) -> Tensor:
        """What is added behind the norm of a map: the stream, or what another made, by its name in `found`."""
        assert m.beside is not None
        if m.beside == "stream":
            assert stream.hidden is not None
            return _places(stream.hidden)
        return found[m.beside]

    def _rows(
        self,
        stage: Stage,
        maps: list[_Map],
        m: _Map,
        stream: Stream,
        target: Tensor,
        given: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Inputs of a map in the merged model, whose weights are in place, and what it should make of them.

        given: outputs of maps that were solved before, which are computed once.
        """
        by_name, inputs = {each.weight: each for each in maps}, {}
        written = stream.hidden
        found: list[Tensor] = []
        others: dict[str, Tensor] = {}

        def known(name: str, x: Tensor) -> Tensor | None:
            if name == m.weight:
                found.append(x)
                raise _Reached
            inputs[name] = x
            return given[name].clone() if name in given else None

        def see(applied: Applied) -> None:
            nonlocal written
            each = by_name.get(applied.tensor)
            if each is None:
                return
            inputs[each.weight] = applied.inputs
            if each.weight == m.weight:  # a convolution
                found.append(applied.inputs)
            elif each.weight == m.beside:
                shift, factor = self._affine(each)
                others[each.weight] = applied.outputs * factor + shift
            if found and (m.beside in (None, "stream") or others):
                raise _Reached
            if applied.kind == "linear" and each.weight not in given:
                given[each.weight] = applied.outputs.clone()
            if each.anchor == "stream":
                assert written is not None
                written = written + applied.outputs

        with self._watched(stream, see, known):
            try:
                stage.run(stream)
            except _Reached:
                pass
        x, y = found[0], target
        part = slice(0, 1) if m.first is True and x.ndim == 3 else slice(None)
        x = x[:, part] if x.ndim > 2 else x
        if m.anchor == "stream":
            assert written is not None
            y = y - written[:, part]
        elif m.anchor:
            y = y - inputs[m.anchor][:, part]
        elif m.norm:
            shift, factor = self._affine(m)
            y = y if m.beside is None else y - self._beside(m, stream, others)
            y = (y - shift) / torch.where(factor == 0, torch.ones_like(factor), factor)
        elif m.offset:
            y = y - self._patch_positions(m, y)
        return x, y

    def _affine(self, m: _Map) -> tuple[Tensor, Tensor]:
        """What the BatchNorm after a map does, as weights are in place: y * factor + shift."""
        parts = {p: self.own.get(f"{m.norm}.{p}") for p in ("weight", "bias", "running_mean", "running_var")}
        mean, variance = parts["running_mean"], parts["running_var"]
        assert mean is not None and variance is not None
        factor = (variance + m.eps).rsqrt()
        if parts["weight"] is not None:
            factor = factor * parts["weight"]
        shift = -mean * factor
        return shift if parts["bias"] is None else shift + parts["bias"], factor

    def _patch_positions(self, m: _Map, y: Tensor) -> Tensor:
        assert m.offset is not None
        return self.own[m.offset].reshape(-1, y.shape[-1])[-y.shape[1] :]

    def _weights(self, stream: Stream, x: Tensor) -> Tensor | None:
        """The weights of tokens (B, tokens) of a map's inputs; None where all weigh the same."""
        mask = stream.batch.get("attention_mask")
        hidden = stream.hidden
        tokens = hidden.shape[:2] if hidden is not None and hidden.ndim == 3 else None
        if x.ndim != 3:
            return None
        if isinstance(mask, torch.Tensor) and mask.shape == x.shape[:2]:
            weights = mask.double()
        elif self.first_only and x.shape[:2] == tokens:
            weights = torch.ones(x.shape[:2], dtype=torch.float64, device=x.device)
        else:
            return None
        if self.first_only:
            weights[:, 0] *= self.settings.first_token
        return weights

    def _put(self, m: _Map, groups: list[tuple[slice, bool]], systems: list[_System]) -> None:
        """Solve, and put the solution in place."""
        weight, bias_name = self.own[m.weight], m.bias or (f"{m.norm}.bias" if m.norm else None)
        if bias_name is not None and (bias_name not in self.own or bias_name not in self.merged):
            bias_name = None
        start_MN = m.matrix(weight).double()
        inputs = m.shape[1]
        metric_NN = self._metric(m)
        shift, factor = self._affine(m) if m.norm else (None, None)
        found_MN, found_M = start_MN.clone(), None if bias_name is None else start_MN.new_zeros(m.shape[0])
        own_bias = self.own[m.bias].double() if m.bias else start_MN.new_zeros(m.shape[0])
        for (rows, _), system in zip(groups, systems):
            width = inputs + (bias_name is not None)
            start_MK = torch.cat([start_MN[rows], own_bias[rows, None]], 1)[:, :width]
            metric_KK = torch.eye(width, dtype=torch.float64, device=start_MK.device)
            metric_KK[:inputs, :inputs] = metric_NN
            p_MK = system.minimum(start_MK, self.settings.ridge, metric_KK)
            found_MN[rows] = p_MK[:, :inputs]
            if found_M is not None:
                found_M[rows] = p_MK[:, -1]
        if factor is not None:
            found_MN[factor == 0] = start_MN[factor == 0]
        self._replace(m.weight, m.stored(found_MN, weight))
        if found_M is not None and bias_name is not None:
            if m.bias is None and factor is not None:  # of a convolution without one: its BatchNorm's
                found_M = self.own[bias_name].double() + factor * torch.where(factor == 0, 0.0, found_M)
            self._replace(bias_name, found_M.to(self.own[bias_name]))

    def _replace(self, name: str, value: Tensor) -> None:
        self.own[name].copy_(value)
        self.solved[name] = value.clone()

    def _metric(self, m: _Map) -> Tensor:
        def taus() -> Iterator[Tensor]:
            base_MN = m.matrix(self._read("base", m.weight)).double()
            for expert in self.source.plan.experts:
                yield m.matrix(self._read(expert, m.weight)).double() - base_MN

        return metric_of(taus(), m.shape[1], self.settings.floor, self.device)

    # ------------------------------------------------------------------------------------------ RegMean++

    def _solve_own(
        self, stage: Stage, maps: list[_Map], streams: dict[str, list[Stream]], inside: bool, last: bool
    ) -> None:
        """All maps of a block at once: W_t x on what each expert's own block makes of the merged stream."""
        if not inside:
            self.kept |= {m.weight: _OUTSIDE for m in maps}
            maps = []
        systems = {m.weight: _System(*m.shape, self.device) for m in maps}
        for task, expert in self.tasks if maps else ():
            self._load(stage, expert)
            sums = {m.weight: _Sums(*m.shape, True, self.device) for m in maps}

            def see(applied: Applied, sums: dict[str, _Sums] = sums) -> None:
                if applied.tensor in sums:
                    sums[applied.tensor].add(applied.inputs.flatten(0, -2), None, None)

            with watched(self.own, see):
                for stream in streams[task]:
                    stage.run(stream)
            for m in maps:
                own_MN = m.matrix(self.own[m.weight]).double()
                own_MK = torch.cat([own_MN, own_MN.new_zeros(len(own_MN), 1)], 1)
                systems[m.weight].include(sums[m.weight], own_MK, self.settings.nondiagonal)
        self._load(stage, "start")
        for m in maps:
            system, start_MN = systems[m.weight], m.matrix(self.own[m.weight]).double()
            found_MN = minimum(system.gram[:-1, :-1], system.cross[:, :-1], start_MN, self.settings.ridge)
            self._replace(m.weight, m.stored(found_MN, self.own[m.weight]))
        if not last:
            self._advance(stage, streams, alone=True)


def _places(x_BMHW: Tensor) -> Tensor:
    """A picture's channels as rows of its places, (B, H * W, M)."""
    return x_BMHW.flatten(2).transpose(1, 2)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def _flat(x: Tensor, y: Tensor, w: Tensor | None, first: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of inputs, targets and weights; of the first token alone if asked."""
    if first and x.ndim == 3:
        x, y, w = x[:, :1], y[:, :1], None
    return x.flatten(0, -2), y.flatten(0, -2), None if w is None else w.flatten()
