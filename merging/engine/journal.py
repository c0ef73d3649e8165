"""What a merge has finished, so that a killed one goes on where it was.

One line of JSON each: the identity of the merge, what its pre-pass found, and every finished tensor with the hashes
of what was written and read, and what else is remembered of it. A line counts only if it is whole, and a tensor only
if its bytes still have their hash.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeline.merging.files import JOURNAL

if TYPE_CHECKING:
    from mergeline.merging.checkpoints.writer import CheckpointWriter


class Journal:
    """The journal in a staging folder; `tensors` are finished: name -> {"hash": ..., "inputs": {origin: hash}}."""

    def __init__(self, folder: Path, identity: str):
        self.tensors: dict[str, dict[str, Any]] = {}
        self.facts: Any = None
        self.has_facts = False
        self.path = folder / JOURNAL
        lines = _lines(self.path)
        self.resumes = bool(lines) and lines[0].get("identity") == identity
        for line in lines[1:] if self.resumes else []:
            if "facts" in line:
                self.facts, self.has_facts = line["facts"], True
            elif "tensor" in line:
                self.tensors[line["tensor"]] = line
        self._handle = os.open(
            self.path, os.O_WRONLY | os.O_CREAT | (0 if self.resumes else os.O_TRUNC), 0o666
        )
        os.lseek(self._handle, 0, os.SEEK_END)
        if self.resumes:
            os.write(self._handle, b"\n")  # ends a line that a kill cut short
        else:
            self._append({"identity": identity})

    def keep_verified(self, writer: CheckpointWriter) -> None:
        """Forget tensors whose bytes are not what the journal says, and tell the writer the hashes of the others."""
        self.tensors = {
            name: line
            for name, line in self.tensors.items()
            if name in writer.specs and writer.stored_hash(name) == line["hash"]
        }
        writer.hashes |= {name: line["hash"] for name, line in self.tensors.items()}

    def add_facts(self, facts: Any) -> None:
        self.facts, self.has_facts = facts, True
        self._append({"facts": facts})

    def add_tensor(self, name: str, hash: str, inputs: dict[str, str], **more: Any) -> None:
        self.tensors[name] = line = {"tensor": name, "hash": hash, "inputs": inputs, **more}
        self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        os.write(self._handle, (json.dumps(line, ensure_ascii=False) + "\n").encode())

    def close(self) -> None:
        os.close(self._handle)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal, in order."""
    found = []
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    for line in text.split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
