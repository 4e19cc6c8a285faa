"""How much memory a model takes while it loads, runs and is fine-tuned. All sizes are bytes.

Weights are counted from an empty model, the key-value cache from what one token leaves in it, activations by
a run on the meta device (`LiveBytes`), where every tensor has a size and none has memory. What is left to
estimate are the temporaries of quantizing and of decoding weights.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewbits.backends.cpu.products import PANEL_BYTES
from fewbits.nn import QuantEmbedding, QuantModule

RUNTIME = 500_000_000
"""What Python, torch and transformers take beside a model: 413 MB of resident memory were measured on x86-64
Linux; a CUDA context takes as much on its device."""
ROOM = 0.1
"""Share of a device that should stay free: heaps and caching allocators hold on to more than is in use."""
_BLOCK = 2**19
"""Weights that are quantized or decoded at a time."""
_BLOCK_BYTES = 16
"""Of temporaries for each of them: 8 to 32, by format."""
_INT8_COLUMNS = 1024
"""Columns of W that LLM.int8() multiplies at a time."""
_ROW_BYTES = 21
"""Of temporaries for each weight of the rows that an embedding gives."""
_ADAMW = 4 + 4 + 8
"""Per trained parameter: float32 value, gradient and the two moments of AdamW."""


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of one sequence between tokens.

    per_token: bytes for each token; window: tokens it keeps at most (None: all); state: bytes whatever the
    length (linear attention, state spaces, convolutions).
    """

    per_token: int = 0
    window: int | None = None
    state: int = 0

    @staticmethod
    def attention(
        heads: int, head_size: int, element_bytes: int = 2, window: int | None = None
    ) -> LayerCache:
        """A layer that keeps a key and a value of `head_size` elements for each of `heads` heads."""
        return LayerCache(2 * heads * head_size * element_bytes, window)

    def nbytes(self, tokens: int) -> int:
        """state + per_token × min(tokens, window)."""
        return self.state + self.per_token * min(tokens, tokens if self.window is None else self.window)


def cache_bytes(layers: Iterable[LayerCache], tokens: int, batch: int = 1) -> int:
    """batch × the sum over layers of state + per_token × min(tokens, window)."""
    return batch * sum(layer.nbytes(tokens) for layer in layers)


def adapter_bytes(shapes: Iterable[tuple[int, int]], rank: int) -> int:
    """LoRA on linear layers [out, in], trained with AdamW in float32.

    rank × (out + in) parameters each, 4 bytes for the value, 4 for the gradient, 8 for two moments.
    """
    return _ADAMW * sum(rank * (rows + columns) for rows, columns in shapes)


def loading_bytes(model: nn.Module) -> int:
    """The most that is in memory while `model`, whose layers are quantized (empty), is loaded.

    Weights arrive in the order of their names. With those that are there, a linear weight is decoded once
    more, to see its error: rows × columns × element bytes, and the temporaries of a block. Fused experts are
    merged from single ones first: their bytes before quantization, one decoded expert, and their codes twice.
    Weights that are read as they are stay mapped from their file.
    """
    arrived = worst = 0
    seen: set[int] = set()
    for _, module in sorted(model.named_modules(), key=lambda pair: pair[0]):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            arrived += 0 if id(tensor) in seen else tensor.nbytes
            seen.add(id(tensor))
        worst = max(worst, arrived + _in_flight(module))
    return worst


def _in_flight(module: nn.Module) -> int:
    """Bytes beside the result while the weights of one module are read."""
    if not isinstance(module, QuantModule):
        parameters = module.parameters(recurse=False)
        return max((one.nbytes for one in parameters if one.dim() == 3), default=0)  # merged experts
    sizes = [0]
    for weight, (shape, dtype) in module.weights().items():
        decoded = shape.numel() * dtype.itemsize
        codes = getattr(module, module.part_names(weight)["codes"])
        stack = len(codes) * decoded + codes.nbytes if module.is_stack else 0
        sizes.append(stack + decoded + _block(shape))
    return max(sizes)


def decoding_bytes(model: nn.Module, tokens: int, compiled: bool = False) -> int:
    """Temporaries of the hungriest product x · decode(W)ᵀ of `model`, x [tokens, in].

    `compiled`: with the C++ kernels, which need a panel of W and x once more, in up to 4 bytes; else in plain
    torch:
    Decoding: W [out, in] in the dtype of the model, and a block. LLM.int8(): of x three float32 forms and a
    mask, 13 × tokens × in; of y three, or two and 1024 columns of W, all of 4 bytes.
    """
    layers = (layer for layer in _quantized(model) if not isinstance(layer, QuantEmbedding))
    product = _compiled_product if compiled else _product
    return max((product(layer, tokens) for layer in layers), default=0)


def lookup_bytes(model: nn.Module, tokens: int) -> int:
    """Temporaries of decoding `tokens` rows of a quantized embedding: 21 × tokens × columns, at most.

    That is before anything is in the cache.
    """
    tables = (layer for layer in _quantized(model) if isinstance(layer, QuantEmbedding))
    return max((_ROW_BYTES * tokens * table.embedding_dim for table in tables), default=0)


def _product(layer: QuantModule, tokens: int) -> int:
    sizes = [0]
    for shape, dtype in layer.weights().values():
        rows, columns = shape
        if layer.scheme.activation is not None:
            product = max(12 * tokens * rows, 8 * tokens * rows + 4 * rows * min(columns, _INT8_COLUMNS))
            sizes.append(13 * tokens * columns + product)
        else:
            sizes.append(rows * columns * dtype.itemsize + _block(shape))
    return max(sizes)


def _compiled_product(layer: QuantModule, tokens: int) -> int:
    sizes = [0]
    for shape, dtype in layer.weights().values():
        x = 4 * tokens * shape[1]
        panel = 0 if layer.scheme.activation is not None else min(shape.numel() * dtype.itemsize, PANEL_BYTES)
        sizes.append(x + panel)
    return max(sizes)


def _block(shape: torch.Size) -> int:
    return _BLOCK_BYTES * min(_BLOCK, shape.numel())


def _quantized(model: nn.Module) -> Iterator[QuantModule]:
    return (module for module in model.modules() if isinstance(module, QuantModule))


# --- what fits ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """The memory of one way to hold a model.

    weights: all parameters and buffers; loading: all at the worst moment of loading; cache: keys and values
    of the whole context; activations: what else a run needs at its worst moment, temporaries of decoding
    included; adapters: LoRA with gradients and optimizer. cache and activations None: not known.
    """

    weights: int
    loading: int
    cache: int | None
    activations: int | None
    adapters: int = 0

    @property
    def running(self) -> int | None:
        """Weights, cache, activations and adapters, if all are known."""
        if self.cache is None or self.activations is None:
            return None
        return self.weights + self.cache + self.activations + self.adapters

    @property
    def needed(self) -> int:
        """The most at any time; without a known running size, at least this."""
        return max(self.loading, self.weights, self.running or 0)

    @property
    def least_device(self) -> int:
        """Capacity of the smallest device that this fits with room to spare."""
        return math.ceil((self.needed + RUNTIME) / (1 - ROOM))


@dataclass(frozen=True)
class Device:
    """A place for a model. capacity: bytes that are free for it and the runtime."""

    name: str
    capacity: int

    @property
    def usable(self) -> int:
        """What a model may take when room is left: nine tenths, less the runtime."""
        return max(0, int(self.capacity * (1 - ROOM)) - RUNTIME)

    def fits(self, estimate: Estimate) -> str:
        """ "yes": with room to spare; "tight": only just; "no"; "unknown": it loads, and may run."""
        if estimate.needed > self.capacity - RUNTIME:
            return "no"
        if estimate.running is None:
            return "unknown"
        return "yes" if estimate.needed <= self.usable else "tight"


def best(estimates: Sequence[Estimate], device: Device) -> int | None:
    """Index of the first (they come best quality first) that fits `device` with room, else just fits."""
    answers = [device.fits(estimate) for estimate in estimates]
    return next((answers.index(answer) for answer in ("yes", "tight", "unknown") if answer in answers), None)


# --- runs without memory -----------------------------------------------------------------------------


_PRODUCTS = {
    *(torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default),
    *(torch.ops.aten.linear.default, torch.ops.aten._grouped_mm.default),
}


@dataclass(frozen=True)
class Live:
    """Bytes alive in a run. peak: at most; products: at most while matrices, such as weights, are multiplied,
    the result included."""

    peak: int
    products: int

    def with_decoding(self, temporaries: int) -> int:
        """The peak where a product needs `temporaries` to decode its weight."""
        return max(self.peak, self.products + temporaries)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make inside, for as long as they live.

    now: their sum at this moment; peak, products: as in `Live`. What existed before is not counted, nor what
    an operation takes and gives back inside. Meant for the meta device, where it costs no memory.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.products = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        if func in _PRODUCTS:
            self.products = max(self.products, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@contextmanager
def tiled_attention() -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` makes its result and no scores, as it does on real devices.

    On the meta device torch would take the plain way, with [queries, keys] scores for every head.
    """
    original = F.scaled_dot_product_attention

    def tiled(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Any:
        return _Attention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]

    # Not a TorchFunctionMode: that is off while a checkpoint is computed again.
    F.scaled_dot_product_attention = tiled  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class _Attention(torch.autograd.Function):
    """Memory of fused attention: query, key, value and result are kept for the way back."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        if mask is not None and mask.dtype == torch.bool:  # becomes 0 and -infinity for the time of the op
            query.new_empty(mask.shape)
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
