"""fewbits as a quantizer of transformers: `from_pretrained`, `save_pretrained`, `dequantize`.

One quantizer serves three config classes: `FewbitsConfig` (method `fewbits`), `fewbits.BitsAndBytesConfig`
and, when fewbits owns the `bitsandbytes` entries, transformers' own `BitsAndBytesConfig`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import BitsAndBytesConfig as TransformersBitsAndBytesConfig

from fewbits import distributed
from fewbits import model as placing
from fewbits.checkpoint import bitsandbytes as schema
from fewbits.config import BitsAndBytesConfig, FewbitsConfig
from fewbits.int8_training import TrainableInt8Linear
from fewbits.integrations import owns_bitsandbytes, placement
from fewbits.machine import give_back_free_memory
from fewbits.model import Decision
from fewbits.nn import QuantEmbedding, QuantLinear, QuantModule
from fewbits.recipe import Recipe, Rule
from fewbits.report import KEPT_REASONS, report

logger = logging.getLogger("fewbits")

_TRIM_AFTER = 2**25  # bytes of weights quantized or moved between two returns of freed memory
_Header = tuple[str, tuple[int, ...]]  # of a tensor in a file: dtype, shape
_NEW = "not in the checkpoint: new and random"
_BITSANDBYTES = ("bitsandbytes_4bit", "bitsandbytes_8bit")
_ORIGINAL_QUANTIZERS = {method: auto.AUTO_QUANTIZER_MAPPING[method] for method in _BITSANDBYTES}


def register(*, takeover: bool) -> None:
    """Enter fewbits into transformers' tables; `takeover` decides the `bitsandbytes` entries."""
    for config in (FewbitsConfig, BitsAndBytesConfig):
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[config.quant_method] = config
        auto.AUTO_QUANTIZER_MAPPING[config.quant_method] = FewbitsQuantizer
    for method, original in _ORIGINAL_QUANTIZERS.items():
        auto.AUTO_QUANTIZER_MAPPING[method] = FewbitsQuantizer if takeover else original


class FewbitsQuantizer(HfQuantizer):
    """Places quantized layers, quantizes weights as they stream in, and names them on disk.

    `in_bitsandbytes_files`: whether the model is read and written in the bitsandbytes schema; otherwise
    tensors are stored under the names that the layers give them.
    """

    requires_calibration = False
    quantization_config: Any

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if isinstance(quantization_config, BitsAndBytesConfig):
            # What the model carries from now on: the class that transformers and others look for.
            quantization_config = TransformersBitsAndBytesConfig.from_dict(quantization_config.to_dict())
        super().__init__(quantization_config, **kwargs)
        self.in_bitsandbytes_files = not isinstance(quantization_config, FewbitsConfig)
        self.recipe = _recipe(quantization_config)
        self.failure: Exception | None = None  # of the first weight that could not be converted
        self._since_trim = 0
        self._wants_float32 = bool(getattr(quantization_config, placement.FLAG, False))
        self._float32: placement.Float32Offload | None = None  # until the device map is known
        self._in_float32: set[str] = set()  # modules that are, because the device map offloads them
        self._casts: list[RemovableHandle] = []  # hooks between these and the rest
        self._max_memory: dict[Any, Any] = {}

    # --- what transformers asks before loading ------------------------------------------------------

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the weights themselves are trained; Trainer asks for adapters otherwise."""
        config = self.quantization_config
        return self.in_bitsandbytes_files and config.load_in_8bit and config.llm_int8_has_fp16_weight

    @property
    def is_compileable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot work from the disk; called for a given map, and again for an inferred one."""
        if not isinstance(device_map, dict):
            return
        if self._float32 is not None:
            self._float32.settle(device_map, self._max_memory, self)
            self._finish_float32()
        mixes_dtypes = self._wants_float32 or not self.in_bitsandbytes_files
        placement.check_disk(device_map, not self.pre_quantized and not self._wants_float32, mixes_dtypes)

    def update_device_map(self, device_map: Any) -> Any:
        """No map: all on the current accelerator, or else on the CPU."""
        if device_map is not None:
            return device_map
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            return {"": "cpu"}
        return {"": f"{accelerator.type}:{torch.accelerator.current_device_index()}"}

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Leave a tenth of every device for the weights that are just being quantized."""
        self._max_memory = {device: size * 0.9 for device, size in max_memory.items()}
        return dict(self._max_memory)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per element; of a weight that waits to be quantized, those of the codes it will become."""
        layer, weight = _layer(model, param_name)
        if isinstance(layer, QuantModule) and layer.borrows(weight):
            return 0  # counted where it comes from
        if self.pre_quantized or not isinstance(layer, QuantModule) or weight not in layer.weights():
            return param.element_size()
        if layer.is_stack:  # its codes are there already, under another name
            return 0
        codes = layer.scheme.weight.parts(layer.weights()[weight][0])[0]
        return codes.nbytes / max(param.numel(), 1)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether `param_name` is quantized here, so that its shape on disk is not that in the model."""
        if self.pre_quantized and not self.in_bitsandbytes_files:
            return False
        layer, weight = _layer(model, param_name)
        return isinstance(layer, QuantModule) and weight != "bias" and not weight.endswith("_bias")

    # --- loading ------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        keys = _header_keys(model, checkpoint_files or ())
        if self.pre_quantized and any(".experts.0." in key for key in keys):  # a layer for each expert
            super()._convert_model_for_quantization(model)
        recipe = self.recipe.with_skips(placing.default_skips(model))
        decisions = placing.decide(model, recipe)
        if keys and self.pre_quantized:
            decisions = self._as_stored(model, decisions, keys)
        if keys:
            decisions = _without_absent(model, decisions, keys)
        originals = {name: model.get_submodule(name) for name, one in decisions.items() if one.scheme}
        placing.place(model, decisions)
        for _, layer in _quantized(model):
            for one in (layer, *layer.parameters(recurse=False)):
                flagged: Any = one
                flagged._is_hf_initialized = True  # transformers must not draw random codes
            if not self.pre_quantized:
                self._await_weights(layer)
        if self.pre_quantized and not self.in_bitsandbytes_files:
            _check_sizes(model, keys)
        self._state_skips(getattr(model, KEPT_REASONS))
        self._state_training(decisions)
        fits = all(isinstance(layer, QuantLinear) for _, layer in _quantized(model))
        if self.in_bitsandbytes_files and not self.pre_quantized and not fits:
            self._leave_bitsandbytes_files(model)
        if self._wants_float32 and device_map is not None:
            # A layer that is stored quantized has no other weights to go back to.
            self._float32 = placement.Float32Offload(model, {} if self.pre_quantized else originals)
            if isinstance(device_map, dict):
                self._float32.extend(device_map)
                self._finish_float32()

    def _finish_float32(self) -> None:
        assert self._float32 is not None
        kept = [name for name in self._float32.originals if name in self._float32.reasons]
        if kept:
            self._state_skips([*getattr(self._float32.model, KEPT_REASONS), *kept], given=True)
        self._in_float32, self._casts = set(self._float32.reasons), self._float32.finish()
        self._float32 = None  # it holds the model

    def _state_skips(self, kept: Iterable[str], given: bool = False) -> None:
        """A skip list adds to the defaults here, but replaces them in bitsandbytes: state all, if any."""
        config: Any = self.quantization_config
        if not self.in_bitsandbytes_files or (config.llm_int8_skip_modules is None and not given):
            return
        skips = config.llm_int8_skip_modules or []
        covered = Recipe(tuple(Rule(pattern, None, "") for pattern in skips))
        self.quantization_config = copy.copy(config)
        self.quantization_config.llm_int8_skip_modules = [
            *skips,
            *(name for name in kept if not covered.named(name)),
        ]

    def _state_training(self, decisions: Mapping[str, Decision]) -> None:
        """A checkpoint of frozen int8 weights trains none, whatever its config says."""
        trained = any(one.scheme is not None and one.scheme.trainable for one in decisions.values())
        if self.is_qat_trainable and not trained:
            self.quantization_config = copy.copy(self.quantization_config)
            self.quantization_config.llm_int8_has_fp16_weight = False

    def _convert_model_for_quantization(self, model: Any) -> None:
        """Not before the headers of the checkpoint say how it stores experts."""

    def _as_stored(
        self, model: Any, decisions: Mapping[str, Decision], keys: Mapping[str, _Header]
    ) -> dict[str, Decision]:
        """Decisions corrected by the headers of the checkpoint: a weight is quantized if it is stored so.

        A weight that is to be trained is frozen if it is stored as int8.

        ValueError for codes without scales.
        """
        marks = schema.MARKS if self.in_bitsandbytes_files else ("_scale", "_scale_codes")
        stored = {_layer_of(key) for key in keys if key.endswith(marks)}
        plain = {_layer_of(key) for key in keys} - stored
        default = self.recipe.rules[-1].scheme
        result = dict(decisions)
        for name, decision in decisions.items():
            names = _names_in_files(name, model.base_model_prefix)
            scheme = self.recipe.match(name).scheme or default
            if stored.intersection(names):
                if scheme is not None and (decision.scheme is None or scheme.trainable):
                    result[name] = Decision(replace(scheme, trainable=False), "stored so in the checkpoint")
            elif decision.scheme is not None:
                if any(keys.get(f"{one}.weight", ("", ()))[0] in ("U8", "I8") for one in names):
                    raise ValueError(f"{name}: the checkpoint has codes but no scales; it is incomplete")
                prefixes = tuple(f"{one}." for one in names)  # experts may be stored one by one
                is_plain = plain.intersection(names) or any(layer.startswith(prefixes) for layer in plain)
                if is_plain and not decision.scheme.trainable:
                    result[name] = Decision(None, "stored so in the checkpoint")
        return result

    def _await_weights(self, layer: QuantModule) -> None:
        """Parameters with the names, shapes and dtypes of a plain checkpoint, until their weights arrive.

        The loader casts what it reads to the dtype that it finds in the model.
        """
        for weight, (shape, dtype) in layer.weights().items():
            if layer.is_stack:
                count = len(layer.get_parameter(layer.part_names(weight)["codes"]))
                shape = torch.Size(
                    (count, *(shape[::-1] if getattr(layer, "is_transposed", False) else shape))
                )
            waiting = torch.empty(shape, dtype=dtype, device="meta")
            layer.register_parameter(weight, nn.Parameter(waiting, requires_grad=False))

    def _leave_bitsandbytes_files(self, model: Any) -> None:
        logger.warning(
            "this model has fused experts, which bitsandbytes files cannot hold in few bits; it will be "
            "saved as method 'fewbits', which needs `import fewbits` to load"
        )
        self.quantization_config = FewbitsConfig.from_recipe(self.recipe)
        self.in_bitsandbytes_files = False
        model.quantization_method = self.quantization_config.quant_method

    def get_quantize_ops(self) -> Any:
        from fewbits.integrations.conversion import QuantizeWeight

        return QuantizeWeight(self)

    def get_weight_conversions(self) -> list[Any]:
        from fewbits.integrations.conversion import bitsandbytes_reader

        return [bitsandbytes_reader(self)] if self.pre_quantized and self.in_bitsandbytes_files else []

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype to cast a tensor of a checkpoint to; the reader of bitsandbytes files casts by itself."""
        from fewbits.integrations.conversion import ReadBitsAndBytes

        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, ReadBitsAndBytes):
                operation.dtype = dtype
                return None
        kept: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return kept

    def count(self, nbytes: int) -> None:
        """Note bytes that were quantized or moved; now and then, freed memory is given back to the system."""
        self._since_trim += nbytes
        if self._since_trim >= _TRIM_AFTER:
            self._since_trim = 0
            give_back_free_memory()

    # --- after loading ------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from fewbits.integrations.conversion import drop_readers, keep_codes_together

        if self.failure is not None:
            raise ValueError(f"cannot load this model: {self.failure}") from self.failure
        drop_readers(model)
        keep_codes_together(model)
        self._initialize_missing(model)
        for _, layer in _quantized(model):
            for weight in layer.weights():
                for attribute in layer.part_names(weight).values():
                    getattr(layer, attribute).requires_grad_(False)
            self.count(layer.use_huge_pages())
        placement.share_scales(model)
        if distributed.prepare_loaded(model, model.dtype):
            logger.info("one of several processes: codes and scales are held ready to be sharded")
        placement.keep_on_cpu(model)
        give_back_free_memory()
        logger.info("%s", report(model).summary)
        return model

    def _initialize_missing(self, model: Any) -> None:
        """Layers whose weights the checkpoint lacks, a new head for instance, become plain new ones."""
        for name, layer in _quantized(model):
            parts = [
                getattr(layer, part)
                for weight in layer.weights()
                for part in layer.part_names(weight).values()
            ]
            loaded = [part.is_meta or getattr(part, "_is_hf_initialized", False) for part in parts]
            if all(loaded):
                continue
            if f"{name}.weight" in model.all_tied_weights_keys:
                continue
            if any(loaded) or not isinstance(layer, QuantLinear | QuantEmbedding):
                raise ValueError(f"{name}: the checkpoint has not all of its tensors; it is incomplete")
            plain = placing.empty_plain(layer, parts[0].device)
            model._init_weights(plain)
            model.set_submodule(name, plain)
            getattr(model, KEPT_REASONS)[name] = _NEW

    # --- saving and undoing -------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The state dict as files have it: names of the bitsandbytes schema, parts in their own dtypes."""
        from accelerate.utils import align_module_device

        from fewbits.integrations.conversion import keep_codes_together

        keep_codes_together(model)  # layers may have been frozen since it was loaded
        unheld = distributed.unheld_state(model)
        state: dict[str, Tensor] = unheld or model.state_dict()
        # Where tied tensors are offloaded, a forward makes two of them.
        ties = model.all_tied_weights_keys.items()
        twice = [key for key, source in ties if source in state and key in state and state[key].is_meta]
        for key in twice:
            del state[key]
        if not self.in_bitsandbytes_files:
            return (state if twice or unheld else None), {}
        for name, layer in _quantized(model):
            if isinstance(layer, QuantLinear):
                for attribute in layer.part_names("weight").values():
                    state.pop(f"{name}.{attribute}")
                with align_module_device(layer):  # weights on the disk come in for a moment
                    stored = schema.to_file(layer.quantized_weight(), layer.scheme.storage_dtype)
                state |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
        return state, {}

    def dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Give plain layers back in `dtype`; None: that of the rest of the model, also after a cast."""
        apart: list[nn.Module] = [layer for _, layer in _quantized(model)]
        apart += self._float32_modules(model)
        others = {id(tensor) for module in apart for tensor in module.parameters(recurse=False)}
        rest = (tensor for tensor in model.parameters() if id(tensor) not in others)
        own = next((tensor.dtype for tensor in rest if tensor.is_floating_point()), model.config.dtype)
        return super().dequantize(model, own if dtype is None else dtype)

    def end_casts(self) -> None:
        """No more casts around what a device map keeps in float32: the rest is in float32 now as well."""
        for hook in self._casts:
            hook.remove()

    def _float32_modules(self, model: Any) -> list[nn.Module]:
        found = []
        for name in self._in_float32:
            module = model.get_submodule(name)
            while hasattr(module, "base_layer"):  # PEFT has put an adapter around it since
                module = module.base_layer
            found.append(module)
        return found

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        # save_pretrained leaves the name of the dtype in the config, from where transformers takes it
        target: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        ours = (QuantModule, TrainableInt8Linear)
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, ours)]
        hooks = {name: layer._hf_hook for name, layer in layers if hasattr(layer, "_hf_hook")}
        if any(getattr(hook, "offload", False) for hook in hooks.values()):
            raise ValueError(
                "cannot dequantize a model with offloaded layers; load it with device_map='cpu' first"
            )
        for name in hooks:
            remove_hook_from_module(model.get_submodule(name))
        placing.dequantize_model(model, target)
        for name, hook in hooks.items():
            add_hook_to_module(model.get_submodule(name), hook)
        placement.end_float32(self._float32_modules(model), self._casts, target)
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                del module.config._is_quantized
        return model


def _recipe(config: Any) -> Recipe:
    if isinstance(config, FewbitsConfig):
        return config.to_recipe()
    options = config.to_dict()
    return BitsAndBytesConfig.from_dict(options).to_recipe()  # type: ignore[no-any-return]


def _quantized(model: nn.Module) -> list[tuple[str, QuantModule]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantModule)]


def _layer(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """(module, attribute) of a parameter name."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _layer_of(key: str) -> str:
    """The layer that a tensor of a checkpoint belongs to: all before its own name."""
    layer, _, name = key.rpartition(".")
    return layer.removesuffix(".weight") if name == "absmax" else layer


def _names_in_files(name: str, prefix: str) -> tuple[str, ...]:
    """What a checkpoint may call the layer `name`: with or without the prefix of the base model."""
    return (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))


def _header_keys(model: Any, files: Iterable[str]) -> dict[str, _Header]:
    """Name in the model → (dtype, shape) of all tensors in safetensors files, from their headers.

    Names go the way that the loader sends them. Empty when that way splits a tensor, whose further names it
    does not tell. ValueError, naming the file, for one that is cut off or none at all.
    """
    from safetensors import SafetensorError, safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    splitting = {
        pattern
        for converter in converters
        if len(converter.target_patterns) > 1
        for pattern in converter.source_patterns
    }
    known, prefix = model.state_dict(), model.base_model_prefix
    keys: dict[str, _Header] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                for name in list(opened.keys()):
                    renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
                    if pattern in splitting:
                        return {}
                    header = opened.get_slice(name)
                    keys[renamed] = (header.get_dtype(), tuple(header.get_shape()))
        except SafetensorError as error:
            raise ValueError(
                f"{file} is no whole safetensors file: {error}. Fetch or save it again"
            ) from error
    return keys


def _check_sizes(model: Any, keys: Mapping[str, _Header]) -> None:
    """ValueError for stored parts whose shapes are not those of the layers."""
    for name, layer in _quantized(model):
        for attribute, tensor in layer.state_dict().items():
            stored = keys.get(f"{name}.{attribute}", ("", tuple(tensor.shape)))[1]
            if stored != tuple(tensor.shape):
                raise ValueError(
                    f"{name}.{attribute} is stored as {list(stored)}, but {layer} needs "
                    f"{list(tensor.shape)}; the checkpoint belongs to another model or config"
                )


def _without_absent(
    model: Any, decisions: Mapping[str, Decision], keys: Mapping[str, _Header]
) -> dict[str, Decision]:
    """Layers that the checkpoint lacks, a new head for instance, are left for transformers to draw."""
    present = {_layer_of(key) for key in keys if not key.endswith(".bias")}
    tied = {name for pair in placing.tied_modules(model) for name in pair}
    result = dict(decisions)
    for name, decision in decisions.items():
        if decision.scheme is None or name in tied or not hasattr(model.get_submodule(name), "weight"):
            continue
        if not present.intersection(_names_in_files(name, model.base_model_prefix)):
            result[name] = Decision(None, _NEW)
    return result


register(takeover=owns_bitsandbytes())
