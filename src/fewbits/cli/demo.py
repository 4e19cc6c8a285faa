"""`fewbits demo`: quantize the embedded model in several ways and show size, quality, speed and memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from fewbits.cli.common import AsJson, Quiet, print_json, results
from fewbits.cli.compare import Html
from fewbits.cli.measure import measure
from fewbits.cli.measured import Comparison, Plan, Subject, command_line, hardware, millinats, notes
from fewbits.cli.page import check_page, write_page

PROMPT = "Once upon a time"
BATCH = 8  # sequences per forward pass

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}


@dataclass(frozen=True)
class Variant:
    """One row of the demo. settings: arguments of transformers' BitsAndBytesConfig, None for as stored;
    reload_of: key of an earlier variant whose saved copy is loaded instead, without a config."""

    key: str
    label: str
    settings: Mapping[str, Any] | None = None
    reload_of: str | None = None


VARIANTS = (
    Variant("full", "full precision"),
    Variant(
        "nf4",
        "NF4, double quant",
        {**FOUR_BITS, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    Variant("nf4_reloaded", "NF4 reloaded", reload_of="nf4"),
    Variant("fp4", "FP4", {**FOUR_BITS, "bnb_4bit_quant_type": "fp4"}),
    Variant("int8", "LLM.int8()", {"load_in_8bit": True}),
)


def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a causal model. Default: demo/model.", show_default=False),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Sequences to compare on.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the sequences.")] = 0,
    # More threads gain nothing on a model this small, and crawl where other work wants the same cores.
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; larger models gain from more.")] = 1,
    html: Html = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Quantize the embedded model to NF4, FP4 and LLM.int8(); show size, quality, speed and memory.

    Example: fewbits demo --html demo.html
    """
    if html is not None:
        check_page(html)
    folder = _find_model(model)
    plan = Plan(samples, tokens, seed, threads, BATCH, prompt=PROMPT)
    with tempfile.TemporaryDirectory(prefix="fewbits-demo-") as scratch:
        rows = measure(_subjects(folder, Path(scratch)), plan, Path(scratch), quiet=quiet)
    comparison = Comparison(rows, plan, command_line())
    if as_json:
        print_json(comparison.to_json())
    else:
        _show(comparison)
    if html is not None:
        write_page(comparison, html, quiet=quiet)


def _subjects(folder: Path, scratch: Path) -> list[Subject]:
    """What each variant loads, and which of them are saved for a later one."""
    reloaded = {variant.reload_of for variant in VARIANTS}
    return [
        Subject(
            key=variant.key,
            label=variant.label,
            given="" if variant.reload_of else str(folder),
            folder=str(scratch / variant.reload_of if variant.reload_of else folder),
            settings=variant.settings,
            save_to=str(scratch / variant.key) if variant.key in reloaded else None,
        )
        for variant in VARIANTS
    ]


def _find_model(given: Path | None) -> Path:
    tree = Path(__file__).resolve().parents[3]
    places = [given] if given is not None else [Path("demo", "model"), tree / "demo" / "model"]
    for place in places:
        if (place / "config.json").is_file():
            return place
    if given is not None:
        raise FileNotFoundError(f"--model needs a folder with config.json and weights; got {given}.")
    raise FileNotFoundError(
        "found no demo/model here; run from a checkout of fewbits, or name a model's folder with --model."
    )


def _show(comparison: Comparison) -> None:
    console = results()
    figures = comparison.reference.figures
    console.print(
        f"\n[bold]{escape(comparison.reference.subject.given)}[/]: {figures.parameters:,} parameters, stored "
        f"in {figures.dtype}; {hardware(comparison.plan)}\n"
    )
    console.print(_table(comparison))
    for note in notes(comparison):
        console.print(note, style="dim", markup=False)
    console.print("\n[bold]What each makes of the prompt[/], greedily:\n")
    for row in comparison.rows:
        console.print(f"[bold]{escape(row.label)}[/]")
        console.print(f"  {row.figures.text}\n", markup=False)
    console.print(comparison.verdict, markup=False)


def _table(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for head in ("weights\nMB", "bits per\nweight", "per-\nplexity", "KL divergence\nmillinats/token"):
        table.add_column(head, justify="right", no_wrap=True)
    for head in ("same\ntop", "tokens\nper s", "peak\nMB"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in comparison.rows:
        figures, quality = row.figures, row.figures.quality
        table.add_row(
            row.label,
            f"{figures.weight_bytes / 1e6:.2f}",
            f"{figures.bits_per_weight:.2f}",
            f"{quality.perplexity:.3f}",
            millinats(quality),
            f"{100 * quality.same_top_share:.1f} %",
            f"{figures.tokens_per_second:.0f}",
            f"{figures.peak_bytes / 1e6:.1f}",
        )
    return table
