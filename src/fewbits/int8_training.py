"""Training through LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339): weights stay, codes follow them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbits import ops
from fewbits.format import Scheme
from fewbits.nn import QuantLinear, is_transposed


class TrainableInt8Linear(nn.Linear):
    """y = x · decode(int8(W))ᵀ + bias by LLM.int8(); W is the trainable parameter `weight`, in its own dtype.

    The state dict is that of the layer it replaces. `weight` is [out_features, in_features]; where
    `source_class` is transformers' Conv1D, [in_features, out_features]. `forward` takes x [..., in_features]
    and returns x's dtype (that of autocast where it is on), in training and evaluation the same values: those
    of the frozen layer that `frozen` gives. Gradients are those of `ops.rounded_linear`.

    Here quantizing in `forward` is what the layer is for. Codes are made from the weight as it is at each
    product and never kept: they cannot be stale, whoever writes to the weight, and a sharded weight stays
    sharded. Making them is little beside a product with many tokens; freeze a model that is to generate.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: Scheme,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        source_class: type[nn.Module] = nn.Linear,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.scheme, self.source_class = replace(scheme, trainable=True), source_class
        self._spelling = str(scheme)
        if is_transposed(source_class):
            self.weight = nn.Parameter(self.weight.detach().T.contiguous())

    @classmethod
    def of(cls, source: nn.Module, scheme: Scheme) -> TrainableInt8Linear:
        """The layer that takes the place of `source` and has its parameters, the same objects."""
        shape = source.get_parameter("weight").shape
        rows, columns = shape[::-1] if is_transposed(type(source)) else shape
        layer = cls(columns, rows, False, scheme, device="meta", source_class=type(source))
        _share_parameters(source, layer)
        return layer.train(source.training)

    def matrix(self) -> Tensor:
        """The weight as [out_features, in_features]; no copy."""
        return self.weight.T if is_transposed(self.source_class) else self.weight

    def forward(self, x: Tensor) -> Tensor:
        place = x.device.type
        if torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place):
            x = x.to(torch.get_autocast_dtype(place))
        return ops.rounded_linear(x, self.matrix(), self.bias, self._spelling)

    def frozen(self) -> QuantLinear:
        """The LLM.int8() layer with the codes that the weight has now, and with the bias of this layer."""
        weight = self.weight
        layer = QuantLinear(
            self.in_features,
            self.out_features,
            False,
            replace(self.scheme, trainable=False),
            device="meta",
            dtype=weight.dtype,
            source_class=self.source_class,
        )
        if not weight.is_meta:
            layer.store(layer.stored("weight", [ops.quantize(self.matrix(), self.scheme.weight)]))
        layer.bias = self.bias
        return layer.train(self.training)

    def plain(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The layer that this one replaced, with its parameters: the same objects, or copies in `dtype`."""
        source: Any = self.source_class
        with torch.device("meta"):
            layer: nn.Module = (
                source(self.out_features, self.in_features)
                if is_transposed(source)
                else nn.Linear(self.in_features, self.out_features, self.bias is not None)
            )
        _share_parameters(self, layer)
        if dtype is not None and dtype != self.weight.dtype:
            layer.to(dtype)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme}"


def freeze(model: nn.Module) -> None:
    """Turn every layer that trains its weight into the frozen LLM.int8() layer of its codes, in place.

    A transformers model is saved with int8 weights from then on, and reloads like any LLM.int8() model.
    ValueError names a weight that holds NaN or infinity, or that hooks of a device map move; layers before it
    are frozen by then.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, TrainableInt8Linear):
            if hasattr(layer, "_hf_hook"):
                raise ValueError(
                    f"cannot freeze {name}, which a device map moves; save the model, load it with "
                    "device_map='cpu' and freeze that"
                )
            try:
                frozen = layer.frozen()
            except ValueError as error:
                raise ValueError(f"cannot freeze {name}: {error}") from error
            frozen.use_huge_pages()
            model.set_submodule(name, frozen)
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if hasattr(config, "llm_int8_has_fp16_weight"):
        config.llm_int8_has_fp16_weight = False


def _share_parameters(source: nn.Module, target: nn.Module) -> None:
    for name in ("weight", "bias"):
        target.register_parameter(name, source._parameters.get(name))
