"""A finished comparison as one HTML page that needs nothing else: no network, fonts, images or scripts."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fewbits.cli.common import format_bytes, messages
from fewbits.cli.measure_inputs import has_tokenizer
from fewbits.cli.measured import (
    Comparison,
    Row,
    hardware,
    millinats,
    notes,
    short,
    versions,
    worst_weights,
)

WORST = 3  # weights named per model

_T = TypeVar("_T")


@dataclass(frozen=True)
class Snippet:
    """How to load a model: with transformers, then with an adapter of PEFT on top."""

    label: str
    transformers: str
    peft: str


def check_page(path: Path) -> None:
    """Refuse a page that could not be made or written, before anything is measured.

    Raises ValueError without matplotlib or jinja2, OSError for a folder or a path in no folder.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--html draws with matplotlib and jinja2, and {error.name} is not installed; "
            "pip install 'fewbits[report]'"
        ) from error
    if path.is_dir():
        raise IsADirectoryError(f"--html writes a file, and {path} is a folder; try {path}/report.html")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--html {path}: there is no folder {path.parent}; make it first")


def write_page(comparison: Comparison, path: Path, *, quiet: bool) -> None:
    """Write the page, whole or not at all, and say so on stderr."""
    text = render(comparison)
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes it private
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    if not quiet:
        messages().print(f"wrote {path} ({format_bytes(len(text.encode()))})", markup=False)


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def render(comparison: Comparison) -> str:
    """The page as HTML."""
    import jinja2
    from markupsafe import Markup

    from fewbits.cli.page import drawing, plots

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": format_bytes,
        "millinats": millinats,
        "short": short,
        "unbroken": _unbroken,
    }
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        title=_title(comparison),
        shades=drawing.shades(),
        hardware=hardware(comparison.plan),
        notes=notes(comparison),
        versions=versions(),
        # Made of escaped text by matplotlib, so these alone go in as they are.
        size_quality=Markup(plots.size_quality(comparison)),
        layer_errors=Markup(plots.layer_errors(comparison)),
        worst=_grouped((row.label, worst_weights(row, WORST)) for row in comparison.others),
        texts=_grouped((row.label, row.figures.text) for row in comparison.rows),
        snippets=[snippet(row, comparison.reference) for row in comparison.others if row.subject.given],
    )


def _title(comparison: Comparison) -> str:
    others = [row.label for row in comparison.others]
    listed = others[0] if len(others) == 1 else f"{', '.join(others[:-1])} and {others[-1]}"
    return f"{listed if len(others) <= 3 else f'{len(others)} models'} against {comparison.reference.label}"


def _unbroken(text: str) -> str:
    """The same text, with its numbers kept on one line with their signs."""
    return re.sub(r"(?<=\d) (?=[%×±])|(?<=±) ", "\N{NO-BREAK SPACE}", text)


def _grouped(values: Iterable[tuple[str, _T]]) -> list[tuple[str, _T]]:
    """(label, value) pairs, those with equal values as one whose labels are joined."""
    groups: list[tuple[str, _T]] = []
    for label, value in values:
        same = next((index for index, group in enumerate(groups) if group[1] == value), None)
        if same is None:
            groups.append((label, value))
        else:
            groups[same] = (f"{groups[same][0]} = {label}", value)
    return groups


def snippet(row: Row, reference: Row) -> Snippet:
    """Python that loads the model of a row, with the tokenizer of the reference if it has none of its own.

    The names in it are literals, whatever they hold.
    """
    settings, place = row.subject.settings, json.dumps(row.subject.given)
    words = place if has_tokenizer(row.subject) else json.dumps(reference.subject.given)
    if settings is None:
        imports, config, argument = "AutoModelForCausalLM, AutoTokenizer", [], ""
    else:
        imports = "AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig"
        config = ["config = BitsAndBytesConfig(", *_arguments(settings), ")"]
        argument = ", quantization_config=config"
    lines = [
        "import fewbits",
        f"from transformers import {imports}",
        "",
        "fewbits.enable(takeover=True)  # needed only beside an installed bitsandbytes",
        *config,
        f"model = AutoModelForCausalLM.from_pretrained({place}{argument})",
        f"tokenizer = AutoTokenizer.from_pretrained({words})",
    ]
    peft = [
        "from peft import LoraConfig, get_peft_model",
        "",
        'lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")',
        "model = get_peft_model(model, lora)",
    ]
    return Snippet(row.label, "\n".join(lines), "\n".join(peft))


def _arguments(settings: Mapping[str, Any]) -> list[str]:
    return [f"    {name}={value!r}," for name, value in settings.items()]
