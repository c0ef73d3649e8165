"""Names on disk and in memory: what transformers 5 calls the tensors of a file once its model is made.

Files keep the names that a model was published with, while its modules have new ones: adapters that were trained with
transformers 5 name those, and so do checkpoints that are written as they lie in memory. `memory_name` says the second
of the first, and leaves what already has it; `on_disk` the first of the second, for the names that a checkpoint has.

To add an architecture, add a `Renaming` to `_ROWS`. Rows say how files are read, as transformers'
`conversion_mapping.py` does (version 5.23).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Iterable, Mapping, NamedTuple

from mergeline.merging.architecture.classes import classes_of

Patterns = tuple[tuple[str, str], ...]


class InMemory(NamedTuple):
    """Where a tensor of a file lies in the model.

    name: of the tensor in memory. expert: which of its packed experts this is, counted from 0; None if it is no single
    expert's. part, parts: which stretch of equal height of the expert's outputs, and how many there are.
    """

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Packing:
    """Experts that lie one by one in files, and packed in memory.

    name: the end of the tensor's name in memory, (E, outputs, inputs). parts: the ends of the names of its parts on
    disk, with `*` for the number of the expert, in their order along the outputs.
    """

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Renaming:
    """How models of some types are named.

    keys: values of `model_type`, or names of classes in `architectures`, which come first.
    patterns: regular expressions of names in files, and what takes the place of the first match; all apply, in order.
    packed: experts that are packed in memory.
    towers: models inside of it: what their names in memory begin with, and which part of the configuration is theirs.
    inside: holds for towers alone.
    written: whether the names in files are written, too, or read alone.
    """

    keys: tuple[str, ...]
    patterns: Patterns = ()
    packed: tuple[Packing, ...] = ()
    towers: tuple[tuple[str, str], ...] = ()
    inside: bool = False
    written: bool = True


_LANGUAGE = ("model.language_model.", "text_config")
_VISION = ("model.vision_tower.", "vision_config")
_LLAVA: Patterns = (
    (r"^language_model\.lm_head\b", "lm_head"),
    (r"^language_model\b", "model.language_model"),
    (r"^vision_tower\b", "model.vision_tower"),
    (r"^multi_modal_projector\b", "model.multi_modal_projector"),
    (r"^model\.language_model\.model\b", "model.language_model"),
)
_AUDIO: Patterns = (
    (r"^language_model\.lm_head\b", "lm_head"),
    (r"^language_model\b", "model.language_model"),
    (r"^audio_tower\b", "model.audio_tower"),
    (r"^multi_modal_projector\b", "model.multi_modal_projector"),
    (r"^model\.language_model\.model\b", "model.language_model"),
)
_ATTENTION: Patterns = (
    (r"attention\.query\b", "q_proj"),
    (r"attention\.key\b", "k_proj"),
    (r"attention\.value\b", "v_proj"),
    (r"attention\.output\.dense\b", "attention.o_proj"),
    (r"intermediate\.dense\b", "mlp.fc1"),
    (r"output\.dense\b", "mlp.fc2"),
)
_SWIN: Patterns = (
    (r"attention\.self\.query\b", "attention.q_proj"),
    (r"attention\.self\.key\b", "attention.k_proj"),
    (r"attention\.self\.value\b", "attention.v_proj"),
    (
        r"attention\.self\.relative_position_bias_table\b",
        "attention.relative_position_bias.relative_position_bias_table",
    ),
    *_ATTENTION[3:],
)
_GATE_UP_DOWN = (
    Packing("mlp.experts.gate_up_proj", ("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight")),
    Packing("mlp.experts.down_proj", ("mlp.experts.*.down_proj.weight",)),
)
_MIXTRAL = (
    Packing("mlp.experts.gate_up_proj", ("mlp.experts.*.w1.weight", "mlp.experts.*.w3.weight")),
    Packing("mlp.experts.down_proj", ("mlp.experts.*.w2.weight",)),
)

_ROWS = (
    Renaming(("GPTNeoXForCausalLM",), ((r"^embed_out\.", "lm_head."),)),
    # Language models that see or hear
    Renaming(
        (
            "llava", "aria", "paligemma", "aya_vision", "got_ocr2", "gemma3", "internvl", "vipllava", "mistral3",
            "pp_chart2table",
        ),
        _LLAVA,
        towers=(_LANGUAGE, _VISION),
    ),
    Renaming(
        ("llava_next", "llava_next_video", "llava_onevision"),
        (*_LLAVA, (r"^image_newline\b", "model.image_newline")),
        towers=(_LANGUAGE, _VISION),
    ),
    Renaming(
        ("video_llava",),
        (
            *_LLAVA,
            (r"^image_tower\b", "model.image_tower"),
            (r"^video_tower\b", "model.video_tower"),
        ),
        towers=(_LANGUAGE, ("model.image_tower.", "vision_config"), ("model.video_tower.", "vision_config")),
    ),
    Renaming(
        ("fuyu",), (*_LLAVA, (r"^vision_embed_tokens\b", "model.vision_embed_tokens")), towers=(_LANGUAGE,)
    ),
    Renaming(
        ("mllama",), (*_LLAVA, (r"^vision_model\b", "model.vision_model")), towers=(_LANGUAGE,)
    ),
    Renaming(
        ("qwen2_audio", "voxtral", "voxtral_realtime", "audioflamingo3", "glmasr", "musicflamingo"),
        _AUDIO,
        towers=(_LANGUAGE, ("model.audio_tower.", "audio_config")),
    ),
    Renaming(
        ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
        (
            (r"^visual\b", "model.visual"),
            (r"^model\b(?!\.(language_model|visual))", "model.language_model"),
        ),
    ),
    Renaming(
        ("emu3",),
        (
            (r"^text_model\.lm_head\b", "lm_head"),
            (r"^text_model\b", "model.text_model"),
            (r"^vqmodel\b", "model.vqmodel"),
            (r"^model\.text_model\.model\b", "model.text_model"),
        ),
    ),
    Renaming(
        ("Gemma3ForCausalLM", "gemma3n_text", "qwen3_5_text"), ((r"^model\.language_model\.", "model."),),
        written=False,
    ),
    # Towers of these, which other models have with their prefix
    Renaming(
        (
            "clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "altclip_vision_model", "mlcd",
            "mlcd_vision_model", "metaclip_2_vision_model",
        ),
        ((r"^vision_model\.", ""),),
        inside=True,
    ),
    Renaming(
        ("CLIPVisionModel", "SiglipVisionModel", "Siglip2VisionModel", "MetaClip2VisionModel"),
        ((r"^vision_model\.", ""),),
    ),
    Renaming(
        ("CLIPTextModel", "SiglipTextModel", "Siglip2TextModel", "MetaClip2TextModel"),
        ((r"^text_model\.", ""),),
    ),
    # Models of images
    Renaming(
        ("vit", "audio-spectrogram-transformer", "deit", "ijepa", "vit_mae", "vit_msn", "vivit"),
        ((r"encoder\.layer\.", "layers."), *_ATTENTION),
    ),
    Renaming(
        ("BeitModel", "BeitForImageClassification", "BeitForMaskedImageModeling"),
        (
            (r"encoder\.layer\.", "layers."),
            *_ATTENTION,
            (r"encoder\.relative_position_bias\b", "shared_position_bias"),
            (
                r"attention\.attention\.relative_position_bias\.relative_position_bias_table\b",
                "relative_position_bias.relative_position_bias_table",
            ),
        ),
    ),
    Renaming(
        ("dinov2", "dinov2_with_registers"),
        (
            (r"attention\.attention\.query\b", "attention.q_proj"),
            (r"attention\.attention\.key\b", "attention.k_proj"),
            (r"attention\.attention\.value\b", "attention.v_proj"),
            (r"attention\.output\.dense\b", "attention.o_proj"),
            (r"mlp\.weights_out\b", "mlp.down_proj"),
        ),
    ),
    Renaming(("swin",), _SWIN),
    Renaming(
        ("segformer",),
        (
            (r"encoder\.patch_embeddings\.(\d+)\.", r"stages.\1.patch_embeddings."),
            (r"encoder\.block\.(\d+)\.", r"stages.\1.blocks."),
            (r"encoder\.layer_norm\.(\d+)", r"stages.\1.layer_norm"),
            (r"attention\.self\.query\b", "attention.q_proj"),
            (r"attention\.self\.key\b", "attention.k_proj"),
            (r"attention\.self\.value\b", "attention.v_proj"),
            (r"attention\.self\.sr\b", "attention.sequence_reduction.sequence_reduction"),
            (r"attention\.self\.layer_norm\b", "attention.sequence_reduction.layer_norm"),
            (r"attention\.output\.dense\b", "attention.o_proj"),
            (r"mlp\.dense1\b", "mlp.fc1"),
            (r"mlp\.dense2\b", "mlp.fc2"),
            (r"layer_norm_1\b", "layernorm_before"),
            (r"layer_norm_2\b", "layernorm_after"),
            (r"decode_head\.linear_c\b", "decode_head.linear_projections"),
        ),
    ),
    # Mixtures of experts
    Renaming(("mixtral", "minimax"), ((r"\.block_sparse_moe\.", ".mlp."),), _MIXTRAL),
    Renaming(
        ("phimoe",),
        ((r"\.block_sparse_moe\.", ".mlp."), (r"\.gate\.weight\b", ".router.weight")),
        _MIXTRAL,
    ),
    Renaming(
        (
            "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe_text", "qwen3_5_moe_text", "afmoe", "deepseek_v2",
            "deepseek_v3", "deepseek_v32", "dots1", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "glm4v_moe_text",
            "longcat_flash", "solar_open", "hunyuan_v1_moe", "flex_olmo", "olmoe", "cohere2_moe",
        ),
        packed=_GATE_UP_DOWN,
    ),
    Renaming(
        ("Qwen3_5MoeForCausalLM",), ((r"^model\.language_model\.", "model."),), _GATE_UP_DOWN, written=False
    ),
    Renaming(
        ("ernie4_5_moe",),
        ((r"mlp\.moe_statics\.e_score_correction_bias\b", "mlp.gate.moe_statics.e_score_correction_bias"),),
        _GATE_UP_DOWN,
    ),
    Renaming(
        ("exaone_moe",),
        ((r"mlp\.e_score_correction_bias\b", "mlp.gate.e_score_correction_bias"),),
        _GATE_UP_DOWN,
    ),
    Renaming(
        ("lfm2_moe",),
        packed=(
            Packing(
                "feed_forward.experts.gate_up_proj",
                ("feed_forward.experts.*.w1.weight", "feed_forward.experts.*.w3.weight"),
            ),
            Packing("feed_forward.experts.down_proj", ("feed_forward.experts.*.w2.weight",)),
        ),
    ),
    Renaming(
        ("jamba",),
        packed=(
            Packing(
                "feed_forward.experts.gate_up_proj",
                ("feed_forward.experts.*.gate_proj.weight", "feed_forward.experts.*.up_proj.weight"),
            ),
            Packing("feed_forward.experts.down_proj", ("feed_forward.experts.*.down_proj.weight",)),
        ),
    ),
    Renaming(
        ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        (
            (r"block_sparse_moe\.input_linear\.weight\b", "block_sparse_moe.experts.gate_up_proj"),
            (r"block_sparse_moe\.output_linear\.weight\b", "block_sparse_moe.experts.down_proj"),
            (r"block_sparse_moe\.router\.layer\.weight\b", "block_sparse_moe.router.weight"),
        ),
    ),
    Renaming(
        ("aria_text",),
        (
            (r"mlp\.experts\.fc1\.weight\b", "mlp.experts.gate_up_proj"),
            (r"mlp\.experts\.fc2\.weight\b", "mlp.experts.down_proj"),
        ),
    ),
)  # fmt: skip
_LEGACY: Patterns = (
    (r"LayerNorm\.gamma\b", "LayerNorm.weight"),
    (r"LayerNorm\.beta\b", "LayerNorm.bias"),
    (r"\.weight_g\b", ".parametrizations.weight.original0"),
    (r"\.weight_v\b", ".parametrizations.weight.original1"),
)


def memory_name(name: str, config: Mapping[str, Any]) -> str:
    """What transformers 5 calls a tensor of a file, or a tensor that already has that name."""
    return in_memory(name, config).name


def in_memory(name: str, config: Mapping[str, Any]) -> InMemory:
    """Where a tensor of a file lies in the model that transformers 5 makes. config: the model's config.json."""
    found = _placed(name, config, inside=False)
    return found._replace(name=_renamed(found.name, _LEGACY))


def on_disk(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of a checkpoint's tensors by what they are called in memory: packed experts are made of several.

    These are sorted by expert, and gate before up.
    """
    places: dict[str, list[tuple[InMemory, str]]] = {}
    for name in names:
        place = in_memory(name, config)
        places.setdefault(place.name, []).append((place, name))
    return {
        memory: [name for _, name in sorted(found, key=lambda at: (at[0].expert or 0, at[0].part, at[1]))]
        for memory, found in places.items()
    }


def disk_name(name: str, config: Mapping[str, Any]) -> str | None:
    """What a tensor of this name in memory is called in files; None where that is not known."""
    row = _row(config, inside=False)
    if row is None or not row.written:
        return name
    found = name
    for pattern, replacement in reversed(row.patterns):
        plain = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^").removesuffix("\\b"))
        anchored = ("^" if pattern.startswith("^") else "") + re.escape(replacement)
        found = re.sub(anchored, plain.replace("\\", r"\\"), found, count=1)
    for candidate in (found, name):
        if memory_name(candidate, config) == name:
            return candidate
    return None


def _placed(name: str, config: Mapping[str, Any], inside: bool) -> InMemory:
    row = _row(config, inside)
    if row is None:
        return InMemory(name)
    name = _renamed(name, row.patterns)
    for prefix, key in row.towers:
        part = config.get(key)
        if name.startswith(prefix) and isinstance(part, Mapping):
            found = _placed(name.removeprefix(prefix), part, inside=True)
            return found._replace(name=prefix + found.name)
    for packing in row.packed:
        for i, pattern in enumerate(packing.parts):
            if at := _ending(pattern).search(name):
                whole = name[: at.start()] + packing.name
                return InMemory(whole, int(at["expert"]), i, len(packing.parts))
    return InMemory(name)


def _row(config: Mapping[str, Any], inside: bool) -> Renaming | None:
    """The row of a configuration: that of its class, or of its type."""
    keys = [*(() if inside else classes_of(config)), config.get("model_type")]
    found = (_rows().get((key, inside)) for key in keys if isinstance(key, str))
    return next((row for row in found if row is not None), None)


@cache
def _rows() -> dict[tuple[str, bool], Renaming]:
    """By key, and whether it is of a tower."""
    outside = {(key, False): row for row in _ROWS for key in row.keys if not row.inside}
    return outside | {(key, True): row for row in _ROWS for key in row.keys}


@cache
def _ending(pattern: str) -> re.Pattern[str]:
    before, _, after = map(re.escape, pattern.partition("*"))
    return re.compile(rf"\b{before}(?P<expert>\d{{1,9}}){after}$")


def _renamed(name: str, patterns: Patterns) -> str:
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name, count=1)
    return name
