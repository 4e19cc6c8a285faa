"""Runs of empty transformers models on the meta device: what they cache, and how much they make on the way.

The code of the model itself says how large everything is, whatever its architecture, and nothing is computed.
ValueError where a model cannot be run so, with the reason.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from fewbits.model import is_linear
from fewbits.nn import is_transposed
from fewbits.planner import LayerCache, Live, LiveBytes, tiled_attention

_CACHES = ("past_key_values", "cache_params")  # what models call the argument
_PER_TOKEN = {"keys": -2, "values": -2, "indexer_keys": -2}  # tensor of a cache layer → dimension of tokens
_STATES = ("conv_states", "recurrent_states")
_META: Any = _config
_PROBE = 4  # tokens; fewer than any window
_RECURRENT = 256  # tokens


def cache_layers(model: PreTrainedModel) -> tuple[LayerCache, ...]:
    """What every layer of `model` keeps of a sequence, from the cache that transformers fills for it."""
    cache = DynamicCache(config=model.config)
    _forward(model, 1, _PROBE, cache)
    return tuple(_layer_cache(layer) for layer in cache.layers)


def prefill(model: PreTrainedModel, batch: int, tokens: int) -> Live:
    """What is alive while a prompt of `batch` × `tokens` is read, its cache included, weights not."""
    run = _run_length(model, tokens)
    return _scaled(_forward(model, batch, run, DynamicCache(config=model.config)), tokens, run)


def training_step(model: PreTrainedModel, batch: int, tokens: int, rank: int) -> Live:
    """What is alive in a training step with LoRA and gradient checkpointing, weights and adapters not.

    Adapters are float32 on all linear layers but the output embedding, as PEFT makes them; the loss is that
    of transformers, over all positions.
    """
    run = _run_length(model, tokens)
    adapted = copy.deepcopy(model).train()  # on the meta device, so it takes nothing
    adapted.requires_grad_(False)
    for _, layer in adapter_targets(adapted):
        layer.register_forward_hook(_Adapter(layer, rank))
    with _dry(adapted) as live, torch.enable_grad():
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = _prompt(batch, run)
        adapted(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    return _scaled(live, tokens, run)


def _scaled(live: LiveBytes, tokens: int, run: int) -> Live:
    return Live(live.peak * tokens // run, live.products * tokens // run)


def _run_length(model: PreTrainedModel, tokens: int) -> int:
    """Tokens to run instead of `tokens`: recurrent layers go through them one by one, so what they make of a
    short sequence is scaled."""
    recurrent = model._is_stateful or any(layer.state for layer in cache_layers(model))
    return min(tokens, _RECURRENT) if recurrent else tokens


def adapter_targets(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The linear layers that LoRA on all linear layers trains: all but the output embedding."""
    head = model.get_output_embeddings()
    return [(name, layer) for name, layer in model.named_modules() if is_linear(layer) and layer is not head]


class _Adapter:
    """Forward hook that adds a LoRA branch in float32 to a linear layer."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        rows, columns = linear_shape(layer)
        self.down = nn.Linear(columns, rank, bias=False, device="meta")
        self.up = nn.Linear(rank, rows, bias=False, device="meta")

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> Tensor:
        branch: Tensor = self.up(self.down(inputs[0].float())) * 2.0
        return (result + branch).to(result.dtype)


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    rows, columns = layer.get_parameter("weight").shape
    return (columns, rows) if is_transposed(type(layer)) else (rows, columns)


def _forward(model: PreTrainedModel, batch: int, tokens: int, cache: DynamicCache) -> LiveBytes:
    """Read a prompt of zeros into `cache`, as `generate` does; what was alive on the way."""
    parameters = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {name: cache for name in _CACHES if name in parameters}
    if options:
        options["use_cache"] = True
    if "logits_to_keep" in parameters:
        options["logits_to_keep"] = 1
    with _dry(model) as live, torch.no_grad():
        model(**_prompt(batch, tokens), **options)
    return live


def _prompt(batch: int, tokens: int) -> dict[str, Tensor]:
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def _dry(model: PreTrainedModel) -> Iterator[LiveBytes]:
    """Attention as it is used by default, sizes counted, and whatever fails turned into a ValueError."""
    if model.config.is_encoder_decoder:
        raise ValueError("it has an encoder and a decoder")
    try:
        with warnings.catch_warnings(), _META.patch(meta_nonzero_assume_all_nonzero=True):
            warnings.simplefilter("ignore")
            _use_fused_attention(model)
            with (
                tiled_attention(),
                _WithoutValues(),
                LiveBytes((*model.parameters(), *model.buffers())) as live,
            ):
                yield live
    except Exception as error:  # code of any model, on tensors without values
        what = str(error).partition("\n")[0]
        raise ValueError(f"{type(model).__name__} does not run without values: {what}") from error


def _use_fused_attention(model: PreTrainedModel) -> None:
    """What `from_pretrained` chooses; an empty model has the plain one."""
    if not model._supports_sdpa:
        return
    model.set_attn_implementation("sdpa")
    if model.config._attn_implementation != "sdpa":
        raise ValueError("its attention cannot be exchanged")


class _WithoutValues(TorchDispatchMode):
    """Inside, the meta device does two things that it refuses: yes is its answer to questions, which ask
    whether all tokens are to be seen, all of one sequence; and experts multiply in every dtype."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            if args[0].dtype == torch.bool:
                return True
        elif func is torch.ops.aten._grouped_mm.default and args[0].is_meta and args[1].dim() == 3:
            return args[0].new_empty(args[0].shape[0], args[1].shape[2])
        return func(*args, **(kwargs or {}))


def _layer_cache(layer: Any) -> LayerCache:
    per_token = state = 0
    for name, value in vars(layer).items():
        tensors = [one for one in (value.values() if isinstance(value, dict) else [value]) if _is_held(one)]
        if name in _PER_TOKEN:
            per_token += sum(one.nbytes // one.shape[_PER_TOKEN[name]] for one in tensors)
        elif name in _STATES:
            state += sum(one.nbytes for one in tensors)
        elif tensors:
            raise ValueError(f"a cache of {type(layer).__name__} holds {name}, of which nothing is known")
    return LayerCache(per_token, getattr(layer, "sliding_window", None), state)


def _is_held(value: object) -> bool:
    """Whether this is a tensor that takes memory worth counting."""
    return isinstance(value, Tensor) and value.dim() > 0
