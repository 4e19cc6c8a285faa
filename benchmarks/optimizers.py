"""Steps of 8-bit optimizers beside torch's and bitsandbytes': time, bytes of state, and losses.

python benchmarks/optimizers.py [--threads 2] [--convergence]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from fewbits import backends, moments
from fewbits.optim import AdamW8bit, AdamW32bit, Lion8bit, Lion32bit

Make = Callable[[Sequence[nn.Parameter]], Optimizer]

# A layer of a Llama with 1.1 billion parameters.
SHAPES = [
    *[(2048, 2048)] * 2, *[(256, 2048)] * 2, *[(5632, 2048)] * 2, (2048, 5632), *[(2048,)] * 2
]  # fmt: skip


def contestants() -> dict[str, Make]:
    found: dict[str, Make] = {
        "torch AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "torch AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
        "AdamW8bit": AdamW8bit,
        "Lion8bit": Lion8bit,
        "AdamW32bit": AdamW32bit,
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes
    except ImportError:
        return found
    return found | {"bitsandbytes AdamW8bit": bitsandbytes.optim.AdamW8bit}


def state_bytes(optimizer: Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def time_steps(dtype: torch.dtype, rounds: int) -> None:
    """Contestants take turns, so that all of them see the same machine."""
    setups = {}
    for name, make in contestants().items():
        params = [nn.Parameter(torch.randn(shape, dtype=dtype) * 0.02) for shape in SHAPES]
        for param in params:
            param.grad = torch.randn_like(param)
        setups[name] = make(params)
        setups[name].step()
    taken: dict[str, list[float]] = {name: [] for name in setups}
    for _ in range(rounds):
        for name, optimizer in setups.items():
            start = time.perf_counter()
            optimizer.step()
            taken[name].append(time.perf_counter() - start)
    count = sum(torch.Size(shape).numel() for shape in SHAPES)
    base = statistics.median(taken["torch AdamW, foreach"])
    print(f"{dtype}, {count / 1e6:.1f} M parameters, {torch.get_num_threads()} threads")
    for name, times in taken.items():
        median = statistics.median(times)
        print(
            f"  {name:26} {median * 1e9 / count:7.2f} ms per M parameters, {median / base:5.2f} of foreach, "
            f"{state_bytes(setups[name]) / count:5.2f} bytes of state",
            flush=True,
        )


def time_specification() -> None:
    param = nn.Parameter(torch.randn(2**20))
    param.grad = torch.randn(2**20)
    for name, choose in {"C++": backends.choose_update, "plain torch": lambda device: moments.update}.items():
        backends.choose_update, kept = choose, backends.choose_update
        optimizer = AdamW8bit([param])
        optimizer.step()
        start = time.perf_counter()
        for _ in range(3):
            optimizer.step()
        print(f"  AdamW8bit in {name:13} {(time.perf_counter() - start) / 3 * 1e3:7.2f} ms per M parameters")
        backends.choose_update = kept


def train(make: Callable[..., Optimizer], lr: float, steps: int) -> list[float]:
    """Losses of a fresh model of the demo's shape on the documents of this repository."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    root = Path(__file__).resolve().parents[1]
    torch.manual_seed(0)
    path = root / "demo" / "model"
    text = " ".join(file.read_text(encoding="utf-8") for file in sorted(root.glob("docs/*.md")))
    tokens = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[0]
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    optimizer = make(model.parameters(), lr=lr, weight_decay=0.01)
    losses = []
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (number + 1) / 10) * (1 - number / steps)
        starts = torch.randint(0, len(tokens) - 65, (8,))
        batch = torch.stack([tokens[start : start + 64] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def show_convergence(steps: int = 300) -> None:
    for name, make, lr in (
        ("torch AdamW", torch.optim.AdamW, 1e-3),
        ("AdamW8bit", AdamW8bit, 1e-3),
        ("Lion32bit", Lion32bit, 2e-4),
        ("Lion8bit", Lion8bit, 2e-4),
    ):
        losses = train(make, lr, steps)
        means = [statistics.mean(losses[at : at + 20]) for at in (0, 40, 80, 140, 200, steps - 20)]
        print(f"  {name:12}", "  ".join(f"{mean:.3f}" for mean in means), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--convergence", action="store_true", help="train, too (minutes)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for dtype in (torch.float32, torch.bfloat16):
        time_steps(dtype, arguments.rounds)
    time_specification()
    if arguments.convergence:
        show_convergence()


if __name__ == "__main__":
    main()
