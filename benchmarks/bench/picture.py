"""The roofline of a run: what contenders reach for each number of rows, under what the machine can do."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from bench.contenders import BNB, OURS, OURS_DQ, OURS_INT8X, OURS_LLM, TORCH
from bench.tables import Part, median_time, present, read_roof

# (label, colour, marker); others of a run are not drawn.
DRAWN = (
    (OURS, "#0b6e4f", "o"),
    (OURS_DQ, "#6bbf59", "^"),
    (OURS_INT8X, "#08415c", "s"),
    (OURS_LLM, "#388697", "D"),
    (BNB, "#c1292e", "v"),
    (TORCH, "#8d6a9f", "P"),
    ("OpenVINO NF4 g64", "#e08e45", "X"),
    ("ONNX Runtime g128, level 4", "#7d7d7d", "<"),
    ("llama.cpp IQ4_NL", "#b5a642", ">"),
)
GREY = "#444444"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8}
ROOFS = (("fp32", "float32"), ("bf16", "bfloat16"), ("int8", "int8"))


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the picture of the first linear part to `path` (.svg or .png)."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fewbits"
    from matplotlib import pyplot

    part = next((part for part in results["parts"] if part["work"] == "linear"), None)
    if part is None:
        raise SystemExit("a roofline needs a linear part; this run has none")
    figure, axes = pyplot.subplots(figsize=(10, 6.4), layout="constrained")
    x_range, y_range = curves(axes, part)
    rows, columns = part["shape"]
    axes.set(
        xscale="log", yscale="log", xlim=x_range, ylim=y_range,
        xlabel="operations per byte of stored weight", ylabel="GFLOP/s (int8: GOP/s)",
    )  # fmt: skip
    roofs(axes, part, x_range)
    about = f"{part['threads']} threads, M = {part['rows'][0]} … {part['rows'][-1]}"
    axes.set_title(
        f"y = x·Wᵀ, W {rows}×{columns}, {about}\n{results['cpu']}, {results['date']}",
        fontsize=11,
    )
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.legend(loc="lower right", fontsize=9, framealpha=0.95)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def curves(axes: Any, part: Part) -> tuple[tuple[float, float], tuple[float, float]]:
    """Draw what was reached; returns the ranges that hold it."""
    operations = 2.0 * part["shape"][0] * part["shape"][1]
    known = {one["label"]: one for one in present(part)}
    all_x: list[float] = []
    all_y: list[float] = []
    for label, colour, marker in DRAWN:
        if label not in known:
            continue
        points = [(m, median_time(part, label, m)) for m in part["rows"]]
        xs = [operations * m / known[label]["nbytes"] for m, taken in points if taken]
        ys = [operations * m / taken for m, taken in points if taken]
        axes.plot(xs, ys, color=colour, marker=marker, markersize=6, linewidth=1.4, label=label, zorder=3)
        if label == OURS:
            for (m, taken), x in zip(points, xs, strict=False):
                y = operations * m / taken if taken else 0.0
                axes.annotate(
                    f"M={m}", (x, y), xytext=(0, 8), textcoords="offset points", ha="right", fontsize=8,
                    color=colour, bbox=PAPER, zorder=4,
                )  # fmt: skip
        all_x, all_y = all_x + xs, all_y + ys
    if not all_x:
        raise SystemExit("this run measured nobody that the roofline shows")
    levels = [rate for kind, _ in ROOFS for found in part["roofs"].get(kind, {}).values() for rate in found]
    highest = max([*all_y, max(levels)]) if levels else max(all_y)
    return (min(all_x) * 0.7, max(all_x) * 2.2), (min(all_y) * 0.6, highest * 1.8)


def roofs(axes: Any, part: Part, x_range: tuple[float, float]) -> None:
    """Draw what the machine can do: a slope of bandwidth, up to the level of each arithmetic."""
    bandwidth = [rate for m in part["rows"] for rate in read_roof(part, m)]
    slope = statistics.median(bandwidth) if bandwidth else None  # GB/s, as all rates are per nanosecond
    line = {"color": GREY, "linewidth": 1.2, "zorder": 2}
    highest = 0.0
    for kind, name in ROOFS:
        rates = [rate for found in part["roofs"].get(kind, {}).values() for rate in found]
        if not rates:
            continue
        level = statistics.median(rates)
        highest = max(highest, level)
        start = level / slope if slope else x_range[0]
        axes.plot([max(start, x_range[0]), x_range[1]], [level, level], **line)
        axes.annotate(
            f"{name} {level:.0f}", (x_range[1], level), xytext=(-4, 3), textcoords="offset points",
            ha="right", fontsize=9, color=GREY,
        )  # fmt: skip
    if slope:
        end = highest / slope if highest else x_range[1]
        axes.plot([x_range[0], end], [x_range[0] * slope, end * slope], **line)
        slanted(axes, f"reading {slope:.0f} GB/s", x_range[0] * 1.15, slope)


def slanted(axes: Any, text: str, x: float, slope: float) -> None:
    """Write along the line y = slope · x, above it; limits and scales have to be set."""
    axes.figure.draw_without_rendering()
    (x0, y0), (x1, y1) = axes.transData.transform([(x, x * slope), (2 * x, 2 * x * slope)])
    angle = math.degrees(math.atan2(y1 - y0, x1 - x0))
    axes.annotate(
        text, (x, x * slope), xytext=(-4, 6), textcoords="offset points", rotation=angle,
        rotation_mode="anchor", fontsize=9, color=GREY, bbox=PAPER,
    )  # fmt: skip
