"""A planned job run to its end: the checks before it, its progress, and what is left when it ends early."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress

from fewbits.checkpoint.finish import check_place
from fewbits.checkpoint.job import Job, Shard
from fewbits.checkpoint.session import read_record
from fewbits.checkpoint.work import run
from fewbits.cli.common import byte_progress, format_bytes, messages

_COPY_SAMPLE = 2**28  # bytes that are copied to see what the disks give
_DISK_MARGIN = 2**24  # bytes for the files beside the weights


@dataclass(frozen=True)
class Timing:
    """Seconds of the two passes over `nbytes` of source."""

    nbytes: int
    check_seconds: float
    seconds: float


def silence(quiet: bool) -> None:
    """Let libraries say nothing but errors, if `quiet`."""
    for name in ("fewbits", "transformers") if quiet else ():
        logging.getLogger(name).setLevel(logging.ERROR)


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse a result that would replace what must not be replaced, or may not without `overwrite`."""
    check_place(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; --overwrite replaces it")


def _sources(job: Job, shards: Sequence[Shard]) -> tuple[list[str], int]:
    """Names and bytes of all that shards are made of."""
    names = [name for shard in shards for unit in shard.units for name in unit.sources]
    return names, sum(job.source.info(name).nbytes for name in names)


def timed_work(
    job: Job,
    part: Sequence[Shard],
    threads: int,
    memory: int,
    checked: tuple[int, float],
    doing: str,
    quiet: bool,
) -> Timing:
    """Do the shards `part` of a job, `threads` units at once within `memory` bytes. checked: the bytes and
    seconds of the check before; doing: what the progress bar calls it."""
    with byte_progress(quiet) as progress:
        task = progress.add_task(doing, total=_sources(job, part)[1])
        begin = time.perf_counter()
        run(
            job,
            part,
            threads=threads,
            memory=memory,
            advance=lambda count: progress.update(task, advance=count),
        )
        return Timing(*checked, time.perf_counter() - begin)


def check_source(job: Job, part: Sequence[Shard], threads: int, quiet: bool) -> tuple[int, float]:
    """Room on the disk, and no NaN or infinity in what is to be done: (bytes, seconds)."""
    left = [shard for shard in part if read_record(job.partial, shard.name) is None]
    check_disk(job, left)
    names, nbytes = _sources(job, left)
    begin = time.perf_counter()
    with byte_progress(quiet) as progress:
        _check_values(job, names, threads, progress, nbytes)
    return nbytes, time.perf_counter() - begin


def _check_values(job: Job, names: Sequence[str], threads: int, progress: Progress, nbytes: int) -> None:
    """Refuse NaN and infinity before anything is written."""
    task = progress.add_task("checking", total=nbytes)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def check(name: str) -> None:
            job.source.check(name, lambda count: progress.update(task, advance=count))

        try:
            for _ in pool.map(check, names):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def check_disk(job: Job, left: Sequence[Shard]) -> None:
    """ValueError when the disk has no room for the shards that are left to do."""
    folder = next(
        place for place in (job.out.parent.resolve(), *job.out.parent.resolve().parents) if place.exists()
    )
    free = shutil.disk_usage(folder).free
    need = sum(shard.size for shard in left) + sum(path.stat().st_size for path in job.copies.values())
    if free < need + _DISK_MARGIN:
        raise ValueError(
            f"{job.out} needs {format_bytes(need + _DISK_MARGIN)} and {folder} has {format_bytes(free)} "
            "free; make room, or choose another place",
        )


def copy_rate(job: Job) -> float:
    """Bytes/s of copying the source's files, or their beginning, to where the result goes; 0 without room."""
    target = job.partial / ".job" / f"copy.{secrets.token_hex(8)}.tmp"
    copied, begin = 0, time.perf_counter()
    try:
        with target.open("xb") as output:
            for header in job.source.headers.values():
                with header.path.open("rb") as file:
                    while copied < _COPY_SAMPLE and (block := file.read(2**22)):
                        copied += output.write(block)
            output.flush()
            os.fsync(output.fileno())
    except OSError:
        return 0.0  # no room for a copy is no reason to stop
    finally:
        target.unlink(missing_ok=True)
    return copied / (time.perf_counter() - begin)


@contextmanager
def explained(job: Job) -> Iterator[None]:
    """Say what is left when work ends early."""
    try:
        yield
    except BaseException as error:
        done = sum(read_record(job.partial, shard.name) is not None for shard in job.shards)
        hint = "nothing was written"
        if done:
            hint = (
                f"{done} of {len(job.shards)} shards are finished and kept in {job.partial}; the same "
                "command with --resume goes on"
            )
        elif (job.out / ".job").exists():
            hint = f"{job.out} is complete; what it replaced may be left beside it"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(error.errno, f"{error.strerror}. Make room; {hint}") from error
        if isinstance(error, KeyboardInterrupt):
            messages().print(hint, markup=False)
        raise
