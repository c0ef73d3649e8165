"""What a model computes with its weights, seen while it runs: the inputs and outputs of every linear map.

Maps are found by the operation that uses a weight, not by the module that holds it: `linear`, `addmm` (transformers'
Conv1D), `x @ W` (the projections of open_clip), convolutions, embeddings, and the attention of torch, whose packed
projections no module computes. A slice of packed weights (`experts[e]`) is known by its part.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable, Iterator, Literal, Mapping, NamedTuple

from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["linear", "convolution", "embedding"]


class Applied(NamedTuple):
    """A linear map that was applied once.

    tensor: the weight's name. part: its index along the weight's first axis, where but a slice is used. inputs:
    (B, ..., N) as the model has them, of a convolution one row (N = I * prod(kernel)) for each place, of an embedding
    the integer indices (B, ...). outputs: (B, ..., M).
    """

    tensor: str
    part: int | None
    kind: Kind
    inputs: Tensor
    outputs: Tensor


@contextmanager
def watched(
    tensors: Mapping[str, Tensor],
    see: Callable[[Applied], None],
    known: Callable[[str, Tensor], Tensor | None] | None = None,
) -> Iterator[None]:
    """In this block, `see` is told of every use of one of `tensors`, by name, as the weight of a linear map.

    known: is asked, by the tensor's name and the inputs, for the outputs of a map before they are computed; None where
    they are to be computed. Of convolutions and embeddings it is not asked.

    Grouped and one- or three-dimensional convolutions, and products that neither torch.nn nor `@` compute (grouped
    products of experts), are not seen.
    """
    with _mode()({id(tensor): name for name, tensor in tensors.items()}, see, known):
        yield


def _mode() -> Any:
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    products = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)

    class Watch(TorchFunctionMode):
        def __init__(
            self,
            names: Mapping[int, str],
            see: Callable[[Applied], None],
            known: Callable[[str, Tensor], Tensor | None] | None,
        ):
            super().__init__()
            self._names, self._see, self._known = names, see, known

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function is functional.multi_head_attention_forward:
                return self._attention(function, args, kwargs)
            if function is functional.linear:
                weight = args[1] if len(args) > 1 else kwargs["weight"]
                return self._linear(weight, args[0], lambda: function(*args, **kwargs))
            if function in products and len(args) == 2:
                return self._linear(args[1], args[0], lambda: function(*args, **kwargs))
            if function is torch.addmm:
                return self._linear(args[2], args[1], lambda: function(*args, **kwargs))
            out = function(*args, **kwargs)
            if function in (functional.embedding, torch.embedding):
                ids, weight = (args if function is functional.embedding else args[1::-1])[:2]
                self._tell(weight, "embedding", ids, out)
            elif function is functional.conv2d:
                self._convolution(out, *args, **kwargs)
            return out

        def _linear(self, weight: Any, inputs: Tensor, compute: Callable[[], Tensor]) -> Tensor:
            name = self._names.get(id(weight))
            outputs = self._known(name, inputs) if self._known and name is not None else None
            outputs = compute() if outputs is None else outputs
            self._tell(weight, "linear", inputs, outputs)
            return outputs

        def _tell(self, weight: Any, kind: Kind, inputs: Tensor, outputs: Tensor) -> None:
            if not isinstance(weight, torch.Tensor):
                return
            name, part = self._names.get(id(weight)), None
            if name is None and weight._base is not None and id(weight._base) in self._names:
                whole = weight._base
                if weight.ndim != whole.ndim - 1 or weight.shape != whole.shape[1:]:
                    return
                name = self._names[id(whole)]
                part = int(weight.storage_offset() - whole.storage_offset()) // whole.stride(0)
            if name is not None:
                self._see(Applied(name, part, kind, inputs, outputs))

        def _convolution(
            self, out: Tensor, x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
            dilation: Any = 1, groups: int = 1,
        ) -> None:  # fmt: skip
            if groups != 1 or id(weight) not in self._names or isinstance(padding, str):
                return
            columns = functional.unfold(x, weight.shape[2:], dilation, padding, stride)
            self._tell(weight, "convolution", columns.transpose(1, 2), out.flatten(2).transpose(1, 2))

        def _attention(self, function: Any, args: Any, kwargs: Any) -> Any:
            """torch's attention in its parts; what it has beyond the usual is computed by itself, unseen."""
            query, key, value, width, heads, weight, bias, bias_k, bias_v, zeros, _, out, out_bias = args[:13]
            rest = {k: v for k, v in kwargs.items() if k not in ("training", "need_weights", "is_causal")}
            if (
                weight is None or bias_k is not None or bias_v is not None or zeros or kwargs.get("need_weights", True)
                or any(v is not None for k, v in rest.items() if k.startswith("static"))
                or rest.get("use_separate_proj_weight")
            ):  # fmt: skip
                return function(*args, **kwargs)
            # (tokens, B, width) -> (B, tokens, width), as all other maps have it.
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
            parts = None if bias is None else bias.chunk(3)
            if query is key is value or (query.shape == key.shape and torch.equal(query, key)):
                packed = self._linear(weight, key, lambda: functional.linear(key, weight, bias))
                q, k, v = packed.chunk(3, dim=-1)
            else:
                each = zip((query, key, value), weight.chunk(3), parts or (None,) * 3)
                q, k, v = (functional.linear(x, part, b) for x, part, b in each)
            q, k, v = (x.unflatten(-1, (heads, width // heads)).transpose(1, 2) for x in (q, k, v))
            mask = _mask(kwargs.get("attn_mask"), kwargs.get("key_padding_mask"), heads, q.dtype)
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            mixed = mixed.transpose(1, 2).flatten(2)
            result = self._linear(out, mixed, lambda: functional.linear(mixed, out, out_bias))
            return result.transpose(0, 1), None

    return Watch


def _mask(mask: Tensor | None, padding: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """The two masks of torch's attention as one that is added to the products, (B or 1, heads or 1, queries, keys)."""

    def added(given: Tensor) -> Tensor:
        if given.dtype != torch.bool:
            return given.to(dtype)
        return torch.zeros_like(given, dtype=dtype).masked_fill_(given, float("-inf"))

    found = None
    if mask is not None:
        found = added(mask)[None, None] if mask.ndim == 2 else added(mask).unflatten(0, (-1, heads))
    if padding is not None:
        keys = added(padding)[:, None, None, :]
        found = keys if found is None else found + keys
    return found
