"""A checkpoint's folder and a LoRA adapter → the units of a job that merges them, file to file.

Two bases can take an adapter that was trained on a quantized model: the original weights W, or decode(Q(W)),
the weights that it was trained beside. The first leaves the errors of quantization behind, to which the
adapter may have adapted; the second keeps them, and is the trained model but for rounding to 16 bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from fewbits import ops
from fewbits.checkpoint.adapter import ADAPTER_WEIGHTS, Adapter, Branch, Change, merged, shape_problem
from fewbits.checkpoint.folder import Folder, some
from fewbits.checkpoint.job import Unit
from fewbits.checkpoint.safetensors import CheckpointError, shown
from fewbits.config import BitsAndBytesConfig, FewbitsConfig
from fewbits.integrations.architecture import clean_config, empty_model
from fewbits.integrations.decoded import DecodedFolder
from fewbits.integrations.layout import (
    Work,
    cast_bytes,
    check_ties,
    empty_sources,
    groups_of,
    named,
    stored_groups,
    units_of,
)
from fewbits.integrations.transformers import FewbitsQuantizer
from fewbits.nn import QuantModule, is_transposed

MERGED = "merged_adapters"  # in config.json: what was merged into the weights, the first one first

Config = BitsAndBytesConfig | FewbitsConfig


@dataclass(frozen=True)
class MergePlan:
    """What becomes of a base and an adapter.

    units: in the order of the new files; config: the new config.json, without a record of the merge; changes:
    tensor of the new files → what is done to it, in words; quantized: number of weights that are quantized
    and decoded first; largest: elements of the largest tensor of the model; model: it, on the meta device.
    """

    units: tuple[Unit, ...]
    config: dict[str, Any]
    changes: Mapping[str, str]
    quantized: int
    largest: int
    model: Any


def plan(
    folder: Folder,
    adapter: Adapter,
    quantization: Config | Callable[[torch.dtype], Config] | None = None,
    dtype: torch.dtype | None = None,
) -> MergePlan:
    """How to merge `adapter` into the checkpoint in `folder`.

    quantization: how the base was quantized while the adapter was trained, to merge into its decoded weights
    (or what gives that for the model's dtype); None for the weights as they are. dtype: that of all floating
    results; None for the base's own.

    CheckpointError for a base that is quantized, or does not fit its config or the adapter; it names what of
    the adapter has no place in the base.
    """
    if folder.quantization is not None:
        method = folder.quantization.get("quant_method", "an unnamed method")
        raise CheckpointError(f"{folder.path} is quantized ({method}); decode it first")
    model = empty_model(folder.config, folder.first_dtype or torch.float32, len(folder.files))
    groups = groups_of(folder, model)
    if isinstance(
        folder, DecodedFolder
    ):  # whose names are the model's; the new files have those of plain ones
        model._weight_conversions = None
    check_ties(folder, model, groups)
    stored, renamed = stored_groups(model, groups)
    placed = None if quantization is None else _placed(folder, model, quantization)
    plain = named(folder, model, [_Merge(model, group, renamed, adapter) for group in stored])
    files = [name for unit in units_of(folder, plain) for name in unit.outputs]
    changes = _changes(adapter, model, files)
    works = [
        replace(work, changes=changes, placed=placed, dtype=dtype)
        for work in plain
        if isinstance(work, _Merge)
    ]
    units = tuple(units_of(folder, works))
    done = _check_shapes(adapter, changes, folder, works)
    new = clean_config(folder.config) | {
        "architectures": [type(model).__name__],
        "dtype": str(dtype or model.dtype).removeprefix("torch."),
    }
    new.pop("torch_dtype", None)
    new.pop("quantization_config", None)
    layers = [] if placed is None else [one for one in placed.modules() if isinstance(one, QuantModule)]
    return MergePlan(
        units,
        new,
        done,
        sum(len(layer.weights()) for layer in layers),
        max((group.elements for group in stored), default=0),
        model,
    )


def assembled(folder: Folder, plan: MergePlan) -> dict[str, Tensor]:
    """The tensors of the new files, all in memory: name → tensor."""
    tensors: dict[str, Tensor] = {}
    for unit in plan.units:
        tensors |= unit.make({name: folder.read(name) for name in unit.sources}).tensors
    return tensors


def in_memory(folder: Folder, plan: MergePlan) -> Any:
    """The merged model itself, in float32, ready to infer."""
    made, told = type(plan.model).from_pretrained(
        None,
        config=copy.deepcopy(plan.model.config),
        state_dict=assembled(folder, plan),
        dtype=torch.float32,
        output_loading_info=True,
    )
    if told["missing_keys"]:
        raise ValueError(f"{some(sorted(told['missing_keys']))} would be missing in the merged model")
    return made.eval()


def _placed(folder: Folder, model: Any, quantization: Config | Callable[[torch.dtype], Config]) -> Any:
    """The model with quantized layers where the adapter's base had them, on the meta device."""
    found = (
        quantization
        if isinstance(quantization, BitsAndBytesConfig | FewbitsConfig)
        else quantization(model.dtype)
    )
    placed = empty_model(folder.config, model.dtype, len(folder.files))
    FewbitsQuantizer(found, pre_quantized=False)._process_model_before_weight_loading(placed)
    return placed


@dataclass(frozen=True)
class _Merge(Work):
    """Merges what the adapter changes.

    changes: by name in the model, or in the new files where the model has another tensor for it; placed: the
    model whose quantized layers say what is quantized and decoded first.
    """

    adapter: Adapter
    changes: Mapping[str, Change] = field(default_factory=dict)
    placed: Any = None
    dtype: torch.dtype | None = None

    def cost(self, folder: Folder, outputs: Mapping[str, Tensor], pieces: int) -> int:
        used = {name for change in self._own(outputs).values() for name in change.tensors}
        factors = sum(4 * self.adapter.folder.info(name).count for name in used)
        copies = 3 if self.placed is not None else 2  # the base, the result, and that in the files' layout
        return super().cost(folder, outputs, pieces) + copies * cast_bytes(folder, self.group) + 2 * factors

    def _own(self, outputs: Mapping[str, Tensor]) -> dict[str, Change]:
        made = {*outputs, self.name_in_model(self.group.first)}
        return {name: change for name, change in self.changes.items() if name in made}

    def stored(
        self, name: str, value: Tensor, squares: dict[str, tuple[float, float]] | None
    ) -> dict[str, Tensor]:
        if not value.is_meta and self.placed is not None:
            value = _decoded(self.placed, name, value)
        return {name: self._changed(name, value)}

    def outputs(
        self, tensors: Mapping[str, Tensor], squares: dict[str, tuple[float, float]] | None = None
    ) -> dict[str, Tensor]:
        made = super().outputs(tensors, squares)
        known = self.model.state_dict()
        return {
            name: tensor if name in known else self._changed(name, tensor) for name, tensor in made.items()
        }

    def _changed(self, name: str, value: Tensor) -> Tensor:
        dtype = self.dtype if self.dtype is not None and value.is_floating_point() else value.dtype
        change = self.changes.get(name)
        if change is None or value.is_meta:
            return value.to(dtype)
        return merged(self.adapter, change, value, dtype, name)


def _decoded(placed: Any, name: str, value: Tensor) -> Tensor:
    """`value` quantized and decoded, as the quantized layer would; itself where there is none."""
    path, _, weight = name.rpartition(".")
    layer = placed.get_submodule(path)
    if not isinstance(layer, QuantModule) or weight not in layer.weights():
        return value
    result = torch.empty(value.shape, dtype=value.dtype)
    for target, matrix in zip(layer.matrices(result), layer.matrices(value), strict=True):
        target.copy_(ops.quantize(matrix, layer.scheme.weight, name=name).dequantize(matrix.dtype))
    return result


# --- names ------------------------------------------------------------------------------------------


def _changes(adapter: Adapter, model: Any, files: Iterable[str]) -> dict[str, Change]:
    """Name in the model, or else in the files, → what the adapter does there. CheckpointError for parts of
    the adapter that have no place."""
    finder = _Finder(model, set(files), {name for name, _ in model.named_modules()})
    found: dict[str, Change] = {}
    homeless = []
    for name, tensor in adapter.saved.items():
        target = finder.tensor(name)
        if target is None:
            homeless.append(tensor)
        else:
            _check_free(target, tensor, found.get(target, Change()).saved)
            found[target] = Change(saved=tensor)
    branches: dict[str, list[Branch]] = {}
    for branch in adapter.branches:
        branches.setdefault(branch.module, []).append(branch)
    for module, nested in branches.items():
        for branch, (target, pattern_name, turned) in zip(
            nested, finder.targets(adapter, module, nested), strict=True
        ):
            rank, scale = adapter.rank(pattern_name), adapter.scale(pattern_name)
            if target is None:
                homeless.append(branch.a)
                continue
            bias = finder.tensor(f"{target.rpartition('.')[0]}.bias")
            if branch.bias and bias is None:
                homeless.append(branch.bias)
                continue
            before = found.get(target, Change())
            _check_free(target, branch.a, before.branch.a if before.branch else "")
            found[target] = replace(before, branch=branch, rank=rank, scale=scale, turned=turned)
            if branch.bias and bias:
                _check_free(bias, branch.bias, found.get(bias, Change()).bias)
                found[bias] = replace(found.get(bias, Change()), bias=branch.bias, scale=scale)
    if homeless:
        raise CheckpointError(
            f"{ADAPTER_WEIGHTS}: {len(homeless)} tensors have no place in {type(model).__name__}: "
            f"{some(homeless)}; is the adapter of another model?"
        )
    return _without_ties(adapter, model, found)


def _check_free(target: str, tensor: str, before: str) -> None:
    """CheckpointError for two tensors of the adapter, `before` and `tensor`, that would do the same."""
    if before:
        raise CheckpointError(
            f"{ADAPTER_WEIGHTS}: {shown(before)} and {shown(tensor)} are two names for one change of "
            f"{shown(target)}; remove the one that was not trained"
        )


@dataclass(frozen=True)
class _Finder:
    """What the modules and tensors that an adapter names are called in this model.

    files: names of the new files' tensors; modules: names of the model's.
    """

    model: Any
    files: set[str]
    modules: set[str]

    def tensor(self, name: str) -> str | None:
        """The name in the model, or in the files, of what an adapter calls `name`; None for nothing."""
        known = self.model.state_dict()
        if name in known:
            return name
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        target, _ = rename_source_key(name, renamings, [], self.model.base_model_prefix, known)
        return target if target in known else name if name in self.files else None

    def targets(
        self, adapter: Adapter, module: str, nested: list[Branch]
    ) -> list[tuple[str | None, str, bool]]:
        """(tensor, what patterns are matched with, turned) for each of the branches of one module."""
        layer = self.model.get_submodule(module) if module in self.modules else None
        listed = adapter.config["target_parameters"]
        own = [] if layer is None else [name for name, _ in layer.named_parameters(recurse=False)]
        targeted = [full for full in (f"{module}.{name}" for name in own) if _ends_with_any(full, listed)]
        if targeted and len(targeted) == len(nested):
            # PEFT wraps a module once for each of its parameters, the first innermost.
            turned = bool(getattr(layer, "is_transposed", False))
            inner = targeted[::-1]
            is_stack = [self.model.get_parameter(name).dim() == 3 for name in inner]
            return [
                (inner[one.depth], inner[one.depth], turned and is_stack[one.depth])
                if one.depth < len(inner)
                else (None, module, False)
                for one in nested
            ]
        if len(nested) > 1 or nested[0].depth:
            return [(None, module, False) for _ in nested]
        target = self.tensor(f"{module}.weight")
        if target is not None and target in self.model.state_dict():
            layer = self.model.get_submodule(target.rpartition(".")[0])
        is_embedding = isinstance(layer, nn.Embedding)
        if is_embedding != nested[0].embedding:
            target = None
        turned = is_embedding or (layer is not None and is_transposed(type(layer)))
        return [(target, module, turned)]


def _ends_with_any(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _without_ties(adapter: Adapter, model: Any, changes: dict[str, Change]) -> dict[str, Change]:
    """`changes` where tied tensors have one: that of the source. CheckpointError where they would differ."""
    result = dict(changes)
    for target, source in model.all_tied_weights_keys.items():
        one, other = result.pop(target, None), result.get(source)
        if one is None and other is None:
            continue
        if one is None or other is None or not _same(adapter, one, other):
            raise CheckpointError(
                f"{target} and {source} are one tensor in this model, and the adapter changes "
                f"{'both, differently' if one and other else target if one else source}; merged, it would "
                "change both uses. Untie the base first: load it, set config.tie_word_embeddings to "
                "false, give the head a copy of the embedding, and save it"
            )
    return result


def _same(adapter: Adapter, one: Change, other: Change) -> bool:
    """Whether two changes of the same tensor do the same."""
    tensors = []
    for change in (one, other):
        parts = [adapter.read(change.saved)] if change.saved else []
        if (branch := change.branch) is not None:
            if branch.magnitude:
                return False  # norms run over the rows of an embedding's tensor, but the columns of a head's
            a, b = adapter.read(branch.a), adapter.read(branch.b)
            parts += [a.T, b.T] if change.turned else [b, a]
        tensors.append(parts)
    if len(tensors[0]) != len(tensors[1]) or one.scale != other.scale:
        return False
    return all(torch.equal(*pair) for pair in zip(*tensors, strict=True))


def _check_shapes(
    adapter: Adapter, changes: Mapping[str, Change], folder: Folder, works: Iterable[Work]
) -> dict[str, str]:
    """Tensor of the new files → what is done to it, in words. CheckpointError for changes that do not fit, or
    that no work would make."""
    shapes: dict[str, tuple[int, ...]] = {}
    words: dict[str, str] = {}
    for work in works:
        empty = empty_sources(folder, work.group)
        inside, outside = work.tensors(empty), work.outputs(empty)
        own = {name: tuple(tensor.shape) for name, tensor in (inside | outside).items()}
        done = [changes[name].words for name in inside if name in changes]
        words |= {
            name: done[0] if done else changes[name].words for name in outside if done or name in changes
        }
        shapes |= own
    for name, change in changes.items():
        problem = (
            shape_problem(adapter, change, name, shapes[name])
            if name in shapes
            else f"{some(change.tensors)} would change {shown(name)}, which the base's files do not hold"
        )
        if problem:
            raise CheckpointError(f"{adapter.path}: {problem}")
    return words
