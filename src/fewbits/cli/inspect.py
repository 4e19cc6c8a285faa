"""`fewbits inspect`: what every tensor of a checkpoint is stored as, straight from headers and config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from fewbits.checkpoint.folder import Folder, open_folder
from fewbits.checkpoint.safetensors import shown
from fewbits.checkpoint.stored import ROLES, StoredWeight, stored_weights
from fewbits.cli.common import AsJson, find_model, format_bytes, print_json, results

_MOST_KEPT = 20  # rows


@dataclass(frozen=True)
class Sum:
    """Several weights together. weights: their number, bytes: of all their parts."""

    weights: int
    bytes: int

    @staticmethod
    def of(stored: Iterable[StoredWeight]) -> Sum:
        """The sum of `stored`."""
        listed = list(stored)
        return Sum(sum(weight.count for weight in listed), sum(weight.nbytes for weight in listed))

    @property
    def bits_per_weight(self) -> float:
        """0 when there are no weights."""
        return 8 * self.bytes / self.weights if self.weights else 0.0


def inspect(
    path: Annotated[str, typer.Argument(help="Folder of a model, or a model id of the hub.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every weight.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint stores: roles, formats, bytes, bits per weight, and what was kept and why.

    Reads headers and config only, so that size does not matter. Knows
    plain checkpoints, bitsandbytes 4 and 8 bit and fewbits' own files; of
    what other quantizers write, the sizes.

    Example: fewbits inspect demo/model --tensors
    """
    folder = open_folder(find_model(path))
    weights = sorted(stored_weights(folder), key=_natural_order)
    if as_json:
        print_json(_as_json(folder, weights))
        return
    _show(folder, weights)
    if tensors:
        console, table = results(), _tensor_table(weights)
        # A line for each, however long: this is for searching, too.
        needed = console.measure(table, options=console.options.update(width=1000)).maximum
        console.width = max(console.width, needed)
        console.print(table)


def _natural_order(weight: StoredWeight) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in weight.name.split(".")]


def _as_json(folder: Folder, weights: Sequence[StoredWeight]) -> dict[str, Any]:
    total = Sum.of(weights)
    return {
        "path": str(folder.path),
        "architecture": _architecture(folder),
        "method": _method(folder, weights),
        "files": len(folder.headers),
        "weights": total.weights,
        "bytes": total.bytes,
        "bits_per_weight": total.bits_per_weight,
        "bytes_in_16_bit": 2 * total.weights,
        "roles": [
            {"role": role, "stored": stored, **_figures(Sum.of(group), total)}
            for (role, stored), group in _by_role(weights).items()
        ],
        "tensors": [_tensor_json(weight) for weight in weights],
    }


def _figures(part: Sum, total: Sum) -> dict[str, Any]:
    return {
        "weights": part.weights,
        "bytes": part.bytes,
        "share": _share(part, total),
        "bits_per_weight": part.bits_per_weight,
    }


def _tensor_json(weight: StoredWeight) -> dict[str, Any]:
    return {
        "name": weight.name,
        "shape": None if weight.shape is None else list(weight.shape),
        "weights": weight.count,
        "stored": weight.stored,
        "bytes": weight.nbytes,
        "bits_per_weight": weight.bits_per_weight,
        "role": weight.role,
        "quantized": weight.quantized,
        "reason": weight.reason,
        "problem": weight.problem,
    }


def _show(folder: Folder, weights: Sequence[StoredWeight]) -> None:
    console = results()
    total = Sum.of(weights)
    plain = 2 * total.weights
    console.print(
        f"\n{_architecture(folder)}: {total.weights:,} weights in {format_bytes(total.bytes)}, "
        f"{total.bits_per_weight:.2f} bits per weight; {_method(folder, weights)}",
        f"In 16 bit it would take {format_bytes(plain)}, {_times(plain, total.bytes)}.\n",
        sep="\n",
        markup=False,
    )
    console.print(_role_table(weights, total))
    if any(weight.quantized for weight in weights):
        kept = [weight for weight in weights if not weight.quantized]
        large = [weight for weight in kept if len(weight.shape or ()) > 1]
        small = Sum.of(weight for weight in kept if len(weight.shape or ()) < 2)
        if large:
            console.print(_kept_table(large))
        note = f"Kept with one dimension: {len(kept) - len(large)} tensors, {format_bytes(small.bytes)}."
        console.print(note, style="dim")
    for weight in weights:
        if weight.problem:
            console.print(weight.problem, style="red", markup=False)


def _architecture(folder: Folder) -> str:
    """The class that the config names, or its model type."""
    named = folder.config.get("architectures")
    first = named[0] if isinstance(named, list) and named else folder.config.get("model_type")
    return shown(first) if isinstance(first, str) else "unknown architecture"


def _method(folder: Folder, weights: Sequence[StoredWeight]) -> str:
    """Who quantized it, or "not quantized"."""
    method = (folder.quantization or {}).get("quant_method")
    if isinstance(method, str):
        return shown(method)
    return "bitsandbytes" if any(weight.quantized for weight in weights) else "not quantized"


def _times(plain: int, stored: int) -> str:
    if stored == plain:
        return "just as much"
    return f"{plain / stored:.2f} times as much" if stored else "and takes nothing here"


def _by_role(weights: Sequence[StoredWeight]) -> dict[tuple[str, str], list[StoredWeight]]:
    """(role, stored as) → weights; roles in their order, what takes most first."""
    groups: dict[tuple[str, str], list[StoredWeight]] = {}
    for weight in weights:
        groups.setdefault((weight.role, weight.stored), []).append(weight)

    def order(key: tuple[str, str]) -> tuple[int, int]:
        return ROLES.index(key[0]), -Sum.of(groups[key]).bytes

    return {key: groups[key] for key in sorted(groups, key=order)}


def _share(part: Sum, total: Sum) -> float:
    return part.bytes / total.bytes if total.bytes else 0.0


def _table(*heads: str, right: Iterable[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for head in heads:
        numbers = head in right
        table.add_column(head, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    return table


def _role_table(weights: Sequence[StoredWeight], total: Sum) -> Table:
    numbers = ("weights", "bytes", "share", "bits per\nweight")
    table = _table("role", "stored as", *numbers, right=numbers)
    for (role, stored), group in _by_role(weights).items():
        part = Sum.of(group)
        table.add_row(
            role,
            Text(stored),
            f"{part.weights:,}",
            format_bytes(part.bytes),
            f"{100 * _share(part, total):.1f} %",
            f"{part.bits_per_weight:.2f}",
        )
    table.add_section()
    table.add_row(
        "all",
        "",
        f"{total.weights:,}",
        format_bytes(total.bytes),
        "100.0 %",
        f"{total.bits_per_weight:.2f}",
        style="bold",
    )
    return table


def _kept_table(kept: Sequence[StoredWeight]) -> Table:
    """Kept weights, largest first; those of the same name but for numbers are one row."""
    groups: dict[tuple[str, str, str], list[StoredWeight]] = {}
    for weight in kept:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", weight.name)
        groups.setdefault((name, weight.stored, weight.reason), []).append(weight)
    rows = sorted(groups.items(), key=lambda row: -Sum.of(row[1]).bytes)
    table = _table("kept", "stored as", "bytes", "why", right=["bytes"])
    table.columns[0].no_wrap, table.columns[-1].min_width = True, 24
    for (name, stored, reason), group in rows[:_MOST_KEPT]:
        part = Sum.of(group)
        label = shown(group[0].name) if len(group) == 1 else f"{len(group)} x {shown(name)}"
        table.add_row(Text(label), stored, format_bytes(part.bytes), Text(shown(reason)))
    if rest := rows[_MOST_KEPT:]:
        part = Sum.of(weight for _, group in rest for weight in group)
        table.add_row(f"{len(rest)} more; --tensors lists all", "", format_bytes(part.bytes), "")
    return table


def _tensor_table(weights: Sequence[StoredWeight]) -> Table:
    numbers = ("shape", "bytes", "bits per\nweight")
    table = _table("tensor", "shape", "stored as", "bytes", "bits per\nweight", right=numbers)
    for weight in weights:
        count = f"{weight.count} in all"
        shape = count if weight.shape is None else " x ".join(map(str, weight.shape)) or "scalar"
        table.add_row(
            Text(shown(weight.name)),
            shape,
            Text(weight.stored),
            format_bytes(weight.nbytes),
            f"{weight.bits_per_weight:.2f}",
        )
    return table
