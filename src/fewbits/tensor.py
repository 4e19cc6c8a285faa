"""A quantized weight: plain tensors and the Format that gives them meaning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.format import Format, Part

# Names of element types in formats, and torch's.
DTYPES: dict[str, torch.dtype] = {
    "u8": torch.uint8,
    "i8": torch.int8,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
}


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor of `shape` stored in `format`.

    codes   packed codes (see `Format.parts` for shapes and dtypes of all of them)
    scale   one per group; itself a QuantizedTensor under double quantization and in NVFP4
    zero    packed integer zero points, or None
    offset  float32 [1], added to every weight, or None
    dtype   of the tensor that was quantized; what `dequantize` returns by default

    Everything is a plain tensor: nothing here is a tensor subclass, and nothing hides in attributes.
    """

    codes: Tensor
    scale: Tensor | QuantizedTensor
    format: Format
    shape: torch.Size
    zero: Tensor | None = None
    offset: Tensor | None = None
    dtype: torch.dtype = torch.float32

    def parts(self) -> dict[str, Tensor]:
        """The stored tensors by name, in the order of `Format.parts`."""
        found: dict[str, Tensor] = {"codes": self.codes}
        if isinstance(self.scale, QuantizedTensor):
            found |= {f"scale.{name}": part for name, part in self.scale.parts().items()}
        else:
            found["scale"] = self.scale
        found |= {"zero": self.zero} if self.zero is not None else {}
        return found | ({"offset": self.offset} if self.offset is not None else {})

    @staticmethod
    def from_parts(
        parts: Mapping[str, Tensor] | Iterable[Tensor],
        format: Format | str,
        shape: Iterable[int],
        dtype: torch.dtype = torch.float32,
        name: str = "tensor",
    ) -> QuantizedTensor:
        """Put stored tensors together, by name or in the order of `Format.parts`; no copy.

        ValueError when a part is missing, unknown, or has another shape or dtype than the format says;
        the message names `name`.
        """
        format, size = Format.parse(format), torch.Size(shape)
        wanted = format.parts(size)
        if isinstance(parts, Mapping):
            _check_names(parts, wanted, format, name)
            given = [parts[part.name] for part in wanted]
        else:
            given = list(parts)
        if len(given) != len(wanted):
            raise ValueError(
                f"{name}: {format} is stored in {len(wanted)} tensors, "
                f"{', '.join(part.name for part in wanted)}; got {len(given)}"
            )
        for part, stored in zip(wanted, given, strict=True):
            if tuple(stored.shape) != part.shape or stored.dtype != DTYPES[part.dtype]:
                raise ValueError(
                    f"{name}: {part.name} of a {list(size)} weight in {format} is "
                    f"{DTYPES[part.dtype]} {list(part.shape)}; got {stored.dtype} {list(stored.shape)}"
                )
        return _assemble(iter(given), format, size, dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights, [*shape], in `dtype` (default: that of the tensor that was quantized).

        Computed in float32 and rounded once.
        """
        decoded: Tensor = torch.ops.fewbits.dequantize(
            list(self.parts().values()), str(self.format), self.shape, dtype or self.dtype
        )
        return decoded

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same on another device."""
        moved = {name: part.to(device) for name, part in self.parts().items()}
        return QuantizedTensor.from_parts(moved, self.format, self.shape, self.dtype)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(part.nbytes for part in self.parts().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and padding included (0 when empty)."""
        return 8 * self.nbytes / math.prod(self.shape) if math.prod(self.shape) else 0.0

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor({self.format}, shape={list(self.shape)}, {self.bits_per_weight:.3f} bits per "
            f"weight, dtype={self.dtype}, device={self.device})"
        )

    def __eq__(self, other: object) -> bool:
        """Equal format, shape, dtype and stored bits."""
        if not isinstance(other, QuantizedTensor):
            return NotImplemented
        mine, others = self.parts(), other.parts()
        same = (self.format, self.shape, self.dtype) == (other.format, other.shape, other.dtype)
        return same and all(torch.equal(mine[name], others[name]) for name in mine)

    __hash__ = None  # type: ignore[assignment]


def _check_names(parts: Mapping[str, Tensor], wanted: tuple[Part, ...], format: Format, name: str) -> None:
    names = {part.name for part in wanted}
    missing, unknown = names - set(parts), set(parts) - names
    if missing or unknown:
        problem = (
            f"missing {', '.join(sorted(missing))}" if missing else f"unknown {', '.join(sorted(unknown))}"
        )
        raise ValueError(f"{name}: {format} is stored in {', '.join(sorted(names))}; {problem}")


def _assemble(
    given: Iterable[Tensor], format: Format, shape: torch.Size, dtype: torch.dtype
) -> QuantizedTensor:
    """Tensors in part order → QuantizedTensor; a nested scale takes its own parts from the same stream."""
    stream = iter(given)
    codes = next(stream)
    scale: Tensor | QuantizedTensor
    if isinstance(format.scale, Format):
        grid = torch.Size(format.group.grid(shape))
        scale = _assemble(stream, format.scale, grid, torch.float32)
    else:
        scale = next(stream)
    zero = next(stream) if format.zero else None
    offset = next(stream) if format.offset else None
    return QuantizedTensor(codes, scale, format, shape, zero, offset, dtype)
