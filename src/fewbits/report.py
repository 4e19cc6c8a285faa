"""The report of every weight of a model: what it is stored as, or why it was kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from fewbits.int8_training import TrainableInt8Linear
from fewbits.nn import QuantModule

KEPT_REASONS = "_fewbits_kept"  # attribute of a model: name of a module or a weight → why it was kept
_ADAPTER = "an adapter"
_WRAPPED = ("base_layer", "original_module")  # where PEFT's wrappers keep what they wrap
NOTES = "_fewbits_notes"  # attribute of a model: parameter name → what happened to it since


@dataclass(frozen=True)
class Entry:
    """One weight: its name, shape, what it is stored as, bytes (scales included), and why it was kept.

    `reason` is empty for a quantized weight; `relative_error` is ‖W - decode(W)‖ / ‖W‖ where known. `note`
    says what happened since: a cast to float32 for training, a merged adapter.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    nbytes: int
    quantized: bool
    reason: str = ""
    relative_error: float | None = None
    note: str = ""

    @property
    def count(self) -> int:
        """Number of weights."""
        result = 1
        for size in self.shape:
            result *= size
        return result


@dataclass(frozen=True)
class Report:
    """Every weight of a model, in its order. `print(report)` shows the kept ones one by one."""

    entries: tuple[Entry, ...]

    @property
    def quantized(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.quantized)

    @property
    def kept(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if not entry.quantized)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as stored."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over the whole model, scales and padding included."""
        count = sum(entry.count for entry in self.entries)
        return 8 * self.nbytes / count if count else 0.0

    @property
    def summary(self) -> str:
        """One line: how many weights are stored as what, and what was kept in bytes."""
        formats: dict[str, int] = {}
        for entry in self.quantized:
            formats[entry.stored] = formats.get(entry.stored, 0) + 1
        stored = ", ".join(f"{count} x {name}" for name, count in formats.items()) or "none"
        adapters = sum(entry.reason == _ADAPTER for entry in self.kept)
        large = [entry for entry in self.kept if len(entry.shape) > 1 and entry.reason != _ADAPTER]
        names = ", ".join(entry.name for entry in large[:3]) + (", …" if len(large) > 3 else "")
        kept, whole = (len(entries) - adapters for entries in (self.kept, self.entries))
        return (
            f"quantized: {stored}; kept: {kept} of {whole} weights"
            + (f" ({names})" if names else "")
            + (f"; {adapters} weights of adapters" if adapters else "")
            + f"; {_size(self.nbytes)}, {self.bits_per_weight:.2f} bits per weight"
        )

    def to_json(self) -> dict[str, Any]:
        """All entries and totals as JSON values."""
        return {
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "weights": [asdict(entry) for entry in self.entries],
        }

    def __str__(self) -> str:
        rows = [("weight", "shape", "stored as", "bytes", "error, or why it was kept")]
        for entry in self.entries:
            error = "" if entry.relative_error is None else f"{entry.relative_error:.4f}"
            shape = " x ".join(map(str, entry.shape)) or "scalar"
            told = "; ".join(filter(None, (entry.reason or error, entry.note)))
            rows.append((entry.name, shape, entry.stored, f"{entry.nbytes:,}", told))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + "  " + row[4]
            for row in rows
        ]
        return "\n".join([*(line.rstrip() for line in lines), self.summary])


def report(model: nn.Module) -> Report:
    """What every weight of `model` is stored as, and why those in full precision were kept.

    Tied weights appear once. Works on any module, also on the meta device and under adapters of PEFT.
    """
    entries: list[Entry] = []
    seen: set[int] = set()
    told, adapters = _told(model), _adapters(model)
    for prefix, module in model.named_modules():
        quantized = _quantized_entries(prefix, module, seen) if isinstance(module, QuantModule) else []
        entries += quantized
        if isinstance(module, TrainableInt8Linear) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            entry = _trainable(_join(prefix, "weight"), module)
            entries.append(replace(entry, note=told.get(("note", id(module.weight)), "")))
        for name, tensor in module.named_parameters(recurse=False):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                entry = _kept(_join(prefix, name), tensor, module, told)
                entries.append(replace(entry, reason=_ADAPTER) if id(tensor) in adapters else entry)
    return Report(tuple(entries))


def _told(model: nn.Module) -> dict[tuple[str, int], str]:
    """("kept", identity of a module or parameter) → why; ("note", of a parameter) → what happened to it.

    The model that was quantized may be deep inside `model` by now, and its layers inside those of an adapter.
    """
    told: dict[tuple[str, int], str] = {}
    for root in model.modules():
        reasons, notes = vars(root).get(KEPT_REASONS, {}), vars(root).get(NOTES, {})
        if not reasons and not notes:
            continue
        for name, module in root.named_modules():
            if (reason := reasons.get(_original(name))) is not None:
                told["kept", id(module)] = reason
        for name, parameter in root.named_parameters():
            if (reason := reasons.get(_original(name))) is not None:
                told["kept", id(parameter)] = reason
            if (note := notes.get(_original(name))) is not None:
                told["note", id(parameter)] = note
    return told


def _adapters(model: nn.Module) -> set[int]:
    """Identities of parameters that PEFT's wrappers have beside what they wrap."""
    found: set[int] = set()
    for module in model.modules():
        if any(name in module._modules for name in _WRAPPED):
            own = (child for name, child in module.named_children() if name not in _WRAPPED)
            found |= {id(parameter) for child in own for parameter in child.parameters()}
            found |= {id(parameter) for parameter in module.parameters(recurse=False)}
    return found


def _original(name: str) -> str:
    """The name of a module or parameter before PEFT wrapped layers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def _quantized_entries(prefix: str, module: QuantModule, seen: set[int]) -> list[Entry]:
    entries = []
    for weight, (shape, _) in module.weights().items():
        tensors = [getattr(module, attribute) for attribute in module.part_names(weight).values()]
        known = id(tensors[0]) in seen
        seen.update(id(tensor) for tensor in tensors)
        if known:
            continue
        lead = tensors[0].shape[:1] if module.is_stack else ()
        entries.append(
            Entry(
                _join(prefix, weight),
                (*lead, *shape),
                str(module.scheme),
                sum(tensor.nbytes for tensor in tensors),
                True,
                relative_error=module.relative_errors.get(weight),
                note=module.notes.get(weight, ""),
            )
        )
    return entries


def _trainable(name: str, module: TrainableInt8Linear) -> Entry:
    """A weight that is trained: stored as it is, and multiplied as codes that are made from it."""
    dtype = str(module.weight.dtype).removeprefix("torch.")
    stored = f"{dtype}, multiplied as {module.scheme}"
    return Entry(name, tuple(module.matrix().shape), stored, module.weight.nbytes, True)


def _kept(name: str, tensor: Tensor, module: nn.Module, told: Mapping[tuple[str, int], str]) -> Entry:
    dtype = str(tensor.dtype).removeprefix("torch.")
    reason = told.get(("kept", id(module)))
    own = told.get(("kept", id(tensor)))  # says more
    if own is not None:
        reason = own
    elif tensor.dim() < 2:
        reason = f"{tensor.dim()}-dimensional"
    elif name.endswith("bias"):
        reason = "bias"
    elif reason is None and isinstance(module, nn.Embedding):
        reason = "an embedding; name it in FewbitsConfig(modules=…) to quantize it"
    elif reason is None and isinstance(module, nn.Linear):
        reason = "not quantized"
    return Entry(
        name,
        tuple(tensor.shape),
        dtype,
        tensor.nbytes,
        False,
        reason or f"a parameter of {type(module).__name__}, which is no linear layer",
        note=told.get(("note", id(tensor)), ""),
    )


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
