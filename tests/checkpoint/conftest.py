"""A small checkpoint, and jobs that halve it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewbits.checkpoint import finish, job, session
from fewbits.checkpoint import work as work_on
from fewbits.checkpoint.folder import Folder, open_folder
from fewbits.checkpoint.job import Job, Made, Unit

COUNT = 12
SHAPE = (64, 32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {f"w{number:02d}": torch.randn(SHAPE) for number in range(COUNT)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def halved(tensors: Mapping[str, Tensor]) -> Made:
    return Made(
        {name: tensor.half() for name, tensor in tensors.items()}, dict.fromkeys(tensors, (1.0, 16.0))
    )


def new_job(source: Path, out: Path, shards: int = 4, **changes: Any) -> Job:
    folder = open_folder(source)
    make = changes.pop("make", halved)
    units = [unit(folder, name, make) for name in folder.files]
    parts = job.split(units, sum(one.nbytes for one in units) // shards)
    identity = {
        "shards": [[shard.name, shard.size] for shard in parts],
        "weights": [
            {
                "name": name,
                "shape": list(SHAPE),
                "count": 2048,
                "stored": "float16",
                "quantized": True,
                "reason": "",
                "nbytes": 4096,
            }
            for name in folder.files
        ],
        "parameters": 2048 * COUNT,
        "card": {"license": "mit"},
        "carried": {},
        "source_bytes": 8192 * COUNT,
        "base_model": "org/base",
        "name": out.name,
        "method": "fewbits",
        "command": "fewbits quantize a b",
        "architecture": "LlamaForCausalLM",
        "versions": {"fewbits": "1"},
        **changes,
    }
    return Job(folder, out, parts, identity, {"config.json": "{}\n"}, {})


def unit(folder: Folder, name: str, make: Any) -> Unit:
    return Unit((name,), {name: ("F16", folder.info(name).shape)}, make, 2**14)


def do(work: Job, *, join: bool = False, threads: int = 2, memory: int = 2**16) -> None:
    with session.session(work, "all", join=join):
        work_on.run(work, work.shards, threads=threads, memory=memory, advance=lambda _: None)
        finish.finish(work.out, overwrite=False)


def start(work: Job, *, join: bool) -> None:
    with session.session(work, "all", join=join):
        pass


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Stop(Exception):  # noqa: N818
    """Raised in the middle of the work."""


def stopping(after: int) -> Any:
    lock, calls = threading.Lock(), 0

    def make(tensors: Mapping[str, Tensor]) -> Made:
        nonlocal calls
        with lock:
            calls += 1
            if calls > after:
                raise Stop
        return halved(tensors)

    return make
