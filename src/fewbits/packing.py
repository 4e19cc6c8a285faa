"""Codes to bytes and back.

Two bit orders are in use. Both run over the last dimension, and a row of codes fills whole bytes:

high_first  the first code sits in the highest bits of its byte: bitsandbytes' NF4 and FP4
low_first   a dense stream from the lowest bit up, which 3-bit codes cross bytes in: GPTQ,
            compressed-tensors, MXFP4, NVFP4
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from fewbits.format import Format, packed_length


def bit_order(format: Format) -> str:
    """The bit order that `format` packs its codes in."""
    return "high_first" if format.group.flat else "low_first"


def pack(codes: Tensor, bits: int, order: str = "low_first") -> Tensor:
    """uint8 codes [..., count] below 2**bits → uint8 bytes [..., ceil(count * bits / 8)].

    The last byte is padded with zero bits.
    """
    if bits == 8:
        return codes.contiguous()
    per_word, word_bytes = _word(bits)
    count = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -count % per_word)).to(_accumulator(bits))
    words = padded.unflatten(-1, (-1, per_word))
    shifts = _shifts(bits, per_word, order, codes.device)
    word = (words << shifts).sum(-1, dtype=words.dtype)
    packed: Tensor = (word.unsqueeze(-1) >> _shifts(8, word_bytes, order, codes.device)) & 0xFF
    return packed.to(torch.uint8).flatten(-2)[..., : packed_length(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int, order: str = "low_first") -> Tensor:
    """Inverse of `pack`: uint8 bytes [..., ceil(count * bits / 8)] → uint8 codes [..., count]."""
    if bits == 8:
        return packed
    per_word, word_bytes = _word(bits)
    word = packed.to(_accumulator(bits))
    if word_bytes > 1:
        words = torch.nn.functional.pad(word, (0, -word.shape[-1] % word_bytes)).unflatten(
            -1, (-1, word_bytes)
        )
        word = (words << _shifts(8, word_bytes, order, packed.device)).sum(-1, dtype=words.dtype)
    codes: Tensor = (word.unsqueeze(-1) >> _shifts(bits, per_word, order, packed.device)) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def _word(bits: int) -> tuple[int, int]:
    """Fewest codes that fill whole bytes, and those bytes: (8, 3) for 3 bits, (2, 1) for 4."""
    per_word = 8 // math.gcd(bits, 8)
    return per_word, per_word * bits // 8


def _accumulator(bits: int) -> torch.dtype:
    word_bits = 8 * _word(bits)[1]
    return torch.int16 if word_bits == 8 else torch.int32 if word_bits < 32 else torch.int64


@lru_cache(maxsize=64)
def _shifts(bits: int, count: int, order: str, device: torch.device) -> Tensor:
    steps = range(count) if order == "low_first" else reversed(range(count))
    return torch.tensor([bits * step for step in steps], device=device, dtype=torch.int32)
