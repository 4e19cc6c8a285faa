"""Parameters of odd shapes, and steps with random gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbits.optim import BlockwiseOptimizer


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    """Of 8-bit states, the last block short; of 32-bit states; a scalar; an empty one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(70, 61), (33,), (), (0, 5)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def take_steps(optimizer: BlockwiseOptimizer, params: list[nn.Parameter], steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return [t for inner in value.values() for t in tensors(inner)]
    return [value] if isinstance(value, Tensor) else []
