"""The examples of one task as a fit draws them: seeded by step and task, some held out, shifted copies if asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Sequence

from mergeline.merging.algebra import draws
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.learning.network import Batch, Examples, batch_size, mask_of

if TYPE_CHECKING:
    from torch import Tensor

STEP = 64  # units that a teacher is run on at once


class Pool:
    """Units of a task: its examples, or, where these differ in shape, the batches that they come in.

    Texts are padded to the longest of the task. Every other unit up to the share `held_out` is kept from fitting.
    Further units are shifted copies.
    """

    def __init__(
        self,
        task: str,
        examples: Examples,
        seed: int,
        held_out: float = 0.0,
        copies: int = 0,
        pixels: int = 3,
    ):
        batches = _padded(list(examples.of(task)))
        shapes = [
            {k: v.shape[1:] for k, v in batch.items() if isinstance(v, torch.Tensor)} for batch in batches
        ]
        self.task, self.seed = task, seed
        self._ragged = any(shape != shapes[0] for shape in shapes)
        self._batches, self._keys = batches, list(shapes[0])
        # A unit is a batch if they are ragged, else an example: in which batch, and where there.
        self._places = [(b, i) for b, batch in enumerate(batches) for i in range(batch_size(batch))]
        self.units = len(batches) if self._ragged else len(self._places)
        held = int(self.units * held_out)
        if held_out and (not held or held == self.units):
            raise UserError(f"'{task}' has {self.units} examples, too few to hold out {held_out:g} of them")
        # Spread over the whole, so that neither part lacks classes that come in order.
        self.held = [i * self.units // held for i in range(held)]
        unseen = set(self.held)
        own = [i for i in range(self.units) if i not in unseen]
        if copies and (self._ragged or "images" not in self._keys):
            raise UserError("shifted copies are of images, and these examples have none; set shifts to 0")
        self.fitted = [i + copy * self.units for copy in range(copies + 1) for i in own]
        # How far each is moved, in pixels: x and y.
        u = draws.uniform(seed, "shift", task, 0, 2 * self.units * (copies + 1)) if copies else torch.empty(0)
        self._shifts = (2 * u.view(-1, 2) - 1) * pixels

    def batch(self, which: Sequence[int]) -> Batch:
        """Some units as a batch; of ragged ones, but one."""
        if self._ragged:
            [one] = which
            return self._batches[one]
        rows = [self._places[i % self.units] for i in which]
        found: dict[str, Any] = {
            key: torch.stack([self._batches[b][key][i] for b, i in rows]) for key in self._keys
        }
        found["task"] = self.task
        moved = [row for row, i in enumerate(which) if i >= self.units]
        if moved:
            images = found["images"]
            images[moved] = shifted(images[moved], self._shifts[[which[row] for row in moved]].to(images))
        return found

    def images(self, which: Sequence[int]) -> tuple[int, ...] | None:
        """The shape (B, ...) of the images of some units; None where there are none."""
        at = which[0] if self._ragged else 0
        found = self._batches[at].get("images")
        if not isinstance(found, torch.Tensor):
            return None
        return tuple(found.shape) if self._ragged else (len(which), *found.shape[1:])

    def drawn(self, step: int, size: int) -> Iterator[list[int]]:
        """What a step sees, `size` units: without replacement until all were drawn, in another order each time."""
        position, found = step * size, []
        for place in range(position, position + size):
            epoch, at = divmod(place, len(self.fitted))
            found.append(self.fitted[self._order(epoch)[at]])
        yield from ([i] for i in found) if self._ragged else [found]

    def cut(self, size: int, which: Sequence[int] | None = None) -> list[list[int]]:
        """Units, all that are fitted if not said, in batches of `size`; ragged ones each by itself."""
        which, step = self.fitted if which is None else which, 1 if self._ragged else size
        return [list(which[start : start + step]) for start in range(0, len(which), step)]

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            u = draws.uniform(self.seed, f"order {epoch}", self.task, 0, len(self.fitted))
            self._epoch, self._drawn = epoch, u.argsort(stable=True).tolist()
        return self._drawn

    def all_of(self, which: Sequence[int]) -> Iterator[tuple[list[int], Batch]]:
        """Units in batches."""
        yield from ((some, self.batch(some)) for some in self.cut(STEP, which))


def _padded(batches: list[Batch]) -> list[Batch]:
    """Batches of texts with as many tokens in each, the further ones 0 and masked; others as they are."""
    masks = [mask_of(batch) for batch in batches]
    longest = max((mask.shape[1] for mask in masks if mask is not None), default=0)

    def longer(batch: Batch, mask: Tensor) -> Batch:
        more = longest - mask.shape[1]
        return {
            key: torch.nn.functional.pad(value, (0, 0) * (value.ndim - 2) + (0, more))
            if isinstance(value, torch.Tensor) and value.shape[:2] == mask.shape
            else value
            for key, value in batch.items()
        }

    return [batch if mask is None else longer(batch, mask) for batch, mask in zip(batches, masks)]


def shifted(images: Tensor, pixels_B2: Tensor) -> Tensor:
    """Images (B, C, H, W) moved by fractions of pixels in x and y, the border repeated."""
    from torch.nn import functional

    height, width = images.shape[-2:]
    turn = torch.eye(2, 3, dtype=images.dtype, device=images.device).repeat(len(images), 1, 1)
    turn[:, 0, 2], turn[:, 1, 2] = -2 * pixels_B2[:, 0] / width, -2 * pixels_B2[:, 1] / height
    grid = functional.affine_grid(turn, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
