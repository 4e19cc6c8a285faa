"""Stored parts as columns of another dtype, bit by bit: what sharding may cut, gather and put together.

A cast by FSDP's mixed precision changes values and so must never meet codes or scales. Held as integers they
are passed by, and held as the dtype that everything else is cast to there is nothing to cast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

DTYPES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_column(part: Tensor, dtype: torch.dtype, *, stack: bool = False) -> Tensor:
    """The bytes of `part` as `dtype`, [n, 1]; of a stack [experts, …], [experts, n].

    Zeros follow where they do not fill the last element; else the memory is that of `part`.
    """
    data = part.detach().contiguous().view((len(part), -1) if stack else (-1,)).view(torch.uint8)
    missing = -data.shape[-1] % dtype.itemsize
    if missing:
        data = functional.pad(data, (0, missing))
    held = _aligned(data, dtype).view(dtype)
    return held if stack else held.view(-1, 1)


def from_column(held: Tensor, shape: Sequence[int], dtype: torch.dtype, *, stack: bool = False) -> Tensor:
    """The part of `shape` and `dtype` that `as_column` made `held` of; a view of it.

    A copy only where a flat parameter of FSDP1 put it at an offset that `dtype` cannot lie at.
    """
    data = (held if stack else held.view(-1)).view(torch.uint8)
    size = math.prod(shape) * dtype.itemsize
    data = data[..., :size] if data.shape[-1] > size else data
    return _aligned(data, dtype).view(dtype).view((len(held), *shape) if stack else tuple(shape))


def explain(tensor: Tensor, kept: torch.dtype, name: str) -> str:
    """What is wrong with a part that should have dtype `kept`, or is a shard, and how to mend it."""
    if tensor.dtype == kept:
        return (
            f"{name} is sharded; call the whole model, whose forward gathers its parts, or unshard() the "
            "module that was sharded"
        )
    return (
        f"{name} was stored as {kept} and is {tensor.dtype} now: a cast changed its values, as FSDP's mixed "
        "precision does, or prepare_model_for_kbit_training. Call fewbits.distributed.prepare(model) before "
        "the model is sharded; a floating quant_storage must be the param_dtype of mixed precision"
    )


def _aligned(data: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling() or dtype.itemsize == 1:
        return data
    return data.clone() if data.storage_offset() % dtype.itemsize else data
