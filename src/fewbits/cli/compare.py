"""`fewbits compare`: hold models against the first one: quality, weight errors, size, speed and memory."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.markup import escape
from rich.table import Table
from safetensors.torch import save_file

from fewbits.cli.common import (
    AsJson,
    FailedCheckError,
    Quiet,
    find_model,
    format_bytes,
    print_json,
    results,
)
from fewbits.cli.measure import SEQUENCES, measure
from fewbits.cli.measure_inputs import check_subjects, text_sequences
from fewbits.cli.measured import (
    Comparison,
    Plan,
    Subject,
    command_line,
    hardware,
    millinats,
    notes,
    short,
)
from fewbits.cli.page import check_page, write_page

DEFAULT_SAMPLES = 32

Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="PAGE.html", help="Also write a page with plots to this file."),
]


def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="A B", help="Folders or model ids, the reference first."),
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="UTF-8 text to compare on. Default: samples of A.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=2, help="Sequences, at most. Default: 32; all of a text.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per forward pass, at most.")] = 8,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. Default: as torch does.", show_default=False)
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0, help="Fail (exit 1) above this KL divergence, millinats/token.", show_default=False
        ),
    ] = None,
    html: Html = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Hold models against the first: KL divergence, perplexity, weight errors, size, speed and memory.

    Any causal models of one vocabulary, plain or quantized, each measured in a process of its own.

    Example: fewbits compare demo/model nf4 int8 --html compare.html
    """
    if len(models) < 2:
        raise typer.BadParameter("comparing needs at least two models, the reference first", param_hint="A B")
    if html is not None:
        check_page(html)
    subjects = _subjects(models)
    check_subjects(subjects, tokens=tokens, sampled=text is None)
    count, cores = samples or DEFAULT_SAMPLES, threads or torch.get_num_threads()
    plan = Plan(count=count, tokens=tokens, seed=seed, threads=cores, batch=batch)
    comparison = _measure(subjects, plan, text, samples, quiet=quiet)
    if as_json:
        print_json(comparison.to_json())
    else:
        _show(comparison, quiet=quiet)
    if html is not None:
        write_page(comparison, html, quiet=quiet)
    _check_kl(comparison, max_kl)


def _subjects(models: Sequence[str]) -> list[Subject]:
    """Labels are the last parts of the names where these differ, else the names, numbered if need be."""
    names = [Path(model).expanduser().resolve().name if Path(model).is_dir() else model for model in models]
    names = names if len(set(names)) == len(names) else list(models)
    times = Counter(names)
    labels = [f"{name} ({index})" if times[name] > 1 else name for index, name in enumerate(names, 1)]
    return [
        Subject(key=label, label=label, given=model, folder=str(find_model(model)))
        for label, model in zip(labels, models, strict=True)
    ]


def _measure(
    subjects: Sequence[Subject], plan: Plan, text: Path | None, most: int | None, *, quiet: bool
) -> Comparison:
    """Measure as `plan` says, on `text` if there is one: then all of its sequences, or at most `most`."""
    with tempfile.TemporaryDirectory(prefix="fewbits-compare-") as scratch:
        if text is not None:
            sequences = text_sequences(subjects[0], text, tokens=plan.tokens, count=most)
            save_file({"tokens": sequences}, Path(scratch, SEQUENCES))
            digest = hashlib.sha256(text.read_bytes()).hexdigest()
            plan = replace(plan, count=len(sequences), text=str(text), text_digest=digest)
        rows = measure(subjects, plan, Path(scratch), quiet=quiet)
    return Comparison(rows, plan, command_line())


def _check_kl(comparison: Comparison, max_kl: float | None) -> None:
    if max_kl is None:
        return
    # "not below", so that nan fails.
    far = [row for row in comparison.others if not 1e3 * row.figures.quality.kl_mean <= max_kl]
    if far:
        which = " and ".join(f"{row.label} has {millinats(row.figures.quality)}" for row in far)
        raise FailedCheckError(
            f"KL divergence from {comparison.reference.label} above {max_kl:g} millinats/token: {which}"
        )


def _show(comparison: Comparison, *, quiet: bool) -> None:
    console = results()
    reference = comparison.reference
    console.print(
        f"\n[bold]{escape(reference.label)}[/]: {reference.figures.parameters:,} parameters, stored in "
        f"{reference.figures.dtype}; {hardware(comparison.plan)}\n"
    )
    console.print(_quality_table(comparison))
    console.print(_cost_table(comparison))
    if any(row.worst_weight for row in comparison.others):
        console.print(_worst_table(comparison))
    if not quiet:
        for note in notes(comparison):
            console.print(note, style="dim", markup=False)
        console.print()
    console.print(comparison.verdict, markup=False)


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("", max_width=28, overflow="fold")
    for head in heads:
        table.add_column(head if "\n" in head else f"\n{head}", justify="right", no_wrap=True)
    return table


def _quality_table(comparison: Comparison) -> Table:
    table = _table(
        "per-\nplexity",
        "KL divergence\nmillinats/token",
        "\nmedian",
        "99th\npercentile",
        "\nmaximum",
        "same\ntop",
    )
    for row in comparison.rows:
        quality = row.figures.quality
        figures = [short(1e3 * value) for value in (quality.kl_median, quality.kl_p99, quality.kl_max)]
        cells = [millinats(quality), *figures, f"{100 * quality.same_top_share:.1f} %"]
        if row is comparison.reference:
            cells = ["reference", "", "", "", ""]
        table.add_row(escape(row.label), f"{quality.perplexity:.3f}", *cells)
    return table


def _cost_table(comparison: Comparison) -> Table:
    table = _table("weights", "bits per\nweight", "of the\nsize", "tokens\nper s", "peak")
    for row in comparison.rows:
        figures = row.figures
        table.add_row(
            escape(row.label),
            format_bytes(figures.weight_bytes),
            f"{figures.bits_per_weight:.2f}",
            f"{comparison.size_ratio(row):.2f} ×",
            f"{figures.tokens_per_second:.1f}",
            format_bytes(figures.peak_bytes),
        )
    return table


def _worst_table(comparison: Comparison) -> Table:
    table = _table("largest error\nof a weight")
    table.add_column("", overflow="fold")
    for row in comparison.others:
        if row.worst_weight is not None:
            name, error = row.worst_weight
            table.add_row(escape(row.label), f"{error:.4f}", escape(name))
    return table
