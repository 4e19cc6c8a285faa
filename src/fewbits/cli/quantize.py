"""`fewbits quantize`: a checkpoint becomes a quantized one, file to file, in little memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table

from fewbits import ops
from fewbits.checkpoint import work
from fewbits.checkpoint.finish import finish
from fewbits.checkpoint.job import Shard, partial_folder
from fewbits.checkpoint.session import check_start, discard, session
from fewbits.cli.common import (
    AsJson,
    Quiet,
    format_bytes,
    grouped,
    messages,
    parse_bytes,
    print_json,
    results,
)
from fewbits.cli.jobs import Planned, Request, part_name, part_of, plan_job
from fewbits.cli.running import Timing, check_free, check_source, copy_rate, explained, silence, timed_work
from fewbits.machine import peak_resident_bytes, usable_cores
from fewbits.report import Report

_SAMPLE = (1024, 1024)  # weights that are quantized to estimate the time


Source = Annotated[str, typer.Argument(metavar="SRC", help="Folder of a model, or a model id.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATTERN=FORMAT", help="Another format for some modules, or skip."),
]
Worker = Annotated[
    str | None, typer.Option(metavar="i/N", help="Do the i-th of N parts; then `fewbits finalize OUT`.")
]


def quantize(
    source: Source,
    out: Out,
    format: Annotated[
        str | None, typer.Option(help="Format of all linear layers, such as nf4:g64:dq (the default).")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="LLM.int8() instead.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="JSON of a BitsAndBytesConfig or FewbitsConfig instead.")
    ] = None,
    sets: Sets = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a weight file.")] = "5GB",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done; write nothing.")
    ] = False,
    worker: Worker = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, and what an interrupted run left.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Tensors at work at once.", show_default="all cores")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="What the model card calls the original.", show_default="SRC")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a safetensors checkpoint, file to file, in little memory.

    Tensors stream from the source's files to OUT's; the model is never built. OUT appears when all of it is
    written, with tokenizer, model card and hashes, and loads with from_pretrained.

    Example: fewbits quantize demo/model demo-nf4 --format nf4:g64:dq
    """
    silence(quiet)
    if not dry_run:
        check_free(out, overwrite)
    shard_bytes = parse_bytes(max_shard_size)
    planned = plan_job(Request(source, out, format, int8, config, tuple(sets or ()), shard_bytes, base_model))
    part = part_of(planned.job.shards, worker)
    threads = threads or usable_cores()
    if dry_run:
        _show_plan(planned, part, threads, as_json)
        return
    if overwrite and not resume and worker is None:
        discard(partial_folder(out))
    join = resume or worker is not None
    check_start(planned.job, join=join)
    job, limit = planned.job, memory_limit(planned, threads)
    with explained(job):
        seconds = check_source(job, part, threads, quiet)
        with session(job, part_name(worker), join=join):
            rate, timing = copy_rate(job), timed_work(job, part, threads, limit, seconds, "quantizing", quiet)
            if worker is None:
                finish(out, overwrite=overwrite)
    if not quiet:
        _note(planned, timing, rate, worker)
    _show_result(planned, part, timing, rate, worker, threads, as_json)


def memory_limit(planned: Planned, threads: int) -> int:
    """Bytes that tensors at work may take together."""
    return work.memory_limit(planned.job, planned.largest, threads)


# --- what is shown ----------------------------------------------------------------------------------


def _note(planned: Planned, timing: Timing, copying: float, worker: str | None) -> None:
    console = messages()
    if planned.left:
        console.print(f"left behind: {', '.join(planned.left)}", style="dim", markup=False)
    rate = f"{timing.nbytes / max(timing.seconds, 1e-9) / 1e9:.3f} GB/s"
    copy = f"a plain copy runs at {copying / 1e9:.3f} GB/s" if copying else "no room to time a copy"
    console.print(
        f"checked {format_bytes(timing.nbytes)} in {timing.check_seconds:.1f} s, quantized it in "
        f"{timing.seconds:.1f} s: {rate}; {copy}; memory peak {format_bytes(peak_resident_bytes())}",
        style="dim",
        markup=False,
    )
    if worker is not None:
        console.print(
            f"worker {worker} is done; when all are: fewbits finalize {planned.job.out}", markup=False
        )


def _show_result(
    planned: Planned,
    part: Sequence[Shard],
    timing: Timing,
    copying: float,
    worker: str | None,
    threads: int,
    as_json: bool,
) -> None:
    job, report = planned.job, planned.report
    if as_json:
        print_json(
            {
                "out": str(job.out),
                "worker": worker,
                "files": [shard.name for shard in part],
                "bytes": report.nbytes,
                "source_bytes": planned.original_bytes,
                "bits_per_weight": report.bits_per_weight,
                "read_bytes": timing.nbytes,
                "check_seconds": timing.check_seconds,
                "quantize_seconds": timing.seconds,
                "bytes_per_second": timing.nbytes / max(timing.seconds, 1e-9),
                "copy_bytes_per_second": copying,
                "peak_memory_bytes": peak_resident_bytes(),
                "memory_limit_bytes": memory_limit(planned, threads),
            }
        )
    elif worker is None:
        results().print(
            f"{job.out}: {format_bytes(planned.original_bytes)} became {format_bytes(report.nbytes)} in "
            f"{len(job.shards)} {'file' if len(job.shards) == 1 else 'files'}, {report.bits_per_weight:.2f} "
            "bits per weight",
            markup=False,
        )
    else:
        results().print(f"worker {worker}: {len(part)} of {len(job.shards)} files", markup=False)


def _show_plan(planned: Planned, part: Sequence[Shard], threads: int, as_json: bool) -> None:
    job, report = planned.job, planned.report
    disk, memory = job.size, memory_limit(planned, threads)
    estimate = _estimate(planned, part, threads)
    if as_json:
        print_json(
            {
                "out": str(job.out),
                "files": [[shard.name, shard.size] for shard in job.shards],
                "bytes": report.nbytes,
                "source_bytes": planned.original_bytes,
                "bits_per_weight": report.bits_per_weight,
                "disk_bytes": disk,
                "memory_bytes": memory,
                "estimated_seconds": estimate,
                "left_behind": list(planned.left),
                "weights": report.to_json()["weights"],
            }
        )
        return
    console = results()
    console.print(f"{job.source.path} → {job.out}", markup=False)
    console.print(_kinds(report))
    for line in _kept(report):
        console.print(line, markup=False)
    console.print(
        f"size    {format_bytes(planned.original_bytes)} → {format_bytes(report.nbytes)}, "
        f"{report.bits_per_weight:.2f} bits per weight\n"
        f"disk    {format_bytes(disk)} in {len(job.shards)} {'file' if len(job.shards) == 1 else 'files'}\n"
        f"memory  at most {format_bytes(memory)} above the interpreter\n"
        f"time    about {_duration(estimate)} with {threads} {'thread' if threads == 1 else 'threads'}, from "
        "a small sample",
        markup=False,
    )
    if planned.left:
        console.print(f"stays behind: {', '.join(planned.left)}", markup=False)
    console.print("nothing was written (--dry-run)", style="dim")


def _kept(report: Report) -> Iterator[str]:
    """A line for each kept weight of two or more dimensions, largest first; those of all layers in one."""
    for name, entries in grouped(entry for entry in report.kept if len(entry.shape) > 1):
        size, one = sum(entry.nbytes for entry in entries), entries[0]
        count = f"{len(entries)} x " if len(entries) > 1 else ""
        yield f"kept: {count}{name} {list(one.shape)} in {one.stored}, {format_bytes(size)}: {one.reason}"


def _kinds(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stored as")
    for head in ("weights", "parameters", "size", "bits per weight"):
        table.add_column(head, justify="right")
    for stored in sorted({entry.stored for entry in report.entries}):
        these = [entry for entry in report.entries if entry.stored == stored]
        count, nbytes = sum(entry.count for entry in these), sum(entry.nbytes for entry in these)
        bits = f"{8 * nbytes / count:.3f}" if count else "–"
        table.add_row(stored, str(len(these)), f"{count:,}", format_bytes(nbytes), bits)
    return table


def _estimate(planned: Planned, part: Sequence[Shard], threads: int) -> float:
    """Seconds, from the rate at which a small sample is quantized to the most frequent format here."""
    formats = [entry.stored for entry in planned.report.quantized]
    names = [name for shard in part for unit in shard.units for name in unit.sources]
    nbytes = sum(planned.job.source.info(name).nbytes for name in names)
    if not formats:
        return nbytes / 1e9
    spelling = max(set(formats), key=formats.count).partition("@")[0]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    sample = torch.randn(_SAMPLE, dtype=torch.bfloat16)
    rates = []
    for _ in range(2):
        begin = time.perf_counter()
        ops.quantize(sample, spelling).dequantize()
        rates.append(sample.nbytes / (time.perf_counter() - begin))
    torch.set_num_threads(before)
    return nbytes / (max(rates) * threads)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
