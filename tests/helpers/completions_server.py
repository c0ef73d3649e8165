"""An OpenAI-compatible server of completions for one small model: python completions_server.py MODEL PORT [fail]

It speaks what lm-eval asks: prompts of tokens, log probabilities with `echo`, greedy texts; and it asks for the key.
"""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER, PORT = sys.argv[1], int(sys.argv[2])
MODEL: Any = AutoModelForCausalLM.from_pretrained(FOLDER).eval()
TOKENIZER: Any = AutoTokenizer.from_pretrained(FOLDER)


@torch.inference_mode()
def completion(ids: list[int], asked: dict[str, Any], index: int) -> dict[str, Any]:
    if not asked.get("echo"):
        count = asked["max_tokens"]
        out = MODEL.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
        text = TOKENIZER.decode(out[0, len(ids) :], skip_special_tokens=True)
        for stop in asked.get("stop") or []:
            text = text.partition(stop)[0]
        return {"index": index, "text": text}
    logits = MODEL(torch.tensor([ids])).logits[0].log_softmax(-1)
    taken = [None, *(float(logits[i, token]) for i, token in enumerate(ids[1:]))]
    best = [None, *({str(int(row.argmax())): float(row.max())} for row in logits[:-1])]
    new = float(logits[-1].max())
    told = {"token_logprobs": [*taken, new], "top_logprobs": [*best, {"new": new}]}
    return {"index": index, "text": "", "logprobs": told}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({"data": [{"id": FOLDER}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompts = asked["prompt"] if isinstance(asked["prompt"][0], list) else [asked["prompt"]]
        self._answer({"choices": [completion(ids, asked, i) for i, ids in enumerate(prompts)]})

    def _answer(self, value: dict[str, Any]) -> None:
        allowed = self.headers.get("Authorization") == f"Bearer {os.environ['VLLM_API_KEY']}"
        body = json.dumps(value if allowed else {}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
