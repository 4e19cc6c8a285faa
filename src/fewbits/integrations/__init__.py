"""Where other libraries find fewbits.

transformers learns of fewbits as soon as both are imported, in either order; nothing is imported for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_AUTO = "transformers.quantizers.auto"  # holds the tables of config and quantizer classes
_takeover: bool | None = None


def enable(takeover: bool | None = None) -> None:
    """Register fewbits with transformers; say who loads `bitsandbytes` checkpoints and configs.

    takeover True: fewbits; False: the bitsandbytes package; None: fewbits where that package is not
    installed. `import fewbits` calls `enable()`. Models that are loaded already stay as they are.
    """
    global _takeover
    _takeover = takeover
    if _AUTO in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def owns_bitsandbytes() -> bool:
    """Whether fewbits loads `bitsandbytes` checkpoints and configs."""
    return importlib.util.find_spec("bitsandbytes") is None if _takeover is None else _takeover


def _register() -> None:
    from fewbits.integrations import transformers

    # Without `register` it is just being imported, and registers at its end.
    if hasattr(transformers, "register"):
        transformers.register(takeover=owns_bitsandbytes())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers fewbits right after transformers' tables have been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()
