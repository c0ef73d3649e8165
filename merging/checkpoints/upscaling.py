"""SMILE: the linear maps of the base, to each of which every expert adds what it changed, chosen token by token.

The files of the experts lie beside a merge that is the base, `adapters/TASK.safetensors` of kind `smile`. Of each
linear map with weight (M, N), or each third of attention's packed projection, they hold the leading k singular triplets
of the expert's task vector and what its bias changed:

    y = W x + b + sum over the top experts of g_e (U_e S_e V_e' x + b_e),  g = softmax of |V_e[:gate]' x|

g is renormalised over the top experts; other tensors are the base's. arXiv 2408.10174; SmileMoELinear of
tanganke/fusion_bench.

Shape suffixes: E experts, K triplets, M by N a map.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Iterator, Mapping

from mergeline.merging.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

SETTINGS = "settings"  # the tensor of a file that holds gate and top
PARTS = ("down", "up", "bias")


@dataclass(frozen=True)
class _Map:
    """What all experts add to one linear map: down (E, K, N), up (E, M, K), bias (E, M)."""

    down: Tensor
    up: Tensor
    bias: Tensor

    def added(self, x: Tensor, gate: int, top: int, chosen: Tensor) -> Tensor:
        """To the outputs (..., M) of inputs (..., N); `chosen` (E) counts the tokens that went to each expert first."""
        import torch

        seen = torch.einsum("...n,ekn->...ek", x, self.down)
        weights, which = seen[..., :gate].norm(dim=-1).softmax(-1).topk(top, dim=-1)
        chosen += torch.bincount(which[..., 0].flatten(), minlength=len(chosen)).to(chosen)
        weights = weights / weights.sum(-1, keepdim=True)
        gates = seen.new_zeros(seen.shape[:-1]).scatter(-1, which, weights)
        return torch.einsum("...ek,emk->...m", seen * gates[..., None], self.up) + gates @ self.bias


class Upscaled:
    """The files of all experts as one: what they add to a model with the base's weights."""

    def __init__(self, experts: Mapping[str, Mapping[str, Tensor]], device: Any = "cpu"):
        """experts: task -> the tensors of its file. Raises UserError where they are of different maps or settings."""
        import torch

        self.tasks, files = list(experts), list(experts.values())
        shapes = [{name: tensor.shape for name, tensor in file.items()} for file in files]
        same = [torch.equal(file[SETTINGS], files[0][SETTINGS]) for file in files]
        if any(shape != shapes[0] for shape in shapes) or not all(same):
            raise UserError(
                f"the adapters of {', '.join(experts)} are of different models or settings; fit them together again"
            )
        self._gate, top = (int(number) for number in files[0][SETTINGS].tolist())
        self._top = min(top, len(files))

        def together(key: str) -> Tensor:
            return torch.stack([file[key] for file in files]).to(device)

        names = sorted({name.rpartition("/")[0] for name in files[0]} - {""})
        self._maps = {name: _Map(*(together(f"{name}/{part}") for part in PARTS)) for name in names}
        self.nbytes = sum(tensor.nbytes for file in files for tensor in file.values())

    @property
    def passes(self) -> float:
        """What a token costs in its linear maps, in runs of the base: the gates of all experts, and what is added."""
        whole = own = 0
        for m in self._maps.values():
            (experts, k, n), width = m.down.shape, m.up.shape[1]
            whole += width * n
            own += width * n + experts * min(self._gate, k) * n + self._top * k * (width + n)
        return round(own / whole, 2)

    @contextmanager
    def inside(self, module: nn.Module) -> Iterator[Tensor]:
        """In this block, `module` runs with what is added; gives the count (E) of tokens, over maps, by their expert.

        Raises:
            UserError: the model lacks one of the maps.
        """
        import torch

        chosen = torch.zeros(len(self.tasks), dtype=torch.int64, device=next(module.parameters()).device)
        handles: list[Any] = []
        attentions: list[tuple[str, Any]] = []
        for name in {name.rpartition("/")[0].rpartition(".")[0] for name in self._maps}:
            try:
                part = module.get_submodule(name)
            except AttributeError:
                raise UserError(
                    f"the model has no part '{name}', to which experts add; fit them again"
                ) from None
            if isinstance(part, torch.nn.MultiheadAttention):
                attentions.append((name, part))
            elif not name.endswith(".out_proj"):  # which its attention computes
                handles.append(part.register_forward_hook(partial(self._after, name, chosen)))
        for name, attention in attentions:
            attention.forward = partial(self._attention, name, attention, chosen)
        try:
            yield chosen
        finally:
            for handle in handles:
                handle.remove()
            for _, attention in attentions:
                del attention.forward

    def _added(self, name: str, x: Tensor, chosen: Tensor) -> Tensor:
        return self._maps[name].added(x, self._gate, self._top, chosen)

    def _after(self, name: str, chosen: Tensor, _module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output + self._added(f"{name}.weight/0", inputs[0], chosen)

    def _attention(
        self, name: str, own: Any, chosen: Tensor, query: Tensor, key: Tensor, value: Tensor,
        attn_mask: Tensor | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """torch's attention, batch first, in its parts."""
        from torch.nn.functional import linear, scaled_dot_product_attention

        biases = own.in_proj_bias.chunk(3)
        q, k, v = (
            (linear(x, weight, bias) + self._added(f"{name}.in_proj_weight/{i}", x, chosen))
            .unflatten(-1, (own.num_heads, own.head_dim))
            .transpose(1, 2)
            for i, (x, weight, bias) in enumerate(
                zip((query, key, value), own.in_proj_weight.chunk(3), biases)
            )
        )
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2).flatten(2)
        out = own.out_proj
        return linear(mixed, out.weight, out.bias) + self._added(
            f"{name}.out_proj.weight/0", mixed, chosen
        ), None


def fits(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether tensors of these shapes are those of a file of an expert."""
    names = {name.rpartition("/")[0] for name in shapes} - {""}
    if not names or shapes.get(SETTINGS) != (2,) or len(shapes) != 3 * len(names) + 1:
        return False
    for name in names:
        down, up, bias = (shapes.get(f"{name}/{part}", ()) for part in PARTS)
        if len(down) != 2 or len(up) != 2 or up[1] != down[0] or bias != up[:1]:
            return False
    return True
