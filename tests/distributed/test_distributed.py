"""FSDP2, FSDP1, DDP and the Trainer in two processes on this machine's CPU, through gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
REPO = HERE.parents[1]
CHECKS = ("fsdp2", "fsdp1_ddp", "trainer")


def in_two_processes(*arguments: object) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(filter(None, [str(REPO / "src"), str(HERE), os.environ.get("PYTHONPATH")]))
    common = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", HERE / "processes.py", *map(str, arguments)],
            env={**common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failures = [output[max(output.find("--- "), 0) :][:6000] for output in outputs]  # the first says most
    assert [process.returncode for process in processes] == [0, 0], "\n".join(failures)


def test_in_two_processes(tmp_path):
    in_two_processes(tmp_path, "check_", *CHECKS)


@pytest.mark.slow
def test_more_in_two_processes(tmp_path):
    in_two_processes(tmp_path, "slow_check_", *CHECKS)


def test_the_example_trains_and_saves(tmp_path, demo_model):
    paths = os.pathsep.join(filter(None, [str(REPO / "src"), os.environ.get("PYTHONPATH")]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--model", demo_model, "--output", tmp_path, "--steps", "3", "--lr", "5e-3", "--batch", "1"]
    done = subprocess.run(
        [*torchrun, REPO / "examples" / "fsdp_qlora.py", *options, "--length", "32", "--bf16"],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    losses = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if "loss" in line]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    adapters = load_file(tmp_path / "adapter_model.safetensors")
    assert len(adapters) == 2 * 7 * 4
    assert all(tensor.abs().sum() > 0 for name, tensor in adapters.items() if "lora_B" in name)
