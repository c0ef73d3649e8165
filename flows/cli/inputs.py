"""The checkpoints that commands read: paths, and what URIs name, as headers alone, streamed or brought here whole."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

from mergeline.flows.cli import text
from mergeline.flows.cli.text import say as print  # what files hold never commands the terminal
from mergeline.merging.errors import UserError

if TYPE_CHECKING:
    from mergeline.merging.engine.plan import Plan


class Inputs:
    """The checkpoints of one command, by the names that the user gave.

    sources: of the folders of headers, the URI of each, with the commit if there is one. beside: what lies there
    besides weights, and describes them.
    """

    def __init__(self, allow_pickle: bool = False, stream: bool = False, whole: bool = False):
        """stream: the data is read over the network where it is asked for, and not brought here.

        whole: what a server sends whole alone is brought here, instead of its headers.
        """
        self._allow_pickle, self._stream, self._whole = allow_pickle, stream, whole
        self.sources: dict[Path, str] = {}
        self.beside: dict[Path, tuple[str, ...]] = {}
        self._pinned: dict[str, str] = {}
        self._refused: dict[Path, str] = {}

    @property
    def are_remote(self) -> bool:
        """Whether headers alone were brought of some, or nothing could be."""
        return bool(self.sources or self._refused)

    def headers(self, where: str) -> Path:
        """A path as it is, or the headers of what a URI names; whole where nothing else can be had.

        Why nothing can be brought of a URI is told in place of the problem that its plan has then (`named`).
        """
        from mergeline.merging.checkpoints.quantised.formats import MOST_READ
        from mergeline.tasks.fetch import is_fetched, is_here
        from mergeline.tasks.remote import NoHeaders, let_data_be_read, remote_headers
        from mergeline.tasks.sources import NoParts, locate

        if is_here(where) or where.startswith(("file:", "open_clip:")) or is_fetched(where):
            return self.data(where)
        try:
            found = locate(where)
            self._pinned[where] = found.pinned or where
            if is_fetched(found.pinned):
                return self.data(where)
            remote = remote_headers(found, where, companions=self._stream)
        except UserError as error:
            if (
                isinstance(error, NoHeaders)
                and self._allow_pickle
                or isinstance(error, NoParts)
                and self._whole
            ):
                text.note(f"note: {where} has no headers that can be read alone: it is brought here whole")
                return self.data(where)
            return self._refuse(error)
        self.sources[remote.folder], self.beside[remote.folder] = remote.source, remote.beside
        let_data_be_read(remote, most=None if self._stream else MOST_READ)
        return remote.folder

    def opened(self, where: str) -> Path:
        """The same for what has no plan: why nothing can be brought of a URI is raised at once (UserError)."""
        path = self.headers(where)
        if path in self._refused:
            raise UserError(self._refused[path])
        return path

    def data(self, where: str) -> Path:
        """A path as it is, or a folder in the user's cache with all of what a URI names, or of a pickle."""
        from mergeline.tasks.fetch import is_here, local_checkpoint

        path = local_checkpoint(self._pinned.get(where, where), allow_pickle=self._allow_pickle)
        if is_here(where) and Path(where) != path:
            print(f"note: {where} is a pickle; its tensors were converted into {path}", file=sys.stderr)
        return path

    def _refuse(self, error: UserError) -> Path:
        path = Path("/nonexistent") / str(len(self._refused))
        self._refused[path] = str(error)
        return path

    def named(self, line: str) -> str:
        """A line of a plan with URIs in place of folders of headers."""
        for path, problem in self._refused.items():
            line = line.replace(f"{path}: no such file or folder", problem)
        for folder, source in self.sources.items():
            line = line.replace(f"{folder}/", f"{source}: ").replace(str(folder), source)
        return line

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """What the block raises of folders of headers, it raises of the URIs that they stand for."""
        try:
            yield
        except UserError as error:
            raise UserError(self.named(str(error))) from None

    @staticmethod
    def traffic() -> dict[str, int]:
        """What came over the network by now."""
        from mergeline.tasks.sources import TRAFFIC

        return {"bytes": TRAFFIC.bytes, "answers": TRAFFIC.answers}

    def network(self, plan: Plan) -> dict[str, Any]:
        """What a plan says of its remote inputs: where they are, and what came over the network by now."""
        sources = {
            name: self.sources[checkpoint.folder]
            for name, checkpoint in plan.checkpoints.items()
            if checkpoint.folder in self.sources
        }
        return {
            "sources": sources,
            "network": self.traffic(),
            "bytes_over_network": plan.bytes_over_network,
        }
