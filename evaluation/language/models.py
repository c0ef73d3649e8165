"""Checkpoints as transformers opens them: a causal language model with its tokenizer, and whether it works at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeline.evaluation.language.quiet import be_quiet
from mergeline.evaluation.pretrained import load_pretrained, load_tokenizer, refuse_corrections
from mergeline.merging.checkpoints.companions import CONFIG
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROBE = "The capital of France is Paris, and 2 + 2 = 4."
_NEW_TOKENS = 8


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def lm(self, batch_size: int) -> Any:
        """As lm-eval asks it."""
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=batch_size)

    def check(self) -> dict[str, bool]:
        """What a model must do before it is used: finite logits, a tokenizer that gives a text back, some output."""
        import torch

        model: Any = self.model
        ids = self.tokenizer(_PROBE, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            logits = model(**ids).logits
            out = model.generate(
                **ids,
                max_new_tokens=_NEW_TOKENS,
                min_new_tokens=1,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )
        text = str(self.tokenizer.decode(ids["input_ids"][0], skip_special_tokens=True))
        return {
            "finite": bool(torch.isfinite(logits).all()),
            "round_trip": text.strip() == _PROBE,
            "generates": out.shape[1] > ids["input_ids"].shape[1],
        }


def refuse_other_kinds(folder: Path) -> None:
    """Raises UserError if a checkpoint's configuration says that it is no causal language model."""
    config = read_object(folder / CONFIG)
    if config.get("is_encoder_decoder"):
        kind = config.get("model_type", "an encoder with a decoder")
        raise UserError(
            f"{folder}: is of type {kind}, no causal language model; write `text2text:` in place of `language:`, which "
            "measures encoders with a decoder"
        )
    from transformers.models.auto import modeling_auto as auto

    kind = config.get("model_type")
    if (
        kind in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        and kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ):
        raise UserError(
            f"{folder}: is of type {kind}, no causal language model; write `vision_language:` in place of `language:`, "
            "which measures models of images and texts"
        )


def load_model(folder: Path, dtype: str = "float32", device: str = "cpu") -> LoadedModel:
    """A folder that transformers' AutoModelForCausalLM and AutoTokenizer open, without code of its own.

    Raises:
        UserError: it does not open, or not without that code; beside it lies what corrects it for tasks.
    """
    refuse_corrections(folder)
    refuse_other_kinds(folder)
    be_quiet()
    return LoadedModel(load_pretrained(folder, "AutoModelForCausalLM", dtype, device), load_tokenizer(folder))
