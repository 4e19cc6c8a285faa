"""Where other libraries find fewbits.

transformers and PEFT learn of fewbits as soon as both are imported, in either order; nothing is imported for
it.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from fewbits.integrations.imports import after_import

_takeover: bool | None = None


def enable(takeover: bool | None = None) -> None:
    """Register fewbits with transformers and PEFT; say who loads `bitsandbytes` checkpoints and configs, and
    whose optimizers `TrainingArguments(optim=…)` means by bitsandbytes' names.

    takeover True: fewbits; False: the bitsandbytes package; None: fewbits where that package is not
    installed. `import fewbits` calls `enable()`. Models that are loaded already stay as they are.
    """
    global _takeover
    _takeover = takeover
    for table, register in _TABLES.items():
        after_import(table, register)
    for module, function in _PEFT.items():
        after_import(module, functools.partial(_extend, module, function))


def owns_bitsandbytes() -> bool:
    """Whether fewbits loads `bitsandbytes` checkpoints and configs."""
    return importlib.util.find_spec("bitsandbytes") is None if _takeover is None else _takeover


def _register_quantizer() -> None:
    from fewbits.integrations import transformers

    # Without `register` it is just being imported, and registers at its end.
    if hasattr(transformers, "register"):
        transformers.register(takeover=owns_bitsandbytes())


def _register_optimizers() -> None:
    from fewbits.integrations import trainer

    trainer.register(takeover=owns_bitsandbytes())


# Modules that hold tables, and what enters fewbits there.
_TABLES: dict[str, Callable[[], None]] = {
    "transformers.quantizers.auto": _register_quantizer,  # config and quantizer classes
    "transformers.trainer_optimizer": _register_optimizers,  # functions by names of optimizers
}

# Functions of PEFT that decide by the kind of layer or model, and which have no registry: `integrations.peft`
# has one of the same name for each, which hands everything but quantized layers of fewbits to the original.
_PEFT = {
    "peft.utils.integrations": "dequantize_module_weight",
    "peft.utils.other": "prepare_model_for_kbit_training",
    "peft.utils.quantization_utils": "resolve_quantization_backend",
    "peft.tuners.lora.layer": "dispatch_default",
    "peft.tuners.tuners_utils": "BaseTuner.inject_adapter",
}
_extended: set[Callable[..., Any]] = set()


def _extend(module: str, path: str) -> None:
    """Put our function in the place of one of `module`, also where it was imported from there already."""
    place, _, name = path.rpartition(".")
    owner: Any = getattr(sys.modules[module], place) if place else sys.modules[module]
    original: Callable[..., Any] | None = getattr(owner, name, None)
    if original is None or original in _extended:  # an earlier PEFT, or done before
        return

    @functools.wraps(original)
    def extended(*args: Any, **kwargs: Any) -> Any:
        from fewbits.integrations import peft

        return getattr(peft, name)(original, *args, **kwargs)

    _extended.add(extended)
    for importer in [owner, *sys.modules.values()]:
        if getattr(importer, "__dict__", {}).get(name) is original:
            setattr(importer, name, extended)
