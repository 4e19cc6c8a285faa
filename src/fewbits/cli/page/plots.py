"""The two plots of the page: size against quality, and the errors of weights by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import mul

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator, MultipleLocator, NullLocator
from matplotlib.transforms import Affine2D

from fewbits.cli.measured import SAME, Comparison, Row
from fewbits.cli.page.drawing import (
    ACCENT,
    FAINT,
    HEAT_STEPS,
    INK,
    MUTED,
    ON_HIGH,
    ON_LOW,
    PAPER,
    add_axes,
    heat,
    new_figure,
    style,
    to_svg,
)

WIDE, NARROW = 1000, 340  # CSS pixels
MAX_KINDS = 16  # rows of the heat map
LABELLED_LAYERS = 12  # up to so many, cells hold their numbers

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


# --- size against quality ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """x: weights in the unit of the axis; y, half: KL divergence and half its interval, millinats/token."""

    label: str
    x: float
    y: float
    half: float


def size_quality(comparison: Comparison) -> str:
    """<svg> of every model as a point: bytes of weights against KL divergence. Empty if no model has one."""
    largest = max(row.figures.weight_bytes for row in comparison.rows)
    scale, unit = next((pair for pair in _UNITS if largest >= pair[0]), (1.0, "bytes"))
    points = _points(comparison.others, scale)
    if not points:
        return ""
    reference = Point(comparison.reference.label, comparison.reference.figures.weight_bytes / scale, 0, 0)
    title = (
        f"Weights in {unit} against KL divergence from {comparison.reference.label} in millinats per token: "
        + "; ".join(f"{point.label}: {point.x:.2f}, {point.y:.2f} ± {point.half:.2f}" for point in points)
    )
    drawn = ""
    for width, height, css_class in ((540, 400, "wide"), (NARROW, 330, "narrow")):
        with style(f"size-quality-{css_class}"):
            figure = new_figure(width, height)
            axes = add_axes(figure, 54, 46, width - 62, height - 94)
            _draw_points(axes, points, reference)
            axes.set_xlabel(f"weights, {unit}")
            _draw_bits(axes, comparison.rows, scale)
            axes.set_ylabel("KL divergence, millinats/token")
            drawn += to_svg(figure, title, css_class)
    return drawn


def _points(rows: Sequence[Row], scale: float) -> list[Point]:
    """One per model with a finite divergence; models at the same place share one."""
    points: list[Point] = []
    for row in rows:
        quality = row.figures.quality
        if not math.isfinite(quality.kl_mean):
            continue
        y = 1e3 * quality.kl_mean if quality.kl_mean > SAME else 0.0
        half = 1e3 * quality.kl_interval95
        place = (row.figures.weight_bytes / scale, y, half)
        same = next((one for one in points if (one.x, one.y, one.half) == place), None)
        if same is not None:
            points[points.index(same)] = Point(f"{same.label} = {row.label}", *place)
        else:
            points.append(Point(row.label, *place))
    return points


def _draw_points(axes: Axes, points: Sequence[Point], reference: Point) -> None:
    positive = [point.y for point in points if point.y > 0]
    floor = _set_scale(axes, points, positive)
    everything = [*points, reference]
    axes.set_xlim(0, 1.12 * max(point.x for point in everything))
    axes.grid(axis="y", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3)
    for point in points:
        y = point.y or floor
        axes.vlines(
            point.x, max(floor, y - point.half), y + point.half, color=ACCENT, linewidth=1.5, zorder=3
        )
        axes.plot(point.x, y, "o", color=ACCENT, markersize=6, zorder=4)
    axes.plot(
        reference.x,
        floor,
        "D",
        markerfacecolor=PAPER,
        markeredgecolor=INK,
        markersize=7,
        zorder=4,
        clip_on=False,
    )
    wide = axes.bbox.width > NARROW
    named = [(_short(point.label) if wide else _folded(point.label), point) for point in everything]
    _label(axes, [(text, point.x, point.y or floor) for text, point in reversed(named)])


def _draw_bits(axes: Axes, rows: Sequence[Row], scale: float) -> None:
    """Bits per weight along the top, where they are the same thing as bytes."""
    counts = {row.figures.parameters for row in rows}
    if len(counts) == 1:
        bits = 8 * scale / counts.pop()
        top = axes.secondary_xaxis("top", functions=(partial(mul, bits), partial(mul, 1 / bits)))
        top.set_xlabel("bits per weight", color=MUTED)
        top.spines[:].set_visible(False)
        top.tick_params(length=3)
        top.xaxis.set_major_locator(MultipleLocator(2 if bits * axes.get_xlim()[1] < 24 else 4))


def _set_scale(axes: Axes, points: Sequence[Point], positive: Sequence[float]) -> float:
    """Scale the y axis, logarithmic where values differ much, and return the y at which zero is drawn."""
    if not positive or max(positive) < 8 * min(positive):
        top = max(point.y + point.half for point in points) or 1.0
        axes.set_ylim(0, 1.15 * top)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        return 0.0
    # Zero has no place on a logarithmic axis: it gets the bottom edge, below a gap, and a tick of its own.
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(1.2 * max(positive)))
    floor: float = 10.0 ** (low - 0.7)
    axes.set_yscale("log")
    axes.set_ylim(floor, 2 * max(positive))
    ticks = [10.0**power for power in range(low, high + 1)]
    between = [3 * tick for tick in ticks[:-1]] if high - low <= 3 else []
    shown = sorted(tick for tick in [*ticks, *between] if tick <= axes.get_ylim()[1])
    axes.set_yticks([floor, *shown], ["0", *(f"{tick:g}" for tick in shown)])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.axhspan(floor, 10.0 ** (low - 0.35), facecolor=FAINT, alpha=0.35, linewidth=0, zorder=0)
    return floor


def _label(axes: Axes, items: Sequence[tuple[str, float, float]]) -> None:
    """Name each point beside it, at the first of some places where it covers nothing."""
    spots = [axes.transData.transform((x, y)) for _, x, y in items]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    frame = axes.get_window_extent()
    for text, x, y in items:
        on_axis = axes.transData.transform((x, y))[1] < frame.y0 + 5
        for dx, dy, across, up in (_ABOVE, *_PLACES) if on_axis else _PLACES:
            note = axes.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", ha=across, va=up, color=INK, zorder=5
            )
            extent = note.get_window_extent()
            box = (extent.x0, extent.y0, extent.x1, extent.y1)
            inside = frame.x0 <= extent.x0 and extent.x1 <= frame.x1 + 8 and extent.y1 <= frame.y1
            if (inside and not any(_overlap(box, other) for other in taken)) or (dx, dy) == _PLACES[-1][:2]:
                taken.append(box)
                break
            note.remove()


_ABOVE = (0, 8, "center", "bottom")
_PLACES = (
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (9, 3, "left", "top"),
    (9, -3, "left", "bottom"),
    _ABOVE,
    (0, -12, "center", "top"),
    (8, 12, "left", "bottom"),
    (-8, 12, "right", "bottom"),
    (8, -12, "left", "top"),
    (9, 24, "left", "bottom"),
)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _folded(text: str) -> str:
    """Names of models at one place, a line each."""
    return "\n= ".join(_short(name, 24) for name in text.split(" = "))


def _short(text: str, most: int = 48) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


# --- errors of weights ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Errors of one model. cells: (kind, layer) → relative error; layer -1 for what lies in no layer."""

    label: str
    cells: dict[tuple[str, int], float]


@dataclass(frozen=True)
class Scale:
    """Logarithmic, so that a layer that is half again worse than its neighbours shows in every model."""

    low: float
    high: float

    @classmethod
    def over(cls, grids: Sequence[Grid]) -> Scale:
        """From the least to the largest error, but neither less than a factor of 3 nor more than of 1000."""
        found = [error for grid in grids for error in grid.cells.values() if 0 < error < math.inf] or [1.0]
        return cls(max(min(*found, max(found) / 3), max(found) / 1000), max(found))

    def share(self, error: float) -> float:
        """Where `error` lies, 0 to 1."""
        if not self.low < error < self.high:
            return 0.0 if error <= self.low else 1.0
        return math.log(error / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """The ends, and round errors well between them."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        round_ones = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        return [self.low, *(one for one in round_ones if 0.15 < self.share(one) < 0.85), self.high]


def layer_errors(comparison: Comparison) -> str:
    """<svg> of relative weight errors, layers across and kinds of weights down, a panel per model on one
    scale. Empty if no weight of any model differs."""
    grids = _grids(comparison.others)
    if not grids:
        return ""
    scale = Scale.over(grids)
    title = (
        f"Relative errors of weights by layer and kind, {_percent(scale.low)} to {_percent(scale.high)}: "
        + ", ".join(grid.label for grid in grids)
    )
    drawn = ""
    for width, css_class in ((WIDE, "wide"), (NARROW, "narrow")):
        with style(f"layer-errors-{css_class}"):
            drawn += to_svg(_draw_grids(grids, scale, width), title, css_class)
    return drawn


def _grids(rows: Sequence[Row]) -> list[Grid]:
    """Of the models with errors; models with the same errors share one."""
    grids: list[Grid] = []
    for row in rows:
        cells: dict[tuple[str, int], float] = {}
        for name, error in (row.figures.weight_errors or {}).items():
            place = kind_and_layer(name)
            cells[place] = max(error, cells.get(place, 0.0))
        if not any(cells.values()):
            continue
        same = next((grid for grid in grids if grid.cells == cells), None)
        if same is not None:
            grids[grids.index(same)] = Grid(f"{same.label} = {row.label}", cells)
        else:
            grids.append(Grid(row.label, cells))
    return grids


def kind_and_layer(name: str) -> tuple[str, int]:
    """("self_attn.q_proj", 3) for "model.layers.3.self_attn.q_proj.weight"; layer -1 outside of layers.

    Further numbers, of experts say, become *: a cell then shows the largest of them.
    """
    parts = name.removesuffix(".weight").split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    if not numbers:
        return ".".join(parts), -1
    rest = parts[numbers[0] + 1 :]
    kind = ".".join("*" if part.isdecimal() else part for part in rest) or parts[numbers[0] - 1]
    return kind, int(parts[numbers[0]])


def kinds_of(grids: Sequence[Grid]) -> list[str]:
    """The kinds with errors, as they come in the model; if too many, those with the largest errors."""
    worst: dict[str, float] = {}
    for grid in grids:
        for (kind, _), error in grid.cells.items():
            worst[kind] = max(error, worst.get(kind, 0.0))
    order = [kind for kind in worst if worst[kind] > 0]
    kept = sorted(order, key=lambda kind: -worst[kind])[:MAX_KINDS]
    return [kind for kind in order if kind in kept]


def _draw_grids(grids: Sequence[Grid], scale: Scale, width: int) -> Figure:
    kinds = kinds_of(grids)
    layers = sorted({layer for grid in grids for kind, layer in grid.cells if kind in kinds and layer >= 0})
    names = _kind_labels(kinds)
    left, gap, count = round(18 + 7.2 * max(len(name) for name in names)), 22, max(len(layers), 1)
    room = width - left - 12
    numbered = len(layers) <= LABELLED_LAYERS
    least, high = (34, 22) if numbered else (10, 16)
    across = max(1, min(len(grids), (room + gap) // (count * least + gap)))
    down = math.ceil(len(grids) / across)
    across = math.ceil(len(grids) / down)  # rows of equal length
    cell = min(80.0, ((room + gap) / across - gap) / count)
    cell = math.floor(cell) if cell >= 10 else cell  # whole pixels are sharp, and short to write
    step = high * len(kinds) + 64
    figure = new_figure(width, step * down + 48)
    for index, grid in enumerate(grids):
        row, column = divmod(index, across)
        place = (left + column * (count * cell + gap), 26 + row * step)
        axes = add_axes(figure, *place, count * cell, high * len(kinds))
        _draw_grid(axes, grid, kinds, layers, scale, cell if numbered else 0)
        axes.set_yticks(range(len(kinds)), names if column == 0 else [])
        axes.set_title(_short(grid.label), loc="left", fontsize=12, color=INK, pad=6)
        if index >= len(grids) - across:
            axes.set_xlabel("layer")
    _draw_scale(figure, left, scale, min(220, room))
    return figure


def _draw_grid(
    axes: Axes, grid: Grid, kinds: Sequence[str], layers: Sequence[int], scale: Scale, cell: float
) -> None:
    """cell: width of a cell that is to hold its number, in pixels; 0 for no numbers."""
    count = max(len(layers), 1)
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=3)
    every = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 100, count) if 13 * step >= count)
    axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    shades: dict[str, list[Path]] = {}
    for (kind, layer), error in grid.cells.items():
        if kind not in kinds:
            continue
        # What lies in no layer spans them all.
        column, span = (layers.index(layer), 1) if layer >= 0 else (0, count)
        row, share = kinds.index(kind), scale.share(error)
        if error:
            square = Path.unit_rectangle().transformed(_move(column - 0.5, row - 0.5, span))
            shades.setdefault(heat(share), []).append(square)
        if cell >= 28 or not error:
            shade = MUTED if not error else ON_HIGH if share > 0.5 else ON_LOW
            middle = column + (span - 1) / 2
            text = f"{100 * error:.{1 if error >= 0.01 else 2}f}" if error else "·"
            axes.text(middle, row, text, ha="center", va="center_baseline", fontsize=11, color=shade)
    # All cells of a shade in one path: a page of a large model stays small.
    for colour, squares in shades.items():
        path = Path.make_compound_path(*squares)
        axes.add_patch(PathPatch(path, facecolor=colour, edgecolor=PAPER, linewidth=0.8, clip_on=False))


def _move(x: float, y: float, width: float) -> Affine2D:
    return Affine2D().scale(width, 1).translate(x, y)


def _kind_labels(kinds: Sequence[str]) -> list[str]:
    """The last parts of the names where these differ, else the whole."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    unique = [last.count(name) == 1 and not re.fullmatch(r"\*|bias", name) for name in last]
    return [
        _short(short if alone else kind, 28) for kind, short, alone in zip(kinds, last, unique, strict=True)
    ]


def _draw_scale(figure: Figure, left: float, scale: Scale, width: float) -> None:
    """The scale of all panels, at the bottom."""
    axes = add_axes(figure, left, 72 * figure.get_figheight() - 34, width, 9)
    for step in range(HEAT_STEPS):  # each goes on under the next, lest the paper shine through between
        start = step / HEAT_STEPS
        axes.add_patch(Rectangle((start, 0), 1 - start, 1, facecolor=heat(start), linewidth=0))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.spines[:].set_visible(False)
    axes.set_yticks([])
    axes.set_xticks([scale.share(tick) for tick in scale.ticks()], [_percent(one) for one in scale.ticks()])
    axes.tick_params(length=0)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
