"""Models behind an OpenAI-compatible server, such as vLLM's, as lm-eval asks them.

The server is started for one model, and ends with what is measured, or with the process that started it.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

from mergeline.evaluation.language.settings import Server
from mergeline.evaluation.pretrained import load_tokenizer
from mergeline.evaluation.processes import last_words, running
from mergeline.merging.checkpoints.companions import CONFIG
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEY = "VLLM_API_KEY"
_SECONDS = 0.5  # between two looks whether the server answers
_PROBE = "The capital of France is Paris, and 2 + 2 = 4."
_LENGTH = 2048  # tokens, where config.json does not say how many there may be
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class ServedModel:
    """A model that a server runs; url: of its completions."""

    folder: Path
    url: str
    key: str
    concurrent: int
    tokenizer: PreTrainedTokenizerBase

    def lm(self, batch_size: int) -> Any:
        """As lm-eval asks it: by tokens, so that it is the tokenizer of the folder that counts."""
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        key = self.key

        class Asked(LocalCompletionsAPI):
            @property
            def api_key(self) -> str:
                return key

        config = read_object(self.folder / CONFIG)
        lengths = [config[name] for name in _LENGTHS if isinstance(config.get(name), int)]
        return Asked(
            model=str(self.folder),
            base_url=self.url,
            tokenizer=str(self.folder),
            tokenizer_backend="huggingface",
            batch_size=batch_size,
            num_concurrent=self.concurrent,
            max_length=min([*lengths, _LENGTH]) if lengths else _LENGTH,
        )

    def check(self) -> dict[str, bool]:
        """What a model must do before it is used: a tokenizer that gives a text back, and some output."""
        import requests

        ids = self.tokenizer(_PROBE)["input_ids"]
        asked = {"model": str(self.folder), "prompt": ids, "max_tokens": 8, "temperature": 0}
        answer = requests.post(self.url, json=asked, headers=_headers(self.key), timeout=300)
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return {
            "round_trip": text.strip() == _PROBE,
            "generates": answer.ok and bool(answer.json()["choices"][0]["text"]),
        }


@contextmanager
def served(folder: Path, settings: Server, log: Path) -> Iterator[ServedModel]:
    """In this block, a server runs the model in `folder`. log: where what it writes goes.

    Raises:
        UserError: it does not start, or not in time.
    """
    folder, tokenizer = folder.absolute(), load_tokenizer(folder)
    port, key = _free_port(), secrets.token_urlsafe(32)
    command = [part.replace("{model}", str(folder)).replace("{port}", str(port)) for part in settings.command]
    log.parent.mkdir(parents=True, exist_ok=True)
    keyed = {**os.environ, _KEY: key}
    with (
        open(log, "wb") as written,
        running(["command", *command], stdout=written, stderr=subprocess.STDOUT, env=keyed) as process,
    ):
        _wait(process, f"http://127.0.0.1:{port}/v1/models", key, settings, log)
        url = f"http://127.0.0.1:{port}/v1/completions"
        yield ServedModel(folder, url, key, settings.concurrent, tokenizer)


def _wait(process: subprocess.Popen[bytes], url: str, key: str, settings: Server, log: Path) -> None:
    """Until the server answers (raises UserError)."""
    import requests

    end = time.monotonic() + settings.minutes * 60
    while time.monotonic() < end:
        if process.poll() is not None:
            raise UserError(
                f"language.server: {settings.command[0]} ended with exit code {process.returncode} before it answered: "
                f"{last_words(log.read_bytes(), log)}"
            )
        try:
            if requests.get(url, headers=_headers(key), timeout=5).ok:
                return
        except requests.RequestException:  # it does not listen yet
            pass
        time.sleep(_SECONDS)
    raise UserError(
        f"language.server: {settings.command[0]} did not answer within {settings.minutes:g} minutes; raise "
        f"server.minutes, or see {log}"
    )


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
