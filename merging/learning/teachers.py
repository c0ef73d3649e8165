"""What the experts make of the examples of their tasks: computed once, an expert at a time, and kept in files."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Mapping, Sequence

from mergeline.merging.canonical import text_digest
from mergeline.merging.engine.machine import workers_of_one_thread
from mergeline.merging.errors import UserError
from mergeline.merging.files import empty, read_object, write_json
from mergeline.merging.lazy import torch
from mergeline.merging.learning.directions import Inputs
from mergeline.merging.learning.network import Batch, Examples, Network, block_name, lists_of_blocks, mask_of
from mergeline.merging.learning.objectives import Outputs
from mergeline.merging.learning.pool import STEP, Pool

if TYPE_CHECKING:
    from torch import Tensor, nn


SIDE_BY_SIDE = 2  # batches of images


def blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model by name: the members of its lists of modules of one kind, two or more."""
    return {
        block_name(name, key): block
        for name, blocks in lists_of_blocks(module).items()
        for key, block in blocks.named_children()
    }


@contextmanager
def heard(module: nn.Module, into: dict[str, Tensor]) -> Iterator[None]:
    """In this block, the outputs of the blocks of a model that runs."""

    def hook(name: str) -> Any:
        def keep(_: nn.Module, __: Any, out: Any) -> None:
            into[name] = out[0] if isinstance(out, tuple) else out

        return keep

    handles = [block.register_forward_hook(hook(name)) for name, block in blocks(module).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def outputs_of(network: Network, batch: Batch, hidden: bool) -> Outputs:
    """What the network makes of a batch."""
    if not hidden:
        return Outputs(network.features(batch))
    found: dict[str, Tensor] = {}
    with heard(network.module, found):
        features = network.features(batch)
    return Outputs(features, found)


class Teachers:
    """The experts' outputs on all units of pools, by task, as files in a folder.

    Making them leaves the network with the weights of an expert.
    """

    def __init__(
        self,
        inputs: Inputs,
        network: Network,
        examples: Examples,
        pools: Mapping[str, Pool],
        folder: Path,
        hidden: bool,
    ):
        from safetensors.torch import save_file

        self._folder, self._hidden = folder / "teachers", hidden
        self._tasks = list(pools)
        self._device = next(tensor.device for tensor in network.tensors().values())
        # By task and key: rows, and where those of each unit begin.
        self._held: dict[str, dict[str, tuple[Tensor, list[int]]]] = {}
        names = list(inputs.experts)
        self._owners = {task: names.index(examples.owners[task]) for task in pools}
        self._heads: dict[int, dict[str, Tensor]] = {}
        self._places: dict[str, dict[int, int]] = {}
        units = {task: [*pool.fitted, *pool.held] for task, pool in pools.items()}
        for task, which in units.items():
            self._places[task] = {unit: place for place, unit in enumerate(which)}
        digests = {task: examples.digests.get(task) for task in pools}
        key = text_digest([units, inputs.contents, digests, {t: p.seed for t, p in pools.items()}, hidden])
        done = self._folder / "key.json"
        if not (done.is_file() and read_object(done).get("key") == key):
            self._folder.mkdir(parents=True, exist_ok=True)
            empty(self._folder)
            inputs.load(network, "base")
            base, differ = _copied_heads(network), False
            for i, expert in enumerate(names):
                tasks = [task for task in examples.tasks_of(expert) if task in pools]
                if tasks:
                    inputs.load(network, expert)
                    if heads := _copied_heads(network):
                        save_file(heads, self._head(i))
                    differ |= any(not torch.equal(heads[name], base[name]) for name in base)
                for task in tasks:
                    self._compute(network, pools[task], units[task])
            if not differ:
                for i in range(len(names)):
                    self._head(i).unlink(missing_ok=True)
            write_json(done, {"key": key})

    def _head(self, expert: int) -> Path:
        """The file of an expert's head; there is none where all have the base's."""
        return self._folder / f"head-{expert:05}.safetensors"

    def _heads_of(self, expert: int) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        if expert not in self._heads:
            path = self._head(expert)
            found = load_file(path) if path.is_file() else {}
            self._heads[expert] = {name: tensor.to(self._device) for name, tensor in found.items()}
        return self._heads[expert]

    def _file(self, task: str) -> Path:
        return self._folder / f"{self._tasks.index(task):05}.safetensors"

    def _compute(self, network: Network, pool: Pool, which: Sequence[int]) -> None:
        from safetensors.torch import save_file

        def told(some: list[int]) -> dict[str, list[Tensor]]:
            batch = pool.batch(some)
            with torch.no_grad():
                outputs = outputs_of(network, batch, self._hidden)
            named = {"features": outputs.features, **{f"hidden/{k}": v for k, v in outputs.hidden.items()}}
            return {key: _by_unit(key, value, batch, len(some)) for key, value in named.items()}

        kept: dict[str, list[Tensor]] = {}
        cut = pool.cut(STEP, which)
        # What blocks give is heard of one batch at a time.
        many = 1 if self._hidden or not cut or pool.images(cut[0]) is None else SIDE_BY_SIDE
        with workers_of_one_thread(many) as threads:
            for found in threads.map(told, cut):
                for key, rows in found.items():
                    kept.setdefault(key, []).extend(rows)
        held: dict[str, Tensor] = {}
        for key, rows in kept.items():
            held[key] = torch.cat(rows).contiguous()
            held[f"ends/{key}"] = torch.tensor([len(row) for row in rows]).cumsum(0)
        save_file(held, self._file(pool.task))

    def of(self, task: str, which: Sequence[int]) -> Outputs:
        """The outputs of a task's own expert on some units."""
        from safetensors.torch import load_file

        if task not in self._held:
            stored = load_file(self._file(task))
            keys = [key for key in stored if not key.startswith("ends/")]
            self._held[task] = {key: (stored[key], [0, *stored[f"ends/{key}"].tolist()]) for key in keys}
        held, places = self._held[task], [self._places[task][unit] for unit in which]

        def rows(key: str) -> Tensor:
            values, ends = held[key]
            return torch.cat([values[ends[i] : ends[i + 1]] for i in places]).to(self._device)

        names = [key.removeprefix("hidden/") for key in held if key.startswith("hidden/")]
        hidden = {name: rows(f"hidden/{name}") for name in names}
        return Outputs(rows("features"), hidden, self._heads_of(self._owners[task]))


def _copied_heads(network: Network) -> dict[str, Tensor]:
    own = network.tensors()
    return {name: own[name].detach().cpu().clone() for name in network.heads}


def _by_unit(key: str, value: Tensor, batch: Batch, units: int) -> list[Tensor]:
    """Rows by unit, one entry each: those of an example, or of a whole batch where that is the unit.

    Of texts, an example has as many rows as tokens that count; else all have equal shares.
    """
    mask, found = mask_of(batch), value.detach().cpu()
    if mask is not None and len(mask) == units and len(found) == int(mask.sum()):
        return list(found.split(mask.sum(1).tolist()))
    if len(found) % units:
        raise UserError(f"{key}: {len(found)} rows for {units} examples; choose another objective")
    return list(found.split(len(found) // units))
