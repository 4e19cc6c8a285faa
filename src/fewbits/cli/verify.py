"""`fewbits verify`: whether a checkpoint is whole, sound and unchanged."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fewbits.checkpoint.finish import HASHES
from fewbits.checkpoint.folder import (
    CONFIG,
    Folder,
    check_values,
    checked_file,
    inventory_problems,
    read_config,
    read_text,
    weight_files,
)
from fewbits.checkpoint.safetensors import CheckpointError, Header, open_regular, read_header, shown
from fewbits.checkpoint.stored import StoredWeight, read_weight, stored_weights
from fewbits.cli.common import (
    AsJson,
    FailedCheckError,
    Quiet,
    byte_progress,
    find_model,
    format_bytes,
    print_json,
    results,
)
from fewbits.tensor import QuantizedTensor

Advance = Callable[[int], None]

_MAX_HASHES_BYTES = 10_000_000
_HASH_BLOCK = 2**22  # bytes
_MOST_SHOWN = 20  # problems of one check


@dataclass
class Check:
    """One line of the checklist. ok: None where there was nothing to check, or no way to."""

    name: str
    ok: bool | None
    detail: str


@dataclass
class Checklist:
    """Checks in the order they were made."""

    checks: list[Check] = field(default_factory=list)

    def add(self, name: str, problems: Iterable[str], covered: str) -> bool:
        """Note a check that found `problems`, or none: then `covered` says what it covered."""
        found = list(problems)
        lines = found[:_MOST_SHOWN]
        lines += [f"and {len(found) - _MOST_SHOWN} more"] if len(found) > _MOST_SHOWN else []
        self.checks.append(Check(name, not found, "\n".join(lines) or covered))
        return not found

    def skip(self, name: str, why: str) -> None:
        """Note a check that was not made."""
        self.checks.append(Check(name, None, why))

    @property
    def failed(self) -> list[str]:
        return [check.name for check in self.checks if check.ok is False]


def verify(
    path: Annotated[str, typer.Argument(help="Folder of a model, or a model id of the hub.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check that a checkpoint is whole and sound: files, headers, hashes, values, codes, scales.

    Reads all of it, one weight at a time, and lists all that is wrong; then the
    exit code is 1. Hashes are compared where the folder has a SHA256SUMS, which
    fewbits quantize writes.

    Example: fewbits verify demo/model
    """
    folder = find_model(path)
    with byte_progress(quiet) as progress:
        checklist = check_folder(folder, progress)
    if as_json:
        checks = [asdict(check) for check in checklist.checks]
        print_json({"path": str(folder), "ok": not checklist.failed, "checks": checks})
    else:
        _show(folder, checklist)
    if checklist.failed:
        failed = ", ".join(checklist.failed)
        raise FailedCheckError(f"{len(checklist.failed)} of {len(checklist.checks)} checks: {failed}")


def check_folder(path: Path, progress: Progress) -> Checklist:
    """All checks of the folder `path`. A check that needs what an earlier one failed to give is skipped."""
    checklist = Checklist()
    folder = _check_structure(path, checklist)
    _check_hashes(path, checklist, progress)
    if folder is None:
        checklist.skip("parts", "not checked, as the files are not sound")
    weights = _check_parts(folder, checklist) if folder is not None else None
    if folder is None or weights is None:
        for name in ("values", "codes and scales"):
            checklist.skip(name, "not checked, as it is not known what the tensors are")
        return checklist
    _check_values(folder, weights, checklist, progress)
    _check_codes(folder, weights, checklist, progress)
    return checklist


@contextmanager
def _task(progress: Progress, name: str, nbytes: int) -> Iterator[Advance]:
    """A bar for the time of the block, up to `nbytes`."""
    task = progress.add_task(name, total=nbytes)
    yield lambda nbytes: progress.advance(task, nbytes)
    progress.remove_task(task)


@contextmanager
def _noted_in(problems: list[str]) -> Iterator[None]:
    """What the block raises about a file goes to `problems`."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:  # RuntimeError: casts that torch has not
        problems.append(" ".join(str(error).split()))


# --- structure --------------------------------------------------------------------------------------


def _check_structure(path: Path, checklist: Checklist) -> Folder | None:
    """Config, files, headers and index; the folder, if they are sound."""
    config: dict[str, Any] = {}
    problems: list[str] = []
    with _noted_in(problems):
        config = read_config(path)
    sound = checklist.add("config", problems, f"{CONFIG} can be read")
    files = _check_files(path, checklist)
    if files is None:
        for name in ("headers", "tensors"):
            checklist.skip(name, "not checked, as the files are not all there")
        return None
    headers = _check_headers(path, files[0], checklist)
    if headers is None:
        checklist.skip("tensors", "not checked, as not all headers are sound")
        return None
    covered = "each in one file" + (", as the index says" if files[1] is not None else "")
    if not checklist.add("tensors", inventory_problems(headers, files[1]), covered) or not sound:
        return None
    return Folder(
        path, config, headers, {tensor: name for name in headers for tensor in headers[name].tensors}
    )


def _check_files(path: Path, checklist: Checklist) -> tuple[list[str], dict[str, str] | None] | None:
    """Names of the weight files and the index, if all are there."""
    names: list[str] = []
    index: dict[str, str] | None = None
    problems: list[str] = []
    with _noted_in(problems):
        names, index = weight_files(path)
    for name in names:
        with _noted_in(problems):
            checked_file(path, name)
    number = "1 weight file" if len(names) == 1 else f"{len(names)} weight files"
    return (names, index) if checklist.add("files", problems, f"{number}, in the folder itself") else None


def _check_headers(path: Path, names: Sequence[str], checklist: Checklist) -> dict[str, Header] | None:
    """The headers by file name, if all are sound."""
    headers: dict[str, Header] = {}
    problems: list[str] = []
    for name in names:
        with _noted_in(problems):
            headers[name] = read_header(path / name)
    tensors = sum(len(header.tensors) for header in headers.values())
    size = format_bytes(sum(header.size for header in headers.values()))
    covered = f"{tensors} tensors fill {size} without gap or overlap"
    return headers if checklist.add("headers", problems, covered) else None


# --- hashes -----------------------------------------------------------------------------------------


def _check_hashes(path: Path, checklist: Checklist, progress: Progress) -> None:
    if not (path / HASHES).exists():
        checklist.skip("hashes", f"the folder has no {HASHES} to compare with")
        return
    listed: dict[str, str] = {}
    problems: list[str] = []
    with _noted_in(problems):
        listed = _listed_hashes(path)
        weights = sorted(entry.name for entry in path.glob("*.safetensors"))
        problems += [f"{HASHES} does not list {shown(name)}" for name in weights if name not in listed]
    total = sum((path / name).stat().st_size for name in listed if (path / name).is_file())
    with _task(progress, "hashes", total) as advance:
        for name, digest in listed.items():
            with _noted_in(problems):
                _check_hash(path, name, digest, advance)
    checklist.add("hashes", problems, f"{len(listed)} files are as {HASHES} says")


def _listed_hashes(path: Path) -> dict[str, str]:
    """File name → SHA-256 in hex, as the folder's SHA256SUMS lists them. CheckpointError for any odd line."""
    listed: dict[str, str] = {}
    for number, line in enumerate(read_text(path, HASHES, _MAX_HASHES_BYTES).splitlines(), 1):
        found = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        name = found[2] if found else ""
        if found is None or ".." in name or re.search(r"[/\\:]", name) or not name.isprintable():
            raise CheckpointError(
                f"{HASHES}, line {number}: {shown(line)} is no hash and name of a file of this folder; "
                "make it again with sha256sum"
            )
        if name in listed:
            raise CheckpointError(f"{HASHES}, line {number}: {name} stands there twice; make it again")
        listed[name] = found[1]
    return listed


def _check_hash(path: Path, name: str, wanted: str, advance: Advance) -> None:
    """CheckpointError unless the file `name` is there and has the hash `wanted`."""
    if not (path / name).exists():
        raise CheckpointError(f"{name} is missing; {HASHES} lists it")
    digest = hashlib.sha256()
    with open_regular(checked_file(path, name)) as (fd, _), open(fd, "rb", closefd=False) as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
            advance(len(block))
    if digest.hexdigest() != wanted:
        raise CheckpointError(
            f"{name} has another SHA-256 than {HASHES} lists; it was changed or damaged, get it again"
        )


# --- tensors ----------------------------------------------------------------------------------------


def _check_parts(folder: Folder, checklist: Checklist) -> tuple[StoredWeight, ...] | None:
    """The weights, if config and side file tell what they are."""
    try:
        weights = stored_weights(folder)
    except (CheckpointError, OSError) as error:
        checklist.add("parts", [str(error)], "")
        return None
    quantized = [weight for weight in weights if weight.quantized]
    whole = f"{len(quantized)} of them quantized, with all their parts" if quantized else "none quantized"
    covered = f"{len(weights)} weights, {whole}"
    checklist.add("parts", [weight.problem for weight in weights if weight.problem], covered)
    return weights


def _check_values(
    folder: Folder, weights: Sequence[StoredWeight], checklist: Checklist, progress: Progress
) -> None:
    # Codes held as a floating dtype can spell NaN; they are no values.
    own = [weight.parts for weight in weights if weight.schema in ("bitsandbytes", "fewbits")]
    codes = {parts.get(part) for parts in own for part in ("codes", "weight")}
    names = [name for name in folder.files if name not in codes]
    problems: list[str] = []
    with _task(progress, "values", sum(folder.info(name).nbytes for name in names)) as advance:
        for name in names:
            with _noted_in(problems):
                check_values(folder, [name], advance)
    checklist.add("values", problems, f"{len(names)} tensors hold no NaN and no infinity")


def _check_codes(
    folder: Folder, weights: Sequence[StoredWeight], checklist: Checklist, progress: Progress
) -> None:
    quantized = [weight for weight in weights if weight.quantized]
    decoded = [weight for weight in quantized if weight.format is not None]
    problems: list[str] = []
    with _task(progress, "codes and scales", sum(weight.nbytes for weight in decoded)) as advance:
        for weight in decoded:
            with _noted_in(problems):
                problems += _weight_problems(folder, weight)
            advance(weight.nbytes)
    if not quantized:
        checklist.skip("codes and scales", "no weight is quantized")
    elif not decoded:
        checklist.skip("codes and scales", "fewbits does not decode what this method writes")
    else:
        formats = ", ".join(sorted({weight.stored for weight in decoded}))
        covered = f"{len(decoded)} weights in {formats}: codes, scales, offsets in range"
        checklist.add("codes and scales", problems, covered)


def _weight_problems(folder: Folder, weight: StoredWeight) -> Iterator[str]:
    for index, quantized in enumerate(read_weight(folder, weight)):
        name = shown(weight.name) + (f"[{index}]" if weight.experts else "")
        yield from tensor_problems(quantized, name)


def tensor_problems(quantized: QuantizedTensor, name: str) -> Iterator[str]:
    """What quantizing never makes: codes that have no value, scales that are negative or not finite.

    Zero points cannot be out of range: every pattern of their bits is one.
    """
    codes, book = quantized.codes, quantized.format.codebook
    unused = [-128] if book.signed else [i for i, value in enumerate(book.values) if not math.isfinite(value)]
    if count := sum(int((codes == code).sum()) for code in unused):
        yield f"{name}: {count} codes have no value in {quantized.format}; get the file again"
    wrong = _wrong_scales(quantized)
    if count := int(wrong.sum()):
        yield f"{name}: {count} of {wrong.numel()} scales are negative or not finite; get the file again"
    if isinstance(quantized.scale, QuantizedTensor):
        yield from tensor_problems(quantized.scale, f"{name}, the scales' own")


def _wrong_scales(quantized: QuantizedTensor) -> Tensor:
    """Which scales are negative or not finite."""
    scale = quantized.scale
    if isinstance(scale, QuantizedTensor):
        decoded = scale.dequantize()
        # Coded as its distance from a mean, a scale may come out a little below 0.
        return ~decoded.isfinite() if scale.offset is not None else ~decoded.isfinite() | (decoded < 0)
    if scale.dtype == torch.uint8:  # powers of two; all ones is NaN
        return scale == 255
    return ~scale.isfinite() | (scale < 0)


# --- output -----------------------------------------------------------------------------------------

_MARKS = {True: ("passed", "green"), False: ("failed", "red"), None: ("skipped", "dim")}


def _show(path: Path, checklist: Checklist) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checklist.checks:
        word, style = _MARKS[check.ok]
        table.add_row(Text(word, style), check.name, Text(check.detail))
    console = results()
    console.print(f"\n{shown(str(path))}\n", style="bold", markup=False)
    console.print(table)
