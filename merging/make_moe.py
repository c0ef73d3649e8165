"""Dense models of one architecture as the experts of one mixture, as mergekit-moe makes it (version 0.1.5).

Every expert brings its MLPs; all else is the base's. The router of a layer has a row for each expert: drawn at random,
or of prompts, as a file has them that `mergeline.tasks.language.routers` writes.

Shape suffixes: L layers, E experts, with the shared one last, H width of the model.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Mapping, get_args

from pydantic import BaseModel, ConfigDict, Field

from mergeline.merging.algebra import draws
from mergeline.merging.algebra.slots import block_elements
from mergeline.merging.canonical import canonical_json
from mergeline.merging.checkpoints.checkpoint import DTYPES, Files, open_checkpoint
from mergeline.merging.checkpoints.companions import WEIGHTS, read_config
from mergeline.merging.checkpoints.writer import CheckpointWriter, TensorSpec
from mergeline.merging.engine.blocks import rounded
from mergeline.merging.engine.inputs import files_of, stamps
from mergeline.merging.engine.manifest import Manifest, checkpoint_metadata
from mergeline.merging.engine.output import opened, publish_all
from mergeline.merging.engine.plan import Entry, Plan
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.engine.work import Finished, MergeJob, Progress, hashes_read, run
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["mixtral", "qwen2", "qwen3", "deepseek"]
Random = Literal["random", "uniform_random"]
ROUTERS = "routers"  # the kind of statistics that rows of routers are given as: `layers.L`, (E, H)
_MLP = re.compile(r"^model\.layers\.(?P<layer>\d{1,6})\.mlp\.(?P<part>gate|up|down)_proj\.weight$")
_BIAS = re.compile(r"\.(mlp\.\w+|self_attn\.o_proj)\.bias$")
_QKV_BIAS = re.compile(r"\.self_attn\.[qkv]_proj\.bias$")
_UNBALANCED = 5.0  # a condition number of a router from which mergekit says that prompts are too similar


class Expert(BaseModel):
    """A dense model whose MLPs are an expert's.

    residual_scale: what its down projection is multiplied by. noise_scale: the standard deviation of noise that is
    added to its weights, drawn by the seed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    residual_scale: float | None = Field(default=None, allow_inf_nan=False)
    noise_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)


@dataclass(frozen=True)
class _Kind:
    """How a kind of mixture is named, and of which kinds of dense models it is made.

    shared: how many experts of every token it may have, and at least. shared_gate: whether these have a router.
    """

    of: tuple[str, ...]
    mixture: str
    parts: Mapping[str, str]
    model_type: str
    architecture: str
    count: str
    shared: tuple[int, int] = (0, 0)
    shared_name: str = ""
    shared_gate: bool = False


_PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_KINDS: dict[str, _Kind] = {
    "mixtral": _Kind(
        ("llama", "mistral"), "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}, "mixtral",
        "MixtralForCausalLM", "num_local_experts",
    ),
    "qwen3": _Kind(("qwen3",), "mlp", _PROJECTIONS, "qwen3_moe", "Qwen3MoeForCausalLM", "num_experts"),
    "qwen2": _Kind(
        ("qwen2", "llama", "mistral"), "mlp", _PROJECTIONS, "qwen2_moe", "Qwen2MoeForCausalLM", "num_experts",
        shared=(1, 1), shared_name="shared_expert", shared_gate=True,
    ),
    "deepseek": _Kind(
        ("llama", "mistral"), "mlp", _PROJECTIONS, "deepseek", "DeepseekForCausalLM", "n_routed_experts",
        shared=(0, 1), shared_name="shared_experts",
    ),
}  # fmt: skip
# The code of this kind is no part of transformers, which fetches it from there where it is allowed to.
_DEEPSEEK = "deepseek-ai/deepseek-moe-16b-base--"


def make_moe(
    base: str | os.PathLike,
    experts: Mapping[str, Expert | str | os.PathLike],
    out: str | os.PathLike,
    *,
    shared: Expert | str | os.PathLike | None = None,
    kind: Kind | None = None,
    routers: Random | str | os.PathLike = "random",
    experts_per_token: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
    shard_size: int | None = None,
    device: str = "cpu",
    memory: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Manifest:
    """Write a mixture of dense models; returns its manifest.

    base: brings all but MLPs, configuration and tokenizer. experts: name -> model, in order; several may be one model,
        or the base (upcycling). shared: of `qwen2` (which needs one) and `deepseek`, an expert that every token is sent
        to. kind: `mixtral` (of Llama and Mistral), `qwen3` (of Qwen3), `qwen2` (of Qwen2, Llama, Mistral), `deepseek`
        (of Llama, Mistral; transformers has no such model and opens it with code of the Hub alone); by default the
        first that base and `shared` allow.
    routers: `random`, standard normal numbers; `uniform_random`, as torch begins a linear layer; or a safetensors file
        with `layers.L` (E, H) for each layer, rows for experts in order, and for the shared one after them.
    experts_per_token: to how many of the experts a token is sent, beside the shared one; 2 by default.

    Memory is that of a block of a tensor; a killed run goes on after the last tensor. The manifest's `moe` says how.

    Raises:
        UserError: as `merging.merge`; models of another kind or shape, biases that the mixture has no place for, fewer
            experts than a token is sent to, a file of routers that does not fit.
    """
    out = Path(out)
    asked = {name: e if isinstance(e, Expert) else Expert(model=Path(e)) for name, e in experts.items()}
    common = shared if isinstance(shared, Expert) or shared is None else Expert(model=Path(shared))
    config = read_config(Path(base)) if Path(base).is_dir() else {}
    chosen = _chosen_kind(kind, str(config.get("model_type")), common is not None)
    plan, origins = _plan(
        Path(base), [*asked.values(), *([common] if common else [])], dtype, seed, shard_size
    )
    layout = _Layout(plan, asked, common, origins, chosen, routers, experts_per_token)
    with opened(
        [plan], [out], device=device, memory=memory, workers=workers, factors=None, need=plan.peak_bytes,
        lapack=False, layout=lambda _: layout, kind="moe", force=force,
    ) as (source, [output], pool):  # fmt: skip
        job = MergeJob(source, [plan], [output.writer], [output.journal.facts])
        for layer in layout.layers:
            _write_routers(layout, layer, output.writer)

        def write(entry: Entry) -> Finished:
            found = _MLP.match(entry.name)
            if not found:
                return job.write(entry)
            hashes = _write_mlps(layout, entry, found["part"], source, output.writer)
            return Finished(entry.name, [hashes], hashes_read(source, entry))

        run(source, [output], write, pool, progress)
        output.writer.finish()
        return publish_all([output], source, device, {"moe": layout.told})[0]


def _plan(
    base: Path, experts: list[Expert], dtype: str | None, seed: int, shard_size: int | None
) -> tuple[Plan, list[str]]:
    """What is read, each model once, and which of it each expert is."""
    names: dict[Path, str] = {base.resolve(): "base"}
    for expert in experts:
        real = expert.model.resolve()
        names.setdefault(real, f"model{len(names)}")
    origins = [names[expert.model.resolve()] for expert in experts]
    others = {name: path for path, name in names.items() if name != "base"}
    recipe: dict[str, Any] = {"dtype": dtype, "seed": seed, "shard_size": shard_size}
    if others:
        include = [f"*.mlp.{part}.weight" for part in _PROJECTIONS.values()]
        recipe |= {"method": "average", "base": base, "experts": others, "include": include}
    else:
        recipe |= {"method": "passthrough", "experts": {"model": base}}
        origins = ["model"] * len(origins)
    plan = make_plan(recipe)
    plan.check()
    return plan, origins


class _Layout:
    """What will be written, from headers alone but for a file of routers (raises UserError if it cannot be)."""

    file = WEIGHTS

    def __init__(
        self,
        plan: Plan,
        experts: Mapping[str, Expert],
        shared: Expert | None,
        origins: list[str],
        kind: str,
        routers: Any,
        chosen: int | None,
    ):
        self.plan, self.experts, self.shared, self.origins = plan, experts, shared, origins
        config = read_config(plan.donor) if plan.donor else {}
        self.id, self.kind = kind, _KINDS[kind]
        self.chosen = 2 if chosen is None else chosen
        if not 1 <= self.chosen <= len(experts):
            raise UserError(
                f"{len(experts)} experts, of which a token is sent to {self.chosen}: bring as many, or more"
            )
        self.entries = {entry.name: entry for entry in plan.entries}
        self.layers = self._layers(config)
        self.qkv_bias = any(_QKV_BIAS.search(name) for name in self.entries)
        self._refuse_biases()
        self.random = routers if routers in get_args(Random) else None
        self.rows = {} if self.random else _read_routers(plan, Path(routers), self._router_shape())
        self.parts = {entry.name: self._parts(entry) for entry in plan.entries}
        self.routers = {layer: self._router_specs(layer) for layer in self.layers}
        specs = [spec for parts in self.parts.values() for spec in parts.values()]
        self.specs = [*specs, *(spec for found in self.routers.values() for spec in found)]
        digests = [c.digest() for c in plan.statistics.get(ROUTERS, [])]
        said = canonical_json({"moe": self.told, "routers": digests})
        self.metadata = checkpoint_metadata(plan) | {"mergeline.moe": said}
        plan.configured = self._configured

    @property
    def all_experts(self) -> list[Expert]:
        return [*self.experts.values(), *([self.shared] if self.shared else [])]

    def _layers(self, config: Mapping[str, Any]) -> list[int]:
        found: dict[int, set[str]] = {}
        for name in self.entries:
            if named := _MLP.match(name):
                found.setdefault(int(named["layer"]), set()).add(named["part"])
        layers = sorted(found)
        whole = layers == list(range(len(layers))) and all(len(parts) == 3 for parts in found.values())
        if not layers or not whole or config.get("num_hidden_layers") not in (None, len(layers)):
            raise UserError("an MLP of gate, up and down in every layer is needed; the base has others")
        return layers

    def _refuse_biases(self) -> None:
        biased = next((name for name in self.entries if _BIAS.search(name)), None)
        if biased is None and self.qkv_bias and self.kind.model_type != "qwen2_moe":
            biased = next(name for name in self.entries if _QKV_BIAS.search(name))
        if biased:
            raise UserError(
                f"'{biased}': {self.kind.architecture} has no place for it; leave these models out"
            )

    def _router_shape(self) -> tuple[int, int]:
        width = self.entries["model.layers.0.mlp.gate_proj.weight"].spec.shape[1]
        return len(self.experts) + (self.shared is not None and self.kind.shared_gate), width

    def _parts(self, entry: Entry) -> dict[str, TensorSpec]:
        named = _MLP.match(entry.name)
        if not named:
            return entry.parts
        before = f"model.layers.{named['layer']}.{self.kind.mixture}."
        part = self.kind.parts[named["part"]]
        names = [f"{before}experts.{i}.{part}.weight" for i in range(len(self.experts))]
        names += [f"{before}{self.kind.shared_name}.{part}.weight"] if self.shared else []
        spec = entry.spec
        return {name: TensorSpec(name, spec.dtype, spec.shape, spec.nbytes) for name in names}

    def _router_specs(self, layer: int) -> list[TensorSpec]:
        """The router, and that of the shared expert where it has one."""
        dtype = self.entries[f"model.layers.{layer}.mlp.down_proj.weight"].spec.dtype
        rows, width = self._router_shape()
        before = f"model.layers.{layer}.{self.kind.mixture}."
        found = [(f"{before}gate.weight", (len(self.experts), width))]
        if rows > len(self.experts):
            found.append((f"{before}{self.kind.shared_name}_gate.weight", (1, width)))
        return [TensorSpec(name, dtype, shape, prod(shape) * DTYPES[dtype][1]) for name, shape in found]

    def _configured(self, config: dict[str, Any]) -> dict[str, Any]:
        kind, count = self.kind, len(self.experts)
        config = {
            **config, "architectures": [kind.architecture], "model_type": kind.model_type, kind.count: count,
            "num_experts_per_tok": self.chosen,
        }  # fmt: skip
        if self.id != "mixtral":
            config |= {"moe_intermediate_size": config.get("intermediate_size"), "norm_topk_prob": True}
        if self.id in ("qwen2", "qwen3"):
            config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
        if self.id == "qwen2":
            config |= {
                "shared_expert_intermediate_size": config.get("intermediate_size"), "qkv_bias": self.qkv_bias,
            }  # fmt: skip
        if self.id == "deepseek":
            names = {"AutoConfig": "configuration_deepseek.DeepseekConfig"} | {
                auto: f"modeling_deepseek.{name}"
                for auto, name in (
                    ("AutoModel", "DeepseekModel"),
                    ("AutoModelForCausalLM", "DeepseekForCausalLM"),
                )
            }
            config |= {
                "n_shared_experts": 1 if self.shared else None, "first_k_dense_replace": 0, "moe_layer_freq": 1,
                "scoring_func": "softmax", "auto_map": {key: _DEEPSEEK + name for key, name in names.items()},
            }  # fmt: skip
        return config

    def router(self, layer: int) -> Tensor:
        """The rows of a layer's router, (E, H) float64."""
        rows, width = self._router_shape()
        if self.random is None:
            return self.rows[layer]
        name = f"model.layers.{layer}.{self.kind.mixture}.gate.weight"
        uniform = draws.uniform(self.plan.recipe.seed, "router", name, 0, rows * width).double()
        if self.random == "uniform_random":
            return ((2 * uniform - 1) * width**-0.5).reshape(rows, width)
        return _normal(uniform).reshape(rows, width)

    @cached_property
    def told(self) -> dict[str, Any]:
        """How it is made, for the manifest."""
        names = [*self.experts, "shared"]
        own = [
            {"name": name, "of": of, "residual_scale": e.residual_scale, "noise_scale": e.noise_scale}
            for name, e, of in zip(names, self.all_experts, self.origins)
        ]
        return {
            "kind": self.id,
            "experts": own[: len(self.experts)],
            "shared": own[-1] if self.shared else None,
            "routers": self.random or "file",
            "experts_per_token": self.chosen,
            "unbalanced": self._unbalanced(),
        }

    def _unbalanced(self) -> list[int]:
        """Layers whose router has rows that are so alike that some expert will hardly be used."""
        if self.random:
            return []
        return [n for n in self.layers if not float(torch.linalg.cond(self.router(n))) <= _UNBALANCED]


def _chosen_kind(kind: str | None, model_type: str, shared: bool) -> str:
    if kind is not None and kind not in _KINDS:
        raise UserError(f"there is no mixture '{kind}'{did_you_mean(kind, _KINDS)}")
    fit = [
        id
        for id, one in _KINDS.items()
        if model_type in one.of and one.shared[0] <= shared <= one.shared[1] and kind in (None, id)
    ]
    if not fit:
        needs = "with a shared expert" if shared else "without a shared expert"
        raise UserError(
            f"no mixture{f' {kind}' if kind else ''} is made of {model_type} models {needs}: mixtral is of llama and "
            "mistral, qwen3 of qwen3, qwen2 of qwen2, llama and mistral with a shared one, deepseek of llama, mistral"
        )
    return fit[0]


def _read_routers(plan: Plan, file: Path, shape: tuple[int, int]) -> dict[int, Tensor]:
    """The routers of a file, float64 (raises UserError where they do not fit)."""
    checkpoint = open_checkpoint(file)
    plan.statistics[ROUTERS] = [checkpoint]
    plan.stamps |= stamps(files_of(checkpoint))
    found: dict[int, Tensor] = {}
    layers = sum(bool(_MLP.match(e.name)) for e in plan.entries) // len(_PROJECTIONS)
    with Files() as files:
        for layer in range(layers):
            info = checkpoint.tensors.get(f"layers.{layer}")
            if info is None or info.shape != shape:
                what = f"has shape {list(info.shape)}, not {list(shape)}" if info else "is missing"
                raise UserError(f"{file}: 'layers.{layer}' {what}: rows for experts, in order, are needed")
            rows_EH = files.elements(info, 0, prod(shape)).double().reshape(shape)
            if not bool(torch.isfinite(rows_EH).all()):
                raise UserError(f"{file}: 'layers.{layer}' holds NaN or Inf; make the routers again")
            found[layer] = rows_EH
    return found


def _normal(uniform: Tensor) -> Tensor:
    """Standard normal numbers of uniform ones with 24 bits."""
    return 2**0.5 * torch.erfinv(2 * (uniform + 2.0**-25) - 1)


def _write_routers(layout: _Layout, layer: int, writer: CheckpointWriter) -> None:
    rows_EH, start = layout.router(layer), 0
    for spec in layout.routers[layer]:
        stop = start + spec.shape[0]
        writer.write(spec.name, rounded(rows_EH[start:stop], spec))
        start = stop


def _write_mlps(
    layout: _Layout, entry: Entry, part: str, source: FileInputs, writer: CheckpointWriter
) -> dict[str, str]:
    """Write one matrix of every expert of a layer; the hashes."""
    hashes, elements, step = {}, prod(entry.spec.shape), block_elements(1)
    for (name, spec), expert, origin in zip(
        layout.parts[entry.name].items(), layout.all_experts, layout.origins
    ):
        sink = writer.open(name)
        for start in range(0, elements, step):
            stop = min(start + step, elements)
            value = source.read(origin, entry.name, start, stop).double()
            if expert.noise_scale:
                uniform = draws.uniform(layout.plan.recipe.seed, "noise", name, start, stop - start).double()
                value = value + _normal(uniform).to(value.device) * expert.noise_scale
            if part == "down" and expert.residual_scale is not None:
                value = value * expert.residual_scale
            sink.append(rounded(value, spec))
        hashes[name] = sink.close()
    return hashes
