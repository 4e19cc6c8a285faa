"""What the commands share: where results and messages go, sizes as text, progress, which model is meant."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from fewbits.machine import peak_resident_bytes, resident_bytes
from fewbits.report import Entry

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no notes.")]

MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md")

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}


class FailedCheckError(Exception):
    """The command worked, and what it checked is not as it should be: exit code 1, message on stderr."""


def results() -> Console:
    """Where results go: stdout. A pipe or file, which has no width to respect, gets 100 columns."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=100)


def messages() -> Console:
    """Where progress and notes go: stderr."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """`value` on stdout as JSON; nan and infinity, which JSON has not, become null."""
    typer.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_bytes(count: float) -> str:
    """Bytes in decimal units, as disks and checkpoints are sold: 3.87 GB."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if abs(count) >= 1000**power:
            return f"{count / 1000**power:.2f} {unit}"
    return f"{count:.0f} B"


def parse_bytes(text: str) -> int:
    """Bytes that a size such as "5GB" (decimal), "24GiB" (binary) or "1000000" means."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in _UNITS or len(found[1]) > 20:
        raise typer.BadParameter(f"{text!r} is no size; write 5GB, 24GiB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def find_model(given: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """The folder that `given` names: a path, or a model id of the hub in its local cache or fetched.

    The hub's own settings are honoured: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN. Only `files` are
    fetched. FileNotFoundError when there is no such thing.
    """
    path = Path(given)
    if given and path.is_dir():
        return path
    if given and path.exists():
        raise NotADirectoryError(f"{given} is a file; name the folder of a model (with its config.json)")
    is_id = re.fullmatch(r"[a-zA-Z0-9][\w.-]*/[\w.-]+", given, re.ASCII)
    if not is_id or path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {given}; name the folder of a model, or a model id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(given, allow_patterns=[*files]))
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"{given} is neither a folder here nor a model that the hub gives: {error}"
        ) from error


def grouped(kept: Iterable[Entry]) -> list[tuple[str, list[Entry]]]:
    """(name with * for the numbers of layers, entries) of kept weights, what takes most first."""
    groups: dict[str, list[Entry]] = {}
    for entry in kept:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", entry.name), []).append(entry)
    return sorted(groups.items(), key=lambda group: -sum(entry.nbytes for entry in group[1]))


class _MemoryColumn(ProgressColumn):
    """Resident set of this process: now, and the peak so far."""

    def render(self, task: Task) -> Text:
        now, peak = format_bytes(resident_bytes()), format_bytes(peak_resident_bytes())
        return Text(f"memory {now}, peak {peak}", style="dim")


@contextmanager
def byte_progress(quiet: bool) -> Iterator[Progress]:
    """A progress bar of bytes on stderr: done, bytes/s, time left, memory. Nothing in a log file."""
    console = messages()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        _MemoryColumn(),
    )
    hidden = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        yield progress
