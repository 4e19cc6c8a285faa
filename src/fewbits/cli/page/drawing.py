"""matplotlib figures as SVG that lives inside a page: its fonts, its colours, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Stand-ins, drawn and then replaced by what the page's style defines, so that one drawing serves light and
# dark. HEAT_STEPS shades run from --heat-low to --heat-high.
INK, MUTED, FAINT, ACCENT, PAPER = "#000001", "#000002", "#000003", "#000004", "#000005"
ON_LOW, ON_HIGH = "#000006", "#000007"
HEAT_STEPS = 50
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    FAINT: "var(--faint)",
    ACCENT: "var(--accent)",
    PAPER: "var(--paper)",
    ON_LOW: "var(--on-low)",
    ON_HIGH: "var(--on-high)",
}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a name may hold dollar signs
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that the layout is the same everywhere
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.linewidth": 1,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
}


def heat(share: float) -> str:
    """The stand-in for the shade at `share`, 0 to 1, of the way from low to high."""
    return f"#0001{round(HEAT_STEPS * min(max(share, 0.0), 1.0)):02x}"


@contextmanager
def style(salt: str) -> Iterator[None]:
    """Draw and save in here. The salt makes ids reproducible, and different from those of other figures."""
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": salt}):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many CSS pixels."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")
    FigureCanvasAgg(figure)  # measures text; saving as SVG brings its own
    return figure


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in CSS pixels from the top left corner."""
    across, down = 72 * figure.get_figwidth(), 72 * figure.get_figheight()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def to_svg(figure: Figure, title: str, css_class: str) -> str:
    """The figure as an <svg> element to put into HTML: no namespaces, metadata or style sheet of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    box = re.search(r'viewBox="([\d. ]+)"', text)
    body = text[text.index("</metadata>") + len("</metadata>") : text.rindex("</svg>")]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<[^>]+>", _restyled, body)  # tags only: names in the text stay as they are
    body = re.sub(r">\s+<", "><", body)
    view = box[1] if box else ""
    return (
        f'<svg class="{css_class}" viewBox="{view}" style="max-width: {view.split()[2]}px" role="img">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def _restyled(tag: re.Match[str]) -> str:
    """A tag of matplotlib with the colours and the font of the page, and without needless ids."""
    text = re.sub(r"\s+", " ", tag[0])
    text = re.sub(r'^<g id="[^"]*"', "<g", text)
    text = re.sub(r" ?font-family: [^;\"]*;?", "", text)
    text = re.sub("#0000[0-9a-f]{2}", lambda found: _VARIABLES.get(found[0], found[0]), text)
    return re.sub("#0001([0-9a-f]{2})", lambda found: f"var(--heat-{int(found[1], 16)})", text)


def shades() -> dict[int, float]:
    """Step → per cent of --heat-high in --heat-low, for the style of the page."""
    return {step: 100 * step / HEAT_STEPS for step in range(HEAT_STEPS + 1)}
