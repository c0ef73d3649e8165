"""`adapter_config.json`: what PEFT says of an adapter; what cannot be merged is refused by its name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Mapping

from mergeline.merging.checkpoints.checkpoint import Checkpoint
from mergeline.merging.checkpoints.companions import ADAPTER_CONFIG, hub_id, source_of
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object

KINDS = ("LORA", "LOHA", "LOKR", "IA3", "OFT", "VERA", "HRA", "SVFIT", "TRAINABLE_TOKENS")
# They add inputs to a model, which no weights do. Of the first, one tensor of rows is all that is saved.
_PLAIN_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
_PROMPTS = (*_PLAIN_PROMPTS, "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE")
# Of LoRA: what changes more than the weights, or in another way.
_REFUSED = {
    "layer_replication": "layers of the base are repeated",
    "use_qalora": "QALoRA pools inputs",
    "kasa_config": "KaSA changes the base by its singular values",
    "velora_config": "VeLoRA is not read",
    "monteclora_config": "MonteCLoRA draws its factors",
    "use_bdlora": "BD-LoRA has factors in blocks",
    "arrow_config": "Arrow chooses among adapters by the input",
}
# Initialisations that change the base itself: what the adapter adds to is not the published base.
_RESIDUAL_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
# A regular expression that repeats a group, or repeats more often, may take exponential time to match.
_REPEATS, _REPEATED, _MOST_REPEATS = re.compile(r"[*+{]"), re.compile(r"\)[*+{]"), 3
_LARGEST = 3e38  # of float32
_DIGEST = re.compile(r"blake3:[0-9a-f]{64}")


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` says. kind: PEFT's `peft_type`."""

    path: Path
    values: Mapping[str, Any]
    kind: str

    def flag(self, key: str) -> bool:
        return bool(self.values.get(key))

    def number(self, key: str, otherwise: float | None = None) -> float:
        """A number above 0 (raises UserError)."""
        value = self.values.get(key, otherwise)
        if not _is_number(value) or value <= 0:
            raise UserError(f"{self.path}: does not say {key}, a number above 0; download it again")
        return value

    def whole_number(self, key: str, otherwise: int | None = None) -> int:
        """A whole number above 0 (raises UserError)."""
        value = self.values.get(key, otherwise)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise UserError(f"{self.path}: does not say {key}, a whole number above 0; download it again")
        return value

    def digest_of(self, module: str) -> str:
        """Of SVFit, the digest of the base's tensor that a module's values are for (raises UserError)."""
        digests = self.values.get("base_digests")
        digest = digests.get(module) if isinstance(digests, dict) else None
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise UserError(
                f"{self.path}: base_digests does not say the digest of the base's '{module}' (blake3:...), in whose "
                "basis its singular values are; write it with the program that trained the adapter"
            )
        return digest

    def of_module(self, patterns: str, module: str, otherwise: float) -> float:
        """The value of the first pattern that the end of a module's name matches (PEFT's `get_pattern_key`)."""
        for pattern, value in (self.values.get(patterns) or {}).items():
            if _REPEATED.search(pattern) or len(_REPEATS.findall(pattern)) > _MOST_REPEATS:
                raise UserError(
                    f"{self.path}: {patterns} {pattern!r} repeats so much that trying it may take for ever; "
                    "name the modules"
                )
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except (re.error, OverflowError, RecursionError) as error:
                raise UserError(
                    f"{self.path}: {patterns} {pattern!r} is no regular expression ({error})"
                ) from None
        return otherwise

    def lora_scaling(self, module: str, rank: int) -> float:
        """What LoRA's product is multiplied with. module: its name, or that of a parameter that is wrapped."""
        alpha = self.of_module("alpha_pattern", module, self.values["lora_alpha"])
        return alpha / (sqrt(rank) if self.flag("use_rslora") else rank)

    def pattern_name(self, module: str) -> str:
        """What patterns match of a module: itself, or its weight, where PEFT wraps that (`target_parameters`)."""
        targets = self.values.get("target_parameters")
        weight = f"{module}.weight"
        wrapped = isinstance(targets, list) and any(f".{weight}".endswith(f".{target}") for target in targets)
        return weight if wrapped else module

    def keeps(self, name: str) -> bool:
        """Whether a tensor is of a module that was trained as a whole (`modules_to_save`)."""
        modules = self.values.get("modules_to_save")
        return isinstance(modules, list) and any(f".{module}." in f".{name}" for module in modules)

    def misfit(self, what: str) -> UserError:
        """What is said of an adapter that is for another base."""
        of = self.values.get("base_model_name_or_path")
        mend = (
            f"name the base that it was trained on, {of!r}" if of else "name the base that it was trained on"
        )
        return UserError(f"{self.path}: the adapter does not fit the base: {what}; {mend}")

    def unsupported(self, what: str) -> UserError:
        """What is said of a part that is not read."""
        return UserError(
            f"{self.path}: {what} is not supported; merge the adapter into its base with PEFT first"
        )


def read_adapter_config(folder: Path) -> AdapterConfig:
    """What is said of an adapter; what cannot be merged is refused.

    Raises:
        UserError: a kind that no weights can stand for, or that is not read; values that are none.
    """
    path = folder / ADAPTER_CONFIG
    return checked_config(path, read_object(path))


def checked_config(path: Path, values: Mapping[str, Any]) -> AdapterConfig:
    """What a configuration says that lies at `path` (raises UserError as `read_adapter_config`)."""
    kind = values.get("peft_type")
    if not isinstance(kind, str):
        raise UserError(f"{path}: does not say the peft_type of the adapter; download it again")
    if kind in _PROMPTS:
        mend = "merge it with others of its type, without the model, or " if kind in _PLAIN_PROMPTS else ""
        raise UserError(
            f"{path}: the adapter is of type {kind}, which adds inputs to the model: no weights do that, so it cannot "
            f"be merged into one; {mend}use it with PEFT"
        )
    if kind not in KINDS:
        raise UserError(
            f"{path}: the adapter is of type {kind}; {', '.join(KINDS)} are read: merge it with PEFT first"
        )
    config = AdapterConfig(path, values, kind)
    for patterns in ("alpha_pattern", "rank_pattern"):
        known = values.get(patterns) or {}
        if not isinstance(known, dict) or not all(map(_is_number, known.values())):
            raise UserError(f"{path}: {patterns} holds no numbers by pattern; download it again")
    if kind == "LORA":
        _check_lora(config)
    return config


def is_kept(folder: Path) -> bool:
    """Whether a folder is an adapter that is merged with others of its type as it lies; no damaged one is."""
    try:
        return read_object(folder / ADAPTER_CONFIG).get("peft_type") in (*_PLAIN_PROMPTS, "SVFIT")
    except UserError:
        return False  # whoever opens it says what is wrong


def refuse_another_base(base: Checkpoint, config: AdapterConfig) -> None:
    """Raises UserError for another base: names on the hub tell versions apart, where both are known."""
    wanted, known = config.values.get("base_model_name_or_path"), hub_id(source_of(base.folder))
    if not known or not isinstance(wanted, str):
        return
    named = hub_id(f"hf://{wanted}") == wanted and not wanted.startswith(".")
    if named and wanted.lower() != known.lower():
        raise UserError(
            f"{config.path}: the adapter was trained on '{wanted}', the base is '{known}'; name that base, or, if it "
            "is a copy of this one, write this one's name into base_model_name_or_path"
        )


def _check_lora(config: AdapterConfig) -> None:
    path, values = config.path, config.values
    if values.get("alora_invocation_tokens") is not None:
        raise UserError(
            f"{path}: the adapter is an aLoRA (alora_invocation_tokens), which acts on what follows these tokens "
            "alone: no weights do that, so it cannot be merged; use it with PEFT"
        )
    for key, why in _REFUSED.items():
        if values.get(key):
            raise config.unsupported(f"'{key}' ({why})")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL_BASES):
        raise UserError(
            f"{path}: init_lora_weights '{start}' changed the base that it adds to; "
            "save it with PEFT's path_initial_model_for_weight_conversion"
        )
    if not _is_number(values.get("lora_alpha")):
        raise UserError(f"{path}: does not say lora_alpha; download it again")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _LARGEST
