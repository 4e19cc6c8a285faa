"""Measure models one after the other, each in a fresh process (`measure_worker`).

So the figures of one cannot lean on what another left in memory. This process only waits and shows how far
it is; it loads no model.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fewbits.checkpoint.safetensors import read_header
from fewbits.cli.common import messages
from fewbits.cli.measured import Figures, Plan, Row, Subject
from fewbits.evaluate import Quality

SEQUENCES = "sequences.safetensors"  # in the scratch folder: tensor "tokens", int64 [count, length]
STAGES = ("starting", "loading", "generating", "comparing")
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

Step = Callable[[str, float], None]


@dataclass(frozen=True)
class Job:
    """What a worker is told. scratch: folder shared by the workers of one run."""

    subject: Subject
    reference: Subject
    plan: Plan
    scratch: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        value = json.loads(text)
        subject, reference = Subject(**value["subject"]), Subject(**value["reference"])
        return cls(subject, reference, Plan(**value["plan"]), value["scratch"])


class WorkerError(Exception):
    """A worker ended without a result; the message is what it wrote last."""


def measure(subjects: Sequence[Subject], plan: Plan, scratch: Path, *, quiet: bool) -> tuple[Row, ...]:
    """Measure every subject against the first, in order: a later one may be what an earlier one saved.

    Sequences of a text are in `scratch` already; otherwise the first worker samples them.

    Raises ValueError for what the user can mend. A worker that ends without a result ends the command.
    """
    rows = []
    try:
        with _progress(quiet, len(subjects)) as step:
            for index, subject in enumerate(subjects):
                job = Job(subject, subjects[0], plan, str(scratch))
                files = file_digests(Path(subject.folder))
                rows.append(Row(subject, run_worker(job, partial(step, index)), files))
    except WorkerError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    return tuple(rows)


@contextmanager
def _progress(quiet: bool, count: int) -> Iterator[Callable[[int, str, float], None]]:
    """Yields step(models done, description, share done of the model at hand)."""
    columns = (TextColumn("{task.description:<30}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = messages()
    hidden = quiet or not console.is_terminal  # a log file gets no bars
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=count)
        yield lambda done, text, share: bar.update(task, description=text, completed=done + share)


def run_worker(job: Job, step: Step) -> Figures:
    """Run one worker to its end and return its figures. It never outlives this call.

    A worker writes one JSON object per line: {"stage": …, "share": …} for each later stage, then
    {"figures": …} or, for something the user can mend, {"error": …}.
    """
    label = job.subject.label
    command = [sys.executable, "-m", "fewbits.cli.measure_worker", job.to_json()]
    log = Path(job.scratch, "worker.log")
    environment = {**os.environ, **QUIET, "OMP_NUM_THREADS": str(job.plan.threads)}
    message: dict[str, Any] = {}
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as worker,
    ):
        try:
            step(f"{label}: {STAGES[0]}", 0.0)
            for line in worker.stdout or ():
                message = json.loads(line)
                if "stage" in message:
                    share = (STAGES.index(message["stage"]) + message["share"]) / len(STAGES)
                    step(f"{label}: {message['stage']}", share)
        except BaseException:
            worker.kill()  # Ctrl-C must leave no worker behind
            raise
    if "error" in message:
        raise ValueError(f"{label}: {message['error']}")
    if "figures" not in message:
        why = " (killed; most likely the memory did not suffice)" if worker.returncode == -9 else ""
        said = log.read_text(errors="replace").strip()
        raise WorkerError(f"{said}\nerror: measuring {label} ended with code {worker.returncode}{why}.")
    figures: dict[str, Any] = message["figures"]
    return Figures(**{**figures, "quality": Quality(**figures["quality"])})


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 as hex of config.json and of the header of every safetensors file: what is cheap to hash and
    still tells checkpoints of different layout apart.

    Raises OSError where there is no config.json or no safetensors file, ValueError for a broken header.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; name the folder of a model")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(
            f"{folder} has no safetensors file; pickled weights are not read, save the model again with "
            "save_pretrained"
        )
    digests = {config.name: hashlib.sha256(config.read_bytes()).hexdigest()}
    return digests | {f"header of {shard.name}": read_header(shard).digest for shard in shards}
