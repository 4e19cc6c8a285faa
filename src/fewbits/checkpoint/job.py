"""Rewriting a checkpoint file by file, in bounded memory, by one process or many, interrupted or not.

A job is a list of shards, each a list of units: tensors that are read together and become tensors that are
written together. Sizes are known before anything is read, so a shard's header is written first and every
tensor goes to its place as soon as it is made. The division into shards depends on nothing but the units, so
that any number of workers gives the same bytes.

On disk, beside the folder OUT that the job makes:

    OUT.partial/                     becomes OUT by a rename when all is done
    OUT.partial/model-….safetensors  a finished shard, whole and synced
    OUT.partial/.job/job.json        what the job is: a worker with another one is refused
    OUT.partial/.job/….part          a shard being written
    OUT.partial/.job/….json          the record of a finished shard: hash, source, notes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbits.checkpoint.folder import Folder
from fewbits.checkpoint.safetensors import TensorInfo, layout

WEIGHTS = "model"  # the stem of transformers' file names
METADATA = {"format": "pt"}


Spec = tuple[str, tuple[int, ...]]  # safetensors dtype, shape
Advance = Callable[[int], None]  # called with bytes of the source that are done


@dataclass(frozen=True)
class Made:
    """What a unit became: tensor name → tensor; and per quantized weight the sums of squares of its error and
    of its values, ‖W - decode(W)‖² and ‖W‖²."""

    tensors: Mapping[str, Tensor]
    squares: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Unit:
    """Tensors of the source that are read together, and what is written of them.

    sources: their names; outputs: name → (safetensors dtype, shape) in the new files; open: the names among
    them whose length is known only when they are made, and at most what their shape says; make: does the
    work, which must depend on nothing else; cost: bytes of memory that it takes at most; piece: (i, n) when
    only the i-th of n equal parts of each output, along the first dimension, is made. The units of the other
    parts have the same outputs and follow.
    """

    sources: tuple[str, ...]
    outputs: Mapping[str, Spec]
    make: Callable[[Mapping[str, Tensor]], Made]
    cost: int
    open: frozenset[str] = frozenset()
    piece: tuple[int, int] = (0, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs, at most."""
        return sum(info.nbytes for info in layout(self.outputs, {})[1].values())


@dataclass(frozen=True)
class Shard:
    """One file to write: its name and units, and where each tensor goes.

    Tensors of open length come last, one behind the other, and the header has room for any length of theirs.
    """

    name: str
    units: tuple[Unit, ...]

    @property
    def places(self) -> dict[str, TensorInfo]:
        """Tensor name → place in the file; for those of open length, with the greatest."""
        return self._longest[1]

    @property
    def size(self) -> int:
        """Bytes of the file, at most."""
        header, places = self._longest
        return max((info.end for info in places.values()), default=len(header))

    def layout(self, lengths: Mapping[str, int]) -> tuple[bytes, dict[str, TensorInfo]]:
        """The header, and the place of each tensor, when those of open length have `lengths` (in
        elements)."""
        outputs = self._outputs()
        outputs |= {name: (outputs[name][0], (length,)) for name, length in lengths.items()}
        return layout(outputs, METADATA, self._open, len(self._longest[0]))

    @cached_property
    def _longest(self) -> tuple[bytes, dict[str, TensorInfo]]:
        return layout(self._outputs(), METADATA, self._open)

    @cached_property
    def _open(self) -> frozenset[str]:
        return frozenset(name for unit in self.units for name in unit.open)

    def _outputs(self) -> dict[str, Spec]:
        return {name: spec for unit in self.units for name, spec in unit.outputs.items()}


@dataclass(frozen=True)
class Job:
    """A checkpoint to be rewritten: from `source`, by `shards`, to the folder `out`, which does not exist
    yet.

    identity: JSON values that say what the job is; all who work on it must agree on them.
    texts, copies: further files of the result: name → content, name → file to copy.
    """

    source: Folder
    out: Path
    shards: tuple[Shard, ...]
    identity: Mapping[str, Any]
    texts: Mapping[str, str]
    copies: Mapping[str, Path]

    @property
    def partial(self) -> Path:
        return partial_folder(self.out)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)


def partial_folder(out: Path) -> Path:
    """Where the job that makes `out` keeps what is done so far."""
    return out.with_name(f"{out.name}.partial")


def split(units: Sequence[Unit], max_bytes: int) -> tuple[Shard, ...]:
    """Shards of at most `max_bytes` of tensors, units in order; a larger unit has a shard of its own."""
    parts: list[list[Unit]] = [[]]
    filled = 0
    for unit in units:
        nbytes = 0 if unit.piece[0] else unit.nbytes  # further pieces belong to the first
        if parts[-1] and nbytes and filled + nbytes > max_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(unit)
        filled += nbytes
    shards = []
    for number, part in enumerate(parts, start=1):
        suffix = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        shards.append(Shard(f"{WEIGHTS}{suffix}.safetensors", tuple(part)))
    return tuple(shards)
