"""The work of a job: units made in threads within a limit of memory, written to their places, recorded."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint.files import file_hash, reserve, sync_folder, write_at, write_atomically
from fewbits.checkpoint.job import Advance, Job, Shard, Unit
from fewbits.checkpoint.safetensors import TORCH_DTYPES, CheckpointError
from fewbits.checkpoint.session import hold, read_record, record_path
from fewbits.machine import give_back_free_memory

_MARGIN = 2**27  # bytes of memory for the temporaries of units at work, besides what grows with tensors
_SPELLINGS = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def memory_limit(job: Job, largest: int, threads: int) -> int:
    """Bytes that units at work may take together: enough for each thread, and at most three times the
    `largest` tensor, of so many elements, in float32 and a margin."""
    costs = [unit.cost for shard in job.shards for unit in shard.units]
    return min(threads * max(costs, default=0), 3 * 4 * largest + _MARGIN)


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
                writer.close()
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
        self._path = job.partial / ".job" / f"{shard.name}.part"
        self._counting = threading.Lock()
        self._left = len(shard.units)
        self._digests: dict[tuple[str, ...], str] = {}
        self._squares: dict[tuple[str, ...], Mapping[str, tuple[float, float]]] = {}
        self._open_tensors: dict[str, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(hold(job.partial, shard.name))
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
            stack.callback(os.close, self._descriptor)
            stack.callback(self._path.unlink, missing_ok=True)
            reserve(self._descriptor, shard.size)  # a full disk is noticed before any work
            self._resources = stack.pop_all()

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
                start = self._shard.places[name].start + unit.piece[0] * tensor.nbytes
                write_at(self._descriptor, _bytes(tensor), start)
        with self._counting:
            self._open_tensors |= {name: made.tensors[name] for name in unit.open}
            self._digests[unit.sources] = digest
            self._squares[unit.sources] = made.squares
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
            "errors": _relative_errors(self._squares[unit.sources] for unit in self._shard.units),
        }
        os.replace(self._path, self._job.partial / self._shard.name)
        sync_folder(self._job.partial)
        write_atomically(record_path(self._job.partial, self._shard.name), json.dumps(record).encode())
        self.close()

    def close(self) -> None:
        """Let go of the file; what is written so far is removed, unless the shard is finished."""
        self._resources.close()


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
    """[file, bytes, modification time in ns] of every source file that a shard is made of, as it was
    opened."""
    files = sorted({job.source.files[name] for unit in shard.units for name in unit.sources})
    headers = [(file, job.source.headers[file]) for file in files]
    return [[file, header.size, header.modified] for file, header in headers]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _relative_errors(squares: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Weight → ‖W - decode(W)‖ / ‖W‖, from the sums of its pieces, in their order."""
    sums: dict[str, tuple[float, float]] = {}
    for piece in squares:
        for name, (error, total) in piece.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + error, before[1] + total)
    return {name: (error / total) ** 0.5 if total else 0.0 for name, (error, total) in sorted(sums.items())}


def _check_made(unit: Unit, tensors: Mapping[str, Tensor]) -> None:
    """ValueError when a unit's tensors are not those that it announced."""
    found = {name: (_SPELLINGS[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    wanted = dict(unit.outputs)
    if unit.piece[1] > 1:
        wanted = {
            name: (dtype, (size // unit.piece[1], *rest)) for name, (dtype, (size, *rest)) in wanted.items()
        }
    for name in unit.open & set(found):
        if math.prod(found[name][1]) <= math.prod(wanted[name][1]):
            wanted[name] = found[name]
    if found != wanted:
        raise ValueError(f"{', '.join(unit.sources)} became {found}, not {wanted}")


def _combined(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()
