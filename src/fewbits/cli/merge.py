"""`fewbits merge`: a LoRA adapter goes into its base, file to file, into the better of two bases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbits.checkpoint import work
from fewbits.checkpoint.adapter import Adapter, open_adapter
from fewbits.checkpoint.finish import finish
from fewbits.checkpoint.folder import check_is_folder
from fewbits.checkpoint.job import partial_folder
from fewbits.checkpoint.session import check_start, discard, session
from fewbits.cli.common import AsJson, Quiet, format_bytes, messages, parse_bytes, print_json, results
from fewbits.cli.merge_bases import Bases, Trained, find_bases
from fewbits.cli.merge_choice import Choice, Trial, choose, show
from fewbits.cli.running import Timing, check_disk, check_free, check_source, explained, silence, timed_work
from fewbits.machine import peak_resident_bytes, usable_cores

if TYPE_CHECKING:
    from fewbits.integrations.merge_files import PlannedMerge

BaseName = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="original|dequantized",
        help="Merge into these weights, without a comparison. Default: the better ones.",
        show_default=False,
    ),
]
Text = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="UTF-8 text to compare on. Default: samples of the trained model.",
        show_default=False,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(min=2, help="Sequences, at most. Default: 32; all of a text.", show_default=False),
]
Quantized = Annotated[str | None, typer.Option(metavar="FOLDER", help="It was this quantized checkpoint.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Tensors at work at once.", show_default="all cores")
]
BaseModel = Annotated[
    str | None, typer.Option(help="What the model card calls the base.", show_default="BASE")
]


def merge(
    source: Annotated[str, typer.Argument(metavar="BASE", help="Folder of the base, or a model id.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of a LoRA adapter of PEFT.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    base: BaseName = None,
    format: Annotated[
        str | None, typer.Option(help="Format of the base while the adapter was trained.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="It was LLM.int8().")] = False,
    config: Annotated[Path | None, typer.Option(help="It was quantized by this JSON of a config.")] = None,
    quantized: Quantized = None,
    text: Text = None,
    samples: Samples = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per forward pass, at most.")] = 8,
    again: Annotated[
        bool, typer.Option("--again", help="Allow a base into which another adapter was merged.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a weight file.")] = "5GB",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, and what an interrupted run left.")
    ] = False,
    threads: Threads = None,
    base_model: BaseModel = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Merge a LoRA adapter into its base, file to file, in little memory: a plain 16-bit checkpoint.

    An adapter trained on a quantized model fits two bases: the original weights, and the quantized ones
    decoded. Both are compared in memory, unless --base names one.

    Example: fewbits merge demo/model adapter merged
    """
    silence(quiet)
    check_free(out, overwrite)
    check_is_folder(adapter)
    found = open_adapter(adapter)
    bases = find_bases(source, found, Trained(format, int8, config, quantized), base)
    test = Trial(text, samples, tokens, seed, batch)
    _check_startable(bases, found, out, test, again=again, go_on=resume or overwrite)
    _check_adapter(found)
    if bases.assumed and not quiet:
        messages().print(
            f"assumed that the base was quantized to {bases.assumed}; --format, --int8, --config or "
            "--quantized say otherwise",
            style="dim",
            markup=False,
        )
    choice = None
    if len(bases.choices) > 1:
        choice = choose(bases.choices, found, test, quiet=quiet)
    name = choice.chosen if choice else next(iter(bases.choices))
    planned = _planned(bases, name, found, out, again, parse_bytes(max_shard_size), base_model)
    timing = _run(planned, threads or usable_cores(), resume, overwrite, quiet)
    _show(planned, bases, name, choice, timing, as_json, quiet)


def _planned(
    bases: Bases,
    name: str,
    adapter: Adapter,
    out: Path,
    again: bool,
    max_shard_bytes: int,
    base_model: str | None,
) -> PlannedMerge:
    from fewbits.integrations.merge_files import plan_merge

    return plan_merge(
        bases.choices[name],
        adapter,
        out,
        again=again,
        max_shard_bytes=max_shard_bytes,
        base_model=base_model,
    )


def _check_startable(
    bases: Bases, adapter: Adapter, out: Path, test: Trial, *, again: bool, go_on: bool
) -> None:
    """What can be refused before models are compared is. go_on: whether what an interrupted run left is in
    order."""
    if len(bases.choices) == 1 and (test.text is not None or test.count is not None):
        raise ValueError(
            f"--text and --samples are for a comparison, and the only base is the "
            f"{next(iter(bases.choices))} one; leave them out, or compare: an original base without --base"
        )
    for name in bases.choices:
        job = _planned(bases, name, adapter, out, again, 2**60, None).job
        if not go_on:
            check_start(job, join=False)
        check_disk(job, job.shards)


def _check_adapter(adapter: Adapter) -> None:
    for name in adapter.folder.files:
        adapter.folder.check(name, lambda _: None)


def _run(planned: PlannedMerge, threads: int, resume: bool, overwrite: bool, quiet: bool) -> Timing:
    job = planned.job
    if overwrite and not resume:
        discard(partial_folder(job.out))
    check_start(job, join=resume)
    limit = work.memory_limit(job, planned.plan.largest, threads)
    with explained(job):
        checked = check_source(job, job.shards, threads, quiet)
        with session(job, "all", join=resume):
            timing = timed_work(job, job.shards, threads, limit, checked, "merging", quiet)
            finish(job.out, overwrite=overwrite)
    return timing


# --- what is shown ----------------------------------------------------------------------------------


def _show(
    planned: PlannedMerge,
    bases: Bases,
    name: str,
    choice: Choice | None,
    timing: Timing,
    as_json: bool,
    quiet: bool,
) -> None:
    job = planned.job
    changed, total = len(planned.plan.changes), len(job.identity["weights"])
    nbytes = sum(weight["nbytes"] for weight in job.identity["weights"])
    if as_json:
        facts: dict[str, Any] = {
            "out": str(job.out),
            "base": name,
            "into": job.identity["adapter"]["into"],
            "assumed": bases.assumed or None,
            "comparison": choice.to_json() if choice else None,
            "changed": changed,
            "tensors": total,
            "bytes": nbytes,
            "files": [shard.name for shard in job.shards],
            "check_seconds": timing.check_seconds,
            "merge_seconds": timing.seconds,
            "peak_memory_bytes": peak_resident_bytes(),
        }
        print_json(facts)
        return
    console = results()
    if choice is not None:
        show(choice, console)
        console.print(f"{name}: {choice.why}", markup=False)
    count = len(job.shards)
    console.print(
        f"{job.out}: adapter merged into {job.identity['adapter']['into']}; {changed} of {total} "
        f"tensors changed, {format_bytes(nbytes)} in {count} {'file' if count == 1 else 'files'}",
        markup=False,
    )
    if not quiet:
        _note(planned, timing)


def _note(planned: PlannedMerge, timing: Timing) -> None:
    console = messages()
    if planned.left:
        console.print(f"left behind: {', '.join(planned.left)}", style="dim", markup=False)
    console.print(
        f"checked {format_bytes(timing.nbytes)} in {timing.check_seconds:.1f} s, merged in "
        f"{timing.seconds:.1f} s: {timing.nbytes / max(timing.seconds, 1e-9) / 1e9:.3f} GB/s; memory peak "
        f"{format_bytes(peak_resident_bytes())}",
        style="dim",
        markup=False,
    )
