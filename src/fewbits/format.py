"""What stored codes mean: the one noun of fewbits.

A `Format` turns codes into weights, group by group:

    weight = (codebook[code] - zero) * scale * unit + offset

`unit` is 1 but for the signed int8 of LLM.int8(), whose files store the absolute maximum of a row as its
scale (unit = 1/127). The scale may itself be stored in a Format (double quantization, NVFP4).

Spelling: `family[:group][:scale][:zero][:offset]`, as in `nf4:g64:dq`, `int8:row`, `int4:g128:f16:zero`,
`fp8_e4m3:b128x128`. `Format.parse(str(f)) == f` for every Format. Standard library only.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from fewbits.codebook import CODEBOOKS, Codebook

ITEM_BYTES = {"u8": 1, "i8": 1, "f16": 2, "bf16": 2, "f32": 4}
SCALE_TYPES = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class Group:
    """Which weights share a scale: `rows` x `columns` blocks of the tensor seen as [rows, last dimension].

    0 means all of them. `flat` groups run over the flattened tensor instead and may straddle rows
    (bitsandbytes); then `columns` is the group size. Spelled g64, row, tensor, b128x128.
    """

    rows: int
    columns: int
    flat: bool = False

    def __str__(self) -> str:
        if (self.rows, self.columns) == (0, 0):
            return "tensor"
        if (self.rows, self.columns) == (1, 0):
            return "row"
        return f"g{self.columns}" if self.rows == 1 else f"b{self.rows}x{self.columns}"

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of `shape`: [groups] when flat, else [row groups, column groups]."""
        if self.flat:
            return (-(-math.prod(shape) // self.columns),)
        rows, columns = matrix_shape(shape)
        return (-(-rows // (self.rows or max(rows, 1))), -(-columns // (self.columns or max(columns, 1))))


@dataclass(frozen=True)
class Part:
    """One stored tensor of a quantized weight: its name, shape and element type (a key of `ITEM_BYTES`)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class _Family:
    """What a family name stands for, and what it leaves open."""

    codebook: str
    group: Group
    scale: str  # a key of ITEM_BYTES, "e8m0", or the spelling of a Format
    groups: str = "grid"  # "flat": gN only; "grid": gN, row, tensor, bRxC; "fixed": the default only


_FAMILIES: dict[str, _Family] = {
    "nf4": _Family("nf4", Group(1, 64, flat=True), "f32", "flat"),
    "fp4": _Family("fp4", Group(1, 64, flat=True), "f32", "flat"),
    "dynamic8": _Family("dynamic8", Group(1, 256, flat=True), "f32", "flat"),
    "udynamic8": _Family("udynamic8", Group(1, 256, flat=True), "f32", "flat"),
    "int8": _Family("int8", Group(1, 0), "f32"),
    "int4": _Family("uint4", Group(1, 128), "f32"),
    "int3": _Family("uint3", Group(1, 128), "f32"),
    "int2": _Family("uint2", Group(1, 64), "f32"),
    "fp8_e4m3": _Family("e4m3", Group(1, 0), "f32"),
    "fp8_e5m2": _Family("e5m2", Group(1, 0), "f32"),
    "mxfp4": _Family("e2m1", Group(1, 32), "e8m0", "fixed"),
    "nvfp4": _Family("e2m1", Group(1, 16), "fp8_e4m3:tensor", "fixed"),
}
# bitsandbytes' double quantization: the scales minus their mean, in signed dynamic 8 bit, groups of 256.
_DOUBLE_QUANT = "dynamic8:g256:offset"


@dataclass(frozen=True)
class Format:
    """What stored codes mean (see the module's docstring). Build one with `Format.parse`.

    `zero`: an integer zero point per group is stored (asymmetric). `offset`: the mean of the tensor is
    subtracted before coding and added after (one float32 per tensor).
    """

    family: str
    group: Group
    scale: str | Format = "f32"
    zero: bool = False
    offset: bool = False
    codebook: Codebook = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        name = "uint8" if self.family == "int8" and self.zero else _FAMILIES[self.family].codebook
        object.__setattr__(self, "codebook", CODEBOOKS[name])

    @staticmethod
    def parse(text: str | Format) -> Format:
        """The Format that `text` spells; a Format passes through. ValueError says which part is wrong."""
        return text if isinstance(text, Format) else _parse(text)

    def __str__(self) -> str:
        family = _FAMILIES[self.family]
        words = [self.family, str(self.group)]
        if str(self.scale) == _DOUBLE_QUANT:
            words.append("dq")
        elif str(self.scale) != family.scale:
            words.append(str(self.scale))
        return ":".join(words + ["zero"] * self.zero + ["offset"] * self.offset)

    @property
    def codes_before_scale(self) -> bool:
        """Codes are chosen with the exact scale, before it is rounded to what is stored.

        bitsandbytes does so under double quantization; every other format chooses codes for the scale
        that decoding will see.
        """
        return isinstance(self.scale, Format) and self.scale.offset

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """The tensors that store a weight of `shape`, in the order that ops take them.

        `codes`, then `scale` (or `scale.codes`, `scale.scale`, … when it has a Format), `zero`, `offset`.
        """
        if all(type(size) is int for size in shape):
            return _parts(self, tuple(shape))
        return self._parts(tuple(shape))  # symbolic sizes, while tracing, cannot be remembered

    def _parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        grid = self.group.grid(shape)
        parts = [self._codes(shape)]
        if isinstance(self.scale, Format):
            parts += [replace(part, name=f"scale.{part.name}") for part in self.scale.parts(grid)]
        else:
            parts.append(Part("scale", grid, "u8" if self.scale == "e8m0" else self.scale))
        if self.zero:
            parts.append(Part("zero", (*grid[:-1], packed_length(grid[-1], self.codebook.bits)), "u8"))
        if self.offset:
            parts.append(Part("offset", (1,), "f32"))
        return tuple(parts)

    def _codes(self, shape: Sequence[int]) -> Part:
        bits = self.codebook.bits
        if self.group.flat:  # bitsandbytes' shapes: 4-bit codes are one column of bytes
            flat = (packed_length(math.prod(shape), bits), 1) if bits < 8 else tuple(shape)
            return Part("codes", flat, "u8")
        rows, columns = matrix_shape(shape)
        return Part("codes", (rows, packed_length(columns, bits)), "i8" if self.codebook.signed else "u8")

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes that store a weight of `shape`: codes, scales, zero points and padding."""
        return sum(part.nbytes for part in self.parts(shape))

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """Stored bits per weight of a tensor of `shape`, scales and padding included (0 when empty)."""
        count = math.prod(shape)
        return 8 * self.nbytes(shape) / count if count else 0.0


@dataclass(frozen=True)
class Activation:
    """Inputs are quantized to int8 on the fly, and multiplied in int8.

    With weights in int8:row this is LLM.int8() (arXiv 2208.07339): one scale per row of the input, and
    columns holding an element of magnitude `threshold` or more stay in 16 bit (float32 for float32 input);
    0 turns that off. With codes of up to 4 bits, as llama.cpp always computes: one scale per `group` columns
    of a row of the input, or per row where `group` is 0; no outliers.

    Spelled `int8`, `int8:t6`, `int8:g64`.
    """

    threshold: float = 0.0
    group: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"the outlier threshold is a number of at least 0, got {self.threshold!r}")
        if self.group < 0 or self.group % 8 or (self.group and self.threshold):
            raise ValueError(
                f"activations are quantized in groups of 8, 16, 24, … columns without outlier threshold, got "
                f"groups of {self.group!r} and threshold {self.threshold!r}"
            )

    def __str__(self) -> str:
        if self.group:
            return f"int8:g{self.group}"
        return f"int8:t{self.threshold!r}".removesuffix(".0") if self.threshold else "int8"

    @staticmethod
    def parse(text: str) -> Activation:
        found = re.fullmatch(r"int8(?::t([0-9][0-9.e+-]*)|:g([1-9][0-9]{0,6}))?", text)
        try:
            return Activation(float(found[1] or 0), int(found[2] or 0)) if found else Activation(math.nan)
        except ValueError:
            raise ValueError(
                f"cannot read the activation {text!r}: write 'int8', 'int8:t6' with a threshold (for "
                "weights in int8:row), or 'int8:g64' with a group size, a multiple of 8 (for weights of up "
                "to 4 bits)"
            ) from None


@dataclass(frozen=True)
class Scheme:
    """How a layer stores its weight and what it does with its input.

    `activation` None decodes the weight and multiplies in `compute_dtype` (a torch dtype's name; None
    follows the input). `storage_dtype` is the dtype that the bytes of the codes are held as
    (bitsandbytes' quant_storage). `trainable`, for LLM.int8() only: the weight stays in its own dtype, to be
    trained, and its codes are made from it for each product. Spelled `nf4:g64`, `int8:row@int8:t6`; the
    dtypes and `trainable` are not part of it.
    """

    weight: Format
    activation: Activation | None = None
    compute_dtype: str | None = None
    storage_dtype: str = "uint8"
    trainable: bool = False

    def __post_init__(self) -> None:
        if self.trainable and not self.is_llm_int8:
            raise ValueError(f"only LLM.int8() trains its weights, int8:row@int8:t6 for instance, not {self}")
        if self.activation is None or self.is_llm_int8:
            return
        if self.weight.codebook.bits > 4 or self.weight.offset or self.activation.threshold:
            raise ValueError(
                f"{self.weight} cannot be multiplied with activations in {self.activation}: int8 and int8:t6 "
                "take weights in int8:row, int8 and int8:g64 weights of up to 4 bits without offset; write "
                f"int8:row@{Activation(self.activation.threshold)}, or {self.weight} alone"
            )

    @property
    def is_llm_int8(self) -> bool:
        """Both sides in int8 with one scale a row: LLM.int8()."""
        rows = (self.weight.family, str(self.weight.group), self.weight.zero) == ("int8", "row", False)
        return self.activation is not None and rows and not self.activation.group

    def __str__(self) -> str:
        return f"{self.weight}@{self.activation}" if self.activation else str(self.weight)

    @staticmethod
    def parse(text: str | Format | Scheme) -> Scheme:
        """The Scheme that `text` spells; a Scheme passes through, a Format is a Scheme of its own."""
        if isinstance(text, Scheme):
            return text
        if isinstance(text, Format):
            return Scheme(text)
        weight, at, activation = text.partition("@")
        return Scheme(Format.parse(weight), Activation.parse(activation) if at else None)


@lru_cache(maxsize=4096)
def _parts(format: Format, shape: tuple[int, ...]) -> tuple[Part, ...]:
    return format._parts(shape)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """[rows, columns] of a tensor seen as a matrix: leading dimensions are rows; a scalar is 1 x 1."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) else (1, 1)


def packed_length(count: int, bits: int) -> int:
    """Bytes that hold `count` codes of `bits` bits."""
    return -(-count * bits // 8)


@lru_cache(maxsize=1024)
def _parse(text: str) -> Format:
    if not isinstance(text, str):
        raise TypeError(f"a format is a string such as 'nf4:g64', got {type(text).__name__}")
    name, *words = text.strip().split(":")
    if name not in _FAMILIES:
        near = difflib.get_close_matches(name, _FAMILIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown format {name!r} in {text!r}: {hint}Known: {', '.join(_FAMILIES)}")
    family = _FAMILIES[name]
    group, scale = family.group, family.scale
    if words and re.fullmatch(r"g\d+|row|tensor|b\d+x\d+", words[0]):
        group = _group(words.pop(0), name, family, text)
    if words and words[0] in (*SCALE_TYPES, "dq") and family.groups != "fixed":
        word = words.pop(0)
        scale = _DOUBLE_QUANT if word == "dq" else word
    zero = words[:1] == ["zero"] and CODEBOOKS[family.codebook].integer
    offset = words[zero : zero + 1] == ["offset"]
    rest = words[zero + offset :]
    if rest or (offset and family.groups != "flat"):
        wrong = rest[0] if rest else "offset"
        raise ValueError(
            f"cannot read {wrong!r} in {text!r}. Write {name}[:group][:scale][:zero][:offset], where group "
            f"is {_groups(family)}, scale is f32, f16, bf16 or dq, zero is for integers and offset for "
            "flat groups; mxfp4 and nvfp4 take none of them"
        )
    return Format(name, group, _parse(scale) if ":" in scale else scale, zero, offset)


def _group(word: str, name: str, family: _Family, text: str) -> Group:
    sizes = [int(digits) for digits in re.findall(r"\d+", word)]
    group = {"row": Group(1, 0), "tensor": Group(0, 0)}.get(word)
    if group is None:
        group = (
            Group(1, sizes[0], flat=family.groups == "flat") if word[0] == "g" else Group(sizes[0], sizes[1])
        )
    fits = {"flat": word[0] == "g", "grid": True, "fixed": group == family.group}[family.groups]
    too_odd = CODEBOOKS[family.codebook].bits < 8 and group.flat and group.columns % 2
    if not fits or any(not 1 <= size <= 2**24 for size in sizes) or too_odd or str(group) != word:
        raise ValueError(f"{name} cannot have groups {word!r} in {text!r}: write {_groups(family)}")
    return group


def _groups(family: _Family) -> str:
    return {
        "flat": f"g64 or another even group size (default {family.group})",
        "grid": f"g128 or another group size, row, tensor or b128x128 (default {family.group})",
        "fixed": f"{family.group} only",
    }[family.groups]
