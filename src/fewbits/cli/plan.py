"""`fewbits plan`: how much memory each way to hold a model takes, from headers and config alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fewbits.cli.common import (
    AsJson,
    FailedCheckError,
    find_model,
    format_bytes,
    grouped,
    parse_bytes,
    print_json,
    results,
)
from fewbits.cli.plan_code import code, command
from fewbits.cli.plan_methods import DEFAULT_CONTEXT, Case, Row, Source, mends
from fewbits.machine import accelerators, memory
from fewbits.planner import ROOM, RUNTIME, Device, best
from fewbits.report import Entry

_BOUND = (
    "Weights are exact. Peaks are of memory in use, within 15 % of those measured on a CPU (Llamas of 135 "
    "million parameters, generating and training); heaps may hold more for a while."
)
_MOST_KEPT = 6  # rows
_LEAST_SHARE = 0.01  # of what is kept, to be a row
_STYLES = {"yes": "green", "tight": "yellow", "no": "red", "unknown": "yellow"}


class Train(str, Enum):
    """What may be trained."""

    lora = "lora"


@dataclass(frozen=True)
class Plan:
    """All that is shown. path: as it was given; chosen: the recommended row, for the first device."""

    path: str
    source: Source
    case: Case
    devices: Sequence[Device]
    rows: Sequence[Row]
    chosen: Row | None
    mends: Sequence[str]
    notes: Sequence[str]


def plan(
    path: Annotated[str, typer.Argument(help="Folder of a model, or a model id of the hub.")],
    size: Annotated[
        str | None,
        typer.Option("--memory", help="Plan for a device of this size, such as 24GiB, not for this machine."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a sequence, prompt and answer.", show_default="8192, or the model's limit"
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    train: Annotated[
        Train | None, typer.Option(help="Plan for fine-tuning with LoRA, not for generating.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters, with --train lora.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Show what fits: the memory of each method, what stays in 16 bit, and the best one as code.

    No weight is read: config.json and the headers of the files say it all. Of a model of the hub only
    config.json is fetched. Ends with 1 when nothing fits.

    Example: fewbits plan demo/model --memory 24GiB
    """
    devices = _devices(size)
    source = Source(find_model(path, files=("config.json",)))
    if context is None:
        context = min(DEFAULT_CONTEXT, source.longest or DEFAULT_CONTEXT)
    made = _plan(path, source, Case(context, batch, None if train is None else rank), devices)
    if as_json:
        print_json(_as_json(made))
    else:
        _show(made)
    if made.chosen is None:
        least = min(row.estimate.needed for row in made.rows)
        raise FailedCheckError(
            f"nothing fits {devices[0].name}: need {format_bytes(least)} and {format_bytes(RUNTIME)} for "
            f"Python and its libraries, have {format_bytes(devices[0].capacity)}"
        )


def _devices(size: str | None) -> list[Device]:
    """Where the model may go; the recommendation is for the first."""
    if size is not None:
        return [Device(size, parse_bytes(size))]
    found = [Device(name, one.available) for name, (_, one) in accelerators().items()]
    return [*found, Device("this CPU", memory().available)]


def _plan(path: str, source: Source, case: Case, devices: Sequence[Device]) -> Plan:
    rows = source.rows(case)
    index = best([row.estimate for row in rows], devices[0])
    helps = mends(source, rows, case, devices) if index is None else []
    notes = [*source.notes, _BOUND]
    if source.longest is not None and case.context > source.longest:
        notes.insert(0, f"The model was made for at most {source.longest:,} tokens.")
    return Plan(path, source, case, devices, rows, None if index is None else rows[index], helps, notes)


# --- output ------------------------------------------------------------------------------------------


def _show(made: Plan) -> None:
    console, source, device = results(), made.source, made.devices[0]
    free = ", ".join(f"{one.name} with {format_bytes(one.capacity)} free" for one in made.devices)
    console.print(f"\n[bold]{source.architecture}[/], {source.parameters:,} parameters in {source.dtype}")
    console.print(f"For {made.case.purpose}, on {free}\n")
    console.print(_table(made))
    for note in made.notes:
        console.print(note, style="dim", markup=False)
    if made.chosen is None:
        console.print(f"\n[bold]Nothing fits {device.name}.[/] What would help:")
        for help in made.mends:
            console.print(f"  {help}", markup=False)
        return
    row = made.chosen
    if row.method.format is not None:
        _show_kept(made, row)
    console.print(f"\n[bold]Recommended: {row.label}[/]. {_why(made)}\n")
    for line in code(made.path, row, source, made.case).splitlines():
        console.print(f"    {line}".rstrip(), markup=False, soft_wrap=True)
    console.print(f"\nNext: [bold]{escape(command(made.path, row, made.source))}[/]\n", soft_wrap=True)


def _table(made: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column("", no_wrap=True)
    extra = "KV cache" if made.case.rank is None else "adapters"
    for head in ("weights", "bits per\nweight", "peak while\nloading", extra, "activations", "running"):
        table.add_column(head, justify="right", no_wrap=True)
    for device in made.devices:
        table.add_column(f"fits\n{device.name}", no_wrap=True)
    for row in made.rows:
        one = row.estimate
        sizes = (one.cache if made.case.rank is None else one.adapters, one.activations, one.running)
        answers = [device.fits(one) for device in made.devices]
        table.add_row(
            row.label,
            format_bytes(one.weights),
            f"{row.bits_per_weight:.2f}",
            format_bytes(one.loading),
            *("unknown" if size is None else format_bytes(size) for size in sizes),
            *(Text(answer, _STYLES[answer]) for answer in answers),
        )
    return table


def _why(made: Plan) -> str:
    """Why the chosen row, in a sentence."""
    row, device = made.chosen, made.devices[0]
    if row is None:
        return ""
    if device.fits(row.estimate) == "unknown":
        return f"Its weights fit {device.name}; what running it takes is not known."
    if device.fits(row.estimate) == "tight":
        return (
            f"It only just fits {device.name}, and nothing fits with room to spare ({100 * ROOM:.0f} %, and "
            f"{format_bytes(RUNTIME)} for Python and its libraries)."
        )
    need = f"it needs {format_bytes(row.estimate.needed)} of {format_bytes(device.usable)} that can be used"
    if row.method.format is None:
        return f"It fits {device.name} with room to spare and loses nothing; {need}."
    before = made.rows[made.rows.index(row) - 1]
    return (
        f"The closest to the original that fits {device.name} with room to spare; {need}, and "
        f"{before.label} would need {format_bytes(before.estimate.needed)}."
    )


def _show_kept(made: Plan, row: Row) -> None:
    console = results()
    groups = grouped(row.kept)
    total = sum(entry.nbytes for entry in row.kept)
    console.print(f"\nWith {row.label}, {format_bytes(total)} stay in {made.source.dtype}:")
    large = [group for group in groups if sum(one.nbytes for one in group[1]) >= _LEAST_SHARE * total]
    large = large[:_MOST_KEPT]
    table = Table(box=None, pad_edge=False, padding=(0, 2), show_header=False)
    table.add_column(no_wrap=True, max_width=52)
    table.add_column(justify="right", no_wrap=True)
    for name, entries in large:
        size = format_bytes(sum(entry.nbytes for entry in entries))
        shown = name if len(entries) == 1 else f"{name} ({len(entries)})"
        table.add_row(Text(f"  {shown}"), size, Text(entries[0].reason, "dim"))
    if rest := [entry for _, entries in groups[len(large) :] for entry in entries]:
        table.add_row(f"  {len(rest)} more", format_bytes(sum(entry.nbytes for entry in rest)), "")
    console.print(table)


def _as_json(made: Plan) -> dict[str, Any]:
    row, case = made.chosen, made.case
    recommended = None
    if row is not None:
        recommended = {
            "method": row.method.key,
            "why": _why(made),
            "code": code(made.path, row, made.source, case),
            "command": command(made.path, row, made.source),
            "kept": [_kept_json(name, entries) for name, entries in grouped(row.kept)],
        }
    return {
        "path": made.path,
        "architecture": made.source.architecture,
        "parameters": made.source.parameters,
        "dtype": made.source.dtype,
        "context": case.context,
        "batch": case.batch,
        "train": None if case.rank is None else {"method": "lora", "rank": case.rank},
        "devices": [{"name": one.name, "bytes": one.capacity, "usable": one.usable} for one in made.devices],
        "methods": [_row_json(one, made.devices) for one in made.rows],
        "recommended": recommended,
        "mends": list(made.mends),
        "notes": list(made.notes),
    }


def _kept_json(name: str, entries: Sequence[Entry]) -> dict[str, Any]:
    size = sum(entry.nbytes for entry in entries)
    return {"name": name, "tensors": len(entries), "bytes": size, "reason": entries[0].reason}


def _row_json(row: Row, devices: Sequence[Device]) -> dict[str, Any]:
    one = row.estimate
    return {
        "method": row.method.key,
        "label": row.label,
        "format": row.method.format,
        "bits_per_weight": row.bits_per_weight,
        **asdict(one),
        "running": one.running,
        "fits": {device.name: device.fits(one) for device in devices},
    }
