"""Folders of training shards, as torch.distributed.checkpoint writes them: by one process, or by two with FSDP."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from places import REPOSITORY
from torch import Tensor, nn

_WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
from training_shards import train
train(int(sys.argv[2]), sys.argv[3], sys.argv[4])
"""


def save_shards(state: dict[str, Any], folder: Path, **options: Any) -> Path:
    """A folder that one process wrote."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True, **options)
    return folder


class Toy(nn.Module):
    """Of uneven sizes, two dtypes, a buffer, and a tensor of few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.up = nn.Linear(6, 5)
        self.down = nn.Linear(5, 6, bias=False).bfloat16()
        self.conv = nn.Conv2d(3, 1, 2)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.down(self.up(self.embed(x)).bfloat16()).float().sum()
            + self.conv(torch.ones(1, 3, 2, 2)).sum()
        )


def trained(steps: int = 3, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The toy after a few steps of AdamW."""
    torch.manual_seed(seed)
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(7, (4,))).square().backward()
        optimizer.step()
    return model, optimizer


def run_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a trainer saves."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optim": moments, "rng": torch.get_rng_state(), "step": 3}


def train(rank: int, meeting: str, folder: str) -> None:
    """One of two processes that train the toy with FSDP and save it, and a copy of the whole by the first."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = Toy()
    fully_shard(model.down, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randint(7, (4,))).square().backward()
        optimizer.step()
    columns = torch.arange(35.0).reshape(5, 7)
    state = run_state(model, optimizer)
    state["model"]["columns"] = distribute_tensor(columns, mesh, [Shard(1)])
    dcp.save(state, checkpoint_id=folder)
    pieces = dcp.HuggingFaceStorageWriter(f"{folder}-pieces", save_distributed=True)
    dcp.save(state["model"], storage_writer=pieces)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=whole)
    if rank == 0:
        save_file({**weights, "columns": columns}, f"{folder}.safetensors")
        squares = {name: own["exp_avg_sq"].contiguous() for name, own in moments["state"].items()}
        save_file(squares, f"{folder}-squares.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def save_by_two(folder: Path) -> Path:
    """A folder that two processes wrote; beside it `NAME.safetensors`, `NAME-squares.safetensors`, `NAME-pieces/`."""
    meeting = folder.with_name("meeting")
    begin = [sys.executable, "-c", _WORKER, str(REPOSITORY / "tests/helpers")]
    workers = [
        subprocess.Popen([*begin, str(rank), str(meeting), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for worker in workers:
        _, said = worker.communicate(timeout=120)
        assert worker.returncode == 0, said
    return folder
