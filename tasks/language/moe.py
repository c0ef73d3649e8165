"""`mergeline moe`: a file that says which dense models become which experts, as mergekit-moe reads it, carried out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Callable, Literal, Sequence

from pydantic import BaseModel, ConfigDict, Field

from mergeline.merging.engine.manifest import Manifest
from mergeline.merging.errors import UserError
from mergeline.merging.make_moe import Expert, Kind, make_moe
from mergeline.merging.strict_yaml import YamlFile
from mergeline.tasks.language.routers import MODES, write_routers

_ALSO_CALLED: dict[str, Kind] = {
    "mixtral": "mixtral", "qwen": "qwen2", "qwen2": "qwen2", "qwen3": "qwen3", "deepseek": "deepseek",
}  # fmt: skip


class _Expert(BaseModel):
    """One expert: a model, and the prompts that its row of the router is made of."""

    model_config = ConfigDict(extra="forbid")

    source_model: str
    positive_prompts: list[str] = []
    negative_prompts: list[str] = []
    noise_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    residual_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None


class _Moe(BaseModel):
    """The file. architecture: mixtral, qwen2, qwen3 or deepseek; by default what the base can become."""

    model_config = ConfigDict(extra="forbid")

    base_model: str
    experts: Annotated[list[_Expert], Field(min_length=1)]
    shared_experts: Annotated[list[_Expert], Field(max_length=1)] = []
    gate_mode: Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"] = (
        "hidden"
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    experts_per_token: Annotated[int, Field(ge=1)] | None = None
    architecture: Literal["mixtral", "qwen", "qwen2", "qwen3", "deepseek"] | None = None


def make_moe_of(
    file: Path,
    out: Path,
    bring: Callable[[str], Path],
    *,
    routers: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    force: bool = False,
    **options: Any,
) -> Manifest:
    """Make the mixture of a YAML file; returns its manifest.

    bring: makes a path, a URI or a name of the Hub that of a folder here. routers: a file of rows in place of
    `gate_mode`; without it, and with prompts, `OUT-routers.safetensors` is written, which `verify` reads again.
    options: as `merging.make_moe.make_moe`.

    Raises:
        UserError: with file and line, for a key or a value that is wrong; as `make_moe` and `write_routers`.
    """
    read = YamlFile(file)
    asked = read.parse(_Moe)

    def local(where: str) -> Path:
        beside = file.parent / where
        return bring(str(beside) if "://" not in where and beside.exists() else where)

    def expert(one: _Expert) -> Expert:
        return Expert(
            model=local(one.source_model), residual_scale=one.residual_scale, noise_scale=one.noise_scale
        )

    base = local(asked.base_model)
    experts = {f"{i}-{Path(one.source_model).name}": expert(one) for i, one in enumerate(asked.experts)}
    gates: Any = routers or asked.gate_mode
    written = Path(f"{out}-routers.safetensors") if gates in MODES else None
    if written:
        gates = write_routers(base, _prompts(asked), gates, written, device=device, force=force)
    try:
        return make_moe(
            base,
            experts,
            out,
            shared=expert(asked.shared_experts[0]) if asked.shared_experts else None,
            kind=_ALSO_CALLED[asked.architecture] if asked.architecture else None,
            routers=gates,
            experts_per_token=asked.experts_per_token,
            dtype=asked.dtype,
            seed=seed,
            device=device,
            force=force,
            **options,
        )
    except UserError:
        if written and not out.exists():
            written.unlink(missing_ok=True)
        raise


def _prompts(asked: _Moe) -> list[tuple[Sequence[str], Sequence[str]]]:
    """Of experts, and of a shared one that has prompts."""
    shared = [one for one in asked.shared_experts if one.positive_prompts]
    if asked.architecture in ("qwen", "qwen2") and not shared:
        raise UserError("shared_experts: give it positive_prompts, of which its gate is made")
    return [(one.positive_prompts, one.negative_prompts) for one in [*asked.experts, *shared]]
