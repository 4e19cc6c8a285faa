"""Configs: what a user asks for, checked at once, and turned into a `Recipe`.

`BitsAndBytesConfig` has the fields and the JSON of the transformers class of that name. Its 4-bit options
follow QLoRA (Dettmers et al. 2023, arXiv:2305.14314), its 8-bit options LLM.int8() (Dettmers et al. 2022,
arXiv:2208.07339). `FewbitsConfig` says what that class cannot: any Format, block size and per-module choice.

Module name patterns mean what they mean in transformers: a pattern matches a module whose name it begins
(up to a dot or the end), whose name it matches as a regular expression with the same boundary, or whose name
it ends.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import math
import os
import re
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from fewbits.format import Activation, Format, Scheme
from fewbits.recipe import Recipe, Rule

Entry = Format | Scheme | str | Mapping[str, Any] | None
"""What a `FewbitsConfig` takes for one weight: a Format, a Scheme, the spelling of either, the JSON object of
a Scheme, or None ("skip": keep the weight as it is)."""

_COMPUTE_DTYPES = ("float16", "bfloat16", "float32", "float64")
_STORAGE_DTYPES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
_ENTRY_DTYPES = ("compute_dtype", "storage_dtype")
_QUANT_TYPES = ("fp4", "nf4")

# The options that a way of loading does not read, with their defaults: any other value deserves a warning.
_UNREAD: dict[str, dict[str, object]] = {
    "load_in_4bit": {"llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False},
    "load_in_8bit": {
        "bnb_4bit_compute_dtype": torch.float32,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": torch.uint8,
    },
}
_BOTH_LOADS = "load_in_4bit and load_in_8bit are both True; only one can be. Set the other to False."


class _Config(ABC):
    """What every config shares: dictionaries, JSON, comparison and later changes."""

    quant_method: ClassVar[str]  # the key under which transformers looks its quantizer up
    _file_method: ClassVar[str]  # "quant_method" in dictionaries and JSON
    _stored_keys: ClassVar[tuple[str, ...]]  # what to_dict adds to the options of the constructor

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON values."""

    def to_diff_dict(self) -> dict[str, Any]:
        """The settings that differ from the defaults, as JSON values."""
        default = type(self)().to_dict().items()
        return {key: value for key, value in self.to_dict().items() if (key, value) not in default}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The settings as JSON text: those that differ from the defaults, or all if not `use_diff`."""
        values = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write all settings to a JSON file."""
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(self.to_json_string(use_diff=False))

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:  # Self, or tuple[Self, dict]: mypy would have every caller ask which
        """The config that `config_dict` (of `to_dict` or of a checkpoint) describes, updated with `kwargs`.

        With `return_unused_kwargs`, returns the config and the `kwargs` that name none of its settings.
        Raises what the constructor raises.
        """
        config = cls(**config_dict)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Change the settings that `kwargs` names; returns the `kwargs` that name none."""
        unused = {}
        for key, value in kwargs.items():
            if key == "quant_method":
                self._check_stored({key: value})
            elif key in vars(self) or isinstance(getattr(type(self), key, None), property):
                setattr(self, key, value)
            else:
                unused[key] = value
        return unused

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """The attributes and their values, so that `dict(config)` works."""
        yield "quant_method", self._file_method
        yield from copy.deepcopy(vars(self)).items()

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string(use_diff=False)}"

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, _Config) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # settings can change

    @classmethod
    def _check_stored(cls, kwargs: Mapping[str, Any]) -> None:
        """Refuse what is no option of the constructor, nor a key that only stored configs have."""
        options = list(inspect.signature(cls.__init__).parameters)[1:-1]
        _check_names(kwargs, cls._stored_keys, options, f"{cls.__name__} option")
        method = kwargs.get("quant_method", cls.quant_method)
        if method not in (cls._file_method, cls.quant_method):
            raise ValueError(
                f"{cls.__name__} cannot describe quant_method {method!r}; it describes {cls._file_method!r}. "
                "Use the config class of that method."
            )


class BitsAndBytesConfig(_Config):
    """The options of transformers' class of this name, checked more strictly; needs no transformers.

    Args:
        load_in_8bit: store weights as row-wise int8 and multiply by LLM.int8().
        load_in_4bit: store weights in 4 bits, in groups of 64 with one float32 scale each.
        llm_int8_threshold: LLM.int8() multiplies the input features that hold a magnitude of at least this
            in floating point; in units of the input, 0.0 for none.
        llm_int8_skip_modules: name patterns of the modules to keep as they are, for 4 bits as well.
        llm_int8_enable_fp32_cpu_offload: modules that a device map offloads, to the disk or to the CPU
            beside an accelerator, stay in float32, and are computed so.
        llm_int8_has_fp16_weight: weights stay as they are, to be trained; int8 codes are made for products.
        bnb_4bit_compute_dtype: dtype that 4-bit weights are decoded and multiplied in; None: float32.
        bnb_4bit_quant_type: 16 values of the 4-bit codes, "fp4" or "nf4" (QLoRA's NormalFloat).
        bnb_4bit_use_double_quant: store the scales of the groups in 8 bits (QLoRA's double quantization).
        bnb_4bit_quant_storage: dtype that the tensor of packed codes is stored as; None: uint8.
        **kwargs: only the further keys of a stored config: `quant_method`, `_load_in_4bit`, `_load_in_8bit`.

    Warns of options that the chosen way of loading does not read. Raises TypeError for a value of the wrong
    type and for unknown options, ValueError for an impossible value and for both ways of loading at once.
    """

    # transformers routes a config by this attribute, and for "bitsandbytes" it insists on an instance of its
    # own class. So the object carries a key of its own; files say "bitsandbytes".
    quant_method: ClassVar[str] = "fewbits_bitsandbytes"
    _file_method: ClassVar[str] = "bitsandbytes"
    _stored_keys: ClassVar[tuple[str, ...]] = ("quant_method", "_load_in_4bit", "_load_in_8bit")

    def __init__(
        self,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        llm_int8_threshold: float = 6.0,
        llm_int8_skip_modules: list[str] | None = None,
        llm_int8_enable_fp32_cpu_offload: bool = False,
        llm_int8_has_fp16_weight: bool = False,
        bnb_4bit_compute_dtype: torch.dtype | str | None = None,
        bnb_4bit_quant_type: str = "fp4",
        bnb_4bit_use_double_quant: bool = False,
        bnb_4bit_quant_storage: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> None:
        self._check_stored(kwargs)
        if load_in_4bit and load_in_8bit:
            raise ValueError(_BOTH_LOADS)
        self._load_in_8bit = _flag("load_in_8bit", load_in_8bit)
        self._load_in_4bit = _flag("load_in_4bit", load_in_4bit)
        self.llm_int8_threshold = _threshold(llm_int8_threshold)
        self.llm_int8_skip_modules = _skip_patterns(llm_int8_skip_modules)
        self.llm_int8_enable_fp32_cpu_offload = _flag(
            "llm_int8_enable_fp32_cpu_offload", llm_int8_enable_fp32_cpu_offload
        )
        self.llm_int8_has_fp16_weight = _flag("llm_int8_has_fp16_weight", llm_int8_has_fp16_weight)
        self.bnb_4bit_compute_dtype = _dtype(
            "bnb_4bit_compute_dtype", bnb_4bit_compute_dtype, torch.float32, _COMPUTE_DTYPES
        )
        self.bnb_4bit_quant_type = _quant_type(bnb_4bit_quant_type)
        self.bnb_4bit_use_double_quant = _flag("bnb_4bit_use_double_quant", bnb_4bit_use_double_quant)
        self.bnb_4bit_quant_storage = _dtype(
            "bnb_4bit_quant_storage", bnb_4bit_quant_storage, torch.uint8, _STORAGE_DTYPES
        )
        self._warn_of_unread_options()

    @property
    def load_in_4bit(self) -> bool:
        """Whether weights are stored in 4 bits. Raises ValueError when set together with `load_in_8bit`."""
        return self._load_in_4bit

    @load_in_4bit.setter
    def load_in_4bit(self, value: bool) -> None:
        if _flag("load_in_4bit", value) and self._load_in_8bit:
            raise ValueError(_BOTH_LOADS)
        self._load_in_4bit = value

    @property
    def load_in_8bit(self) -> bool:
        """Whether weights are stored as int8. Raises ValueError when set together with `load_in_4bit`."""
        return self._load_in_8bit

    @load_in_8bit.setter
    def load_in_8bit(self, value: bool) -> None:
        if _flag("load_in_8bit", value) and self._load_in_4bit:
            raise ValueError(_BOTH_LOADS)
        self._load_in_8bit = value

    def is_quantizable(self) -> bool:
        """Whether the config asks for any quantization."""
        return self.load_in_8bit or self.load_in_4bit

    def quantization_method(self) -> str | None:
        """ "llm_int8", "fp4" or "nf4"; None if neither way of loading is set."""
        if self.load_in_8bit:
            return "llm_int8"
        return self.bnb_4bit_quant_type if self.load_in_4bit else None

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON values, the same as transformers' class gives."""
        values = dict(self)
        for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
            values[name] = _dtype_name(values[name])
        return {**values, "load_in_4bit": self.load_in_4bit, "load_in_8bit": self.load_in_8bit}

    def to_recipe(self) -> Recipe:
        """One keeping rule per skip pattern, then one rule for all other weights.

        Raises ValueError if neither `load_in_4bit` nor `load_in_8bit` is set.
        """
        skips = [Rule(name, None, "llm_int8_skip_modules") for name in self.llm_int8_skip_modules or ()]
        if self.load_in_4bit:
            return Recipe((*skips, Rule(".*", self._scheme_4bit(), "load_in_4bit")))
        if self.load_in_8bit:
            trained = self.llm_int8_has_fp16_weight
            scheme = Scheme(Format.parse("int8:row"), Activation(self.llm_int8_threshold), trainable=trained)
            return Recipe((*skips, Rule(".*", scheme, "load_in_8bit")))
        raise ValueError(
            "BitsAndBytesConfig has load_in_4bit=False and load_in_8bit=False, so it names no format. "
            "Set one of the two to True."
        )

    def _scheme_4bit(self) -> Scheme:
        double = ":dq" if self.bnb_4bit_use_double_quant else ""
        return Scheme(
            Format.parse(f"{self.bnb_4bit_quant_type}:g64{double}"),
            compute_dtype=_dtype_name(self.bnb_4bit_compute_dtype),
            storage_dtype=_dtype_name(self.bnb_4bit_quant_storage),
        )

    def _warn_of_unread_options(self) -> None:
        chosen = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
        unread = _UNREAD[chosen].items() if self.is_quantizable() else ()
        given = [name for name, default in unread if getattr(self, name) != default]
        if given:
            text = f"{', '.join(given)}: no effect with {chosen}=True. Leave it out."
            warnings.warn(text, UserWarning, stacklevel=_callers_level())


class FewbitsConfig(_Config):
    """Any Format for any weight, by module name.

    Args:
        format: the Entry of every weight that `modules` does not name; None or "skip": quantize only those.
        modules: name pattern -> Entry, first match wins; also for embeddings and lm_head, which are
            otherwise kept. A mapping, or a list of [pattern, entry] pairs.
        compute_dtype: floating dtype that weights are decoded and multiplied in, "bfloat16" for instance;
            None: that of the input. It holds for every Entry that names none itself and has no quantized
            activation; a Scheme object names its own, also when that is None.
        **kwargs: only the further keys of a stored config: `quant_method`, `version`.

    An Entry may be the JSON object {"format": spelling, "compute_dtype": ..., "storage_dtype": ...}, the
    latter two optional: a Scheme holds them, its spelling does not. The attributes hold JSON values in their
    canonical spelling. `to_dict` gives `modules` as an object when its names are in sorted order, and as a
    list of pairs otherwise, because config files are written with sorted keys.

    Raises TypeError for a value of the wrong type and for unknown options, ValueError for a spelling, pattern
    or dtype that means nothing and for the `version` of a newer fewbits.
    """

    quant_method: ClassVar[str] = "fewbits"
    _file_method: ClassVar[str] = "fewbits"
    _stored_keys: ClassVar[tuple[str, ...]] = ("quant_method", "version")
    VERSION: ClassVar[int] = 1
    """The version of the JSON that this class writes, and the newest that it reads."""

    def __init__(
        self,
        format: Entry = "nf4:g64:dq",
        modules: Mapping[str, Entry] | Iterable[tuple[str, Entry]] | None = None,
        compute_dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> None:
        self._check_stored(kwargs)
        if kwargs.get("version", self.VERSION) not in range(1, self.VERSION + 1):
            raise ValueError(
                f"FewbitsConfig has version {kwargs['version']!r}, but this fewbits reads versions up to "
                f"{self.VERSION}. Upgrade fewbits."
            )
        self.compute_dtype = _optional_dtype("FewbitsConfig compute_dtype", compute_dtype)
        self.format = self._spell(format, "format")
        self.modules = {
            pattern: self._spell(entry, f'modules["{pattern}"]') for pattern, entry in _module_pairs(modules)
        }

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> FewbitsConfig:
        """The config whose `to_recipe` chooses as `recipe` does; the reasons of the rules are not kept."""
        modules: dict[str, Entry] = {}
        default: Scheme | None = None
        for rule in recipe.rules:
            if rule.is_default:  # no later rule is ever reached
                default = rule.scheme
                break
            modules.setdefault(rule.pattern, rule.scheme)
        shared = default.compute_dtype if default is not None else None
        return cls(default, modules, shared)

    def is_quantizable(self) -> bool:
        """Whether the config asks for any quantization."""
        return any(entry != "skip" for entry in (self.format, *self.modules.values()))

    def quantization_method(self) -> str | None:
        """The spelling of the default Scheme; None if only `modules` names what to quantize."""
        scheme = _scheme(self.format, "format", self.compute_dtype)
        return None if scheme is None else str(scheme)

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON values."""
        modules = copy.deepcopy(self.modules)
        return {
            "quant_method": self._file_method,
            "version": self.VERSION,
            "format": copy.deepcopy(self.format),
            "modules": modules if list(modules) == sorted(modules) else [*map(list, modules.items())],
            "compute_dtype": self.compute_dtype,
        }

    def to_recipe(self) -> Recipe:
        """One rule per entry of `modules`, in order, then one for all other weights."""
        entries = [(pattern, entry, f'modules["{pattern}"]') for pattern, entry in self.modules.items()]
        entries.append((".*", self.format, "format"))
        default = self.compute_dtype
        return Recipe(tuple(Rule(name, _scheme(entry, why, default), why) for name, entry, why in entries))

    def _spell(self, entry: Entry, where: str) -> str | dict[str, Any]:
        """The JSON value of an Entry: a spelling if that says it all, otherwise an object."""
        scheme = _scheme(entry, where, self.compute_dtype)
        if scheme is None:
            return "skip"
        plain = _with_default_dtype(Scheme.parse(str(scheme)), self.compute_dtype)
        if scheme.trainable:
            raise ValueError(f"FewbitsConfig {where} cannot train weights; use BitsAndBytesConfig for that.")
        unsaid = {k: v for k in _ENTRY_DTYPES if (v := getattr(scheme, k)) != getattr(plain, k)}
        return {"format": str(scheme), **unsaid} if unsaid else str(scheme)


def _scheme(entry: Entry, where: str, compute_dtype: str | None) -> Scheme | None:
    """The Scheme that an Entry means under a config's default compute dtype; None: keep the weight."""
    if entry is None or entry == "skip":
        return None
    if isinstance(entry, Scheme):
        return entry
    if isinstance(entry, Mapping):
        return _scheme_from_object(entry, where, compute_dtype)
    if isinstance(entry, str | Format):
        try:
            return _with_default_dtype(Scheme.parse(entry), compute_dtype)
        except ValueError as error:
            raise ValueError(f"FewbitsConfig {where}: {error}") from error
    raise TypeError(
        f"FewbitsConfig {where} must be a Format, a Scheme, a spelling or a JSON object, got {entry!r}. "
        'Write a spelling such as "nf4:g64:dq", or "skip".'
    )


def _scheme_from_object(entry: Mapping[str, Any], where: str, compute_dtype: str | None) -> Scheme:
    known = ("format", *_ENTRY_DTYPES)
    _check_names(entry, known, known, f"FewbitsConfig {where} key")
    spelling = entry.get("format")
    scheme = _scheme(spelling, where, compute_dtype) if isinstance(spelling, str) else None
    if scheme is None:
        raise ValueError(
            f'FewbitsConfig {where} needs a spelling under "format", got {dict(entry)!r}. '
            'Write {"format": "nf4:g64", ...}, or "skip" in place of the object.'
        )
    if "compute_dtype" in entry:
        dtype = _optional_dtype(f"FewbitsConfig {where} compute_dtype", entry["compute_dtype"])
        scheme = replace(scheme, compute_dtype=dtype)
    storage = _dtype(
        f"FewbitsConfig {where} storage_dtype", entry.get("storage_dtype"), torch.uint8, _STORAGE_DTYPES
    )
    return replace(scheme, storage_dtype=_dtype_name(storage))


def _with_default_dtype(scheme: Scheme, compute_dtype: str | None) -> Scheme:
    # With a quantized activation the multiplication is an integer one: there is no dtype to choose.
    return scheme if scheme.activation is not None else replace(scheme, compute_dtype=compute_dtype)


def _module_pairs(modules: object) -> Iterator[tuple[str, Entry]]:
    given = modules.items() if isinstance(modules, Mapping) else () if modules is None else modules
    pairs: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(
                f"FewbitsConfig modules must map patterns to formats, got {modules!r}. "
                'Write {"lm_head": "int8"}, or a list of [pattern, format] pairs.'
            )
        pattern = _pattern(pair[0], "FewbitsConfig modules")
        if sum(pattern == other[0] for other in pairs) > 1:
            raise ValueError(f"FewbitsConfig modules names {pattern!r} twice. Remove one of the two.")
        yield pattern, pair[1]


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}. Write True or False.")
    return value


def _threshold(value: object) -> float:
    if not (isinstance(value, float) and math.isfinite(value) and value >= 0):
        error = ValueError if isinstance(value, float) else TypeError
        mend = f"{value}.0" if type(value) is int and value >= 0 else "6.0, or 0.0 to look for no outliers"
        raise error(f"llm_int8_threshold must be a finite float from 0.0, got {value!r}. Write {mend}.")
    return value


def _skip_patterns(value: object) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise TypeError(f'llm_int8_skip_modules must be a list of str, got {value!r}. Write ["lm_head"].')
    return [_pattern(pattern, "llm_int8_skip_modules") for pattern in value]


def _pattern(pattern: object, where: str) -> str:
    if not isinstance(pattern, str):
        raise TypeError(f'{where} must name modules by str, got {pattern!r}. Write, say, "lm_head".')
    try:
        re.compile(f"(?:{pattern})")
    except re.error as error:
        raise ValueError(
            f"{where} has {pattern!r}, which is no regular expression ({error}). "
            f'Escape it as {re.escape(pattern)!r}, or write ".*" for "anything".'
        ) from error
    return pattern


def _quant_type(value: object) -> str:
    if not isinstance(value, str) or value not in _QUANT_TYPES:
        error = ValueError if isinstance(value, str) else TypeError
        near = _nearest(str(value), _QUANT_TYPES)
        raise error(f'bnb_4bit_quant_type must be "nf4" or "fp4", got {value!r}. Write "{near}".')
    return value


def _dtype(name: str, value: object, default: torch.dtype, allowed: tuple[str, ...]) -> torch.dtype:
    dtype = default if value is None else getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or _dtype_name(dtype) not in allowed:
        raise ValueError(f"{name} cannot be {value!r}. Write one of {', '.join(allowed)}.")
    return dtype


def _optional_dtype(name: str, value: object) -> str | None:
    return None if value is None else _dtype_name(_dtype(name, value, torch.float32, _COMPUTE_DTYPES))


def _dtype_name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _check_names(given: Iterable[str], known: Iterable[str], options: Iterable[str], what: str) -> None:
    """Raise TypeError for the first of `given` that is not `known`, with the nearest of `options`."""
    for name in given:
        if name not in tuple(known):
            near = _nearest(str(name), options)
            raise TypeError(f"Unknown {what} {name!r}. Did you mean {near!r}? If not, remove it.")


def _nearest(name: str, options: Iterable[str]) -> str:
    return difflib.get_close_matches(name.lower(), list(options), n=1, cutoff=0.0)[0]


def _callers_level() -> int:
    """The `stacklevel` at which a warning of the calling function names the first line outside fewbits."""
    level, frame = 0, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("fewbits."):
        level, frame = level + 1, frame.f_back
    return level
