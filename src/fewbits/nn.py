"""Layers whose weights are quantized: what they share, linear, embedding. `experts.py` has the others.

A layer holds the parts of its weight as plain tensors, so that devices, `state_dict`, safetensors and
sharding treat it like any other. The codes are the parameter `weight`, a part `scale` is `weight_scale`,
`scale.codes` is `weight_scale_codes`; of experts, `quantized_gate_up_proj_codes` and so on. Codes of linear
layers and embeddings are one column, [bytes, 1], in every format: 8-bit codes in the shape of the weight
could be taken for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbits import columns, machine, ops
from fewbits.format import Part, Scheme
from fewbits.tensor import DTYPES, QuantizedTensor

# The product with a weight as it is now (`ops.fixed_linear`), and the addresses that it holds for, behind the
# dtype of the bias.
_Fixed = tuple[tuple[object, ...], Callable[[Tensor], Tensor | None] | None]
_NOTHING_FIXED: _Fixed = ((), None)
_SAME_SIZE_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class QuantModule(nn.Module, ABC):
    """What quantized layers share: parts by name, and casts that leave them alone.

    `.to(dtype)`, `.half()` and the like change a bias and the dtype that weights decode to, but never codes
    or scales, also where codes are held as a floating dtype (`storage_dtype`).

    source_class     the class of the layer that this one replaced
    relative_errors  per weight, ‖W - decode(W)‖ / ‖W‖, where it was quantized here and not loaded
    notes            per weight, what happened to it since, for the report
    held             the dtype that all parts are held as, bit by bit, or None (`hold`)
    is_stack         parts have a leading dimension: one quantized tensor per expert
    """

    is_stack = False
    scheme: Scheme
    source_class: type[nn.Module]
    relative_errors: dict[str, float]
    notes: dict[str, str]

    def _init(
        self,
        weights: dict[str, tuple[torch.Size, torch.dtype]],
        scheme: Scheme,
        source_class: type[nn.Module],
        scales: str = "parameters",
    ) -> None:
        nn.Module.__init__(self)
        self.source_class, self.relative_errors, self._scales = source_class, {}, scales
        self.notes = {}
        self._weights = weights
        self.held: torch.dtype | None = None
        self._set_scheme(scheme)

    def _set_scheme(self, scheme: Scheme) -> None:
        # What every forward needs, worked out once.
        self.scheme, self._spelling = scheme, str(scheme)
        self._names: dict[str, dict[str, str]] = {}
        self._layouts: dict[str, list[tuple[tuple[int, ...], torch.dtype]]] = {}
        self._fixed = _NOTHING_FIXED

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take over: everything but what holds addresses of this process."""
        return {**self.__dict__, "_fixed": _NOTHING_FIXED}

    def weights(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Quantized weights of this layer: name → (shape of one quantized tensor, dtype it decodes to).

        That is the dtype before quantization, or the last that the module was cast to.
        """
        return self._weights

    @abstractmethod
    def dequantize(self, weight: str) -> Tensor:
        """A weight decoded, to the dtype that `weights` says."""

    def part_names(self, weight: str) -> dict[str, str]:
        """Part name of the format → attribute of this module, in the order of the format."""
        if weight not in self._names:
            parts = self.scheme.weight.parts(self.weights()[weight][0])
            self._names[weight] = {part.name: self._attribute(weight, part.name) for part in parts}
            self._layouts[weight] = [(part.shape, DTYPES[part.dtype]) for part in parts]
        return self._names[weight]

    def matrices(self, value: Tensor) -> Sequence[Tensor]:
        """A weight of the replaced layer as the tensors that this one quantizes, each [out, in]."""
        return [value.T if is_transposed(self.source_class) else value]

    def stored(self, weight: str, quantized: Sequence[QuantizedTensor]) -> dict[str, Tensor]:
        """Attribute → tensor, as this layer stores what became of `matrices`."""
        names = self.part_names(weight)
        tensors = {names[part]: tensor for part, tensor in quantized[0].parts().items()}
        tensors[names["codes"]] = self.to_storage(tensors[names["codes"]])
        return tensors

    def store(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `stored` returned."""
        for attribute, tensor in tensors.items():
            self._register(attribute, tensor)

    def unheld(self) -> dict[str, Tensor]:
        """Attribute → tensor of all parts, as they are where nothing is held as another dtype."""
        found: dict[str, Tensor] = {}
        for weight in self.weights():
            codes, *rest = self._parts(weight)
            found |= zip(self.part_names(weight).values(), (self.to_storage(codes), *rest), strict=True)
        return found

    def hold(self, dtype: torch.dtype | None) -> None:
        """Hold all parts as frozen parameters of `dtype`, their bytes in a column; None: as before that.

        For sharding, see `fewbits.distributed`. The bytes, and what the layer computes, stay the same.
        """
        tensors = self.unheld()
        self.held, self._fixed = dtype, _NOTHING_FIXED
        self.store(tensors)

    def share(self, other: QuantModule) -> None:
        """Use the parts of `other`, to which this layer is tied."""
        self.held, self._fixed = other.held, _NOTHING_FIXED
        for name in self.part_names("weight").values():
            tensor = getattr(other, name)
            if isinstance(tensor, nn.Parameter):
                self._buffers.pop(name, None)
            setattr(self, name, tensor)

    def borrows(self, attribute: str) -> bool:
        """Whether a tensor of this layer is that of the layer it is tied to."""
        return self._scales == "shared" and attribute in self._buffers

    def use_huge_pages(self) -> int:
        """Move large codes on the CPU to memory that is read faster (`machine.huge_pages`); bytes moved."""
        moved_bytes = 0
        for weight in self.weights():
            codes = getattr(self, self._attribute(weight, "codes"))
            if codes.is_cpu and codes.nbytes >= machine.HUGE_PAGE:
                memory, start = machine.huge_pages(codes.nbytes)
                moved = torch.frombuffer(memory, dtype=codes.dtype, count=codes.numel(), offset=start)
                before = codes.detach()
                codes.data = moved.view(codes.shape).copy_(before)
                machine.forget_file_pages(before.data_ptr(), before.nbytes)  # of a quantized checkpoint
                moved_bytes += codes.nbytes
        return moved_bytes

    def to_storage(self, codes: Tensor) -> Tensor:
        """Codes as one column, their bytes viewed as `storage_dtype`; the same memory."""
        dtype = getattr(torch, self.scheme.storage_dtype)
        column = codes.view(-1)
        return (column if dtype == torch.uint8 else column.view(dtype)).view(-1, 1)

    def _attribute(self, weight: str, part: str) -> str:
        if part == "codes":
            return weight
        return f"{weight}_{part.replace('.', '_')}"

    def _register(self, attribute: str, tensor: Tensor) -> None:
        self._parameters.pop(attribute, None)
        self._buffers.pop(attribute, None)
        codes = [self._attribute(weight, "codes") for weight in self.weights()]
        if self.held is not None:
            tensor = columns.as_column(tensor, self.held, stack=self.is_stack)
        if self._scales == "parameters" or attribute in codes or self.held is not None:
            self.register_parameter(attribute, nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(attribute, tensor, persistent=self._scales == "buffers")

    def _allocate(
        self, weight: str, shape: torch.Size, device: torch.device | str | None, *lead: int
    ) -> None:
        for part in self.scheme.weight.parts(shape):
            tensor = torch.empty((*lead, *part.shape), dtype=DTYPES[part.dtype], device=device)
            if part.name == "codes":
                self._check_storage(part, shape)
                tensor = self.to_storage(tensor)
            self._register(self._attribute(weight, part.name), tensor)

    def _check_storage(self, part: Part, shape: torch.Size) -> None:
        size = getattr(torch, self.scheme.storage_dtype).itemsize
        if part.nbytes % size:
            raise ValueError(
                f"codes of a {list(shape)} weight in {self.scheme.weight} take {part.nbytes} bytes, which "
                f"cannot be held as {self.scheme.storage_dtype}; use quant_storage uint8 or skip this layer"
            )

    def _parts(self, weight: str = "weight") -> list[Tensor]:
        parts: list[Tensor] = []
        storage = self.held
        if storage is None and not self.is_stack and self.scheme.storage_dtype != "uint8":
            storage = getattr(torch, self.scheme.storage_dtype)
        for part, name in self.part_names(weight).items():
            tensor, (shape, dtype) = getattr(self, name), self._layouts[weight][len(parts)]
            in_column = self.held is not None or (part == "codes" and not self.is_stack)
            kept = (storage or dtype) if in_column else dtype
            if tensor.dtype != kept or hasattr(tensor, "full_tensor"):
                raise ValueError(columns.explain(tensor, kept, f"{name} of {self}"))
            if in_column:
                tensor = columns.from_column(tensor, shape, dtype, stack=self.is_stack)
            parts.append(tensor)
        return parts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantModule:
        names = (name for weight in self.weights() for name in self.part_names(weight).values())
        protected = {id(getattr(self, name)) for name in names}

        def as_integers(tensor: Tensor) -> Tensor:
            # A cast passes integers by, so bits travel as integers of the same size.
            if id(tensor) not in protected:
                return fn(tensor)
            bits = tensor.detach().view(_SAME_SIZE_INTEGER[tensor.element_size()])
            moved = fn(bits)
            return (moved if moved.dtype == bits.dtype else bits.to(moved.device)).view(tensor.dtype)

        for name, (shape, dtype) in self._weights.items():
            self._weights[name] = (shape, fn(torch.empty(0, dtype=dtype)).dtype)
        return super()._apply(as_integers, recurse)  # type: ignore[no-untyped-call,no-any-return]


class QuantMatrix(QuantModule):
    """A layer with one quantized matrix, `weight`: [out, in] of a linear layer, the rows of an embedding."""

    def quantized_weight(self) -> QuantizedTensor:
        """The weight; shares memory with this layer."""
        shape, dtype = self.weights()["weight"]
        return QuantizedTensor.from_parts(self._parts(), self.scheme.weight, shape, dtype)

    def dequantize(self, weight: str = "weight") -> Tensor:
        """The weight decoded, to the dtype that `weights` says."""
        return self.quantized_weight().dequantize()

    def overwrite(self, weight: QuantizedTensor) -> None:
        """Put another weight of the same format and shape in the place of this one, in the same memory."""
        mine = self.quantized_weight()
        if (weight.format, weight.shape) != (mine.format, mine.shape):
            raise ValueError(
                f"cannot put a weight {weight.format} {list(weight.shape)} in the place of {mine.format} "
                f"{list(mine.shape)}"
            )
        given = weight.parts()
        with torch.no_grad():
            for (name, part), held in zip(
                mine.parts().items(), self.part_names("weight").values(), strict=True
            ):
                if part.untyped_storage().data_ptr() != getattr(self, held).untyped_storage().data_ptr():
                    raise ValueError(
                        f"{held} of {self} lies where it cannot be written; unshard the model first"
                    )
                part.copy_(given[name])


class QuantLinear(QuantMatrix, nn.Linear):
    """y = x · decode(W)ᵀ + bias, with W [out_features, in_features] in a Format.

    `scheme` says the format, LLM.int8() activations if any, and the compute dtype (None: that of x). The
    result has x's dtype. `dtype` is that of the weight before quantization. `scales`: how parts other than
    the codes are held: "parameters", "buffers", or "shared": buffers that are those of the layer it is tied
    to, and not in the state dict.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: Scheme,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        source_class: type[nn.Module] = nn.Linear,
        scales: str = "parameters",
    ) -> None:
        shape = torch.Size((out_features, in_features))
        self._init({"weight": (shape, dtype)}, scheme, source_class, scales)
        self.in_features, self.out_features = in_features, out_features
        self._allocate("weight", shape, device)
        if bias:
            self.bias = nn.Parameter(
                torch.empty(out_features, device=device, dtype=dtype), requires_grad=False
            )
        else:
            self.register_parameter("bias", None)

    def adopt(self, weight: QuantizedTensor, storage_dtype: str) -> None:
        """Change format, storage dtype and weight dtype to those of a weight that was read from a file."""
        self._set_scheme(replace(self.scheme, weight=weight.format, storage_dtype=storage_dtype))
        self._weights["weight"] = (weight.shape, weight.dtype)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        name = self.scheme.compute_dtype
        return None if name is None else getattr(torch, name)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        if not torch.compiler.is_compiling() and ops.is_plain(x, bias):
            plain = self._plain_forward(x, bias)
            if plain is not None:
                return plain
        dtype = x.dtype
        computed = self.compute_dtype
        place = x.device.type
        if computed is None and torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place):
            computed = dtype = torch.get_autocast_dtype(place)
        shape = (self.out_features, self.in_features)
        x = x if computed is None else x.to(computed)
        y: Tensor = torch.ops.fewbits.linear.default(x, self._parts(), bias, self._spelling, shape)
        return y.to(dtype)

    def _plain_forward(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """The product without torch's dispatcher, which takes longer than a small layer; None: not here."""
        if self.scheme.compute_dtype is not None and self.compute_dtype != x.dtype:
            return None
        parameters, buffers = self._parameters, self._buffers
        # Addresses say whether parts and bias are those that `_fixed` was made for. Others may have come to
        # the same place, which is as good, but for a bias of another dtype.
        found: list[object] = [] if bias is None else [bias.dtype, bias.data_ptr()]
        for name in self.part_names("weight").values():
            part = parameters.get(name, buffers.get(name))
            if part is None:  # FSDP1 has views of a flat parameter in its place
                return None
            found.append(part.data_ptr())
        places = tuple(found)
        if places != self._fixed[0]:
            self._fixed = (places, ops.fixed_linear(self.quantized_weight(), bias, self.scheme))
        fixed = self._fixed[1]
        return None if fixed is None else fixed(x)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.scheme}"
        )


class QuantEmbedding(QuantMatrix, nn.Embedding):
    """Rows of a quantized [num_embeddings, embedding_dim] table; only the rows asked for are decoded.

    Returns the dtype that `weights` says. `scales` is as in `QuantLinear`, but never "parameters":
    transformers takes the first floating parameter for the dtype of the model, and that must be no scale.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme,
        *,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        scales: str = "buffers",
    ) -> None:
        shape = torch.Size((num_embeddings, embedding_dim))
        self._init({"weight": (shape, dtype)}, scheme, nn.Embedding, scales)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._allocate("weight", shape, device)

    def forward(self, input: Tensor) -> Tensor:
        shape, dtype = self.weights()["weight"]
        rows: Tensor = torch.ops.fewbits.embedding.default(
            input, self._parts(), str(self.scheme.weight), shape, dtype
        )
        return rows

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme}"


def is_transposed(layer: type[nn.Module]) -> bool:
    """Whether a linear layer of this class keeps its weight as [in, out]: transformers' Conv1D (GPT-2)."""
    return layer.__name__ == "Conv1D" and not issubclass(layer, nn.Linear)
