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
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Keys that name code, kernels or downloads rather than sizes; dropped at every depth.
_DROPPED = re.compile(
    r"auto_map|custom_pipelines|_?(attn|experts)_implementation(_internal|_autoset)?|_?use_kernels|_?kernel_config"
    r"|use_pretrained_backbone|fusion_config|transformers_weights|_name_or_path|name_or_path"
)
_TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def empty_model(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model that a config.json describes, on the meta device; no code is run or fetched because of it.

    Its class is the first of "architectures" (without one, the causal model of "model_type"). Parameters have
    the config's dtype, or `dtype` where it names none. A "quantization_config" is left out. ValueError names
    an architecture that this transformers does not have, or what is wrong with the config.
    """
    cleaned = clean_config(config)
    cleaned.pop("quantization_config", None)
    model_type = cleaned.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"config.json has model_type {model_type!r}, which transformers {transformers.__version__} does "
            "not know; upgrade transformers. Code that comes with a model is never run"
        )
    try:
        with _offline():
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
    return model.eval()


def clean_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without the keys that name code, kernels or downloads, at every depth."""
    return {
        key: clean_config(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not _DROPPED.fullmatch(key)
    }


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
    """The dtype that a config.json says its weights have ("dtype", formerly "torch_dtype"), if it says
    one."""
    name = config.get("dtype") or config.get("torch_dtype")
    return _TORCH_DTYPES.get(str(name).removeprefix("torch."))


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
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"config.json names the architecture {name!r}, which transformers {transformers.__version__} "
            "does not have; upgrade transformers. Code that comes with a model is never run"
        )
    return found


@contextmanager
def _offline() -> Iterator[None]:
    """Nothing is fetched from the hub inside, whatever a config asks for."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
