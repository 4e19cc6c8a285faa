"""A small checkpoint, jobs that halve it, and folders of any tensors."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewbits.checkpoint import finish, job, session
from fewbits.checkpoint import work as work_on
from fewbits.checkpoint.folder import Folder, open_folder
from fewbits.checkpoint.job import Job, Made, Unit
from fewbits.checkpoint.stored import StoredWeight, stored_weights
from fewbits.config import FewbitsConfig
from fewbits.model import quantize_model

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


def write(path: Path, tensors: Mapping[str, Tensor], quantization: Any = None, **config: Any) -> Folder:
    """A folder with these tensors and this quantization_config."""
    if quantization is not None:
        config["quantization_config"] = quantization
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: one.contiguous() for name, one in tensors.items()}, path / "model.safetensors")
    return open_folder(path)


def found_in(folder: Folder) -> dict[str, StoredWeight]:
    """The weights of a folder by name; together they have all of its bytes."""
    weights = stored_weights(folder)
    assert sum(weight.nbytes for weight in weights) == folder.nbytes
    return {weight.name: weight for weight in weights}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 20, 64))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(96, 33)
        self.norm = nn.LayerNorm(96)
        self.experts = Experts()


class Model(nn.Module):
    """What `own` quantizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(40, 64)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.lm_head = nn.Linear(64, 40, bias=False)


def own(path: Path, config: FewbitsConfig, **more: Any) -> tuple[Folder, nn.Module]:
    """A folder in fewbits' own schema, and the model that it holds."""
    model = Model()
    quantize_model(model, config)
    return write(path, model.state_dict(), config.to_dict(), **more), model
