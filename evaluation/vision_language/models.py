"""Models that read an image and a text as transformers opens them, and the texts that they write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Sequence

from mergeline.evaluation.pretrained import load_pretrained, load_processor, opening, refuse_corrections
from mergeline.evaluation.vision_language.images import open_image
from mergeline.merging.architecture.classes import classes_of
from mergeline.merging.checkpoints.companions import CONFIG
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROMPT = "{image}\n{question}"  # of processors without a chat template


@dataclass(frozen=True)
class Reader:
    """A model in memory with its processor.

    prompt: what it reads, with the places {image} and {question}; None for the processor's chat template, or an image
    and the question below where it has none.
    """

    folder: Path
    model: PreTrainedModel
    processor: Any
    prompt: str | None = None

    def write(
        self,
        images: Sequence[Path],
        questions: Sequence[str],
        max_new_tokens: int,
        batch_size: int,
        count: Callable[[int], None] = lambda done: None,
    ) -> list[str]:
        """What the model writes to each of N images and questions: the likeliest token each time.

        Questions of like length go together, the longest first; `count` is told how many each batch had. Whatever else
        the folder's generation_config.json asks for, such as a token that all texts begin with, holds.

        Raises:
            UserError: an image does not open; the processor cannot make of both what the model reads.
        """
        import torch

        model: Any = self.model
        order = sorted(range(len(questions)), key=lambda i: -len(questions[i]))
        texts = [""] * len(questions)
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            batch = self.inputs([images[i] for i in some], [questions[i] for i in some])
            with (
                torch.inference_mode(),
                opening(self.folder, "with what its processor makes of image and text"),
            ):
                out = model.generate(
                    **batch,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=self.processor.tokenizer.pad_token_id,
                )
            if not model.config.is_encoder_decoder:
                out = out[:, batch["input_ids"].shape[1] :]
            for i, text in zip(some, self.processor.tokenizer.batch_decode(out, skip_special_tokens=True)):
                texts[i] = text
            count(len(some))
        return texts

    def inputs(self, images: Sequence[Path], questions: Sequence[str]) -> Any:
        """What the model is called with for B images and questions; the shorter texts are filled up on the left."""
        texts = [self._text(question) for question in questions]
        first = self.processor.tokenizer.bos_token
        # Chat templates write the first token themselves.
        more = {"add_special_tokens": False} if first and texts[0].startswith(first) else {}
        opened = [[open_image(image)] for image in images]
        with opening(self.folder, "with its processor"):
            batch = self.processor(images=opened, text=texts, padding=True, return_tensors="pt", **more)
        return batch.to(self.model.device, dtype=self.model.dtype)

    def _text(self, question: str) -> str:
        image = str(getattr(self.processor, "image_token", None) or "")
        if image and image in question:
            raise UserError(
                f"the question {question[:80]!r} has the token of images, {image}, which is put beside it; leave it out"
            )
        if self.prompt is None and self.processor.chat_template:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            with opening(self.folder, "with its chat template"):
                return str(
                    self.processor.apply_chat_template(
                        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
                    )
                )
        return (self.prompt or _PROMPT).replace("{image}", image).replace("{question}", question)


def refuse_other_kinds(folder: Path) -> None:
    """Raises UserError if a checkpoint's configuration does not say that it reads images and writes texts."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KINDS

    config = read_object(folder / CONFIG)
    kind = config.get("model_type", "unknown")
    if kind not in KINDS:
        raise UserError(
            f"{folder}: is of type {kind}, no model that reads images and texts and writes texts, which "
            f"`vision_language:` measures; {_where_it_belongs(config)}"
        )


def _where_it_belongs(config: dict[str, Any]) -> str:
    made_for = " ".join(classes_of(config))
    if config.get("is_encoder_decoder"):
        return "for encoders with a decoder write `text2text:`"
    if "ForImageClassification" in made_for:
        return "for image classifiers write `image_classification:`"
    if config.get("model_type") in ("clip", "siglip"):
        return "for CLIP models write `datasets:` and `suite:`"
    return "for causal language models write `language:`"


def load_reading_processor(folder: Path) -> Any:
    """The processor of images and texts of a folder, which fills texts up on the left (raises UserError).

    Where its files are missing, transformers may give a tokenizer, or a processor of images, alone.
    """
    processor = load_processor(folder)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UserError(
            f"{folder}: has no processor of images and texts; put processor_config.json and preprocessor_config.json, "
            "and the files of the tokenizer, beside the weights"
        )
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def load_reader(
    folder: Path, dtype: str = "float32", device: str = "cpu", prompt: str | None = None
) -> Reader:
    """A folder that transformers' AutoModelForImageTextToText and AutoProcessor open, without code of its own.

    Raises:
        UserError: it is of another kind, or does not open; beside it lies what corrects it for tasks.
    """
    refuse_corrections(folder)
    refuse_other_kinds(folder)
    processor = load_reading_processor(folder)
    model = load_pretrained(folder, "AutoModelForImageTextToText", dtype, device)
    return Reader(folder, model, processor, prompt)
