"""Which weights `fewbits merge` can merge into, and how it is known how the base was quantized."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbits.checkpoint.adapter import Adapter
from fewbits.checkpoint.finish import model_name
from fewbits.checkpoint.folder import Folder, read_config
from fewbits.checkpoint.safetensors import CheckpointError, shown
from fewbits.cli.common import find_model
from fewbits.cli.jobs import DEFAULT_FORMAT, Config, Request, chosen_config, config_of

if TYPE_CHECKING:
    from fewbits.integrations.merge_files import Base

ORIGINAL, DEQUANTIZED = "original", "dequantized"


@dataclass(frozen=True)
class Trained:
    """What the command is told of how the base was quantized while the adapter was trained."""

    format: str | None = None
    int8: bool = False
    config: Path | None = None
    quantized: str | None = None

    @property
    def given(self) -> bool:
        return self != Trained()


@dataclass(frozen=True)
class Bases:
    """The weights to choose from, by name; assumed: what was assumed of the quantization, "" for nothing."""

    choices: dict[str, Base]
    assumed: str = ""


def find_bases(source: str, adapter: Adapter, trained: Trained, wanted: str | None) -> Bases:
    """The weights that can be merged into, of which only the `wanted` where one is.

    ValueError for options that do not go together or for a base that has no such weights.
    """
    from fewbits.integrations.decoded import DecodedFolder
    from fewbits.integrations.merge_files import chosen_base, open_base

    if wanted not in (None, ORIGINAL, DEQUANTIZED):
        raise ValueError(f"--base {wanted!r} is neither {ORIGINAL} nor {DEQUANTIZED}")
    given = (
        trained.format is not None,
        trained.int8,
        trained.config is not None,
        trained.quantized is not None,
    )
    if sum(given) > 1:
        raise ValueError("--format, --int8, --config and --quantized exclude each other; give one of them")
    if wanted == ORIGINAL and trained.given:
        raise ValueError(
            f"--base {ORIGINAL} takes the weights as they are: leave out --format, --int8, --config and "
            "--quantized, or the --base"
        )
    folder = open_base(find_model(source))
    if isinstance(folder, DecodedFolder):
        if trained.given or wanted == ORIGINAL:
            raise ValueError(
                f"{source} is quantized: its original weights are not there, and how it is quantized is "
                "known. Give the original as BASE and this one as --quantized, or leave these options out"
            )
        return Bases({DEQUANTIZED: chosen_base(folder, None)})
    choices = {ORIGINAL: chosen_base(folder, None)}
    if wanted == ORIGINAL:
        return Bases(choices)
    choices[DEQUANTIZED], assumed = _dequantized(folder, adapter, trained)
    if wanted == DEQUANTIZED:
        del choices[ORIGINAL]
    return Bases(choices, assumed)


def _dequantized(folder: Folder, adapter: Adapter, trained: Trained) -> tuple[Base, str]:
    """The decoded weights, and what was assumed of them."""
    from fewbits.integrations.decoded import DecodedFolder
    from fewbits.integrations.merge_files import chosen_base, open_base, spelling

    if trained.quantized is not None:
        quantized = open_base(find_model(trained.quantized))
        if not isinstance(quantized, DecodedFolder):
            raise ValueError(f"--quantized {trained.quantized} is not quantized; name a quantized checkpoint")
        called = ("--quantized", model_name(quantized.path))
        return chosen_base(quantized, None, called, model_name(folder.path)), ""
    if trained.given:
        request = _request(trained.format, trained.int8, trained.config)
        return chosen_base(folder, chosen_config(request), _words(trained)), ""
    for found, source in _hints(adapter):
        base = chosen_base(folder, found, ("--format", spelling(found)))
        return base, f"{spelling(found)}, {source}"
    request = _request(DEFAULT_FORMAT, False, None)
    base = chosen_base(folder, chosen_config(request), ("--format", DEFAULT_FORMAT))
    return base, f"{DEFAULT_FORMAT}, the usual way, because nothing says how"


def _request(format: str | None, int8: bool, config: Path | None) -> Request:
    return Request("", Path(), format, int8, config, (), 1, None)


def _words(trained: Trained) -> tuple[str, ...]:
    """The options again, without a path of this machine."""
    if trained.int8:
        return ("--int8",)
    if trained.config is not None:
        return ("--config", trained.config.name)
    return ("--format", str(trained.format))


def _hints(adapter: Adapter) -> list[tuple[Config, str]]:
    """What the adapter's own files say of the quantization, surest first, and where.

    Its config names a folder, which a foreign file may choose freely. So nothing is read there but the
    settings of the quantization.
    """
    found: list[tuple[Config, str]] = []
    options = _options_of(adapter.trained_on) if adapter.trained_on else {}
    if options.get("quant_method") in ("bitsandbytes", "fewbits"):
        called = shown(adapter.trained_on)
        found.append((config_of(options, f"{called}/config.json"), f"as {called} is quantized"))
    if adapter.quantization is not None:
        found.append((config_of(dict(adapter.quantization), "README.md"), "as the adapter's README.md says"))
    return found


def _options_of(base: str) -> dict[str, Any]:
    """The quantization config of the checkpoint in the folder `base`; {} for whatever cannot be read."""
    if not os.path.isfile(os.path.join(base, "config.json")):  # False, too, for names that cannot be
        return {}
    try:
        options = read_config(Path(base)).get("quantization_config")
    except (OSError, CheckpointError):
        return {}
    return options if isinstance(options, dict) else {}
