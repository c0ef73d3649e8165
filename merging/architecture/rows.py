"""The table: how tensors are named, in most models and in single architectures.

To add an architecture, register a row:

    register(Row(
        "mymodel",
        model_types=("mymodel",),
        patterns=(Pattern("wi_fused", Role.MLP_GATE_UP), Pattern("lin", Role.ATTENTION_OUTPUT, inside="attn")),
    ))

A row is used if the configuration (config.json), or a part of it such as `text_config`, has one of its `model_types`,
or if every expression of its `telling` is found in some tensor's name. All rows that are used apply, those of the
configuration first, and after them `COMMON`, which is enough for most models: a row says only what is different.

A pattern is a regular expression for the end of a module's name: the tensor's name without `.weight`, `.bias` or the
statistics of a batch norm, and whole where a parameter has no module of its own (`in_proj_weight`, `cls_token`). It
begins at a dot or the start of the name. `inside` is what must stand before it, and what stands before the pattern is
the module (an attention, an MLP) that the tensor is a part of: parts of one module need patterns that leave the same.
The first pattern that fits the name and the number of dimensions counts.

Then add a tiny model to tests/helpers/model_zoo.py: tests/merging/test_architecture.py asks what its tensors are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Iterator, Mapping, Sequence

from mergeline.merging.architecture.tensors import Role, kind_of

_ANY = range(9)
_DIMENSIONS: dict[Role, range] = {
    Role.POSITION: _ANY,
    Role.CONSTANT: _ANY,
    Role.TOKEN: _ANY,
    Role.PROMPT: range(2, 4),
    Role.UNORDERED_PROMPT: range(3, 4),
    Role.SCALE: _ANY,
    Role.NORM: range(1, 2),
    Role.PATCH_EMBEDDING: range(2, 6),
    Role.STEM: range(3, 6),
    Role.CONVOLUTION: range(3, 6),
    Role.EXPERTS: range(3, 4),
}
_MATRIX = range(2, 3)


@dataclass(frozen=True)
class Pattern:
    """What modules of a name are.

    name, inside: regular expressions, as the head of this file says.
    transposed: weights have the axes (inputs, outputs).

    Of packed experts:
    experts: names of an expert's matrices, one or gate and up, with `{}` for its number, in place of the pattern.
    partner: the last part of the name of the other tensor, whose shape tells the orientation.
    outputs_first: whether the axes are (E, outputs, inputs), where the shapes do not tell it; None if nothing does.
    interleaved: the rows of gate and up alternate.
    counted_by: a tensor with a row for each expert, in place of the pattern, where the tensor is (E * A, B).
    """

    name: str
    role: Role
    inside: str = ""
    transposed: bool = False
    experts: tuple[str, ...] = ()
    partner: str = ""
    outputs_first: bool | None = None
    interleaved: bool = False
    counted_by: str = ""

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        before = rf"(?:{self.inside})\." if self.inside else ""
        return re.compile(rf"(?<![^.]){before}(?P<name>{self.name})$")

    def start(self, module: str, dimensions: int | None) -> int | None:
        """Where in a module's name the pattern begins; None if it does not fit. dimensions: None for any number."""
        allowed = _MATRIX if self.counted_by else _DIMENSIONS.get(self.role, _MATRIX)
        if dimensions is not None and dimensions not in allowed:
            return None
        found = self._expression.search(module)
        return found.start("name") if found else None


@dataclass(frozen=True)
class Row:
    """One architecture, or several that share everything that is said here.

    telling: regular expressions for names of tensors; of a pair, the second is what the tensor's second dimension is
        as a multiple of its first.
    permutes: what keeps the model's function when it is permuted, beside the hidden units of an MLP: `heads` (whole
        groups of heads: no positions that are added head by head), `dimensions` (of the queries and keys of a head: no
        positions that rotate them, no norm of each head), `residual` (one width from embedding to output: no
        positions that are computed and added), `channels` (of ResNets: convolution, batch norm, activation).
    towers: of models with several: key of its own configuration -> regular expression for the beginnings of its names.
    """

    id: str
    model_types: tuple[str, ...] = ()
    telling: tuple[str | tuple[str, int], ...] = ()
    patterns: tuple[Pattern, ...] = ()
    permutes: frozenset[str] = frozenset()
    towers: Mapping[str, str] = field(default_factory=dict)


def _experts(
    gate: str,
    up: str,
    down: str,
    path: str = r"experts\.",
    both: str = "gate_up_proj",
    one: str = "down_proj",
    **more: Any,
) -> tuple[Pattern, ...]:
    """Gate and up packed in one tensor (`both`) beside down (`one`): patterns of a path, names of an expert's own."""
    return (
        Pattern(f"{path}{both}", Role.EXPERTS, experts=(gate, up), partner=one, **more),
        Pattern(f"{path}{one}", Role.EXPERTS, experts=(down,), partner=both, **more),
    )


_DEFAULT_EXPERTS = (
    "experts.{}.gate_proj.weight",
    "experts.{}.up_proj.weight",
    "experts.{}.down_proj.weight",
)
_ATTENTION = r"\w*attn\d?|\w*[aA]ttention|attn_?pool"
_OUTSIDE = r"^(?:[a-z_]+\.)*"  # no number before: outside of the layers

# CoOp, CoCoOp, VPT and UPT by the names of MVLPT's trainers, VPT by those of Jia et al. (2022), PEFT's prompts.
PROMPTS: tuple[Pattern, ...] = (
    Pattern(r"vpt_embeddings(?:_deep)?|(?:deep_)?prompt_embeddings", Role.UNORDERED_PROMPT),
    Pattern(r"ctx|cocoop_ctx|prompt_embeddings", Role.PROMPT),
)

COMMON: tuple[Pattern, ...] = (
    *PROMPTS,
    Pattern(r"\w*(?:norm|Norm)\w*|ln(?:_\w+)?|\w+_ln|bn\d*|\d+", Role.NORM),
    # What stands before the layers
    Pattern(
        r"embed_tokens|word_embeddings|tok_embeddings|token_embedding|tokens_embed|wte|shared|embed_in"
        r"|(?:model|backbone)\.embeddings",
        Role.EMBEDDING,
    ),
    Pattern(
        r"wpe|position_embeddings?|embed_positions|pos_embed(?:ding)?|positional_embedding"
        r"|positions_embed|token_type_embeddings|relative_attention_bias|relative_position_bias_table",
        Role.POSITION,
    ),
    Pattern(r"position_ids|relative_position_index|inv_freq|masked_bias", Role.CONSTANT),
    Pattern(
        r"(?:cls|dist|mask|reg|register|class)_tokens?|class_embedding|cls_emb|query_tokens|probe|masked_spec_embed"
        r"|attn_pool\.query|class_embedder\.embedding_table",
        Role.TOKEN,
    ),
    Pattern(
        r"patch_embed\.proj|patch_embeddings?(?:\.projection)?|pos_embed\.proj|conv_proj|x_embedder",
        Role.PATCH_EMBEDDING,
    ),
    Pattern(
        _OUTSIDE
        + r"(?:conv\d(?:\.\d+)?|conv_in|conv_stem|stem(?:\.\w+)*|features\.conv0|embedder\.convolution)",
        Role.STEM,
    ),
    # What stands after them
    Pattern(
        r"lm_head(?:\.decoder)?|embed_out|cls\.predictions(?:\.decoder)?|vocab_projector|^output", Role.HEAD
    ),
    Pattern(
        r"text_projection|visual_projection|visual\.proj|text_model\.head|multi_modal_projector\.\w+"
        r"|mm_projector(?:\.\d+)?|(?:merger|deepstack_merger_list\.\d+)\.(?:linear_fc\d|mlp\.\d+)",
        Role.PROJECTION,
    ),
    Pattern(
        r"(?:mlp|moe|ffn|block_sparse_moe|feed_forward|mixer)\.gate|(?:\w*_)?router(?:\.layer|\.classifier)?"
        r"|shared_expert_gate",
        Role.ROUTER,
    ),
    Pattern(
        _OUTSIDE + r"(?:classifier(?:\.\d+|\.out_proj)?|score|qa_outputs|heads?\.head|head\.fc|fc)"
        r"|^head(?:_dist)?",
        Role.CLASSIFIER,
    ),
    # Attention
    Pattern(r"in_proj_weight", Role.QKV_THIRDS),
    Pattern(r"qkv|qkv_proj|c_attn|Wqkv|W_pack|to_qkv", Role.QKV_GROUPED),
    Pattern(r"query_key_value", Role.QKV_INTERLEAVED),
    Pattern(r"q_proj|to_q|q_lin|q|wq|(?:self|attention)\.query|add_q_proj", Role.QUERY),
    Pattern(r"k_proj|to_k|k_lin|k|wk|(?:self|attention)\.key|add_k_proj", Role.KEY),
    Pattern(r"v_proj|to_v|v_lin|v|wv|(?:self|attention)\.value|add_v_proj", Role.VALUE),
    Pattern(
        r"out_proj|o_proj|proj|c_proj|output\.dense|dense|out_lin|o|wo|Wo|to_out\.0|to_add_out",
        Role.ATTENTION_OUTPUT,
        inside=_ATTENTION,
    ),
    Pattern(r"o_proj", Role.ATTENTION_OUTPUT),
    # MLP
    *_experts(*_DEFAULT_EXPERTS),
    Pattern(r"experts\.up_proj", Role.EXPERTS, experts=(_DEFAULT_EXPERTS[1],)),
    Pattern(r"gate_proj|wi_0|fc1_g", Role.MLP_GATE),
    Pattern(r"w1", Role.MLP_GATE, inside=r"feed_forward|experts\.\d+"),
    Pattern(r"gate_up_proj|w12", Role.MLP_GATE_UP),
    Pattern(
        r"up_proj|fc1|fc1_x|linear_fc1|c_fc|fc_in|dense_h_to_4h|lin1|wi|wi_1|Wi|intermediate\.dense"
        r"|intermediate_dense|linear1",
        Role.MLP_UP,
    ),
    Pattern(r"w3", Role.MLP_UP, inside=r"feed_forward|experts\.\d+"),
    Pattern(r"net\.0\.proj", Role.MLP_UP, inside=r"ff(?:_context)?"),
    Pattern(r"0", Role.MLP_UP, inside="mlp"),
    Pattern(
        r"down_proj|fc2|linear_fc2|fc_out|dense_4h_to_h|lin2|wo|output\.dense|output_dense|linear2",
        Role.MLP_DOWN,
    ),
    Pattern(r"w2", Role.MLP_DOWN, inside=r"feed_forward|experts\.\d+"),
    Pattern(r"c_proj|w3|Wo|3", Role.MLP_DOWN, inside="mlp"),
    Pattern(r"net\.2", Role.MLP_DOWN, inside=r"ff(?:_context)?"),
    # Numbers and vectors that scale
    Pattern(
        r"logit_scale|logit_bias|gamma(?:_\d)?|layer_scale|(?:ls\d|layer_scale\d?)\.\w+|lambda_?\d",
        Role.SCALE,
    ),
)

ROWS: list[Row] = [
    Row(
        "llama",
        model_types=(
            "llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2",
            "olmo3", "smollm3", "granite", "starcoder2",
        ),
        telling=(r"layers\.\d+\.self_attn\.o_proj\.weight$", r"layers\.\d+\.mlp\.gate_proj\.weight$"),
        permutes=frozenset({"heads", "residual"}),
    ),
    Row(
        "phi3",
        model_types=("phi3",),
        telling=(r"layers\.\d+\.self_attn\.qkv_proj\.weight$", r"layers\.\d+\.mlp\.gate_up_proj\.weight$"),
        permutes=frozenset({"residual"}),
    ),
    Row(
        "gpt_neox",
        model_types=("gpt_neox",),
        telling=(r"gpt_neox\.layers\.\d+\.attention\.query_key_value\.weight$",),
        permutes=frozenset({"heads", "residual"}),
    ),
    Row(
        "bloom",
        model_types=("bloom", "falcon"),
        telling=(r"(^|\.)h\.\d+\.self_attention\.query_key_value\.weight$",),
        permutes=frozenset({"residual"}),
    ),
    Row(
        "gpt2",  # transformers' Conv1D
        model_types=("gpt2", "openai-gpt", "imagegpt", "decision_transformer"),
        telling=((r"(^|\.)h\.\d+\.attn\.c_attn\.weight$", 3),),
        patterns=(
            Pattern(r"c_attn", Role.QKV_THIRDS, inside=r"h\.\d+\.attn", transposed=True),
            Pattern(r"c_proj", Role.ATTENTION_OUTPUT, inside=r"h\.\d+\.(?:attn|crossattention)", transposed=True),
            Pattern(r"q_attn", Role.QUERY, inside=r"h\.\d+\.crossattention", transposed=True),
            Pattern(r"c_attn", Role.LINEAR, inside=r"h\.\d+\.crossattention", transposed=True),
            Pattern(r"c_fc", Role.MLP_UP, inside=r"h\.\d+\.mlp", transposed=True),
            Pattern(r"c_proj", Role.MLP_DOWN, inside=r"h\.\d+\.mlp", transposed=True),
        ),
        permutes=frozenset({"heads", "dimensions", "residual"}),
    ),
    Row(
        "gpt_bigcode",
        model_types=("gpt_bigcode",),
        patterns=(Pattern(r"c_attn", Role.QKV_INTERLEAVED),),
    ),
    Row(
        "opt",
        model_types=("opt",),
        permutes=frozenset({"heads", "dimensions", "residual"}),
    ),
    Row("t5", model_types=("t5", "mt5", "umt5"), telling=(r"\.SelfAttention\.q\.weight$",)),
    Row(
        "bert",
        model_types=("bert", "roberta", "xlm-roberta", "distilbert", "electra", "camembert"),
        telling=(r"attention\.self\.query\.weight$", r"attention\.output\.LayerNorm\.(weight|gamma)$"),
        permutes=frozenset({"heads", "dimensions", "residual"}),
    ),
    Row(
        "vit",
        model_types=("vit", "deit", "dinov2"),
        permutes=frozenset({"heads", "dimensions", "residual"}),
    ),
    Row(
        "timm_vit",
        telling=(r"^blocks\.\d+\.attn\.qkv\.weight$", r"^patch_embed\.proj\.weight$", r"^pos_embed$"),
        permutes=frozenset({"heads", "residual"}),
    ),
    Row(
        "whisper",
        model_types=("whisper",),
        telling=(r"encoder\.conv2\.weight$", r"decoder\.layers\.\d+\.encoder_attn\.q_proj\.weight$"),
        patterns=(Pattern(r"^proj_out", Role.HEAD),),
    ),
    Row("llava", model_types=("llava", "llava_next", "llava_onevision", "vipllava", "mistral3", "paligemma", "gemma3")),
    Row(
        "clip",
        model_types=("clip", "clip_vision_model", "clip_text_model", "siglip"),
        permutes=frozenset({"heads", "dimensions", "residual"}),
        towers={"text_config": r"text_", "vision_config": r"vision_|visual_"},
    ),
    Row(
        "open_clip",
        telling=(r"^visual\.transformer\.resblocks\.\d+\.attn\.in_proj_weight$",),
        patterns=(Pattern(r"visual\.conv1", Role.PATCH_EMBEDDING),),
        permutes=frozenset({"heads", "dimensions", "residual"}),
        towers={"text_cfg": r"(?!visual\.)", "vision_cfg": r"visual\."},
    ),
    Row(
        "resnet",  # of torchvision, timm and open_clip
        telling=(
            r"layer\d\.\d+\.bn1\.running_mean$",
            r"layer\d\.\d+\.downsample\.\d+\.running_mean$",
        ),
        permutes=frozenset({"channels"}),
    ),
    Row(
        "resnet_hf",
        model_types=("resnet",),
        telling=(r"encoder\.stages\.\d+\.layers\.\d+\.layer\.\d+\.convolution\.weight$",),
        permutes=frozenset({"channels"}),
    ),
    Row(
        "torchvision",  # the first convolution of ConvNeXt, EfficientNet, MobileNet and Swin
        telling=(r"^features\.0\.0\.weight$",),
        patterns=(Pattern(r"^features\.0\.0", Role.STEM),),
    ),
    # Mixtures of experts
    Row(
        "mixtral",
        model_types=("mixtral", "phimoe", "minimax", "minimax_m2", "kimi_linear"),
        telling=(r"\.block_sparse_moe\.gate\.weight$",),
        patterns=_experts(
            "block_sparse_moe.experts.{}.w1.weight",
            "block_sparse_moe.experts.{}.w3.weight",
            "block_sparse_moe.experts.{}.w2.weight",
            path=r"(?:mlp|block_sparse_moe)\.experts\.",
        ),
    ),
    Row(
        "lfm2_moe",
        model_types=("lfm2_moe",),
        patterns=_experts("experts.{}.w1.weight", "experts.{}.w3.weight", "experts.{}.w2.weight"),
    ),
    Row(
        "deepseek_v4",
        model_types=("deepseek_v4",),
        patterns=_experts(
            "ffn.experts.{}.w1.weight",
            "ffn.experts.{}.w3.weight",
            "ffn.experts.{}.w2.weight",
            path=r"(?:mlp|ffn)\.experts\.",
        ),
    ),
    Row(
        "qwen_moe",
        model_types=(
            "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_5_moe",
            "qwen3_5_moe_text", "olmoe", "flex_olmo", "glm4_moe", "dots1", "ernie4_5_moe", "hunyuan_v1_moe", "jamba",
        ),
    ),
    Row("deepseek", model_types=("deepseek_v2", "deepseek_v3", "deepseek_v32")),
    Row(
        "granitemoe",
        model_types=("granitemoe", "granitemoeshared", "granitemoehybrid"),
        telling=(r"\.block_sparse_moe\.input_linear\.weight$",),
        patterns=_experts(
            *_DEFAULT_EXPERTS, path="", both="input_linear", one="output_linear", inside="block_sparse_moe"
        ),
    ),
    Row("llama4", model_types=("llama4", "llama4_text")),
    Row(
        "aria",
        model_types=("aria", "aria_text"),
        telling=(r"\.mlp\.experts\.fc1\.weight$",),
        patterns=_experts(*_DEFAULT_EXPERTS, both="fc1", one="fc2"),
    ),
    Row(
        "openai_privacy_filter",  # gpt-oss, but gate and up lie side by side
        model_types=("openai_privacy_filter",),
        telling=(r"\.experts\.gate_up_proj_bias$", r"^score\.bias$"),
        patterns=_experts(*_DEFAULT_EXPERTS, outputs_first=False),
    ),
    Row(
        "gpt_oss",
        model_types=("gpt_oss",),
        telling=(r"\.experts\.gate_up_proj_bias$",),
        patterns=_experts(*_DEFAULT_EXPERTS, outputs_first=False, interleaved=True),
    ),
    Row(
        "nemotron_h",
        model_types=("nemotron_h",),
        patterns=(
            Pattern(r"experts\.up_proj", Role.EXPERTS, experts=_DEFAULT_EXPERTS[1:2], outputs_first=True),
            Pattern(r"experts\.down_proj", Role.EXPERTS, experts=_DEFAULT_EXPERTS[2:], outputs_first=True),
        ),
    ),
    Row(
        "dbrx",
        model_types=("dbrx",),
        telling=(r"\.ffn\.experts\.mlp\.v1$",),
        patterns=tuple(
            Pattern(
                rf"experts\.mlp\.{part}", Role.EXPERTS, experts=(f"experts.mlp.{{}}.{part}.weight",),
                outputs_first=part != "w2", counted_by="router.layer.weight",
            )
            for part in ("w1", "v1", "w2")
        ),
    ),
    # Diffusion
    Row(
        "unet",
        telling=(r"^down_blocks\.\d+\.resnets\.\d+\.conv1\.weight$", r"^up_blocks\.\d+\.resnets\.\d+\.conv1\.weight$"),
    ),
    Row("dit", telling=(r"^transformer_blocks\.\d+\.attn1?\.to_q\.weight$",)),
]  # fmt: skip


def prompt_role(name: str, shape: Sequence[int]) -> Role | None:
    """What kind of soft prompt a tensor is; None of others."""
    return next((p.role for p in PROMPTS if p.start(name, len(shape)) is not None), None)


def register(row: Row) -> None:
    """Use a row from now on, before all others.

    Raises:
        ValueError: there is a row of this id.
    """
    if any(known.id == row.id for known in ROWS):
        raise ValueError(f"there is a row '{row.id}'")
    ROWS.insert(0, row)


def rows_for(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> list[Row]:
    """The rows of a model, those that the configuration names first: its own type, then those of its parts."""
    types = list(_model_types(config))
    named = [row for model_type in types for row in ROWS if model_type in row.model_types]
    names = {kind_of(name): name for name in reversed(list(shapes))}.values()
    told = [row for row in ROWS if row.telling and all(_tells(t, names, shapes) for t in row.telling)]
    return list({row.id: row for row in [*named, *told]}.values())


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for part in config.values():
        if isinstance(part, Mapping):
            yield from _model_types(part)


def _tells(telling: str | tuple[str, int], names: Any, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    pattern, multiple = telling if isinstance(telling, tuple) else (telling, None)
    search = re.compile(pattern).search
    for name in names:
        if search(name):
            shape = shapes[name]
            if multiple is None or len(shape) == 2 and shape[1] == multiple * shape[0] > 0:
                return True
    return False
