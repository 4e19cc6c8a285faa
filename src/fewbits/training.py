"""Preparing a quantized model for training adapters on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fewbits.nn import QuantModule
from fewbits.report import NOTES

_Model = TypeVar("_Model", bound=nn.Module)
_HALF = (torch.float16, torch.bfloat16)


def prepare_for_training(
    model: _Model,
    *,
    gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    norms_in_float32: bool = False,
) -> _Model:
    """Freeze all parameters of `model` in place and let gradients pass; adapters come on top. Returns it.

    PEFT's `prepare_model_for_kbit_training` makes a float32 copy of everything that is not quantized; this
    makes none, or with `norms_in_float32` of the weights of normalization layers only.
    `gradient_checkpointing` recomputes activations in the backward pass, in models of transformers only;
    `gradient_checkpointing_kwargs` go to `torch.utils.checkpoint.checkpoint`. `fewbits.report` notes what
    was cast.
    """
    prepare(model, _is_norm if norms_in_float32 else _nothing, "prepare_for_training")
    if gradient_checkpointing:
        checkpoint_activations(model, gradient_checkpointing_kwargs)
    return model


def prepare(model: nn.Module, in_float32: Callable[[nn.Module], bool], caller: str) -> None:
    """Freeze `model`; cast the 16-bit parameters of modules that `in_float32` picks, never stored parts.

    What is cast is noted for the report, in the name of `caller`.
    """
    model.requires_grad_(False)
    notes = vars(model).setdefault(NOTES, {})
    parts = {id(tensor) for tensor in _stored_parts(model)}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in parts or parameter.dtype not in _HALF or not in_float32(module):
                continue
            before = str(parameter.dtype).removeprefix("torch.")
            parameter.data = parameter.data.float()
            notes[f"{prefix}.{name}".removeprefix(".")] = f"cast from {before} by {caller}"


def checkpoint_activations(model: nn.Module, kwargs: Mapping[str, Any] | None) -> None:
    """Let a model of transformers recompute activations; others are left alone."""
    transformers_model: Any = model
    # The second is its name before transformers 5.20.
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, name):
            getattr(transformers_model, name)(None if kwargs is None else dict(kwargs))
            # Behind a frozen embedding the first block has nothing to differentiate by otherwise.
            if not hasattr(model, "_require_grads_hook"):
                transformers_model.enable_input_require_grads()
            return


def _stored_parts(model: nn.Module) -> list[Tensor]:
    return [
        getattr(layer, attribute)
        for layer in model.modules()
        if isinstance(layer, QuantModule)
        for weight in layer.weights()
        for attribute in layer.part_names(weight).values()
    ]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _nothing(module: nn.Module) -> bool:
    return False
