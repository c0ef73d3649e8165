"""Names of layers of diffusion models, as programs that train LoRA write them, and as diffusers has them.

sd-scripts ("Kohya") and LyCORIS write a layer's name with `_` for `.`; of SDXL's UNet that of Stability's code (`sgm`),
of FLUX that of Black Forest Labs' code, where queries, keys and values are one matrix.
"""

from __future__ import annotations

import re
from typing import Iterable, Iterator, Mapping

# By diffusers' name of a part of a residual block, and of what lies outside of blocks, Stability's.
_RESNET = {
    "norm1": "in_layers_0", "conv1": "in_layers_2", "time_emb_proj": "emb_layers_1", "norm2": "out_layers_0",
    "conv2": "out_layers_3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_OUTSIDE = {
    "conv_in": "input_blocks_0_0", "conv_out": "out_2", "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2", "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}  # fmt: skip
_BLOCK = re.compile(
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:\.(.+))?"
)
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)(?:\.(.+))?")


# Black Forest Labs' names, `{}` for the number of the block, and the layers of diffusers that lie in them, in order.
_FLUX: Mapping[str, tuple[str, ...]] = {
    "double_blocks_{}_img_attn_qkv": tuple(f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
    "double_blocks_{}_txt_attn_qkv": tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"),
    "double_blocks_{}_img_attn_proj": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks_{}_txt_attn_proj": ("transformer_blocks.{}.attn.to_add_out",),
    "double_blocks_{}_img_mlp_0": ("transformer_blocks.{}.ff.net.0.proj",),
    "double_blocks_{}_img_mlp_2": ("transformer_blocks.{}.ff.net.2",),
    "double_blocks_{}_txt_mlp_0": ("transformer_blocks.{}.ff_context.net.0.proj",),
    "double_blocks_{}_txt_mlp_2": ("transformer_blocks.{}.ff_context.net.2",),
    "double_blocks_{}_img_mod_lin": ("transformer_blocks.{}.norm1.linear",),
    "double_blocks_{}_txt_mod_lin": ("transformer_blocks.{}.norm1_context.linear",),
    "single_blocks_{}_linear1": (
        *(f"single_transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.{}.proj_mlp",
    ),
    "single_blocks_{}_linear2": ("single_transformer_blocks.{}.proj_out",),
    "single_blocks_{}_modulation_lin": ("single_transformer_blocks.{}.norm.linear",),
}
_NUMBER = re.compile(r"(?<=blocks_)\d{1,6}(?=_)")


class LayerNames:
    """What other programs call the layers of a model.

    modules: diffusers' or transformers' names of its layers. layers_per_block: of a UNet's configuration.
    """

    def __init__(self, modules: Iterable[str], layers_per_block: int = 2):
        self._modules: dict[str, str] = {}
        for module in modules:
            self._modules |= {name: module for name in _stability(module, layers_per_block)}
            self._modules[module.replace(".", "_")] = module

    def find(self, name: str) -> tuple[str, ...]:
        """The layers that a name with `_` means, in the order of their outputs; () if it means none."""
        if name in self._modules:
            return (self._modules[name],)
        number = _NUMBER.search(name)
        if number is None:
            return ()
        parts = _FLUX.get(f"{name[: number.start()]}{{}}{name[number.end() :]}", ())
        return tuple(part.format(number[0]) for part in parts)


def _stability(module: str, layers_per_block: int) -> Iterator[str]:
    """Stability's name of a layer of a UNet."""
    if module in _OUTSIDE:
        yield _OUTSIDE[module]
    if found := _MIDDLE.fullmatch(module):
        kind, index, rest = found.groups()
        yield f"middle_block_{1 if kind == 'attentions' else 2 * int(index)}{_inside(kind, rest)}"
    if found := _BLOCK.fullmatch(module):
        side, block, kind, index, rest = found.groups()
        first = int(block) * (layers_per_block + 1)
        if kind == "downsamplers":
            yield f"input_blocks_{first + layers_per_block + 1}_0_op"
        elif kind == "upsamplers":  # after an attention, if there is one
            yield from (f"output_blocks_{first + layers_per_block}_{i}_conv" for i in (1, 2))
        else:
            at = first + int(index) + (side == "down")
            part = 0 if kind == "resnets" else 1
            yield f"{'input' if side == 'down' else 'output'}_blocks_{at}_{part}{_inside(kind, rest)}"


def _inside(kind: str, rest: str | None) -> str:
    if not rest:
        return ""
    return "_" + (_RESNET.get(rest, rest) if kind == "resnets" else rest).replace(".", "_")
