"""What was measured of several models against one, and what that says: rows, verdict, notes, JSON."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import psutil

import fewbits
from fewbits.evaluate import Quality
from fewbits.machine import cpu_name, usable_cores

SAME = 1e-6  # nats/token: below, two models differ by no more than the rounding of float32


@dataclass(frozen=True)
class Subject:
    """A model to measure: loaded from a folder as it is stored, or quantized on the way.

    key: short name, unique in a run; label: name to show; given: the path or model id that the user named,
    empty for a model that is gone after the run; folder: where it is; settings: arguments of
    BitsAndBytesConfig, None for as stored; save_to: folder to save it to when it has been measured.
    """

    key: str
    label: str
    given: str
    folder: str
    settings: Mapping[str, Any] | None = None
    save_to: str | None = None


@dataclass(frozen=True)
class Plan:
    """What all models of a run are measured on.

    count: number of sequences; tokens: of each; seed: of samples; batch: sequences per forward pass, at
    most; text: file that the sequences are from, None for samples of the reference, and text_digest its
    SHA-256 as hex; prompt: what to continue, None for nothing.
    """

    count: int
    tokens: int
    seed: int
    threads: int
    batch: int
    text: str | None = None
    text_digest: str | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Figures:
    """The figures of one model.

    weight_bytes      parameters and buffers, as stored in memory
    kept_bytes        those of them in parameters that are not quantized
    parameters        number of weights, before quantization
    stored            format or dtype → number of weight tensors stored so
    weight_errors     ‖R - W‖ / ‖R‖ of every weight W against R of the reference; None where it has other
                      weights, and weight_note then says why; empty for the reference
    peak_bytes        largest resident set while loading and generating, above that before
    peak_is_exact     whether the system could reset the peak; otherwise it is an upper bound
    text              greedy continuation of the prompt, None without one
    """

    weight_bytes: int
    kept_bytes: int
    bits_per_weight: float
    parameters: int
    dtype: str
    stored: dict[str, int]
    quality: Quality
    weight_errors: dict[str, float] | None
    weight_note: str
    tokens_per_second: float
    decoded_tokens: int
    decode_repeats: int
    peak_bytes: int
    peak_is_exact: bool
    text: str | None


@dataclass(frozen=True)
class Row:
    """One model and its figures. files: what identifies it → SHA-256 as hex, of config.json and of the
    header of every safetensors file."""

    subject: Subject
    figures: Figures
    files: Mapping[str, str]

    @property
    def label(self) -> str:
        return self.subject.label

    @property
    def worst_weight(self) -> tuple[str, float] | None:
        """(layer, relative error) of the weight that differs most; None if none does."""
        worst = worst_weights(self, 1)
        return worst[0] if worst else None


@dataclass(frozen=True)
class Comparison:
    """A finished run: the reference first, then the models held against it."""

    rows: tuple[Row, ...]
    plan: Plan
    command: str

    @property
    def reference(self) -> Row:
        return self.rows[0]

    @property
    def others(self) -> tuple[Row, ...]:
        return self.rows[1:]

    @property
    def verdict(self) -> str:
        """One sentence: what was kept of the reference, at what size."""
        closest = min(self.others, key=lambda row: _or_infinity(row.figures.quality.kl_mean))
        smallest = min(self.others, key=lambda row: row.figures.weight_bytes)
        if closest.figures.quality != smallest.figures.quality:
            return (
                f"{closest.label} is closest: it {self._kept(closest)}; "
                f"{smallest.label} is smallest: it {self._kept(smallest)}."
            )
        worst = smallest.worst_weight
        return (
            f"{smallest.label}{' is closest and smallest: it' if len(self.others) > 1 else ''} "
            + self._kept(smallest)
            + (f"; worst layer {worst[0]} (relative error {worst[1]:.3f})" if worst else "")
            + "."
        )

    def _kept(self, row: Row) -> str:
        quality, size = row.figures.quality, f"{self.size_ratio(row):.2f} × the size"
        if not math.isfinite(quality.kl_mean):
            return f"is broken, its KL divergence being {quality.kl_mean}, at {size}"
        if abs(quality.kl_max) < SAME:
            return f"predicts the same as {self.reference.label} on all tokens at {size}"
        same = f"{100 * quality.same_top_share:.1f} % of the top tokens"
        return f"keeps {same} at {size}, KL {millinats(quality)} millinats/token"

    def size_ratio(self, row: Row) -> float:
        return row.figures.weight_bytes / self.reference.figures.weight_bytes

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values; divergences in nats/token."""
        return {
            "versions": versions(),
            **machine(),
            "threads": self.plan.threads,
            "command": self.command,
            "model": self.reference.subject.given,
            "parameters": self.reference.figures.parameters,
            "text": self.plan.text,
            "text_sha256": self.plan.text_digest,
            "samples": self.plan.count,
            "tokens": self.plan.tokens,
            "seed": self.plan.seed,
            "batch": self.plan.batch,
            "prompt": self.plan.prompt,
            "verdict": self.verdict,
            "notes": notes(self),
            "rows": [self._row_json(row) for row in self.rows],
        }

    def _row_json(self, row: Row) -> dict[str, Any]:
        subject = row.subject
        return {
            "key": subject.key,
            "label": subject.label,
            "model": subject.given,
            "settings": subject.settings,
            "size_ratio": self.size_ratio(row),
            "worst_weight": row.worst_weight,
            **asdict(row.figures),
            "files": dict(row.files),
        }


def worst_weights(row: Row, count: int) -> list[tuple[str, float]]:
    """The `count` weights that differ most from the reference's, as (name of the layer, relative error)."""
    errors = row.figures.weight_errors or {}
    ranked = sorted(errors.items(), key=lambda item: -_or_infinity(item[1]))
    return [(name.removesuffix(".weight"), error) for name, error in ranked[:count] if error]


def millinats(quality: Quality) -> str:
    """Mean KL divergence and half its 95 % interval, in millinats/token; more digits for a tiny interval."""
    mean, half = 1e3 * quality.kl_mean, 1e3 * quality.kl_interval95
    if not math.isfinite(mean):
        return str(mean)
    digits = 4 if 0 < half < 0.005 else 2
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def short(value: float) -> str:
    """A positive figure with two decimals, or none where it is large."""
    return f"{value:,.0f}" if 1000 <= value < math.inf else f"{value:.2f}"


def versions() -> dict[str, str]:
    """fewbits and what it computed with."""
    libraries = {name: version(name) for name in ("torch", "transformers")}
    return {"fewbits": fewbits.__version__, **libraries}


def machine() -> dict[str, Any]:
    """The hardware: name and number of processors, bytes of memory."""
    return {"cpu": cpu_name(), "cpus": usable_cores(), "memory_bytes": psutil.virtual_memory().total}


def hardware(plan: Plan) -> str:
    """The hardware and how much of it was used, in a few words."""
    threads = "1 thread" if plan.threads == 1 else f"{plan.threads} threads"
    facts = machine()
    memory = f"{facts['memory_bytes'] / 1e9:.0f} GB of memory"
    return f"{facts['cpu']}, {threads} on {facts['cpus']} cores, {memory}"


def command_line() -> str:
    """What was called, ready to paste."""
    return shlex.join(["fewbits", *sys.argv[1:]])


def notes(comparison: Comparison) -> list[str]:
    """What the columns mean, exactly."""
    reference, plan = comparison.reference, comparison.plan
    figures = reference.figures
    exact = all(row.figures.peak_is_exact for row in comparison.rows)
    bound = "" if exact else " (upper bound: this system cannot reset it)"
    source = f"sampled from {reference.label}" if plan.text is None else f"of {plan.text}"
    missing = [
        f"{row.label}: no weight errors; {row.figures.weight_note}"
        for row in comparison.others
        if row.figures.weight_errors is None
    ]
    return [
        f"weights: all parameters and buffers, also those kept in {figures.dtype}; bits per weight: the "
        "same over the number of original parameters.",
        f"perplexity, KL divergence from {reference.label} (mean ± 95 %), same top token: on "
        f"{figures.quality.tokens:,} tokens {source}, in sequences of {plan.tokens}.",
        f"tokens per s: greedy, one sequence, {figures.decoded_tokens} tokens, median of "
        f"{figures.decode_repeats} runs.",
        "peak: largest resident set while loading and generating, above the same process after a first load "
        f"and a few tokens, which bring in the libraries{bound}. Each row has its own process.",
        *missing,
    ]


def _or_infinity(value: float) -> float:
    """So that nan ranks as the worst."""
    return value if math.isfinite(value) else math.inf
