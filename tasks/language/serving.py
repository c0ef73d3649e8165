"""Language models where they are served: what one writes after a prompt, the likeliest token each time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Sequence

from mergeline.tasks.serving.contract import MAX_NEW_TOKENS, TEXT, Row, Served, text_of

if TYPE_CHECKING:
    from mergeline.evaluation.language.settings import Language
    from mergeline.tasks.modality import Json
    from mergeline.tasks.serving.contract import Predict


def served(language: Language) -> Served:
    """Inputs are prompts, put into the chat template where models were measured so; answers are texts."""
    settings = {"dtype": language.dtype, "apply_chat_template": language.apply_chat_template}
    return Served({"prompt": TEXT}, {"text": TEXT}, settings, parameters={MAX_NEW_TOKENS: 64})


def predictor(model: Path, beside: Path, settings: Json) -> Predict:
    """What writes with the model and the tokenizer in a folder (raises UserError)."""
    import torch

    from mergeline.evaluation.language.models import load_model
    from mergeline.evaluation.language.prompts import as_chat

    loaded = load_model(model, settings["dtype"])
    writer: Any = loaded.model
    pad = loaded.tokenizer.pad_token_id
    pad = loaded.tokenizer.eos_token_id if pad is None else pad

    def predict(rows: Sequence[Row], parameters: Mapping[str, Any]) -> list[Json]:
        found = []
        for row in rows:
            prompt, templated = text_of(row, "prompt"), settings["apply_chat_template"]
            if templated:
                prompt = as_chat(prompt, loaded.tokenizer)
            ids = loaded.tokenizer(prompt, return_tensors="pt", add_special_tokens=not templated)
            ids.pop("token_type_ids", None)
            longest = int(parameters.get(MAX_NEW_TOKENS, 64))
            with torch.inference_mode():
                out = writer.generate(
                    **ids, max_new_tokens=longest, do_sample=False, num_beams=1, pad_token_id=pad
                )
            own = out[0, ids["input_ids"].shape[1] :]
            found.append({"text": str(loaded.tokenizer.decode(own, skip_special_tokens=True))})
        return found

    return predict
