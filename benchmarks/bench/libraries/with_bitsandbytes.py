"""bitsandbytes: its layers, and (variant "function …") its functions as they call them.

On CPUs with AVX512-BF16 an eval-mode layer repacks its weight in place at the first call; that is done here
before anything is timed. Where K is not divisible by 64 the repacked product is wrong: the errors show it.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from bitsandbytes import functional as bf

from bench.libraries import RefusedError, Task, Work

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
torch.set_grad_enabled(False)
warnings.filterwarnings("ignore", module="bitsandbytes")


def versions() -> dict[str, str]:
    return {"bitsandbytes": bnb.__version__, "torch": torch.__version__}


def prepare(task: Task) -> Work:
    return {"linear": linear, "dequantize": dequantize, "quantize": quantize}[task.work](task)


def linear(task: Task) -> Work:
    weight = torch.from_numpy(task.read_weight()).bfloat16()
    kind, _, variant = task.variant.rpartition(" ")
    source = (int8_layer if variant == "llm.int8" else nf4_layer)(weight, variant.endswith("dq"), task.x)
    decoded = decoded_weight(source, variant)
    probe = torch.zeros(1, weight.shape[1], dtype=DTYPES[task.x])
    layers = [copy.deepcopy(source).eval() for _ in range(task.copies(stored_bytes(source)))]
    with torch.inference_mode():
        for layer in layers:
            layer(probe)
    inputs: list[torch.Tensor] = []

    def set_input(x: np.ndarray) -> None:
        inputs[:] = [torch.from_numpy(x).to(DTYPES[task.x])]

    def through_layer(i: int) -> Any:
        return layers[i](inputs[0])

    def through_function(i: int) -> Any:
        parameter = layers[i].weight
        return bnb.matmul_4bit(inputs[0], parameter, quant_state=parameter.quant_state)

    run = through_function if kind == "function" else through_layer
    return Work(
        run, len(layers), stored_bytes(layers[0]), set_input, lambda: run(0).float().numpy(), lambda: decoded
    )


def nf4_layer(weight: torch.Tensor, double: bool, x: str) -> Any:
    rows, columns = weight.shape
    layer = bnb.nn.Linear4bit(
        columns, rows, bias=False, compute_dtype=DTYPES[x], compress_statistics=double, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=double, quant_type="nf4", module=layer
    )
    return layer.to("cpu")


def int8_layer(weight: torch.Tensor, double: bool, x: str) -> Any:
    rows, columns = weight.shape
    layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


def decoded_weight(layer: Any, variant: str) -> np.ndarray:
    if variant == "llm.int8":
        weight = layer.weight
        scale = (weight.SCB if weight.SCB is not None else layer.state.SCB).float()
        return (weight.data.float() * scale.view(-1, 1) / 127).numpy()
    state = copy.deepcopy(layer.weight.quant_state)
    state.dtype = torch.float32
    return bf.dequantize_4bit(layer.weight.data, state).numpy()


def stored_bytes(layer: Any) -> int:
    """Of the weight and of all tensors that its quantization state holds."""
    weight = layer.weight
    tensors = [weight.data]
    for holder in (getattr(weight, "quant_state", None), getattr(layer, "state", None)):
        for value in vars(holder).values() if holder is not None else ():
            tensors += [value] if isinstance(value, torch.Tensor) and value.numel() > 256 else []
            if isinstance(value, bf.QuantState):
                tensors += [value.absmax]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def dequantize(task: Task) -> Work:
    weight = torch.from_numpy(task.read_weight()).bfloat16()
    double = task.variant.endswith("dq")
    codes, state = bf.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    nbytes = codes.nbytes + state.absmax.nbytes
    copies = [(codes.clone(), copy.deepcopy(state)) for _ in range(task.copies(nbytes))]
    return Work(lambda i: bf.dequantize_4bit(*copies[i]), len(copies), nbytes)


def quantize(task: Task) -> Work:
    weight = torch.from_numpy(task.read_weight()).bfloat16()
    nbytes = weight.numel() * 2
    copies = [weight.clone() for _ in range(task.copies(nbytes))]
    if task.variant == "int8":
        halves = [weight.half() for weight in copies]  # the only dtype it takes
        return Work(lambda i: bf.int8_vectorwise_quant(halves[i]), len(copies), nbytes)
    if not task.variant.startswith("nf4"):
        raise RefusedError(f"{task.variant} is not known here")
    double = task.variant.endswith("dq")
    return Work(
        lambda i: bf.quantize_4bit(copies[i], quant_type="nf4", compress_statistics=double),
        len(copies),
        nbytes,
    )
