"""The ops of fewbits in torch: schemas, shapes for tracing, gradients.

A quantized weight enters an op as its parts (in the order of `Format.parts`), the spelling of its format
and its shape, so that `torch.compile` sees plain tensors and constants:

    fewbits::quantize(weight, format) -> parts
    fewbits::dequantize(parts, format, shape, dtype) -> weight
    fewbits::linear(x, parts, bias, scheme, shape) -> y          differentiable in x and bias
    fewbits::linear_backward(grad, parts, format, shape) -> grad_x              differentiable in grad
    fewbits::embedding(indices, parts, format, shape, dtype) -> rows
    fewbits::rounded_linear(x, weight, bias, scheme) -> y        differentiable in x, weight and bias
    fewbits::rounded_linear_backward(grad, weight, format) -> grad_x            differentiable in both
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from fewbits import backends
from fewbits.format import Format, Scheme
from fewbits.tensor import DTYPES, QuantizedTensor

_LIBRARY = torch.library.Library("fewbits", "DEF")
_LIBRARY.define("quantize(Tensor weight, str format, str name='tensor') -> Tensor[]")
_LIBRARY.define("dequantize(Tensor[] parts, str format, SymInt[] shape, ScalarType dtype) -> Tensor")
_LIBRARY.define("linear(Tensor x, Tensor[] parts, Tensor? bias, str scheme, SymInt[] shape) -> Tensor")
_LIBRARY.define("linear_backward(Tensor grad, Tensor[] parts, str format, SymInt[] shape) -> Tensor")
_LIBRARY.define(
    "embedding(Tensor indices, Tensor[] parts, str format, SymInt[] shape, ScalarType dtype) -> Tensor"
)
_LIBRARY.define("rounded_linear(Tensor x, Tensor weight, Tensor? bias, str scheme) -> Tensor")
_LIBRARY.define("rounded_linear_backward(Tensor grad, Tensor weight, str format) -> Tensor")


def quantize(tensor: Tensor, format: Format | str, *, name: str = "tensor") -> QuantizedTensor:
    """Quantize a floating tensor of any rank, stride and length to the nearest codes of `format`.

    `name` is what errors call the tensor. ValueError for NaN or infinity, an unknown format, or a scale
    that does not fit the dtype the format stores it in.
    """
    format = Format.parse(format)
    parts = torch.ops.fewbits.quantize.default(tensor.detach(), str(format), name)
    return QuantizedTensor.from_parts(parts, format, tensor.shape, tensor.dtype, name)


def dequantize(weight: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weights [*shape] in `dtype` (default: that of the tensor that was quantized)."""
    return weight.dequantize(dtype)


def linear(
    x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """x [..., in] · decode(weight [out, in])ᵀ + bias [out], in x's dtype.

    `activation` "int8:t6" multiplies by LLM.int8() (weights in int8:row), "int8:g64" quantizes x in groups of
    64 columns (weights of up to 4 bits). Gradients flow to x and bias, as if x had not been rounded.
    """
    scheme = str(weight.format) + (f"@{activation}" if activation else "")
    if not torch.compiler.is_compiling() and is_plain(x, bias):  # the dispatcher takes longer than it helps
        _check_linear(x, weight.codes, bias, weight.format, weight.shape)
        return _multiply(x, weight, bias, _scheme(scheme))
    parts = list(weight.parts().values())
    result: Tensor = torch.ops.fewbits.linear.default(x, parts, bias, scheme, weight.shape)
    return result


def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scheme: str) -> Tensor:
    """`linear` with the codes that a floating weight [out, in] has now, for training that weight.

    `scheme` is the spelling of a Scheme, for instance "int8:row@int8:t6".

    Gradients are straight-through (Bengio et al. 2013, arXiv:1308.3432): rounding to codes counts as the
    identity. With ŵ the decoded codes, grad_x = grad_y · ŵ, the weight that was multiplied by, and
    grad_weight = grad_yᵀ · x. For backward x and the weight itself are kept; codes are made again there.
    """
    result: Tensor = torch.ops.fewbits.rounded_linear.default(x, weight, bias, scheme)
    return result


def embedding(indices: Tensor, weight: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows `indices` [...] of weight [rows, columns] → [..., columns]; decodes only those rows."""
    parts = list(weight.parts().values())
    result: Tensor = torch.ops.fewbits.embedding.default(
        indices, parts, str(weight.format), weight.shape, dtype or weight.dtype
    )
    return result


def is_plain(x: Tensor, bias: Tensor | None) -> bool:
    """Nothing is watching: no gradient, autocast, tracing or mode of torch has a part in this op."""
    if type(x) is not Tensor or not x.is_cpu or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    modes: Any = torch._C
    return (
        modes._len_torch_dispatch_stack() == 0
        and modes._functorch.peek_interpreter_stack() is None
        and modes._get_tracing_state() is None
    )


def fixed_linear(
    weight: QuantizedTensor, bias: Tensor | None, scheme: Scheme
) -> Callable[[Tensor], Tensor | None] | None:
    """x → `linear(x, weight, bias)` with all that does not depend on x worked out before, for plain x only.

    None when no backend has a short way for this weight; the function returns None when there is none for an
    x. It holds the addresses of the parts and of the bias, and keeps nothing alive.
    """
    op = "linear" if scheme.activation is None else "linear_int8" if scheme.is_llm_int8 else "linear_a8"
    kernels = backends.choose(op, weight.format, weight.device)
    make = getattr(kernels, "fixed_linear", None)
    return (
        None if make is None else cast("Callable[[Tensor], Tensor | None] | None", make(weight, bias, scheme))
    )


# --- implementations --------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _scheme(spelling: str) -> Scheme:
    return Scheme.parse(spelling)


def _weight(parts: Sequence[Tensor], format: Format, shape: Sequence[int]) -> QuantizedTensor:
    return QuantizedTensor.from_parts(parts, format, shape)


def _quantize(weight: Tensor, format: str, name: str = "tensor") -> list[Tensor]:
    parsed = Format.parse(format)
    quantized = backends.choose("quantize", parsed, weight.device).quantize(weight, parsed, name)
    return list(quantized.parts().values())


def _dequantize(parts: list[Tensor], format: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    weight = _weight(parts, Format.parse(format), shape)
    return backends.choose("dequantize", weight.format, weight.device).dequantize(weight, dtype)


def _linear(x: Tensor, parts: list[Tensor], bias: Tensor | None, scheme: str, shape: Sequence[int]) -> Tensor:
    parsed = _scheme(scheme)
    _check_linear(x, parts[0], bias, parsed.weight, shape)
    return _multiply(x, _weight(parts, parsed.weight, shape), bias, parsed)


def _multiply(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, scheme: Scheme) -> Tensor:
    activation, format = scheme.activation, weight.format
    if activation is None:
        return backends.choose("linear", format, x.device).linear(x, weight, bias)
    if scheme.is_llm_int8:
        kernels = backends.choose("linear_int8", format, x.device)
        return kernels.linear_int8(x, weight, bias, activation.threshold)
    return backends.choose("linear_a8", format, x.device).linear_a8(x, weight, bias, activation.group)


def _linear_backward(grad: Tensor, parts: list[Tensor], format: str, shape: Sequence[int]) -> Tensor:
    parsed = Format.parse(format)
    _check_factor(grad, parsed, shape, 0)
    weight = _weight(parts, parsed, shape)
    return backends.choose("linear_backward", weight.format, grad.device).linear_backward(grad, weight)


def _embedding(
    indices: Tensor, parts: list[Tensor], format: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    weight = _weight(parts, Format.parse(format), shape)
    kernels = backends.choose("embedding", weight.format, weight.device)
    return kernels.embedding(indices, weight, dtype)


def _rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scheme: str) -> Tensor:
    parsed = _scheme(scheme)
    _check_linear(x, weight, bias, parsed.weight, weight.shape)
    return _multiply(x, _rounded(weight, parsed.weight), bias, parsed)


def _rounded_linear_backward(grad: Tensor, weight: Tensor, format: str) -> Tensor:
    codes = _rounded(weight, Format.parse(format))
    return backends.choose("linear_backward", codes.format, grad.device).linear_backward(grad, codes)


def _rounded(weight: Tensor, format: Format) -> QuantizedTensor:
    name = "the weight of a layer in training"
    return backends.choose("quantize", format, weight.device).quantize(weight, format, name)


def _check_linear(
    x: Tensor, codes: Tensor, bias: Tensor | None, format: Format, shape: Sequence[int]
) -> None:
    _check_places(x, codes, bias, shape)
    _check_factor(x, format, shape, 1)


def _check_factor(x: Tensor, format: Format, shape: Sequence[int], side: int) -> None:
    if len(shape) != 2 or not x.dim() or x.shape[-1] != shape[side] or not x.is_floating_point():
        raise ValueError(
            f"cannot multiply x {x.dtype} {list(x.shape)} with a weight {list(shape)} in {format}: it takes "
            "a floating x whose last dimension fits a weight [out, in]"
        )


def _check_places(x: Tensor, codes: Tensor, bias: Tensor | None, shape: Sequence[int]) -> None:
    """Also while tracing, where nothing else would notice."""
    if bias is not None and tuple(bias.shape) != (shape[0],):
        raise ValueError(f"a weight {list(shape)} takes a bias [{shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("weight", codes), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device}, but the {name} is on {tensor.device}; move one of them")


def _without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Layers decide what to cast; an autocast product inside would round what has to be exact."""

    def run(first: Tensor | list[Tensor], *rest: Any) -> Any:
        place = (first if isinstance(first, Tensor) else first[0]).device.type
        if not torch.is_autocast_enabled(place):
            return implementation(first, *rest)
        with torch.autocast(place, enabled=False):
            return implementation(first, *rest)

    return run


# --- tracing and gradients --------------------------------------------------------------------------


def _quantize_fake(weight: Tensor, format: str, name: str = "tensor") -> list[Tensor]:
    parts = Format.parse(format).parts(weight.shape)
    return [weight.new_empty(part.shape, dtype=DTYPES[part.dtype]) for part in parts]


def _dequantize_fake(parts: list[Tensor], format: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty(shape, dtype=dtype)


def _linear_fake(
    x: Tensor, parts: list[Tensor], bias: Tensor | None, scheme: str, shape: Sequence[int]
) -> Tensor:
    _check_places(x, parts[0], bias, shape)
    return x.new_empty(*x.shape[:-1], shape[0])


def _linear_backward_fake(grad: Tensor, parts: list[Tensor], format: str, shape: Sequence[int]) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], shape[1])


def _embedding_fake(
    indices: Tensor, parts: list[Tensor], format: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return parts[0].new_empty(*indices.shape, shape[1], dtype=dtype)


def _rounded_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, scheme: str) -> Tensor:
    _check_places(x, weight, bias, weight.shape)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _rounded_linear_backward_fake(grad: Tensor, weight: Tensor, format: str) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


for _name, _implementation, _fake in (
    ("quantize", _quantize, _quantize_fake),
    ("dequantize", _dequantize, _dequantize_fake),
    ("linear", _linear, _linear_fake),
    ("linear_backward", _linear_backward, _linear_backward_fake),
    ("embedding", _embedding, _embedding_fake),
    ("rounded_linear", _rounded_linear, _rounded_linear_fake),
    ("rounded_linear_backward", _rounded_linear_backward, _rounded_linear_backward_fake),
):
    _LIBRARY.impl(_name, _without_autocast(_implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fewbits::{_name}", _fake, lib=_LIBRARY)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, parts, bias, scheme, shape = inputs
    ctx.save_for_backward(*parts)  # codes and scales only: neither x nor a decoded weight is kept
    ctx.scheme, ctx.shape = scheme, shape
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        format = ctx.scheme.partition("@")[0]
        grad_x = torch.ops.fewbits.linear_backward.default(grad.contiguous(), parts, format, ctx.shape)
    if ctx.needs_input_grad[2]:
        grad_bias = _bias_gradient(grad, ctx.bias_dtype)
    return grad_x, [None] * len(parts), grad_bias, None, None


def _bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(dtype)


def _weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return (grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])).to(dtype)


def _save_rounded_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.scheme = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(weight if needs_x else None, x if needs_weight else None)
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype


def _rounded_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, x = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        format = ctx.scheme.partition("@")[0]
        grad_x = torch.ops.fewbits.rounded_linear_backward.default(grad.contiguous(), weight, format)
    if ctx.needs_input_grad[1]:
        grad_weight = _weight_gradient(grad, x, ctx.weight_dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = _bias_gradient(grad, ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias, None


# grad_x is linear in grad, so that its derivative is the forward product again: gradients of any order.


def _save_for_second(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, parts, ctx.format, ctx.shape = inputs
    ctx.save_for_backward(*parts)


def _second(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors)
    result = torch.ops.fewbits.linear.default(grad, parts, None, ctx.format, ctx.shape)
    return result, [None] * len(parts), None, None


def _save_rounded_for_second(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, weight, ctx.format = inputs
    needs_first, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(weight if needs_first else None, first if needs_weight else None)
    ctx.weight_dtype = weight.dtype


def _rounded_second(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, first = ctx.saved_tensors
    grad_first = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_first = torch.ops.fewbits.rounded_linear.default(grad, weight, None, ctx.format)
    if ctx.needs_input_grad[1]:
        grad_weight = _weight_gradient(first, grad, ctx.weight_dtype)
    return grad_first, grad_weight, None


for _name, _derivative, _save in (
    ("linear", _backward, _save_for_backward),
    ("rounded_linear", _rounded_backward, _save_rounded_for_backward),
    ("linear_backward", _second, _save_for_second),
    ("rounded_linear_backward", _rounded_second, _save_rounded_for_second),
):
    torch.library.register_autograd(f"fewbits::{_name}", _derivative, setup_context=_save, lib=_LIBRARY)
