"""The figures of a run as text."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from bench.contenders import OURS, OURS_DQ

Part = dict[str, Any]
BUSY = 0.5  # load average before a run above which its figures mean little
BASE = {"linear": OURS, "dequantize": OURS, "quantize": OURS_DQ}


def as_text(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in sorted(results["versions"].items()))
    lines = [
        f"{results['cpu']}, {results['cache_bytes'] >> 20} MiB of last-level cache; {results['date']}",
        versions,
        f"{results['command']}   {results['wall_seconds']:.0f} s",
        f"medians over rounds of the {results['statistic']} of each slice",
    ]
    if results["load_average"] > BUSY:
        lines.append(
            f"THE MACHINE WAS BUSY before this run (load {results['load_average']:.1f}): do not trust it"
        )
    for part in results["parts"]:
        lines += ["", *(linear_part(part) if part["work"] == "linear" else codes_part(part))]
    lost = {**results["lost"], **refusals(results)}
    lines += ["", "left out:" if lost else "nobody was left out"]
    lines += [f"  {name}: {reason}" for name, reason in sorted(lost.items())]
    return "\n".join(lines)


def refusals(results: dict[str, Any]) -> dict[str, str]:
    return {
        f"{one['label']} ({part['work']}, {part['shape'][0]}×{part['shape'][1]})": one["refused"]
        for part in results["parts"]
        for one in part["contenders"]
        if "refused" in one
    }


def linear_part(part: Part) -> list[str]:
    lines = [f"## {title(part)}, {part['rounds']} rounds", "", roofs_line(part)]
    base = next((one["label"] for one in present(part)), OURS)
    for about, heading, cell in (
        ("", "µs", lambda one, m: time_cell(part, one, m)),
        (f"Time as a multiple of {base}:", "", lambda one, m: ratio_cell(part, one, m, base)),
        (
            "Share of the roof that is nearer, r: read bandwidth, a: arithmetic:",
            "",
            lambda one, m: share_cell(part, one, m),
        ),
    ):
        lines += ["", about] if about else [""]
        lines += [block(part, heading, cell)]
    lines += ["", errors_block(part)]
    return lines


def title(part: Part) -> str:
    work = {"linear": "linear", "dequantize": "dequantize to bfloat16", "quantize": "quantize from bfloat16"}
    threads = f"{part['threads']} thread{'s' if part['threads'] > 1 else ''}"
    return f"{work[part['work']]}, {part['shape'][0]}×{part['shape'][1]} (N×K), {threads}"


def roofs_line(part: Part) -> str:
    rates = {
        name: statistics.median(rate for rates in by_rows.values() for rate in rates)
        for name, by_rows in part["roofs"].items()
        if by_rows
    }
    unit = {"read": "GB/s", "read, 2 MiB pages": "GB/s", "write, streaming": "GB/s"}
    return "roofs: " + "; ".join(
        f"{name} {rate:.0f} {unit.get(name, 'GFLOP/s')}" for name, rate in rates.items()
    )


def block(part: Part, heading: str, cell: Callable[[Part, int], str]) -> str:
    rows = [f"{heading:<34}" + "".join(f"{f'M={m}':>9}" for m in part["rows"])]
    for one in present(part):
        rows.append(f"{one['label']:<34}" + "".join(f"{cell(one, m):>9}" for m in part["rows"]))
    return "\n".join(rows)


def present(part: Part) -> list[Part]:
    return [one for one in part["contenders"] if part["ns"].get(one["label"])]


def times(part: Part, label: str, m: int) -> list[float]:
    """Nanoseconds, one per round; empty when not measured."""
    found: list[float] = part["ns"].get(label, {}).get(str(m), [])
    return found


def median_time(part: Part, label: str, m: int) -> float | None:
    found = times(part, label, m)
    return statistics.median(found) if found else None


def ratio(part: Part, label: str, m: int, to: str, to_m: int | None = None) -> float | None:
    """Median over rounds of label's time over `to`'s time."""
    above, below = times(part, label, m), times(part, to, m if to_m is None else to_m)
    pairs = [a / b for a, b in zip(above, below, strict=False) if b]
    return statistics.median(pairs) if pairs else None


def read_roof(part: Part, m: int) -> list[float]:
    """Bytes per nanosecond in each round, with the kind of pages that read faster."""
    kinds = [part["roofs"].get(name, {}).get(str(m), []) for name in ("read", "read, 2 MiB pages")]
    return max((kind for kind in kinds if kind), key=statistics.median, default=[])


def share(amount: float, taken: list[float], roof: list[float]) -> float | None:
    """Median over rounds of amount / time / roof."""
    found = [amount / ns / rate for ns, rate in zip(taken, roof, strict=False) if rate]
    return statistics.median(found) if found else None


def read_share(part: Part, one: Part, m: int) -> float | None:
    return share(one["nbytes"], times(part, one["label"], m), read_roof(part, m))


def arithmetic_share(part: Part, one: Part, m: int) -> float | None:
    rows, columns = part["shape"]
    roofs = part["roofs"]
    kind = next((k for k in (one["arithmetic"], "fp32") if roofs.get(k, {}).get(str(m))), None)
    if kind is None:
        return None
    return share(2.0 * rows * columns * m, times(part, one["label"], m), roofs[kind][str(m)])


def time_cell(part: Part, one: Part, m: int) -> str:
    value = median_time(part, one["label"], m)
    return "" if value is None else f"{value / 1e3:,.0f}".replace(",", " ")


def ratio_cell(part: Part, one: Part, m: int, to: str) -> str:
    value = ratio(part, one["label"], m, to)
    return "" if value is None else f"{value:.2f}"


def share_cell(part: Part, one: Part, m: int) -> str:
    found = [(read_share(part, one, m) or 0.0, "r"), (arithmetic_share(part, one, m) or 0.0, "a")]
    value, letter = max(found)
    return f"{value:.0%} {letter}" if value and times(part, one["label"], m) else ""


def errors_block(part: Part) -> str:
    lines = [f"{'relative errors':<34}{'product':>12}{'with weights':>14}{'bits/weight':>13}"]
    weights = part["shape"][0] * part["shape"][1]
    for one in present(part):
        cells = [f"{one[key]:.1e}" if key in one else "" for key in ("product_error", "total_error")]
        lines.append(f"{one['label']:<34}{cells[0]:>12}{cells[1]:>14}{one['nbytes'] * 8 / weights:>13.2f}")
    return "\n".join(lines)


def codes_part(part: Part) -> list[str]:
    """Dequantizing is held to the bytes it writes, quantizing to those it reads; both are bfloat16."""
    base, roof = BASE[part["work"]], part["roofs"].get("write, streaming", {}).get("0", [])
    verb = "written"
    if part["work"] == "quantize":
        roof, verb = read_roof(part, 0), "read"
    moved = 2 * part["shape"][0] * part["shape"][1]
    lines = [f"## {title(part)}, {part['rounds']} rounds", "", roofs_line(part), ""]
    lines += [f"{'':<34}{'µs':>10}{f'GB/s {verb}':>14}{'of roof':>9}  × {base}"]
    for one in present(part):
        value, of_roof = median_time(part, one["label"], 0), share(moved, times(part, one["label"], 0), roof)
        multiple = ratio(part, one["label"], 0, base)
        assert value is not None
        cells = [
            f"{time_cell(part, one, 0):>10}{moved / value:>14.2f}",
            f"{'' if of_roof is None else f'{of_roof:.0%}':>9}",
            f"  {'' if multiple is None else f'{multiple:.2f}'}",
        ]
        lines.append(f"{one['label']:<34}" + "".join(cells))
    return lines
