"""LoRA over the fused weights of quantized experts (`LoraConfig(target_parameters=…)`)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from fewbits import ops
from fewbits.experts import QuantExperts
from fewbits.tensor import QuantizedTensor


def warn_of_rounding() -> None:
    """Once per process, as warnings are by default."""
    warnings.warn(
        "merging into quantized weights rounds them again; fewbits.report(model) tells what each layer lost. "
        "To lose nothing, merge into 16-bit weights: fewbits merge",
        stacklevel=3,
    )


class ParamWrapper(lora.ParamWrapper):  # PEFT knows its own by this name
    """LoRA over one weight of a `QuantExperts`, with A and B as PEFT lays them out.

    The product is computed as x · W + (x · A) · B per expert, so no weight of the size of the stack exists.
    """

    merged_adapters: list[str]
    _first: dict[str, Tensor] | None = None  # parts before anything was merged

    def get_param(self) -> Tensor:
        """A stand-in with the shape, dtype and device of the weight, and no memory."""
        layer = self._experts()
        (out_features, in_features), dtype = layer.weights()[self.parameter_name]
        sizes = (in_features, out_features) if layer.transposed else (out_features, in_features)
        device = getattr(layer, layer.part_names(self.parameter_name)["codes"]).device
        return torch.empty((), dtype=dtype, device=device).expand(layer.count, *sizes)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to every expert's weight, and round it to its Format again; see `LoraLinear.merge`."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if names:
            with (
                torch.inference_mode(mode=False),
                torch.no_grad(),
            ):  # what is stored outlives an inference mode
                self._merge([*self.merged_adapters, *names], safe_merge)

    def _merge(self, every: list[str], safe_merge: bool) -> None:
        layer, weight = self._experts(), self.parameter_name
        first = self._first or {name: layer.unheld()[name] for name in layer.part_names(weight).values()}
        first = {name: part.to(self.get_param().device) for name, part in first.items()}
        terms = [self._term(name) for name in every]
        shape, format = layer.weights()[weight][0], layer.scheme.weight
        found, lost, changed, whole = [], 0.0, 0.0, 0.0
        for expert in range(layer.count):
            parts = [part[expert] for part in first.values()]
            before = QuantizedTensor.from_parts(parts, format, shape).dequantize(torch.float32)
            value = before + sum((b[expert] @ a[expert]).float() for a, b in terms)
            if safe_merge and not torch.isfinite(value).all():
                raise ValueError(
                    f"NaNs detected in the merged weights of expert {expert} for {', '.join(every)}"
                )
            found.append(ops.quantize(value, format, name=f"{weight}[{expert}]"))
            lost += float((value - found[-1].dequantize(torch.float32)).square().sum())
            changed += float((value - before).square().sum())
            whole += float(value.square().sum())
        layer.store(layer.stored(weight, found))
        self._first, self.merged_adapters = first, every
        error = math.sqrt(lost / whole) if whole else 0.0
        added = f", {math.sqrt(lost / changed):.3g} of the change" if changed else ""
        layer.relative_errors[weight] = error
        warn_of_rounding()
        layer.notes[weight] = f"merged {', '.join(every)}: {error:.4f} of the weight{added} lost"

    def unmerge(self) -> None:
        """Give the codes of before the first merge back, bit for bit."""
        if self._first is None:
            super().unmerge()  # says that nothing is merged
            return
        with torch.inference_mode(mode=False):
            device = self.get_param().device
            self._experts().store({name: part.to(device) for name, part in self._first.items()})
        self._experts().notes.pop(self.parameter_name, None)
        self.merged_adapters.clear()
        self._first = None

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        terms = [self._term(name) for name in active_adapters if name in self.lora_A]
        with self._experts().adding(self.parameter_name, terms):
            yield

    def _term(self, adapter: str) -> tuple[Tensor, Tensor]:
        """a [experts, rank, in], b [experts, out, rank] with the scaling in it."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        if a.is_meta or self.get_param().is_meta:
            raise ValueError(
                "experts or adapters over them are offloaded, where adapters over experts cannot be applied; "
                "offload other modules, or leave the experts without adapters"
            )
        a = a.reshape(self.num_experts, -1, a.shape[-1])
        return a, b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1) * self.scaling[adapter]

    def _experts(self) -> QuantExperts:
        layer: Any = self.get_base_layer()
        assert isinstance(layer, QuantExperts)
        return layer
