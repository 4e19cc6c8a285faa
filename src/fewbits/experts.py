"""The fused experts of a mixture, each quantized on its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.format import Scheme
from fewbits.nn import QuantModule
from fewbits.tensor import QuantizedTensor


class QuantExperts(QuantModule):
    """The fused experts of a mixture (3-D parameters), each expert quantized on its own.

    Takes the place of an experts module of any layout: its other parameters, submodules and attributes move
    here, and `source_class.forward` runs on decoded weights, which live as long as that. Parts are stored as
    [experts, …] stacks. `RoutedExperts` decodes less where it can.
    """

    is_stack = True
    _terms: dict[str, list[tuple[Tensor, Tensor]]]  # what `adding` adds

    def __init__(
        self,
        source: nn.Module,
        scheme: Scheme,
        device: torch.device | str | None,
        scales: str = "parameters",
    ) -> None:
        weights = dict(expert_shapes(source))
        self._init(weights, replace(scheme, storage_dtype="uint8"), type(source), scales)
        self._terms = {}
        for name, value in vars(source).items():
            if name not in ("_parameters", "_buffers", "_modules") and not name.startswith("__"):
                self.__dict__.setdefault(name, value)
        for name, module in source.named_children():
            self.add_module(name, module)
        for name, parameter in source.named_parameters(recurse=False):
            if name not in weights:
                self.register_parameter(name, parameter)
        for weight, (shape, _) in weights.items():
            self._allocate(weight, shape, device, int(source.get_parameter(weight).shape[0]))

    def _attribute(self, weight: str, part: str) -> str:
        # Not beginning with the name of the weight: transformers before 5.21 would split the parts into
        # experts when it saves, as it does with the weight itself.
        return f"quantized_{weight}_{part.replace('.', '_')}"

    def to_storage(self, codes: Tensor) -> Tensor:
        return codes

    def quantized_weight(self, weight: str, expert: int) -> QuantizedTensor:
        """The weight [out, in] of one expert; shares memory with this layer."""
        shape, dtype = self._weights[weight]
        parts = [part[expert] for part in self._parts(weight)]
        return QuantizedTensor.from_parts(parts, self.scheme.weight, shape, dtype)

    def matrices(self, value: Tensor) -> Sequence[Tensor]:
        return list(value.transpose(1, 2) if self.transposed else value)

    def stored(self, weight: str, quantized: Sequence[QuantizedTensor]) -> dict[str, Tensor]:
        experts = [one.parts() for one in quantized]
        names = self.part_names(weight)
        return {name: torch.stack([parts[part] for parts in experts]) for part, name in names.items()}

    def dequantize(self, weight: str) -> Tensor:
        """A fused weight decoded, [experts, …] in the orientation and dtype it had."""
        experts = range(self.count)
        fused = torch.stack([self.quantized_weight(weight, expert).dequantize() for expert in experts])
        return fused.transpose(1, 2).contiguous() if self.transposed else fused

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(getattr(self, self._attribute(next(iter(self._weights)), "codes")))

    @contextmanager
    def adding(self, weight: str, terms: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Compute with weight[e] + b[e] · a[e] of every term (a [experts, rank, in], b [experts, out, rank]).

        For as long as the context lasts. Gradients flow to the terms.
        """
        self._terms[weight] = list(terms)
        try:
            yield
        finally:
            del self._terms[weight]

    @property
    def transposed(self) -> bool:
        """Whether the layer that this one replaced kept its weights as [experts, in, out]."""
        return bool(getattr(self, "is_transposed", False))

    def forward(self, *inputs: Tensor) -> Any:
        """`source_class.forward` on all experts, decoded for the time of the call."""
        source: Any = self.source_class
        try:
            for weight in self._weights:  # found before parameters; never registered, never saved
                self.__dict__[weight] = self._with_terms(weight)
            return source.forward(self, *inputs)
        finally:
            for weight in self._weights:
                self.__dict__.pop(weight, None)

    def _with_terms(self, weight: str) -> Tensor:
        value = self.dequantize(weight)
        for a, b in self._terms.get(weight, ()):
            term = b @ a
            value = value + (term.transpose(1, 2) if self.transposed else term).to(value.dtype)
        return value

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={list(shape)}" for name, (shape, _) in self._weights.items())
        return f"{shapes}, {self.scheme}"


class RoutedExperts(QuantExperts):
    """Experts that follow transformers' experts interface: only those that a token is routed to are decoded.

    forward (hidden_states [tokens, hidden], top_k_index [tokens, k], top_k_weights [tokens, k]) with
    `gate_up_proj` or `up_proj`, and `down_proj`; flags `has_gate`, `has_bias`, `is_transposed`,
    `has_post_expert_norm`. Activation function and gating are those of `source_class`.
    """

    act_fn: nn.Module
    post_expert_norm: nn.Module

    def _project(self, weight: str, expert: int, x: Tensor) -> Tensor:
        bias = getattr(self, f"{weight}_bias")[expert] if getattr(self, "has_bias", False) else None
        parts = [part[expert] for part in self._parts(weight)]
        scheme, shape = self.scheme, self._weights[weight][0]
        computed = x if scheme.compute_dtype is None else x.to(getattr(torch, scheme.compute_dtype))
        y: Tensor = torch.ops.fewbits.linear.default(computed, parts, bias, self._spelling, shape)
        for a, b in self._terms.get(weight, ()):
            y = y + x.to(a.dtype) @ a[expert].T @ b[expert].T
        return y.to(x.dtype)

    def forward(  # type: ignore[override]  # what the interface calls, by position or by name
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        result = torch.zeros_like(hidden_states)
        source: Any = self.source_class
        up = "gate_up_proj" if "gate_up_proj" in self._weights else "up_proj"
        for expert, tokens, rank in self._routes(top_k_index):
            hidden = self._project(up, expert, hidden_states[tokens])
            hidden = source._apply_gate(self, hidden) if up == "gate_up_proj" else self.act_fn(hidden)
            hidden = self._project("down_proj", expert, hidden)
            if getattr(self, "has_post_expert_norm", False):
                hidden = self.post_expert_norm(hidden)
            hidden = hidden * top_k_weights[tokens, rank, None]
            result.index_add_(0, tokens, hidden.to(result.dtype))
        return result

    def _routes(self, top_k_index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(expert, its tokens, their place in the top k) of every expert that is hit."""
        for expert in torch.unique(top_k_index).tolist():
            if expert < self.count:  # larger: the expert lives on another device
                tokens, rank = torch.where(top_k_index == expert)
                yield expert, tokens, rank


def expert_shapes(module: nn.Module) -> Iterator[tuple[str, tuple[torch.Size, torch.dtype]]]:
    """Fused expert weights of a module: (name, ([out, in] of one expert, dtype)); none if it has none.

    They are the 3-D parameters of a class whose name says that it holds experts.
    """
    if isinstance(module, QuantModule) or "Expert" not in type(module).__name__:
        return
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3 and parameter.is_floating_point():
            shape = parameter.shape[:0:-1] if getattr(module, "is_transposed", False) else parameter.shape[1:]
            yield name, (torch.Size(shape), parameter.dtype)


def experts_class(module: nn.Module) -> type[QuantExperts]:
    """The class that quantizes the experts of `module`."""
    routed = hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    known = set(dict(expert_shapes(module))) <= {"gate_up_proj", "up_proj", "down_proj"}
    return RoutedExperts if routed and known else QuantExperts
