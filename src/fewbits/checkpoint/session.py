"""Who does a job, and what is known of it on the disk: its description, locks, and records of its shards."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fewbits.checkpoint.files import copy_atomically, create_atomically, file_hash, write_atomically
from fewbits.checkpoint.folder import read_json
from fewbits.checkpoint.job import Job
from fewbits.checkpoint.safetensors import CheckpointError

DESCRIPTION = "job.json"
FINALIZE = "finalize"  # the part of a job that comes last

_MAX_STATE = 10**9  # bytes of a description or record
_KEYS = {
    "shards",
    "weights",
    "parameters",
    "card",
    "carried",
    "source_bytes",
    "base_model",
    "name",
    "method",
    "command",
}


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
    if (job.partial / ".job" / DESCRIPTION).exists():
        found = read_description(job.partial)
        _check_same(found, json.loads(json.dumps(job.identity)), job.partial)


@contextmanager
def session(job: Job, name: str, *, join: bool) -> Iterator[None]:
    """Make the partial folder (or with `join`, go on with it) and be the one who does the part `name` of the
    job.

    Whatever ends it early: without `join`, a folder in which no shard is finished is removed. Raises what
    `check_start` raises; BlockingIOError while another process does that part, or finishes the job.
    """
    is_new = not job.partial.exists() and not join
    try:
        _make_folder(job, join=join)
        with hold(job.partial, name):
            if name != FINALIZE:
                with hold(job.partial, FINALIZE):
                    pass  # nobody is finishing it
            _describe(job)
            yield
    except (FileExistsError, BlockingIOError):
        raise
    except BaseException:
        if is_new and not any(read_record(job.partial, shard.name) for shard in job.shards):
            with suppress(FileExistsError, BlockingIOError):  # not ours any more
                discard(job.partial)
        raise


@contextmanager
def hold(partial: Path, name: str) -> Iterator[None]:
    """Be the only one at the part `name` of the job in `partial`, a shard for instance; BlockingIOError if
    another process is at it."""
    lock = FileLock(partial / ".job" / f"{name}.lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(f"another process is at {name} of {partial}; wait for it") from None
    try:
        yield
    finally:
        lock.release()


def _make_folder(job: Job, *, join: bool) -> None:
    job.partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        job.partial.mkdir()
    except FileExistsError:
        check_start(job, join=join)
    (job.partial / ".job").mkdir(exist_ok=True)


def _describe(job: Job) -> None:
    """Say in the partial folder what the job is, and put all files there that are no weights."""
    described = job.partial / ".job" / DESCRIPTION
    if not create_atomically(described, json.dumps(job.identity, indent=2, sort_keys=True).encode()):
        check_start(job, join=True)  # another worker was faster; is it at the same job?
    for name, text in job.texts.items():
        write_atomically(job.partial / name, text.encode())
    for name, original in job.copies.items():
        if not (job.partial / name).is_file() or file_hash(job.partial / name) != file_hash(original):
            copy_atomically(original, job.partial / name)


def check_idle(partial: Path) -> None:
    """BlockingIOError while a process works on the job in `partial`."""
    for path in partial.glob(".job/*.lock"):
        try:
            FileLock(path, thread_local=False).acquire(timeout=0).lock.release()
        except Timeout:
            raise BlockingIOError(f"a process is still writing to {partial}; end it first") from None


def discard(partial: Path) -> None:
    """Remove what an interrupted job left, if there is any. BlockingIOError while a process works on it."""
    _check_is_job(partial)
    check_idle(partial)
    if partial.exists():
        shutil.rmtree(partial)


def _check_is_job(partial: Path) -> None:
    """FileExistsError for anything in the place of a job's folder that no job has left there."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise FileExistsError(f"{partial} is in the way; remove it, or choose another place")
    if partial.exists() and any(partial.iterdir()) and not (partial / ".job").is_dir():
        raise FileExistsError(f"{partial} is in the way, and nothing that fewbits left; choose another place")


def _check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], partial: Path) -> None:
    changed = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if changed:
        raise CheckpointError(
            f"{partial} belongs to another job: {', '.join(changed)} differ. Give the same source and "
            "arguments as before; or start afresh: remove it, or --overwrite without --resume and --worker"
        )


def record_path(partial: Path, shard: str) -> Path:
    """Where the record of a finished shard is kept."""
    return partial / ".job" / f"{shard}.json"


def read_description(partial: Path) -> dict[str, Any]:
    """What the job in `partial` is. FileNotFoundError when there is none, CheckpointError for a damaged
    one."""
    if not (partial / ".job" / DESCRIPTION).is_file():
        raise FileNotFoundError(f"there is no job in {partial}; run `fewbits quantize` first")
    found = read_json(partial / ".job", DESCRIPTION, _MAX_STATE)
    shards = found.get("shards")
    fine = isinstance(shards, list) and all(_names_shard(entry) for entry in shards)
    if not fine or not set(found) >= _KEYS:
        raise CheckpointError(f"{partial}/.job/{DESCRIPTION} is damaged; remove {partial} and start afresh")
    return found


def _names_shard(entry: object) -> bool:
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    name, size = entry
    return (
        type(size) is int and isinstance(name, str) and re.fullmatch(r"[\w-]+\.safetensors", name) is not None
    )


def read_record(partial: Path, shard: str) -> dict[str, Any] | None:
    """The record of a finished shard; None when it is not finished, or the record is damaged."""
    if not record_path(partial, shard).is_file() or not (partial / shard).is_file():
        return None
    try:
        record = read_json(partial / ".job", f"{shard}.json", _MAX_STATE)
    except CheckpointError:
        return None  # the shard is made again
    return record if {"sha256", "size", "source", "source_sha256", "errors"} <= set(record) else None
