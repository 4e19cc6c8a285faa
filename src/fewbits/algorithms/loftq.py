"""LoftQ: codes and a low-rank adapter that make up for each other (Li et al. 2023, arXiv:2310.08659)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits import ops
from fewbits.format import Format
from fewbits.tensor import QuantizedTensor

_EXACT_SIZE = 1024
"""Side of a matrix up to which its whole singular value decomposition is worth computing."""


@dataclass(frozen=True)
class Factored:
    """W ≈ decode(quantized) + b · a.

    a  float32 [rank, in]
    b  float32 [out, rank]
    relative_errors  ‖W - decode(Q) - b · a‖ / ‖W‖ of plain quantization (b · a = 0), then of each iteration
    """

    quantized: QuantizedTensor
    a: Tensor
    b: Tensor
    relative_errors: tuple[float, ...]


def loftq(
    weight: Tensor, format: Format | str, rank: int, *, iterations: int = 1, name: str = "weight"
) -> Factored:
    """Alternate Q = quantize(W - b · a) and b · a = the best `rank` terms of W - decode(Q).

    `weight` is floating [out, in]. The iteration with the least error is returned: the error need not fall
    with each. Matrices of more than 1024 rows and columns are decomposed at random (Halko et al. 2011,
    arXiv:0909.4061) with a fixed seed. ValueError for a rank that the matrix has not, and what `quantize`
    raises.
    """
    if weight.dim() != 2 or not 1 <= rank <= min(weight.shape):
        raise ValueError(f"{name} {list(weight.shape)} has no factors of rank {rank}; take a smaller rank")
    if iterations < 1:
        raise ValueError(f"LoftQ takes at least one iteration, got {iterations}")
    exact = weight.detach().float()
    norm = float(exact.norm()) or 1.0
    target, errors = exact, list[float]()
    best: tuple[QuantizedTensor, Tensor, Tensor] | None = None
    for _ in range(iterations):
        quantized = ops.quantize(target, format, name=name)
        residual = exact - quantized.dequantize(torch.float32)
        a, b = _factors(residual, rank)
        target = exact - b @ a
        errors = errors or [float(residual.norm()) / norm]
        errors.append(float((residual - b @ a).norm()) / norm)
        if best is None or errors[-1] <= min(errors[1:]):
            best = quantized, a, b
    assert best is not None
    return Factored(*best, tuple(errors))


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """a [rank, in], b [out, rank]: the best b · a, each with half of the singular values."""
    if min(matrix.shape) <= _EXACT_SIZE:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=4)
        vh = v.T
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
