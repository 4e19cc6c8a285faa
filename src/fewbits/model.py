"""Recipe → modules: which layers of a model are quantized, and the swap.

`decide` gives every candidate layer its Scheme or the reason why it is kept; `place` puts quantized layers
in (empty ones: the weights come later, or from `quantize_model`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbits import ops
from fewbits.config import BitsAndBytesConfig, FewbitsConfig
from fewbits.experts import expert_shapes, experts_class
from fewbits.format import Format, Scheme
from fewbits.int8_training import TrainableInt8Linear
from fewbits.machine import give_back_free_memory
from fewbits.nn import (
    QuantEmbedding,
    QuantLinear,
    QuantModule,
    is_transposed,
)
from fewbits.recipe import Recipe
from fewbits.report import KEPT_REASONS, Report, report
from fewbits.tensor import QuantizedTensor

_BLOCK = 2**19  # weights compared at a time


@dataclass(frozen=True)
class Decision:
    """What happens to one layer: quantized by `scheme`, or kept (None); `reason` says why."""

    scheme: Scheme | None
    reason: str


def quantize_model(
    model: nn.Module, recipe: Recipe | BitsAndBytesConfig | FewbitsConfig | Scheme | Format | str
) -> Report:
    """Quantize the layers of a loaded model in place and report every weight.

    `recipe` may be a config, or a format such as "nf4:g64:dq" for all linear layers. The model's output
    embedding, tied weights and modules kept in float32 are skipped unless the recipe names them. On the
    meta device only the layers are swapped. ValueError names a weight that holds NaN or infinity, or that
    a format cannot store; layers before it are then quantized already.
    """
    if is_linear(model) or isinstance(model, nn.Embedding):
        raise ValueError(
            f"quantize_model swaps the layers of a model, and {type(model).__name__} is itself a layer; wrap "
            "it: torch.nn.Sequential(layer)"
        )
    decisions = decide(model, as_recipe(recipe).with_skips(default_skips(model)))
    tied = dict(tied_modules(model))
    _place_trainable(model, decisions)
    for name, layer in _empty_layers(model, decisions):
        source = model.get_submodule(name)
        for weight in layer.weights():
            value = source.get_parameter(weight)
            if not value.is_meta and name not in tied:
                layer.store(fill(layer, weight, value.detach(), f"{name}.{weight}"))
        layer.use_huge_pages()
        model.set_submodule(name, layer)
    for target, source_name in tied.items():
        share(model, target, source_name)
    setattr(model, KEPT_REASONS, kept_reasons(decisions))
    give_back_free_memory()
    return report(model)


def as_recipe(recipe: Recipe | BitsAndBytesConfig | FewbitsConfig | Scheme | Format | str) -> Recipe:
    """The Recipe that a config, or a format for all linear layers, stands for."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, BitsAndBytesConfig | FewbitsConfig):
        return recipe.to_recipe()
    return FewbitsConfig(recipe).to_recipe()


def decide(model: nn.Module, recipe: Recipe) -> dict[str, Decision]:
    """Module name → Decision for every layer of `model` that has a weight to quantize.

    Embeddings are candidates only where a rule names them. Tied layers share one Decision: naming one of
    them names both. ValueError when rules give tied layers different schemes.
    """
    decisions: dict[str, Decision] = {}
    for name, module in model.named_modules():
        rule = recipe.match(name)
        if type(module) is nn.Embedding and recipe.named(name) is None:
            continue
        if not (is_linear(module) or type(module) is nn.Embedding or any(expert_shapes(module))):
            if (why := _why_not(module)) is not None:
                decisions[name] = Decision(None, why)
            continue
        decisions[name] = Decision(rule.scheme, rule.reason)
        if rule.scheme is not None and rule.scheme.trainable and not is_linear(module):
            decisions[name] = Decision(None, "trained as it is: LLM.int8() trains linear layers only")
        if isinstance(module, nn.Embedding) and (problem := _embedding_problem(module)):
            decisions[name] = Decision(None, problem)
    for weights in _tied_weights(model):
        _decide_tied(model, recipe, decisions, weights)
    return decisions


def place(model: nn.Module, decisions: Mapping[str, Decision]) -> None:
    """Swap the layers that are to be quantized for empty quantized ones on the meta device.

    Those that are to be trained through LLM.int8() keep the weights that they have.
    """
    _place_trainable(model, decisions)
    for name, layer in _empty_layers(model, decisions):
        model.set_submodule(name, layer)
    setattr(model, KEPT_REASONS, kept_reasons(decisions))


def fill(layer: QuantModule, weight: str, value: Tensor, name: str) -> dict[str, Tensor]:
    """Quantize `value` for `layer`: attribute → tensor to store. Notes the relative error on the layer.

    `value` has the orientation of the layer that `layer` replaced; `name` is what errors call it.
    """
    result, error, total = quantized(layer, weight, value, name)
    layer.relative_errors[weight] = (error / total) ** 0.5 if total else 0.0
    return layer.stored(weight, result)


def quantized(
    layer: QuantModule, weight: str, value: Tensor, name: str
) -> tuple[list[QuantizedTensor], float, float]:
    """What `fill` stores: the quantized tensors, one or one per expert; ‖W - decode(W)‖² and ‖W‖²."""
    result, error, total = [], 0.0, 0.0
    for index, matrix in enumerate(layer.matrices(value)):
        one = ops.quantize(matrix, layer.scheme.weight, name=f"{name}[{index}]" if layer.is_stack else name)
        result.append(one)
        squares = _squared_error(matrix, one.dequantize(matrix.dtype))
        error, total = error + squares[0], total + squares[1]
    return result, error, total


def _squared_error(weight: Tensor, decoded: Tensor) -> tuple[float, float]:
    """(‖weight - decoded‖², ‖weight‖²) in float32, by small blocks of rows: loading must not need memory."""
    error = total = 0.0
    rows = max(1, _BLOCK // max(weight.shape[-1], 1))
    for one, other in zip(weight.split(rows), decoded.split(rows), strict=True):
        exact = one.float()
        error += float((exact - other.float()).square().sum())
        total += float(exact.square().sum())
    return error, total


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Give every quantized layer back as the plain layer it replaced, in place.

    Weights come in `dtype` (None: that before quantization); tied ones stay tied.
    """
    decoded: dict[int, nn.Parameter] = {}  # by the identity of the codes, which tied layers share
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantModule):
            model.set_submodule(name, to_float(layer, dtype, decoded))
        elif isinstance(layer, TrainableInt8Linear):
            model.set_submodule(name, layer.plain(dtype))
    if hasattr(model, KEPT_REASONS):
        delattr(model, KEPT_REASONS)


def to_float(
    layer: QuantModule, dtype: torch.dtype | None = None, decoded: dict[int, nn.Parameter] | None = None
) -> nn.Module:
    """The plain layer that `layer` replaced, with its weights decoded to `dtype` (None: as they were).

    `decoded` remembers weights by the identity of their codes, so that tied layers share one.
    """
    decoded = {} if decoded is None else decoded
    plain = _revive(layer)
    for weight in layer.weights():
        codes = getattr(layer, layer.part_names(weight)["codes"])
        if id(codes) not in decoded:
            value = layer.dequantize(weight)
            value = value.T.contiguous() if is_transposed(layer.source_class) else value
            decoded[id(codes)] = nn.Parameter(value if dtype is None else value.to(dtype))
        plain.register_parameter(weight, decoded[id(codes)])
    for name, parameter in layer.named_parameters(recurse=False):
        if name not in {part for weight in layer.weights() for part in layer.part_names(weight).values()}:
            cast = parameter if dtype is None else nn.Parameter(parameter.to(dtype), parameter.requires_grad)
            plain.register_parameter(name, cast)
    return plain.train(layer.training)


def empty_plain(layer: QuantLinear | QuantEmbedding, device: torch.device) -> nn.Module:
    """A layer of the class that `layer` replaced, uninitialised, on `device`; it keeps the bias."""
    plain = _revive(layer)
    weight = torch.empty_like(
        plain.get_parameter("weight"), device=device, dtype=layer.weights()["weight"][1]
    )
    plain.register_parameter("weight", nn.Parameter(weight))
    if layer._parameters.get("bias") is not None:
        plain.register_parameter("bias", layer.get_parameter("bias"))
    return plain


def kept_reasons(decisions: Mapping[str, Decision]) -> dict[str, str]:
    """Module name → why it was kept, as `report` shows it."""
    return {name: decision.reason for name, decision in decisions.items() if decision.scheme is None}


def share(model: nn.Module, target: str, source: str) -> None:
    """Let the quantized layer `target` use the parts of `source`, to which it is tied."""
    one, other = model.get_submodule(target), model.get_submodule(source)
    if isinstance(one, QuantModule) and isinstance(other, QuantModule):
        one.share(other)


def tied_modules(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(target, source) of every two layers that share a weight."""
    for source, *targets in _tied_weights(model):
        for target in targets:
            if target.endswith(".weight") and source.endswith(".weight"):
                yield target.removesuffix(".weight"), source.removesuffix(".weight")


def _tied_weights(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one, the source first: as transformers ties them, or as found."""
    keys: Mapping[str, str] | None = getattr(model, "all_tied_weights_keys", None)
    groups: dict[str, list[str]] = {}
    if keys is not None:
        for target, source in keys.items():
            groups.setdefault(source, [source]).append(target)
        return list(groups.values())
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(names.setdefault(id(parameter), name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def default_skips(model: nn.Module) -> dict[str, str]:
    """Patterns of layers that are kept unless a rule names them, and why: the defaults of transformers.

    The output embedding, tied weights, the last layer, and what the model itself keeps in float32. Empty
    for models that are not transformers models.
    """
    if not hasattr(model, "get_output_embeddings"):
        return {}
    skips: dict[str, str] = {}
    for target, source in tied_modules(model):
        skips[target], skips[source] = f"tied to {source}", f"tied to {target}"
    names = [name for name, _ in model.named_parameters()]
    if names:
        skips.setdefault(names[-1].removesuffix(".weight"), "the last layer")
    transformers_model: Any = model
    head = transformers_model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            skips.setdefault(name, "the output embedding")
    for pattern in getattr(model, "_keep_in_fp32_modules", None) or ():
        skips.setdefault(pattern, "the model keeps it in float32")
    return skips


def is_linear(module: nn.Module) -> bool:
    """Exactly nn.Linear, or transformers' Conv1D; a subclass may compute something else."""
    return type(module) is nn.Linear or is_transposed(type(module))


# --- layers -----------------------------------------------------------------------------------------


def _place_trainable(model: nn.Module, decisions: Mapping[str, Decision]) -> None:
    for name, decision in decisions.items():
        if decision.scheme is not None and decision.scheme.trainable:
            layer = TrainableInt8Linear.of(model.get_submodule(name), decision.scheme)
            model.set_submodule(name, layer)


def _empty_layers(model: nn.Module, decisions: Mapping[str, Decision]) -> Iterator[tuple[str, QuantModule]]:
    """(name, quantized layer with the bias of the one it replaces and empty parts) of all to be quantized."""
    chosen = {
        name: decision.scheme
        for name, decision in decisions.items()
        if decision.scheme is not None and not decision.scheme.trainable
    }
    # transformers takes the first floating parameter for the dtype of the model. Behind a quantized
    # embedding that would be a scale of the first layer, so scales are buffers then.
    embeds = any(isinstance(model.get_submodule(name), nn.Embedding) for name in chosen)
    shared = {target for target, _ in tied_modules(model)}
    for name, scheme in chosen.items():
        scales = "shared" if name in shared else "buffers" if embeds else "parameters"
        yield name, _empty_layer(model.get_submodule(name), scheme, scales)


def _empty_layer(source: nn.Module, scheme: Scheme, scales: str) -> QuantModule:
    layer: QuantModule
    if any(expert_shapes(source)):
        layer = experts_class(source)(source, scheme, "meta", scales)
        return layer.train(source.training)
    weight = source.get_parameter("weight")
    if isinstance(source, nn.Embedding):
        layer = QuantEmbedding(
            source.num_embeddings,
            source.embedding_dim,
            scheme,
            padding_idx=source.padding_idx,
            device="meta",
            dtype=weight.dtype,
            scales=scales,
        )
    else:
        rows, columns = weight.shape[::-1] if is_transposed(type(source)) else weight.shape
        layer = QuantLinear(
            columns,
            rows,
            False,
            scheme,
            device="meta",
            dtype=weight.dtype,
            source_class=type(source),
            scales=scales,
        )
        layer.bias = source.bias  # type: ignore[assignment]
    return layer.train(source.training)


def _revive(layer: QuantModule) -> nn.Module:
    """An instance of the replaced class, without its quantized weights."""
    source: Any = layer.source_class
    if isinstance(layer, QuantLinear):
        if is_transposed(source):
            with torch.device("meta"):
                conv: nn.Module = source(layer.out_features, layer.in_features)
            return conv
        return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    if isinstance(layer, QuantEmbedding):
        return nn.Embedding(
            layer.num_embeddings, layer.embedding_dim, padding_idx=layer.padding_idx, device="meta"
        )
    plain: nn.Module = source.__new__(source)
    nn.Module.__init__(plain)
    own = {
        *vars(nn.Module()),
        "scheme",
        "source_class",
        "relative_errors",
        "notes",
        "_weights",
        "_scales",
        "_spelling",
        "_names",
        "_terms",
        "_layouts",
        "held",
        "_fixed",
    }
    plain.__dict__.update({name: value for name, value in vars(layer).items() if name not in own})
    for name, child in layer.named_children():
        plain.add_module(name, child)
    return plain


# --- decisions --------------------------------------------------------------------------------------


def _why_not(module: nn.Module) -> str | None:
    """Why a layer with large weights is no candidate, or None if it has none."""
    if isinstance(module, QuantModule):
        return None
    if isinstance(module, TrainableInt8Linear):
        return "its weight is trained; fewbits.int8_training.freeze comes before quantizing"
    if isinstance(module, nn.Linear | nn.Embedding):
        return f"{type(module).__name__} is a subclass that may compute something else"
    return None


def _embedding_problem(module: nn.Embedding) -> str | None:
    return "max_norm rescales its rows in place" if module.max_norm is not None else None


def _decide_tied(
    model: nn.Module, recipe: Recipe, decisions: dict[str, Decision], weights: Sequence[str]
) -> None:
    """Layers that share one weight get the scheme that a rule names for any of them, or stay as they are."""
    odd = [weight for weight in weights if not weight.endswith(".weight")]
    names = [weight.removesuffix(".weight") for weight in weights if weight.endswith(".weight")]
    rules = [rule for name in names if (rule := recipe.named(name)) and rule.scheme is not None]
    schemes = {rule.scheme for rule in rules}
    if len(schemes) > 1:
        given = ", ".join(sorted(map(str, schemes)))
        raise ValueError(f"{' and '.join(names)} share one weight; give them one format, not {given}")
    problems = [why for name in names if (why := _tie_problem(model.get_submodule(name), schemes))]
    problem = f"tied to {odd[0]}, which cannot be quantized" if odd else next(iter(problems), None)
    for name in names:
        if rules and problem is None:
            decisions[name] = Decision(rules[0].scheme, rules[0].reason)
        elif problem is not None or name in decisions:
            partner = next((one for one in names if one != name), name)
            decisions[name] = Decision(None, problem or f"tied to {partner}")


def _tie_problem(module: nn.Module, schemes: set[Scheme | None]) -> str | None:
    if not (is_linear(module) or type(module) is nn.Embedding):
        return f"tied to a {type(module).__name__}, which cannot be quantized"
    if isinstance(module, nn.Embedding):
        return _embedding_problem(module)
    if schemes and module.bias is not None:
        return "tied, with a bias: transformers pads it by the rows of the weight, which codes have not"
    return None
