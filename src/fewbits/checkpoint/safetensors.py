"""The safetensors container: its header read and checked, its tensors read, its layout for writing.

A file is the header's length (8 bytes, little endian), the header (a JSON object: tensor name → dtype, shape,
data_offsets; `__metadata__` → strings), and the tensors' bytes without gaps.

Files are foreign, so everything in a header is checked before it is used. Tensors are read with pread and
not through a mapping: a file that is cut off under a mapping kills the process (SIGBUS), and mapped pages
count as resident memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A file that cannot be trusted or read; the message names the file, the tensor and the mend."""


# Bits of an element, by the format's names. In this order files hold their tensors: larger alignment first.
ELEMENT_BITS: dict[str, int] = {
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F32": 32,
    "U32": 32,
    "I32": 32,
    "BF16": 16,
    "F16": 16,
    "U16": 16,
    "I16": 16,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I8": 8,
    "U8": 8,
    "F6_E3M2": 6,
    "F6_E2M3": 6,
    "F4": 4,
    "BOOL": 8,
}
# Those that torch has. It packs F4 two to an element and has no F6, so these are sized but never read.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_ENTRIES = 2**20
MAX_DIMENSIONS = 64  # as torch
MAX_SIZE = 2**60  # of a dimension and of a whole tensor, in elements
_READ_BYTES = 2**30  # per call; systems read less than 2 GiB at once
_AGAIN = "the file is damaged or was not made by safetensors; get it again from its source"
# Per header, before it is parsed: parsing must not take much more memory than a header of MAX_ENTRIES does.
_MAX_MARKS = {"{": MAX_ENTRIES + 2, "[": 2 * MAX_ENTRIES, ",": 8 * MAX_ENTRIES}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. start, end: its bytes, counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A checked header. tensors: by name, in the order of their bytes; size: bytes of the whole file;
    modified: when the file last changed, in ns; digest: SHA-256 of the header with its length, as hex."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    size: int
    modified: int
    digest: str


def shown(name: str) -> str:
    """A foreign name as messages show it: of bounded length, and without terminal control characters."""
    short = name if len(name) <= 200 else f"{name[:200]}…"
    return short if short and short.isprintable() else ascii(short)


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """(descriptor, status) of a regular file, open for reading.

    CheckpointError for a folder, pipe, device and the like, which are not opened at all; OSError for a file
    that is missing or may not be read.
    """
    _check_regular(os.stat(path), path)
    # A file that becomes a link or a pipe in between is not followed and does not block.
    follow = 0 if path.is_symlink() else os.O_NOFOLLOW
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | follow)
    try:
        found = os.fstat(fd)
        _check_regular(found, path)
        yield fd, found
    finally:
        os.close(fd)


def _check_regular(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{shown(path.name)} is not a regular file; put the file itself in its place")


def read_into(fd: int, buffer: memoryview, offset: int, what: str) -> None:
    """Fill `buffer` with the bytes from `offset`; CheckpointError, naming `what`, if the file ends first."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done : done + _READ_BYTES]], offset + done)
        if not count:
            raise CheckpointError(
                f"{what}: the file ends {len(buffer) - done} bytes too early; it was cut off while being "
                "read, get it again from its source"
            )
        done += count


def read_tensor(fd: int, info: TensorInfo, file: str = "the file") -> Tensor:
    """The tensor that `info` describes, in memory of its own. CheckpointError when the file ends before it
    does, or when torch has no such dtype; `file` is what the message calls the file."""
    what = f"{shown(file)}, tensor {shown(info.name)}"
    if info.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"{what}: torch has no {info.dtype}; store the tensor in another dtype")
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    read_into(fd, raw.numpy().data, info.start, what)
    return raw.view(TORCH_DTYPES[info.dtype]).view(info.shape)


def read_header(path: Path) -> Header:
    """The header of the file at `path`; reads nothing else of it.

    CheckpointError for anything the format forbids, and for a file shorter or longer than its header says.
    """
    where = shown(path.name)
    with open_regular(path) as (fd, status):
        size = status.st_size
        if size < 8:
            raise CheckpointError(f"{where} has {size} bytes, too few for a header; {_AGAIN}")
        prefix = bytearray(8)
        read_into(fd, memoryview(prefix), 0, where)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{where}: a header of {length} bytes is over the limit of 100 MB; {_AGAIN}"
            )
        if length > size - 8:
            raise CheckpointError(
                f"{where}: the header takes {length} bytes and the file has {size - 8} after its length; "
                f"{_AGAIN}"
            )
        text = bytearray(length)
        read_into(fd, memoryview(text), 8, where)
    entries = _parse(text, where)
    metadata = _metadata(entries.pop("__metadata__", {}), where)
    found = [_tensor(name, entry, 8 + length, where) for name, entry in entries.items()]
    tensors = sorted(found, key=lambda info: (info.start, info.end))
    _check_coverage(tensors, 8 + length, size, where)
    digest = hashlib.sha256(prefix)
    digest.update(text)
    return Header(
        path,
        {info.name: info for info in tensors},
        metadata,
        size,
        status.st_mtime_ns,
        digest.hexdigest(),
    )


def layout(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    last: Container[str] = (),
    header_size: int = 0,
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header's bytes, its length included, and where each tensor of (dtype, shape) goes, in file order.

    They are what safetensors' `save_file` writes, but that the tensors named in `last` go behind all others,
    and that the header is padded to `header_size` bytes if it is shorter. `metadata` goes in by sorted key;
    empty, it is left out. ValueError for an unknown dtype and for a header over the format's limit.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(ELEMENT_BITS)}
    if unknown := {dtype for dtype, _ in tensors.values()} - set(ranks):
        raise ValueError(f"safetensors files have no dtype {min(unknown)}; known: {', '.join(ranks)}")
    order = sorted(tensors, key=lambda name: (name in last, ranks[tensors[name][0]], name))
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    ends, end = {}, 0
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + _nbytes(dtype, shape)
        ends[name] = (start, end)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * max(-len(text) % 8, header_size - 8 - len(text))
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"a header of {len(text)} bytes is over the limit of 100 MB; write more, smaller files"
        )
    base = 8 + len(text)
    places = {
        name: TensorInfo(name, *tensors[name], base + start, base + end)
        for name, (start, end) in ends.items()
    }
    return len(text).to_bytes(8, "little") + text, places


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object that has no name twice. ValueError otherwise."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {shown(name)} stands twice in one object")
    return found


def _parse(text: bytearray, where: str) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise CheckpointError(f"{where}: the header does not begin with a brace; {_AGAIN}")
    try:
        characters = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: the header is not UTF-8 ({error.reason}); {_AGAIN}") from None
    if any(characters.count(mark) > most for mark, most in _MAX_MARKS.items()):
        raise CheckpointError(f"{where}: the header has more than {MAX_ENTRIES} entries; {_AGAIN}")
    try:
        entries = json.loads(characters, object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: the header cannot be read as JSON ({error}); {_AGAIN}") from None
    assert isinstance(entries, dict)  # it begins with a brace
    if len(entries) > MAX_ENTRIES:
        raise CheckpointError(f"{where}: the header has more than {MAX_ENTRIES} entries; {_AGAIN}")
    return entries


def _metadata(found: object, where: str) -> dict[str, str]:
    if not isinstance(found, dict) or not all(_is_text(part) for pair in found.items() for part in pair):
        raise CheckpointError(f"{where}: __metadata__ does not map names to texts; {_AGAIN}")
    return found


def _tensor(name: str, entry: object, base: int, where: str) -> TensorInfo:
    """An entry of the header, checked on its own. base: where in the file the tensors' bytes begin."""
    what = f"{where}, tensor {shown(name)}"
    if not name or not _is_text(name):
        raise CheckpointError(f"{what}: a tensor's name must be UTF-8 text that is not empty; {_AGAIN}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what}: the entry must be exactly dtype, shape and data_offsets; {_AGAIN}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BITS:
        raise CheckpointError(
            f"{what}: the dtype {reprlib.repr(dtype)} is unknown; known: {', '.join(ELEMENT_BITS)}"
        )
    if not _are_sizes(shape) or math.prod(size or 1 for size in shape) >= MAX_SIZE:
        raise CheckpointError(
            f"{what}: the shape {reprlib.repr(shape)} is no list of at most {MAX_DIMENSIONS} sizes with "
            f"under 2**60 elements; {_AGAIN}"
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{what}: data_offsets {reprlib.repr(offsets)} are no range; {_AGAIN}")
    bits, given = math.prod(shape) * ELEMENT_BITS[dtype], offsets[1] - offsets[0]
    if bits != 8 * given:
        raise CheckpointError(
            f"{what}: {dtype} {shape} takes {bits / 8:g} bytes, data_offsets give it {given}; {_AGAIN}"
        )
    return TensorInfo(name, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _are_sizes(values: object) -> bool:
    if not isinstance(values, list) or len(values) > MAX_DIMENSIONS:
        return False
    # type, not isinstance: true is no size.
    return all(type(size) is int and 0 <= size < MAX_SIZE for size in values)


def _is_text(value: object) -> bool:
    """Whether it is a str that UTF-8 can hold: JSON's escapes can spell half a character."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return isinstance(value, str)


def _check_coverage(tensors: list[TensorInfo], base: int, size: int, where: str) -> None:
    """Tensors in file order must follow each other without gap or overlap, up to the end of the file."""
    end = base
    for info in tensors:
        if info.start != end:
            kind = "overlaps the one before" if info.start < end else "leaves a gap before it"
            raise CheckpointError(
                f"{where}, tensor {shown(info.name)}: {kind}, it starts at byte {info.start} and not at "
                f"{end}; {_AGAIN}"
            )
        end = info.end
    if size < end:
        raise CheckpointError(
            f"{where} is cut off: {end - size} of {end} bytes are missing; get it again from its source"
        )
    if size > end:
        raise CheckpointError(f"{where} has {size - end} bytes more than its header says; {_AGAIN}")


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    bits = math.prod(shape) * ELEMENT_BITS[dtype]
    if bits % 8:
        raise ValueError(f"{dtype} {list(shape)} does not fill whole bytes")
    return bits // 8
