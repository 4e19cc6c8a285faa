"""The ways to hold a model that `fewbits plan` compares: what each takes, and how to have it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewbits import reference
from fewbits.backends import choose
from fewbits.checkpoint.folder import open_folder, read_config
from fewbits.checkpoint.safetensors import shown
from fewbits.cli.common import format_bytes
from fewbits.config import BitsAndBytesConfig, FewbitsConfig
from fewbits.format import Format
from fewbits.machine import accelerators
from fewbits.model import quantize_model
from fewbits.nn import QuantModule
from fewbits.planner import (
    Device,
    Estimate,
    Live,
    adapter_bytes,
    cache_bytes,
    decoding_bytes,
    loading_bytes,
    lookup_bytes,
)
from fewbits.report import Entry, report

DEFAULT_CONTEXT = 8192
_LEAST_CONTEXT = 256
EMBEDDING_FORMAT = "int8:row"


@dataclass(frozen=True)
class Method:
    """A way to hold weights.

    format: of the linear layers, None as they are; dtype: what a float32 model is cast to; embeddings: those
    become int8, too; options: of transformers' BitsAndBytesConfig, where that can say it.
    """

    key: str
    label: str
    format: str | None = None
    dtype: str | None = None
    embeddings: bool = False
    options: tuple[str, ...] = ()


_NF4 = ("load_in_4bit=True", 'bnb_4bit_quant_type="nf4"')
_DOUBLE = (*_NF4, "bnb_4bit_use_double_quant=True")

# Best quality first, behind the model as it is stored.
METHODS = (
    Method("bfloat16", "bfloat16", dtype="bfloat16"),
    Method("int8", "LLM.int8()", "int8:row@int8:t6", options=("load_in_8bit=True",)),
    Method("nf4", "NF4", "nf4:g64", options=_NF4),
    Method("nf4-dq", "NF4, double quant", "nf4:g64:dq", options=_DOUBLE),
    Method("nf4-dq-embeddings", "NF4 dq", "nf4:g64:dq", embeddings=True),
    Method("int3-embeddings", "int3", "int3:g64:f16:zero", embeddings=True),
)


@dataclass(frozen=True)
class Case:
    """What is done with a model. context: tokens of a sequence; rank: of LoRA adapters, None to generate."""

    context: int
    batch: int
    rank: int | None

    @property
    def purpose(self) -> str:
        """In words."""
        tokens = f"{self.batch} x {self.context:,} tokens"
        if self.rank is None:
            return f"generating, {tokens} of prompt and answer"
        return f"training LoRA adapters of rank {self.rank} on {tokens}, with gradient checkpointing"


@dataclass(frozen=True)
class Row:
    """One method for one model. embeddings: names of modules that become int8; kept: what stays as it is."""

    method: Method
    estimate: Estimate
    bits_per_weight: float
    embeddings: tuple[str, ...]
    kept: tuple[Entry, ...]

    @property
    def label(self) -> str:
        """What the method is called, with what became of the embeddings."""
        return self.method.label + (" + int8 embeddings" if self.embeddings else "")


class Source:
    """A model to plan for, from a folder that may have no weights yet: its config, and headers if there.

    dtype: that of the model, by name; longest: the tokens it was made for, if it says so; notes: what a
    reader of the plan should know. CheckpointError for a folder that is not sound, ValueError for an
    architecture that is not known.
    """

    def __init__(self, path: Path) -> None:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        from fewbits.integrations.architecture import stored_dtype

        self.notes: list[str] = []
        self.folder = open_folder(path) if any(path.glob("*.safetensors")) else None
        config = read_config(path) if self.folder is None else self.folder.config
        dtype = stored_dtype(config)
        if self.folder is None:
            self._tell("There are no weights here; sizes are those that config.json says.")
        if dtype is None:
            dtype = (None if self.folder is None else self.folder.first_dtype) or torch.bfloat16
            self._tell(f"config.json names no dtype; this is for {_name(dtype)}.")
        self.dtype = _name(dtype)
        self._config = {**config, "dtype": self.dtype}
        self.is_quantized = bool(config.get("quantization_config"))
        self._demands: dict[tuple[str, Case], tuple[int | None, Live | None]] = {}
        model = self.model()
        self.architecture = type(model).__name__
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        causal, settings = MODEL_FOR_CAUSAL_LM_MAPPING, type(model.config)
        self.is_causal = settings in causal and causal[settings] is type(model)
        self.longest: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def _tell(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def model(self, dtype: str | None = None) -> Any:
        """The empty model, all of it in full precision."""
        from fewbits.integrations.architecture import empty_model

        return empty_model({**self._config, "dtype": dtype or self.dtype})

    def rows(self, case: Case) -> tuple[Row, ...]:
        """All methods that make a difference, best quality first; of a quantized checkpoint, only itself."""
        if self.is_quantized:
            return (self._stored(self._config["quantization_config"], case),)
        rows = [self.row(Method("stored", f"{self.dtype}, as stored"), case)]
        for method in METHODS:
            if method.dtype is None or self.dtype == "float32":
                row = self.row(method, case)
                if row.estimate.weights != rows[-1].estimate.weights:
                    rows.append(row)
        return tuple(rows)

    def row(self, method: Method, case: Case) -> Row:
        """The row of one method."""
        model = self.model(method.dtype)
        embeddings = _embeddings(model) if method.embeddings else ()
        adapters = _adapters(model, case)
        if method.format is not None:
            quantize_model(model, FewbitsConfig(method.format, dict.fromkeys(embeddings, EMBEDDING_FORMAT)))
            embeddings = tuple(
                name for name in embeddings if isinstance(model.get_submodule(name), QuantModule)
            )
        return self._finish(method, model, case, embeddings, adapters, loading_bytes(model))

    def _stored(self, quantization: Mapping[str, Any], case: Case) -> Row:
        """A checkpoint that is quantized already, planned as it is."""
        name = shown(str(quantization.get("quant_method", "an unnamed method")))
        self._tell(f"This checkpoint is quantized already, by {name}; it is planned as it is stored.")
        model = self.model()
        adapters = _adapters(model, case)
        kinds: dict[str, Any] = {"bitsandbytes": BitsAndBytesConfig, "fewbits": FewbitsConfig}
        if name in kinds:
            try:
                quantize_model(model, kinds[name].from_dict(quantization))
            except (TypeError, ValueError) as error:
                raise ValueError(f"quantization_config in config.json: {error}") from error
        row = self._finish(
            Method("stored", "as stored"), model, case, (), adapters, model.get_memory_footprint()
        )
        if name in kinds or self.folder is None:
            return row
        self._tell(f"Temporaries of {name} are not counted.")
        weights = self.folder.nbytes
        estimate = replace(row.estimate, weights=weights, loading=weights)
        return replace(row, estimate=estimate, bits_per_weight=8 * weights / self.parameters, kept=())

    def _finish(
        self,
        method: Method,
        model: Any,
        case: Case,
        embeddings: tuple[str, ...],
        adapters: int,
        loading: int,
    ) -> Row:
        cache, live = self._demand(method.dtype or self.dtype, case)
        tokens = case.batch * case.context
        activations = None
        if cache is not None and live is not None:
            decoding = decoding_bytes(model, tokens, compiled=_computes_in_c())
            peak = max(live.with_decoding(decoding), lookup_bytes(model, tokens))
            activations = max(0, peak - cache)
        weights = model.get_memory_footprint()
        estimate = Estimate(weights, loading, cache, activations, adapters)
        return Row(method, estimate, 8 * weights / self.parameters, embeddings, report(model).kept)

    def _demand(self, dtype: str, case: Case) -> tuple[int | None, Live | None]:
        """(cache, what a run has alive) of the model in full precision; None where that is not known."""
        key = (dtype, case)
        if key not in self._demands:
            try:
                self._demands[key] = _run(self.model(dtype), case)
            except ValueError as error:
                self._demands[key] = (None, None)
                self._tell(f"KV cache and activations are not estimated: {error}.")
        return self._demands[key]


def _computes_in_c() -> bool:
    """Whether this machine runs models on its processor, with the C++ kernels."""
    kernels = choose("linear", Format.parse("nf4:g64"), torch.device("cpu"))
    return not accelerators() and kernels is not reference


def _run(model: Any, case: Case) -> tuple[int, Live]:
    from fewbits.integrations import dry_run

    if case.rank is not None:
        return 0, dry_run.training_step(model, case.batch, case.context, case.rank)
    cache = cache_bytes(dry_run.cache_layers(model), case.context, case.batch)
    return cache, dry_run.prefill(model, case.batch, case.context)


def _adapters(model: Any, case: Case) -> int:
    from fewbits.integrations import dry_run

    if case.rank is None:
        return 0
    shapes = [dry_run.linear_shape(layer) for _, layer in dry_run.adapter_targets(model)]
    return adapter_bytes(shapes, case.rank)


def _embeddings(model: Any) -> tuple[str, ...]:
    """Names of the input and output embeddings."""
    both = [model.get_input_embeddings(), model.get_output_embeddings()]
    return tuple(name for name, module in model.named_modules() if any(module is one for one in both))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- what to do --------------------------------------------------------------------------------------


def mends(source: Source, rows: Sequence[Row], case: Case, devices: Sequence[Device]) -> list[str]:
    """Up to three ways to make the smallest of `rows`, which does not fit the first device, fit after all."""
    row = min(rows, key=lambda row: row.estimate.needed)
    device, label, one = devices[0], row.label, row.estimate
    found = [f"{other.name}, which {label} fits" for other in devices[1:] if other.fits(one) != "no"][:1]
    for option, smaller in _smaller(case):
        estimate = _again(source, row, smaller)
        if device.fits(estimate) != "no":
            found.append(f"{option}: {label} needs {format_bytes(estimate.needed)} then")
            break
    beside = one.needed - one.weights
    if case.rank is None and beside < device.usable:
        outside = format_bytes(one.needed - device.usable)
        found.append(f'device_map="auto": {outside} of the weights wait in main memory, which is slow')
    return [*found, f"a device with {format_bytes(one.least_device)}, or a smaller model"][:3]


def _smaller(case: Case) -> Iterator[tuple[str, Case]]:
    """Options that take less memory, the least change first."""
    if case.batch > 1:
        yield "--batch 1", replace(case, batch=1)
    context = case.context // 2
    also = "--batch 1 " if case.batch > 1 else ""
    while context >= _LEAST_CONTEXT:
        yield f"{also}--context {context}", replace(case, batch=1, context=context)
        context //= 2


def _again(source: Source, row: Row, case: Case) -> Estimate:
    if row.method.key == "stored":
        return source.rows(case)[0].estimate
    return source.row(row.method, case).estimate
