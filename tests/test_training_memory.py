"""Memory of a training step, in a process of its own: frozen weights cost their stored bytes and a panel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
MB = 10**6
SIZE, LAYERS, TOKENS = 3072, 6, 64
DENSE = SIZE * SIZE * 2  # bytes of one bfloat16 weight
PANEL = 2**23

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux, to see the peak of a single step"
)

# A small step first, so that what torch and the kernels take once does not count.
STEP = """
import json, re, sys, torch
from pathlib import Path
from torch import nn
from fewbits import backends
from fewbits.format import Format, Scheme
from fewbits.int8_training import TrainableInt8Linear
from fewbits.nn import QuantLinear
kind, size, layers, tokens = sys.argv[1], *map(int, sys.argv[2:])

def memory(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def layer(size):
    plain = nn.Linear(size, size, False, device="meta" if "@" in kind or ":" in kind else "cpu",
                      dtype=torch.bfloat16)
    if kind == "frozen":
        return plain.requires_grad_(False)
    if kind == "trained":
        return plain
    if kind.startswith("trained "):
        plain.to_empty(device="cpu")
        nn.init.normal_(plain.weight, std=0.01)
        return TrainableInt8Linear.of(plain, Scheme.parse(kind.removeprefix("trained ")))
    quantized = QuantLinear(size, size, False, Scheme.parse(kind), dtype=torch.bfloat16)
    for name, part in quantized.named_parameters():
        part.data.fill_(0.01) if part.is_floating_point() else part.data.random_(0, 100)
    return quantized

class Residual(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.layer = layer(size)
    def forward(self, x):
        return x + self.layer(x)

def step(model, size, tokens):
    x = torch.randn(tokens, size, dtype=torch.bfloat16, requires_grad=True)
    model(x).float().square().mean().backward()
    assert x.grad is not None

step(nn.Sequential(*(Residual(256) for _ in range(2))), 256, tokens)
before = memory("VmRSS")
model = nn.Sequential(*(Residual(size) for _ in range(layers)))
held = sum(p.nbytes for p in model.parameters())
Path("/proc/self/clear_refs").write_text("5")
step(model, size, tokens)
compiled = backends.explain("nf4:g64")["linear"]["cpu"] == "used"
print(json.dumps({"growth": memory("VmHWM") - before, "held": held, "compiled": compiled}))
"""


def measured(kind: str) -> tuple[int, int, bool]:
    """(growth of the resident set for the model and one step, bytes of parameters, C++ kernels?)."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**16),  # memory is what is in use
    }
    done = subprocess.run(
        [sys.executable, "-c", STEP, kind, *map(str, (SIZE, LAYERS, TOKENS))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return found["growth"], found["held"], found["compiled"]


@pytest.fixture(scope="module")
def beside_the_frozen_weights() -> int:
    """Bytes that a step over plain frozen weights takes beside them."""
    growth, held, _ = measured("frozen")
    assert held == LAYERS * DENSE
    assert growth > 0.98 * held, "nothing was measured"
    return growth - held


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["nf4:g64", "int4:g128", "int8:row@int8:t6", "fp8_e4m3:row"])
def test_frozen_weights_cost_their_stored_bytes_and_one_panel(scheme, beside_the_frozen_weights):
    growth, held, compiled = measured(scheme)
    shown = f"growth {growth / MB:.1f} MB, held {held / MB:.1f} MB, {beside_the_frozen_weights / MB:.1f} MB"
    # Plain torch decodes a whole weight, in float32 by blocks.
    panel = PANEL if compiled else 2 * DENSE + 8 * MB
    assert held < 0.52 * LAYERS * DENSE
    assert growth > 0.98 * held, f"nothing was measured: {shown}"
    assert growth < held + beside_the_frozen_weights + panel + 2 * MB, shown


@pytest.mark.slow
def test_training_through_int8_takes_what_plain_training_does_an_int8_copy_and_a_panel():
    plain, held, compiled = measured("trained")
    mine, same, _ = measured("trained int8:row@int8:t6")
    assert held == same == LAYERS * DENSE
    assert plain > 1.9 * held, "gradients are not in it"
    room = DENSE // 2 + (PANEL if compiled else 2 * DENSE + 8 * MB) + 2 * MB
    assert mine < plain + room, f"{mine / MB:.1f} MB, plain training {plain / MB:.1f} MB"
