"""Training with 8-bit states arrives where training with 32-bit states does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fewbits import moments
from fewbits.codebook import CODEBOOKS
from fewbits.optim import AdamW8bit, Lion8bit, Lion32bit

EPS = 1e-16  # small beside the smallest gradients


class NearestAdam(Optimizer):
    """The contrast: both moments rounded to the nearest code of the dynamic maps, v as it is."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if not state:
                state.update(step=0, m=torch.zeros_like(param), v=torch.zeros_like(param))
            state["step"] += 1
            m, v = state["m"], state["v"]
            m.mul_(0.9).add_(param.grad, alpha=0.1)
            v.mul_(0.999).addcmul_(param.grad, param.grad, value=0.001)
            m_hat, v_hat = m / (1 - 0.9 ** state["step"]), v / (1 - 0.999 ** state["step"])
            param.sub_(self.param_groups[0]["lr"] * m_hat / (v_hat.sqrt() + EPS))
            state["m"], state["v"] = self.rounded(m, "dynamic8"), self.rounded(v, "udynamic8")

    @staticmethod
    def rounded(values: Tensor, name: str) -> Tensor:
        book = CODEBOOKS[name]
        blocks = values.view(-1, moments.BLOCK)
        scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)
        codes = torch.bucketize(blocks / scale, torch.tensor(book.thresholds))
        return (torch.tensor(book.values)[codes] * scale).view_as(values)


@dataclass(frozen=True)
class Descent:
    distance: Tensor  # [256] mean |x| at the end, by rising curvature
    largest_step: float  # over all steps and elements, in learning rates


def descend(make: Callable[[list[nn.Parameter]], Optimizer], smallest: float, noise: float = 0.0) -> Descent:
    """½ Σ hᵢ xᵢ² from x about 1, with noisy gradients; every block mixes hᵢ from `smallest` to 1."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(256, generator=generator)
    curvature = torch.logspace(math.log10(smallest), 0, 256)[order].repeat(16)
    x = nn.Parameter(1 + 0.1 * torch.randn(4096, generator=generator))
    optimizer = make([x])
    steps, lr, largest = 500, 0.02, 0.0
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - number / steps)
        x.grad = curvature * (x.detach() + noise * torch.randn(4096, generator=generator))
        before = x.detach().clone()
        optimizer.step()
        largest = max(largest, float((x.detach() - before).abs().max()) / lr)
    distance = x.detach().abs().view(16, 256).mean(0)[curvature[:256].argsort()]
    return Descent(distance, largest)


def adamw(params: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, eps=EPS, weight_decay=0.0)


def adamw8(params: list[nn.Parameter]) -> Optimizer:
    return AdamW8bit(params, eps=EPS, weight_decay=0.0)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_blocks_that_mix_gradients_of_1e_6_and_1_converge_as_with_32_bits(noise):
    exact, mine = descend(adamw, 1e-6, noise), descend(adamw8, 1e-6, noise)
    assert float(exact.distance.mean()) < 0.05
    assert float(mine.distance.mean()) < float(exact.distance.mean()) + 0.01
    assert float(mine.distance.max()) < 0.15
    assert mine.largest_step < 3


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_gradients_of_1e_8_beside_1_are_slower_but_neither_stuck_nor_thrown_about(noise):
    mine = descend(adamw8, 1e-8, noise)
    assert mine.largest_step < 3
    assert float(mine.distance[-192:].mean()) < 0.05
    # Below the range of the codes by 30 times, and still on the way from 1.
    assert float(mine.distance[:16].mean()) < 0.75
    assert float(mine.distance.max()) < 1.2


@pytest.mark.parametrize("smallest", [1e-6, 1e-8])
def test_second_moments_rounded_to_the_nearest_code_fail_there(smallest):
    """What the rounding of `fewbits.moments` is for; with moderate gradients there is no difference."""
    assert float(descend(NearestAdam, 1e-2).distance.max()) < 0.01
    nearest = descend(NearestAdam, smallest)
    assert nearest.largest_step > 1000
    assert float(nearest.distance.max()) > 10


# --- a language model -------------------------------------------------------------------------------


def train(make: Callable[..., Optimizer], model_path: Path, steps: int, lr: float) -> list[float]:
    """Losses of a fresh model of the demo's shape on the texts of this repository."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    root = model_path.parents[1]
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted(root.glob("docs/*.md")))
    tokens = AutoTokenizer.from_pretrained(model_path)(text, return_tensors="pt").input_ids[0]
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path))
    optimizer = make(model.parameters(), lr=lr, weight_decay=0.01)
    losses = []
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (number + 1) / 5) * (1 - number / steps)
        starts = torch.randint(0, len(tokens) - 33, (4,))
        batch = torch.stack([tokens[start : start + 32] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def assert_same_curve(mine: list[float], exact: list[float], window: int) -> None:
    ends = torch.tensor([mine[-window:], exact[-window:]]).mean(1)
    assert float(ends[1]) < exact[0] - 0.8, "this learns nothing"
    assert abs(float(ends[0] - ends[1])) < 0.02 * float(ends[1])


def test_a_short_training_follows_adamw(demo_model: Path) -> None:
    assert_same_curve(
        train(AdamW8bit, demo_model, 12, 2e-3), train(torch.optim.AdamW, demo_model, 12, 2e-3), window=3
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mine", "exact", "lr"), [(AdamW8bit, torch.optim.AdamW, 2e-3), (Lion8bit, Lion32bit, 3e-4)]
)
def test_training_follows_the_32_bit_optimizer(mine, exact, lr, demo_model: Path) -> None:
    assert_same_curve(train(mine, demo_model, 300, lr), train(exact, demo_model, 300, lr), window=20)
