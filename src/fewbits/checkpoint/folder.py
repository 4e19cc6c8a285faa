"""A model's folder: its config and the safetensors files that transformers would load.

`open_folder` makes every check that names, links, headers and the index allow, before a tensor is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint.safetensors import (
    TORCH_DTYPES,
    CheckpointError,
    Header,
    TensorInfo,
    open_regular,
    read_header,
    read_into,
    read_tensor,
    shown,
    unique_pairs,
)

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_MAX_CONFIG_BYTES = 10_000_000
_MAX_INDEX_BYTES = 200_000_000
_AGAIN = "get it again from its source"
_BLOCK_BYTES = 2**21  # large enough to read fast, small enough to stay in the cache until it is checked

# Per floating dtype: the integers its bits are viewed as, a mask that takes the sign off, and the first and
# last of the masked bits that are NaN or infinite.
_NOT_FINITE: dict[str, tuple[torch.dtype, int, int, int]] = {
    "F64": (torch.int64, 2**63 - 1, 0x7FF << 52, 2**63 - 1),
    "F32": (torch.int32, 2**31 - 1, 0xFF << 23, 2**31 - 1),
    "BF16": (torch.int16, 0x7FFF, 0x7F80, 0x7FFF),
    "F16": (torch.int16, 0x7FFF, 0x7C00, 0x7FFF),
    "F8_E5M2": (torch.uint8, 0x7F, 0x7C, 0x7F),
    "F8_E4M3": (torch.uint8, 0x7F, 0x7F, 0x7F),
    "F8_E8M0": (torch.uint8, 0xFF, 0xFF, 0xFF),
    "F8_E5M2FNUZ": (torch.uint8, 0xFF, 0x80, 0x80),
    "F8_E4M3FNUZ": (torch.uint8, 0xFF, 0x80, 0x80),
}


@dataclass(frozen=True)
class Folder:
    """A checked folder. headers: by file name; files: tensor name → file name. Safe to read from threads."""

    path: Path
    config: dict[str, Any]
    headers: Mapping[str, Header]
    files: Mapping[str, str]

    def info(self, name: str) -> TensorInfo:
        """What the header says of the tensor `name`."""
        return self.headers[self.files[name]].tensors[name]

    def read(self, name: str) -> Tensor:
        """The tensor `name`. CheckpointError when its file changed since it was opened, OSError when it is
        gone."""
        file = self.files[name]
        header = self.headers[file]
        with open_regular(header.path) as (fd, status):
            _check_unchanged(header, status)
            return read_tensor(fd, header.tensors[name], file)

    def check(self, name: str, advance: Callable[[int], object]) -> None:
        """`check_values` of one tensor."""
        check_values(self, [name], advance)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.info(name).nbytes for name in self.files)

    @property
    def first_dtype(self) -> torch.dtype | None:
        """That of the first floating tensor by name, which transformers takes where a config names none."""
        header = next(iter(self.headers.values()))
        dtypes = (TORCH_DTYPES.get(info.dtype) for _, info in sorted(header.tensors.items()))
        return next((one for one in dtypes if one is not None and one.is_floating_point), None)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The config's `quantization_config`, if it has one."""
        found: dict[str, Any] | None = self.config.get("quantization_config")
        return found


def open_folder(path: Path) -> Folder:
    """The model in the folder `path`, as transformers would find it: `model.safetensors`, else the shards of
    `model.safetensors.index.json`.

    CheckpointError for weights that are no safetensors or whose headers, index or links are not sound;
    FileNotFoundError or NotADirectoryError when there is no such folder.
    """
    check_is_folder(path)
    config = read_config(path)
    names, index = weight_files(path)
    headers = {name: read_header(checked_file(path, name)) for name in names}
    problems = list(inventory_problems(headers, index))
    if problems:
        more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
        raise CheckpointError(problems[0] + more)
    files = {tensor: name for name, header in headers.items() for tensor in header.tensors}
    return Folder(path, config, headers, files)


def check_is_folder(path: Path) -> None:
    """FileNotFoundError or NotADirectoryError unless `path` is a folder."""
    if not path.exists():
        raise FileNotFoundError(f"there is no folder {path}; name the folder of a model")
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; name the folder of a model, with its {CONFIG}")


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of the folder `path`."""
    if not (path / CONFIG).exists():
        raise CheckpointError(f"{shown(str(path))} has no {CONFIG}; name the folder of a model")
    config = read_json(path, CONFIG, _MAX_CONFIG_BYTES)
    if not isinstance(config.get("quantization_config", {}), dict | None):
        raise CheckpointError(f"{CONFIG}: quantization_config is no JSON object; {_AGAIN}")
    return config


def weight_files(path: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files in the folder `path`, and the index's tensor → file name if it has one."""
    if (path / SINGLE).exists() or (path / SINGLE).is_symlink():
        return [SINGLE], None
    if not (path / INDEX).exists():
        raise CheckpointError(_why_no_weights(path))
    index = read_json(path, INDEX, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(index, dict) or not index or not all(type(name) is str for name in index.values()):
        raise CheckpointError(f"{INDEX}: weight_map does not map tensors to file names; {_AGAIN}")
    names = sorted(set(index.values()))
    for name in names:
        check_file_name(name, INDEX)
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} weight files are missing: {some(missing)}; get them from the "
            "model's source"
        )
    return names, index


def inventory_problems(headers: Mapping[str, Header], index: Mapping[str, str] | None) -> Iterator[str]:
    """Where the tensors in the files and those in the index differ, one sentence each."""
    found: dict[str, str] = {}
    for file, header in headers.items():
        for tensor in header.tensors:
            if tensor in found:
                yield f"tensor {shown(tensor)} is in {found[tensor]} and again in {file}; {_AGAIN}"
            found.setdefault(tensor, file)
    if index is None:
        return
    for tensor, file in index.items():
        if tensor not in headers[file].tensors:
            yield f"{file} lacks tensor {shown(tensor)}, which {INDEX} puts there; {_AGAIN}"
    for tensor in [tensor for tensor in found if tensor not in index]:
        yield f"{found[tensor]}, tensor {shown(tensor)}: {INDEX} does not name it; {_AGAIN}"


def check_file_name(name: str, where: str) -> None:
    """CheckpointError unless `name`, which the file `where` gives, can only be a file of the same folder."""
    outside = ".." in name or any(mark in name for mark in "/\\:")
    if outside or not name.isprintable() or not name.endswith(".safetensors"):
        raise CheckpointError(
            f"{where} names the file {shown(name)}; only .safetensors files of the folder itself are read, "
            "without a path"
        )


def checked_file(folder: Path, name: str) -> Path:
    """The path of the file `name` of `folder`. CheckpointError for a link to nothing or out of the folder.

    Links to the blobs of the same model in the hub's cache are fine: models--*/snapshots/* → models--*/blobs.
    """
    path = folder / name
    if not path.is_symlink():
        return path
    try:
        target, root = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError):
        raise CheckpointError(f"{name} is a link to nothing; {_AGAIN}") from None
    model = root.parent.parent
    in_cache = root.parent.name == "snapshots" and model.name.startswith("models--")
    if root not in target.parents and not (in_cache and target.parent == model / "blobs"):
        raise CheckpointError(f"{name} is a link out of its folder; put the file itself in its place")
    return path


def read_text(folder: Path, name: str, most_bytes: int) -> str:
    """The UTF-8 text in the file `name` of `folder`; CheckpointError if it is none or over `most_bytes`."""
    with open_regular(checked_file(folder, name)) as (fd, status):
        size = status.st_size
        if size > most_bytes:
            raise CheckpointError(f"{name} has {size} bytes, over the limit of {most_bytes}; {_AGAIN}")
        text = bytearray(size)
        read_into(fd, memoryview(text), 0, name)
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{name} is not UTF-8 text ({error.reason}); {_AGAIN}") from None


def read_json(folder: Path, name: str, most_bytes: int) -> dict[str, Any]:
    """The JSON object in the file `name` of `folder`; CheckpointError if it is none or over `most_bytes`."""
    text = read_text(folder, name, most_bytes)
    try:
        found = json.loads(text, object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} cannot be read as JSON ({error}); {_AGAIN}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{name} is no JSON object; {_AGAIN}")
    return found


def some(names: Iterable[str], most: int = 5) -> str:
    """The first few of `names`, and how many more there are."""
    listed = [shown(name) for name in names]
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


def check_values(folder: Folder, names: Iterable[str], advance: Callable[[int], object]) -> None:
    """Read the tensors `names` once, a small block at a time, and check that they are finite.

    Integer and complex tensors are passed by. `advance` is told the bytes of every block. CheckpointError
    names the first tensor with NaN or infinite elements, where the first of them is and how many there are.
    """
    buffer = torch.empty(_BLOCK_BYTES, dtype=torch.uint8)
    for name in names:
        info, file = folder.info(name), folder.files[name]
        if info.dtype not in _NOT_FINITE:
            advance(info.nbytes)
            continue
        header = folder.headers[file]
        with open_regular(header.path) as (fd, status):
            _check_unchanged(header, status)
            first, count = _find_not_finite(fd, info, file, buffer, advance)
        if count:
            raise CheckpointError(
                f"{file}, tensor {shown(name)}: {count} of {info.count} values are NaN or infinite, the "
                f"first at flat index {first}; {_AGAIN}"
            )


def _find_not_finite(
    fd: int, info: TensorInfo, file: str, buffer: Tensor, advance: Callable[[int], object]
) -> tuple[int, int]:
    """(flat index of the first, number) of the values of a tensor that are not finite."""
    view, mask, low, high = _NOT_FINITE[info.dtype]
    first, found = -1, 0
    for start in range(info.start, info.end, _BLOCK_BYTES):
        raw = buffer[: min(_BLOCK_BYTES, info.end - start)]
        read_into(fd, raw.numpy().data, start, f"{file}, tensor {shown(info.name)}")
        bits = raw.view(view).bitwise_and_(mask)
        if bits.max() >= low:
            places = ((bits >= low) & (bits <= high)).nonzero().flatten()
            if not found and len(places):
                first = (start - info.start) // view.itemsize + int(places[0])
            found += len(places)
        advance(len(raw))
    return first, found


def _check_unchanged(header: Header, status: os.stat_result) -> None:
    if (status.st_size, status.st_mtime_ns) != (header.size, header.modified):
        raise CheckpointError(f"{header.path.name} changed while it was in use; start again")


def _why_no_weights(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    others = [name for name in names if name.endswith(".safetensors")]
    pickled = [name for name in names if name.endswith(_PICKLED)]
    where = shown(str(path))
    if others:
        return f"{where} has no {SINGLE}; transformers loads no {some(others)}: rename it, or add {INDEX}"
    if pickled:
        return (
            f"{where} holds only pickle weights ({some(pickled)}), which can run code when read; where you "
            "trust them, load the model once with transformers and save_pretrained it, which writes "
            f"{SINGLE}"
        )
    return f"{where} has no weights: neither {SINGLE} nor {INDEX}; {_AGAIN}"
