"""FSDP2: parameters that are DTensors, in a process group of one and of two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Trains two layers under fully_shard, saves after 3 steps, and goes on; prints what the test compares.
SCRIPT = """
import copy, json, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict,
)
from fewbits.optim import AdamW8bit

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 99), nn.Tanh(), nn.Linear(99, 7))
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, AdamW8bit(model.parameters(), lr=1e-2)

def train(model, optimizer, seed, steps=3):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 64, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

model, optimizer = build()
train(model, optimizer, 1)
weight = model[0].weight
assert isinstance(weight, DTensor)
state = optimizer.state[weight]
assert type(state["exp_avg"]) is torch.Tensor and state["exp_avg"].dtype == torch.uint8
assert state["exp_avg"].shape == weight.to_local().shape
saved = optimizer.state_dict()
whole = saved["state"][0]["exp_avg_sq"]
assert isinstance(whole, DTensor) and whole.dtype == torch.float32
assert whole.shape == weight.shape and whole.placements == weight.placements
assert optimizer.state[weight]["exp_avg"].dtype == torch.uint8

again, other = build()
again.load_state_dict(model.state_dict())
other.load_state_dict(copy.deepcopy(saved))
reloaded = other.state_dict()["state"]
for number, entries in saved["state"].items():
    assert reloaded[number]["step"] == entries["step"] == 3
    for key in ("exp_avg", "exp_avg_sq"):
        was, now = entries[key].to_local(), reloaded[number][key].to_local()
        # Second moments come back as they were; first ones but for the negative end of their map.
        assert float((was - now).norm()) <= (0.01 if key == "exp_avg" else 0.0) * float(was.norm())
full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
third, last = build()
third.load_state_dict(model.state_dict())
set_optimizer_state_dict(third, last, full, options=StateDictOptions(full_state_dict=True))
for network, stepper in ((model, optimizer), (again, other), (third, last)):
    train(network, stepper, 2)
results = [[p.full_tensor().flatten()[:40].tolist() for p in m.parameters()] for m in (model, again, third)]
if rank == 0:
    print(json.dumps({"results": results, "in_8bit": optimizer.memory().in_8bit}))
dist.destroy_process_group()
"""


def run(world: int, folder: Path) -> dict[str, list[list[list[float]]]]:
    folder.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(world), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-6000:]
    found: dict[str, list[list[list[float]]]] = json.loads(outputs[0][0].splitlines()[-1])
    return found


def furthest(one: list[list[float]], other: list[list[float]]) -> float:
    return max(abs(x - y) for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True))


def test_shards_are_updated_where_they_lie_and_their_states_load(tmp_path: Path) -> None:
    """A run goes on from its state dict, and from that which is gathered, but for one more rounding."""
    found = run(1, tmp_path / "one")
    assert furthest(found["results"][0], found["results"][1]) < 1e-3
    assert found["results"][1] == found["results"][2]
    assert found["in_8bit"] == 64 * 99


@pytest.mark.slow
def test_two_processes_train_as_one_but_for_rounding(tmp_path: Path) -> None:
    one, two = run(1, tmp_path / "one"), run(2, tmp_path / "two")
    assert two["results"][1] == two["results"][2]
    assert furthest(two["results"][0], two["results"][1]) < 1e-3
    assert furthest(one["results"][0], two["results"][0]) < 0.02
