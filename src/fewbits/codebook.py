"""The tables of values that codes stand for, and how a value finds its nearest code.

Every table is written once, here, as exact float32 values; torch, Triton and C++ take it from this file.
Standard library only.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass


def f32(value: float) -> float:
    """`value` rounded to float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _below(value: float) -> float:
    """The next float32 below a positive `value`."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return float(struct.unpack("<f", struct.pack("<I", bits - 1))[0])


@dataclass(frozen=True)
class Codebook:
    """Values of codes 0 … 2**bits - 1, in float32.

    values      of each code, in code order; empty for integer codebooks, whose codes are their values
    peak        the magnitude that the scale maps the largest weight of a group to
    unit        what a decoded value is multiplied with after the scale (see `fewbits.format`)
    order       codes by rising value; of the codes without sign bit when `sign_bit`
    thresholds  between neighbours of `order`: a value goes up when strictly greater
    sign_bit    the highest bit of a code is its sign, set for values below 0
    signed      codes are two's complement int8
    reciprocal  coding multiplies with peak/scale where others divide by the scale (as bitsandbytes does)
    """

    name: str
    bits: int
    values: tuple[float, ...] = ()
    peak: float = 1.0
    unit: float = 1.0
    order: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    sign_bit: bool = False
    signed: bool = False
    reciprocal: bool = False

    @property
    def integer(self) -> bool:
        return not self.values

    @property
    def low(self) -> int:
        """Smallest code of an integer codebook."""
        return -127 if self.signed else 0

    @property
    def high(self) -> int:
        """Largest code of an integer codebook."""
        return 127 if self.signed else 2**self.bits - 1

    @property
    def middle(self) -> int:
        """Zero point of an integer codebook whose format stores none."""
        return 0 if self.signed else 2 ** (self.bits - 1)


def _table(name: str, bits: int, values: list[float]) -> Codebook:
    """Values in rising order; a value on the middle between two codes takes the lower one."""
    middles = tuple(f32(f32(a + b) / 2) for a, b in itertools.pairwise(values))
    return Codebook(
        name, bits, tuple(values), order=tuple(range(len(values))), thresholds=middles, reciprocal=True
    )


def _minifloat(name: str, exponent_bits: int, mantissa_bits: int, bias: int, largest: float) -> Codebook:
    """A small IEEE-like float: round to nearest, ties to the even mantissa, saturating at `largest`."""
    bits = 1 + exponent_bits + mantissa_bits
    magnitudes = []
    for code in range(2 ** (bits - 1)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits + (exponent > 0)
        magnitudes.append(fraction * 2.0 ** (max(exponent, 1) - bias))
    finite = [value for value in magnitudes if value <= largest]
    # What lies above the largest finite value is infinity or NaN, and never chosen.
    magnitudes = finite + [math.nan] * (len(magnitudes) - len(finite))
    middles = [(a + b) / 2 for a, b in itertools.pairwise(finite)]
    # A tie goes to the even code: up from an odd one, hence its threshold lies just below the middle.
    thresholds = tuple(_below(middle) if code % 2 else middle for code, middle in enumerate(middles))
    return Codebook(
        name,
        bits,
        tuple(magnitudes + [-value for value in magnitudes]),
        peak=largest,
        order=tuple(range(len(finite))),
        thresholds=thresholds,
        sign_bit=True,
    )


def _dynamic(signed: bool) -> list[float]:
    """The dynamic 8-bit map (Dettmers, arXiv 1511.04561): seven decades, each evenly split.

    Follows bitsandbytes' float32 arithmetic step by step, so that the 256 values are equal in every bit.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        points = 2 ** (decade if signed else decade + 1) + 1
        step = f32(f32(1.0 - f32(0.1)) / (points - 1))
        # From both ends towards the middle, each point with one rounding (a fused multiply-add).
        edges = [
            f32(f32(0.1) + step * i) if i < points // 2 else f32(1.0 - step * (points - 1 - i))
            for i in range(points)
        ]
        power = f32(10.0 ** (decade - 6))
        middles = [f32(f32(a + b) / 2) for a, b in itertools.pairwise(edges)]
        values += [f32(power * middle) for middle in middles]
        values += [-f32(power * middle) for middle in middles] if signed else []
    return sorted(values)


# QLoRA (arXiv 2305.14314), appendix E: quantiles of a normal distribution, with an exact zero.
_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
# bitsandbytes' FP4: sign, two bits of exponent, one of mantissa, in its own order of codes.
_FP4 = [f32(value / 12) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)]
# The literals of its CUDA kernel; not quite the middles.
_FP4_THRESHOLDS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)


def _fp4() -> Codebook:
    order = tuple(sorted(range(8), key=_FP4.__getitem__))
    values = tuple(_FP4 + [0.0 - value for value in _FP4])  # code 8 is 0, not -0
    thresholds = tuple(f32(value) for value in _FP4_THRESHOLDS)
    return Codebook("fp4", 4, values, order=order, thresholds=thresholds, sign_bit=True, reciprocal=True)


def _unsigned(bits: int) -> Codebook:
    # GPTQ and compressed-tensors: the largest weight of a symmetric group lies at 2**(bits-1) - 1/2.
    return Codebook(f"uint{bits}", bits, peak=(2**bits - 1) / 2)


_ALL: tuple[Callable[[], Codebook], ...] = (
    lambda: _table("nf4", 4, _NF4),
    _fp4,
    lambda: _table("dynamic8", 8, _dynamic(signed=True)),
    lambda: _table("udynamic8", 8, _dynamic(signed=False)),
    # Second moments of optimizers: their roots are in the unsigned dynamic map (see `fewbits.moments`).
    lambda: _table("udynamic8_squared", 8, [f32(value * value) for value in _dynamic(signed=False)]),
    lambda: Codebook("int8", 8, peak=127.0, unit=f32(1 / 127), signed=True, reciprocal=True),
    *(lambda bits=bits: _unsigned(bits) for bits in (2, 3, 4, 8)),
    lambda: _minifloat("e4m3", 4, 3, 7, 448.0),
    lambda: _minifloat("e5m2", 5, 2, 15, 57344.0),
    lambda: _minifloat("e2m1", 2, 1, 1, 6.0),
)
CODEBOOKS: dict[str, Codebook] = {book.name: book for book in (make() for make in _ALL)}
