"""An empty model from its config.json alone: what tensors it has, and which of them are layers.

A config is foreign text. What it can make transformers do beyond choosing sizes is dropped first: code of its
own (`auto_map`), kernels to fetch (the attention and experts implementations), backbones to download.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Keys that name code, kernels or downloads rather than sizes; dropped at every depth.
_DROPPED = re.compile(
    r"auto_map|custom_pipelines|_?(attn|experts)_implementation(_internal|_autoset)?|_?use_kernels|_?kernel_config"
    r"|use_pretrained_backbone|fusion_config|transformers_weights|_name_or_path|name_or_path"
    r"|use_timm_backbone|backbone_kwargs|model_args|pretrained_cfg|checkpoint_path|detectron2_.*"
)
_LAYERS = re.compile(r"(num|n)_(\w+_)?layers?|num_blocks|depth")
_COUNTS = re.compile(rf"{_LAYERS.pattern}|num_labels|(num|n)_(\w+_)?experts")
_MAX_COUNT = 2**20
_MAX_DEPTH = 20
_MODULES = 10**6
_TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")
}  # what a model can be built in


def empty_model(
    config: Mapping[str, Any], dtype: torch.dtype = torch.float32, tensors: int | None = None
) -> PreTrainedModel:
    """The model that a config.json describes, on the meta device; no code is run or fetched because of it.

    Its class is the first of "architectures" (without one, the causal model of "model_type"). Parameters have
    the config's dtype, or `dtype` where it names none. A "quantization_config" is left out. `tensors`: how
    many the checkpoint has; a config that makes far more of them is refused before it takes all memory.
    ValueError names an architecture that this transformers does not have, or what is wrong with the config.
    """
    cleaned = clean_config(config)
    _check_counts(cleaned, tensors)
    cleaned.pop("quantization_config", None)
    model_type = cleaned.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"config.json has model_type {model_type!r}, which transformers {transformers.__version__} does "
            "not know; upgrade transformers. Code that comes with a model is never run"
        )
    try:
        with _offline(), _at_most(_MODULES if tensors is None else 20 * tensors + 10_000):
            settings = CONFIG_MAPPING[model_type].from_dict(_with_floats(cleaned))
            with torch.device("meta"):
                model: PreTrainedModel = _model_class(config, settings)._from_config(
                    settings, dtype=stored_dtype(config) or dtype, attn_implementation="eager"
                )
    except ValueError:
        raise
    except Exception as error:  # model code meets sizes it was not written for
        what = " ".join(str(error).splitlines()[:2])  # torch adds a stack
        raise ValueError(
            f"config.json does not describe a {model_type} model: {type(error).__name__}: {what}"
        ) from error
    if next(model.parameters(), None) is None:
        raise ValueError(f"{type(model).__name__} in config.json has no weights; it is no whole architecture")
    return model.eval()


def clean_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without the keys that name code, kernels or downloads, at every depth.

    ValueError for one that is nested deeper than any model's, or whose model is made by another package
    (timm), which may load what it likes.
    """
    cleaned: dict[str, Any] = _clean(config, 0)
    return cleaned


def _clean(value: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise ValueError(f"config.json is nested deeper than {_MAX_DEPTH} levels; the file is damaged")
    if isinstance(value, list):
        return [_clean(item, depth + 1) for item in value]
    if not isinstance(value, Mapping):
        return value
    if str(value.get("model_type")).startswith("timm"):
        raise ValueError("config.json has a model of the timm package in it, which is not supported")
    return {key: _clean(item, depth + 1) for key, item in value.items() if not _DROPPED.fullmatch(key)}


def _with_floats(value: Any) -> Any:
    """`value` with infinities in place of {"__float__": "Infinity"}, as transformers spells them in JSON."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"} and str(value["__float__"]).lower() in (
            "infinity",
            "-infinity",
            "nan",
        ):
            return float(value["__float__"])
        return {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def stored_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a config.json says its weights have ("dtype", formerly "torch_dtype"), if it says one.

    ValueError for one that no model is built in.
    """
    name = config.get("dtype") or config.get("torch_dtype")
    if name is None:
        return None
    if str(name).removeprefix("torch.") not in _TORCH_DTYPES:
        raise ValueError(f"config.json has dtype {name!r}; models are in {', '.join(_TORCH_DTYPES)}")
    return _TORCH_DTYPES[str(name).removeprefix("torch.")]


def _model_class(config: Mapping[str, Any], settings: Any) -> Any:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name is None:
        causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
        return (
            causal[type(settings)]
            if type(settings) in causal
            else modeling_auto.MODEL_MAPPING[type(settings)]
        )
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not is_model or getattr(found, "config_class", None) is None:  # as bases have none
        raise ValueError(
            f"config.json names the architecture {name!r}, which transformers {transformers.__version__} "
            "does not have; upgrade transformers. Code that comes with a model is never run"
        )
    return found


def _check_counts(value: Any, tensors: int | None, key: str = "") -> None:
    """ValueError for counts that no model has: of layers, experts and labels, and in lists of whatever."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            _check_counts(item, tensors, name)
    elif isinstance(value, list):
        for item in value:
            _check_counts(item, tensors, "[]")
    elif type(value) is int:
        most = _MAX_COUNT if tensors is None or not _LAYERS.fullmatch(key) else tensors
        if value > most and (key == "[]" or _COUNTS.fullmatch(key)):
            raise ValueError(f"config.json has {value} for {key}, which no model has; the file is damaged")


@contextmanager
def _at_most(modules: int) -> Iterator[None]:
    """Inside, ValueError as soon as more than so many modules are made."""
    left = modules

    def count(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(
                f"config.json describes a model of more than {modules} modules, far more than the checkpoint "
                "has tensors; the config belongs to another model"
            )

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _offline() -> Iterator[None]:
    """Nothing is fetched from the hub inside, whatever a config asks for."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
