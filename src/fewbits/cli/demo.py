"""`fewbits demo`: quantize the embedded model in several ways and show size, quality, speed and memory.

Each variant is measured in a fresh process (`demo_worker`), one after the other, so that the figures of
one cannot lean on what another left in memory. This process only waits and draws; it loads no model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fewbits
from fewbits.cli.common import AsJson, Quiet, messages, print_json, results
from fewbits.machine import cpu_name

PROMPT = "Once upon a time"
STAGES = ("starting", "loading", "generating", "comparing")
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

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


@dataclass(frozen=True)
class Job:
    """What a worker is told. scratch: folder shared by the workers of one run; tokens: per sample."""

    variant: str
    model: str
    scratch: str
    samples: int
    tokens: int
    seed: int
    threads: int


@dataclass(frozen=True)
class Settings:
    """What the user asked for; the same for every worker of a run."""

    model: Path
    samples: int
    tokens: int
    seed: int
    threads: int


class WorkerError(Exception):
    """A worker ended without a result; the message is what it wrote last."""


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
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Quantize the embedded model to NF4, FP4 and LLM.int8(); show size, quality, speed and memory."""
    settings = Settings(_find_model(model), samples, tokens, seed, threads)
    try:
        with _progress(quiet) as step:
            rows = _measure_all(settings, step)
    except WorkerError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    if as_json:
        print_json(_as_json(settings, rows))
    else:
        _show(settings, rows)


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


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Yields step(description), to be called once per stage of each variant."""
    steps = len(VARIANTS) * len(STAGES)
    columns = (TextColumn("{task.description:<30}"), BarColumn(), TimeElapsedColumn())
    console = messages()
    hidden = quiet or not console.is_terminal  # a log file gets no bars
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=steps)
        done = iter(range(steps))
        yield lambda text: bar.update(task, description=text, completed=next(done))


def _measure_all(settings: Settings, step: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row of figures per variant, in order: a reloaded variant needs what an earlier one saved."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="fewbits-demo-") as scratch:
        for variant in VARIANTS:
            job = Job(
                variant=variant.key,
                model=str(settings.model),
                scratch=scratch,
                samples=settings.samples,
                tokens=settings.tokens,
                seed=settings.seed,
                threads=settings.threads,
            )
            figures = _run_worker(job, variant.label, step)
            rows.append({"key": variant.key, "label": variant.label, **figures})
    return rows


def _run_worker(job: Job, label: str, step: Callable[[str], None]) -> dict[str, Any]:
    """Run one worker to its end and return its figures.

    A worker writes one JSON object per line: {"stage": …} for each later stage, then {"figures": …} or, for
    something the user can mend, {"error": …}.
    """
    command = [sys.executable, "-m", "fewbits.cli.demo_worker", json.dumps(asdict(job))]
    log = Path(job.scratch, f"{job.variant}.log")
    environment = {**os.environ, **QUIET, "OMP_NUM_THREADS": str(job.threads)}
    message: dict[str, Any] = {}
    step(f"{label}: {STAGES[0]}")
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as worker,
    ):
        try:
            for line in worker.stdout or ():
                message = json.loads(line)
                if "stage" in message:
                    step(f"{label}: {message['stage']}")
        except BaseException:
            worker.terminate()  # Ctrl-C must leave no worker behind
            raise
    if "error" in message:
        raise ValueError(f"{label}: {message['error']}")
    if "figures" not in message:
        said = log.read_text(errors="replace").strip()
        raise WorkerError(f"{said}\nerror: measuring {label} ended with code {worker.returncode}.")
    figures: dict[str, Any] = message["figures"]
    return figures


def _as_json(settings: Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    first = rows[0]
    libraries = {name: version(name) for name in ("torch", "transformers")}
    return {
        "versions": {"fewbits": fewbits.__version__, **libraries},
        "cpu": cpu_name(),
        "threads": first["threads"],
        "model": str(settings.model),
        "parameters": first["parameters"],
        "samples": settings.samples,
        "tokens": settings.tokens,
        "seed": settings.seed,
        "prompt": PROMPT,
        "notes": _notes(rows),
        "rows": rows,
    }


def _show(settings: Settings, rows: list[dict[str, Any]]) -> None:
    console = results()
    first = rows[0]
    console.print(
        f"\n[bold]{settings.model}[/]: {first['parameters']:,} parameters, stored in {first['dtype']}; "
        f"{cpu_name()}, {first['threads']} {'thread' if first['threads'] == 1 else 'threads'}\n"
    )
    console.print(_table(rows))
    for note in _notes(rows):
        console.print(note, style="dim")
    console.print("\n[bold]What each makes of the prompt[/], greedily:\n")
    for row in rows:
        console.print(f"[bold]{row['label']}[/]")
        console.print(f"  {row['text']}\n", markup=False)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for head in ("weights\nMB", "bits per\nweight", "per-\nplexity", "KL divergence\nmillinats/token"):
        table.add_column(head, justify="right", no_wrap=True)
    for head in ("same\ntop", "tokens\nper s", "peak\nMB"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        quality = row["quality"]
        table.add_row(
            row["label"],
            f"{row['weight_bytes'] / 1e6:.2f}",
            f"{row['bits_per_weight']:.2f}",
            f"{quality['perplexity']:.3f}",
            f"{1e3 * quality['kl_mean']:.2f} ± {1e3 * quality['kl_interval95']:.2f}",
            f"{100 * quality['same_top_share']:.1f} %",
            f"{row['tokens_per_second']:.0f}",
            f"{row['peak_bytes'] / 1e6:.1f}",
        )
    return table


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    """What the columns mean, exactly."""
    first = rows[0]
    bound = "" if all(row["peak_is_exact"] for row in rows) else " (upper bound: this system cannot reset it)"
    scored = first["quality"]["tokens"]
    return [
        f"weights: all parameters and buffers, also those kept in {first['dtype']}; bits per weight: the "
        "same over the number of original parameters.",
        f"perplexity, KL divergence from full precision (mean ± 95 %), same top token: on {scored:,} tokens "
        "that the full-precision model sampled itself.",
        f"tokens per s: greedy, one sequence, {first['decoded_tokens']} tokens, median of "
        f"{first['decode_repeats']} runs.",
        "peak: largest resident set while loading and generating, above the same process after a first load "
        f"and a few tokens, which bring in the libraries{bound}. Each row has its own process.",
    ]
