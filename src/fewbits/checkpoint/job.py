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

import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from fewbits.checkpoint.files import (
    copy_atomically,
    file_hash,
    reserve,
    sync_folder,
    write_at,
    write_atomically,
)
from fewbits.checkpoint.folder import Folder
from fewbits.checkpoint.safetensors import TORCH_DTYPES, CheckpointError, TensorInfo, layout
from fewbits.machine import give_back_free_memory

WEIGHTS = "model"  # the stem of transformers' file names
METADATA = {"format": "pt"}

_HASH_BLOCK = 2**22  # bytes
_SPELLINGS = {dtype: name for name, dtype in TORCH_DTYPES.items()}

Spec = tuple[str, tuple[int, ...]]  # safetensors dtype, shape
Advance = Callable[[int], None]  # called with bytes of the source that are done


@dataclass(frozen=True)
class Made:
    """What a unit became: tensor name → tensor, and a relative error per quantized weight, if any."""

    tensors: Mapping[str, Tensor]
    errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Unit:
    """Tensors of the source that are read together, and what is written of them.

    sources: their names; outputs: name → (safetensors dtype, shape) in the new files; open: the names among
    them whose length is known only when they are made, and at most what their shape says; make: does the
    work, which must depend on nothing else; cost: bytes of memory that it takes at most.
    """

    sources: tuple[str, ...]
    outputs: Mapping[str, Spec]
    make: Callable[[Mapping[str, Tensor]], Made]
    cost: int
    open: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes that are written, at most."""
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
        if parts[-1] and filled + unit.nbytes > max_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(unit)
        filled += unit.nbytes
    shards = []
    for number, part in enumerate(parts, start=1):
        suffix = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        shards.append(Shard(f"{WEIGHTS}{suffix}.safetensors", tuple(part)))
    return tuple(shards)


# --- starting ---------------------------------------------------------------------------------------


def check_start(job: Job, *, join: bool) -> None:
    """Whether the job may start, or with `join` go on with what is there; writes nothing.

    FileExistsError when there is something and `join` is not given; CheckpointError when it is another job's.
    """
    _check_is_job(job.partial)
    if job.partial.exists() and not join:
        raise FileExistsError(
            f"{job.partial} is what an interrupted run left; --resume goes on with it, --overwrite starts "
            "afresh"
        )
    described = job.partial / ".job" / "job.json"
    if described.exists():
        found = json.loads(described.read_text(encoding="utf-8"))
        _check_same(found, json.loads(json.dumps(job.identity)), job.partial)


def start(job: Job, *, join: bool) -> None:
    """Make the partial folder, say in it what the job is, and put all files there that are no weights.

    Raises what `check_start` raises.
    """
    check_start(job, join=join)
    state = job.partial / ".job"
    state.mkdir(parents=True, exist_ok=True)
    if not (state / "job.json").exists():
        write_atomically(state / "job.json", json.dumps(job.identity, indent=2, sort_keys=True).encode())
    for name, text in job.texts.items():
        write_atomically(job.partial / name, text.encode())
    for name, original in job.copies.items():
        copy_atomically(original, job.partial / name)


def discard(partial: Path) -> None:
    """Remove what an interrupted job left, if there is any. BlockingIOError while a process works on it."""
    _check_is_job(partial)
    for path in partial.glob(".job/*.lock"):
        try:
            FileLock(path, thread_local=False).acquire(timeout=0).lock.release()
        except Timeout:
            raise BlockingIOError(f"a process is still writing to {partial}; end it first") from None
    if partial.exists():
        shutil.rmtree(partial)


def _check_is_job(partial: Path) -> None:
    """FileExistsError for anything in the place of a job's folder that no job has left there."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise FileExistsError(f"{partial} is in the way; remove it, or choose another place")
    if partial.exists() and any(partial.iterdir()) and not (partial / ".job").is_dir():
        raise FileExistsError(f"{partial} is in the way, and nothing that fewbits left; choose another place")


def _check_same(found: Any, wanted: Any, partial: Path) -> None:
    keys = {*found, *wanted} if isinstance(found, dict) else set(wanted)
    other = found if isinstance(found, dict) else {}
    changed = sorted(key for key in keys if other.get(key) != wanted.get(key))
    if changed:
        raise CheckpointError(
            f"{partial} belongs to another job: {', '.join(changed)} differ. Give the same source and "
            "arguments as before; or start afresh: remove it, or --overwrite without --resume and --worker"
        )


# --- working ----------------------------------------------------------------------------------------


def run(job: Job, shards: Iterable[Shard], *, threads: int, memory: int, advance: Advance) -> None:
    """Write `shards`, several units at a time within `memory` bytes; finished ones are left as they are.

    Each thread computes on one core, so that results do not depend on how many there are. Any error leaves
    finished shards and nothing half-written under a final name.
    """
    budget = _Budget(memory)
    writers: list[_Writer] = []
    tasks: set[Future[None]] = set()
    with ThreadPoolExecutor(threads, "fewbits", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for shard in shards:
                if is_done(job, shard, advance):
                    continue
                writers.append(_Writer(job, shard))
                for unit in shard.units:
                    budget.acquire(unit.cost)
                    tasks = _without_finished(tasks)
                    tasks.add(pool.submit(_work, writers[-1], unit, budget, advance))
            for task in as_completed(tasks):
                task.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            for writer in writers:
                writer.abandon()
            raise


def _work(writer: _Writer, unit: Unit, budget: _Budget, advance: Advance) -> None:
    try:
        writer.write(unit)
        give_back_free_memory()
    finally:
        budget.release(unit.cost)
    advance(writer.source_bytes(unit))


def _without_finished(tasks: set[Future[None]]) -> set[Future[None]]:
    """Those that are still at work; the first error of the others is raised."""
    done = {task for task in tasks if task.done()}
    for task in done:
        task.result()
    return tasks - done


class _Budget:
    """Bytes of memory that units in work may take together; a larger one runs alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken = limit, 0
        self._changed = threading.Condition()

    def acquire(self, cost: int) -> None:
        with self._changed:
            while self._taken and self._taken + cost > self._limit:
                self._changed.wait()
            self._taken += cost

    def release(self, cost: int) -> None:
        with self._changed:
            self._taken -= cost
            self._changed.notify_all()


class _Writer:
    """Writes one shard: its header, then tensors at their places as they come, from several threads."""

    def __init__(self, job: Job, shard: Shard) -> None:
        self._job, self._shard = job, shard
        state = job.partial / ".job"
        self._path = state / f"{shard.name}.part"
        self._lock = FileLock(state / f"{shard.name}.lock", thread_local=False)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(
                f"another process is writing {shard.name} in {job.partial}; wait for it"
            ) from None
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
        self._open = True
        self._counting = threading.Lock()
        self._left = len(shard.units)
        self._digests: dict[tuple[str, ...], str] = {}
        self._errors: dict[str, float] = {}
        self._open_tensors: dict[str, Tensor] = {}
        try:
            reserve(self._descriptor, shard.size)  # a full disk is noticed before any work
        except OSError:
            self.abandon()
            raise

    def source_bytes(self, unit: Unit) -> int:
        return sum(self._job.source.info(name).nbytes for name in unit.sources)

    def write(self, unit: Unit) -> None:
        """Make the unit and write its tensors; behind the last unit, the shard gets its name and record.

        ValueError when the tensors are not those that were announced.
        """
        tensors = {name: self._job.source.read(name) for name in unit.sources}
        digest = _digest(tensors.values())
        made = unit.make(tensors)
        del tensors
        _check_made(unit, made.tensors)
        for name, tensor in made.tensors.items():
            if name not in unit.open:
                write_at(self._descriptor, _bytes(tensor), self._shard.places[name].start)
        with self._counting:
            self._open_tensors |= {name: made.tensors[name] for name in unit.open}
            self._digests[unit.sources] = digest
            self._errors |= made.errors
            self._left -= 1
            last = self._left == 0
        if last:
            self._finish()

    def _finish(self) -> None:
        lengths = {name: tensor.numel() for name, tensor in self._open_tensors.items()}
        header, places = self._shard.layout(lengths)
        write_at(self._descriptor, header, 0)
        for name, tensor in self._open_tensors.items():
            write_at(self._descriptor, _bytes(tensor), places[name].start)
        size = max((info.end for info in places.values()), default=len(header))
        os.ftruncate(self._descriptor, size)
        os.fsync(self._descriptor)
        record = {
            "sha256": file_hash(self._path),
            "size": size,
            "source": _source_state(self._job, self._shard),
            "source_sha256": _combined(self._digests[unit.sources] for unit in self._shard.units),
            "errors": dict(sorted(self._errors.items())),
        }
        os.replace(self._path, self._job.partial / self._shard.name)
        sync_folder(self._job.partial)
        write_atomically(_record_path(self._job.partial, self._shard.name), json.dumps(record).encode())
        self._close()

    def abandon(self) -> None:
        """Remove what is written so far, unless the shard is finished."""
        if self._open:
            self._path.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        self._open = False
        os.close(self._descriptor)
        self._lock.release()


# --- records ----------------------------------------------------------------------------------------


def _record_path(partial: Path, shard: str) -> Path:
    return partial / ".job" / f"{shard}.json"


def read_record(partial: Path, shard: str) -> dict[str, Any] | None:
    """The record of a finished shard, None when it is not finished."""
    try:
        record = json.loads(_record_path(partial, shard).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return record if isinstance(record, dict) and (partial / shard).is_file() else None


def is_done(job: Job, shard: Shard, advance: Advance) -> bool:
    """Whether `shard` is finished, from the source as it is now; CheckpointError if that has changed.

    A file of the same size and modification time is taken for unchanged; otherwise its tensors are hashed.
    """
    record = read_record(job.partial, shard.name)
    if record is None or (job.partial / shard.name).stat().st_size != record.get("size"):
        return False
    if record.get("source") != _source_state(job, shard):
        found = _combined(_digest(job.source.read(name) for name in unit.sources) for unit in shard.units)
        if found != record.get("source_sha256"):
            raise CheckpointError(
                f"{job.source.path} has changed since {shard.name} was made of it; --overwrite starts afresh"
            )
    advance(sum(job.source.info(name).nbytes for unit in shard.units for name in unit.sources))
    return True


def _source_state(job: Job, shard: Shard) -> list[list[Any]]:
    """[file, bytes, modification time in ns] of every source file that a shard is made of."""
    files = sorted({job.source.files[name] for unit in shard.units for name in unit.sources})
    stats = [(file, (job.source.path / file).stat()) for file in files]
    return [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]


# --- bytes ------------------------------------------------------------------------------------------


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _check_made(unit: Unit, tensors: Mapping[str, Tensor]) -> None:
    """ValueError when a unit's tensors are not those that it announced."""
    found = {name: (_SPELLINGS[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    wanted = dict(unit.outputs)
    for name in unit.open & set(found):
        if math.prod(found[name][1]) <= math.prod(wanted[name][1]):
            wanted[name] = found[name]
    if found != wanted:
        raise ValueError(f"{', '.join(unit.sources)} became {found}, not {wanted}")


def _combined(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()
