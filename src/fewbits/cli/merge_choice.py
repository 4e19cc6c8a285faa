"""Which of two bases the merged model is better on: loss on a text, or closeness to the trained model."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewbits.checkpoint.adapter import Adapter
from fewbits.cli.common import format_bytes, messages
from fewbits.cli.measure_inputs import has_tokenizer, text_sequences
from fewbits.cli.measured import Subject
from fewbits.cli.merge_bases import DEQUANTIZED, ORIGINAL
from fewbits.evaluate import interval95, quality, sample_sequences, token_scores
from fewbits.machine import give_back_free_memory, memory

if TYPE_CHECKING:
    from fewbits.integrations.merge_files import Base

_BYTES_PER_WEIGHT = 10  # two models in float32, and the 16-bit weights that the second is made from


@dataclass(frozen=True)
class Trial:
    """What is measured on: sequences of a text, or samples of the trained model. count: None for all."""

    text: Path | None
    count: int | None
    tokens: int
    seed: int
    batch: int


@dataclass(frozen=True)
class Figures:
    """One model. Losses and divergences (from the trained model) in nats/token, with the half widths of
    their 95 % intervals."""

    loss: float
    loss_interval95: float
    perplexity: float
    kl: float
    kl_interval95: float


@dataclass(frozen=True)
class Choice:
    """What was chosen, why, and the figures by name: the trained model, both candidates.

    difference: of original and dequantized, in loss on a text or else in divergence, nats/token.
    """

    chosen: str
    why: str
    figures: Mapping[str, Figures]
    difference: float
    difference_interval95: float
    sequences: int
    tokens: int
    measured_on: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def choose(bases: Mapping[str, Base], adapter: Adapter, test: Trial, *, quiet: bool) -> Choice:
    """Measure both bases with the adapter merged into them, in memory.

    The trained model is the decoded base and the adapter, not rounded to 16 bits. ValueError when a model
    cannot be measured, or would not fit into memory: then one must be named.
    """
    import transformers

    from fewbits.integrations.merging import in_memory, plan

    transformers.utils.logging.disable_progress_bar()

    plans = {key: plan(base.folder, adapter, base.quantization) for key, base in bases.items()}
    last = bases[DEQUANTIZED]
    unrounded = plan(last.folder, adapter, last.quantization, torch.float32)
    _check(unrounded.model, test)
    say = messages()
    with say.status("", spinner="line") if not quiet and say.is_terminal else _Silent() as status:
        status.update("the trained model: putting it together")
        reference = in_memory(last.folder, unrounded)
        status.update("the trained model: sequences")
        sequences = _sequences(reference, last, adapter, test)
        scores = {"trained": token_scores(reference, reference, sequences, batch=test.batch)}
        for key, base in bases.items():
            status.update(f"{key}: merging in memory and measuring")
            model = in_memory(base.folder, plans[key])
            scores[key] = token_scores(reference, model, sequences, batch=test.batch)
            del model
            gc.collect()
            give_back_free_memory()
    return decide(scores, test)


class _Silent:
    """In place of a status line where none is wanted."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *error: object) -> None: ...

    def update(self, text: str) -> None: ...


def _check(model: Any, test: Trial) -> None:
    name = "give --base original or --base dequantized"
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is no causal language model, whose bases could be compared; {name}"
        )
    config = model.config.get_text_config()
    begin = getattr(config, "bos_token_id", None)
    if test.text is None and not isinstance(begin, int):
        raise ValueError(f"the model has no begin token to sample from; give --text FILE, or {name}")
    longest = getattr(config, "max_position_embeddings", None) or test.tokens
    if test.tokens > longest:
        raise ValueError(f"the model takes at most {longest} tokens; got --tokens {test.tokens}. Give fewer")
    need = _BYTES_PER_WEIGHT * sum(parameter.numel() for parameter in model.parameters())
    free = memory().available
    if need > free:
        raise ValueError(
            f"comparing the bases takes {format_bytes(need)} of memory and {format_bytes(free)} are free; "
            f"{name}: merging alone takes little"
        )


def _sequences(reference: Any, base: Base, adapter: Adapter, test: Trial) -> Tensor:
    if test.text is None:
        return sample_sequences(
            reference, count=test.count or 32, length=test.tokens, seed=test.seed, batch=test.batch
        )
    subjects = [
        Subject(key=name, label=name, given=str(path), folder=str(path))
        for name, path in ((base.name, base.folder.path), (adapter.path.name, adapter.path))
    ]
    subject = next((one for one in subjects if has_tokenizer(one)), subjects[0])
    return text_sequences(subject, test.text, tokens=test.tokens, count=test.count)


def decide(scores: Mapping[str, Tensor], test: Trial) -> Choice:
    """The better one by `token_scores` of "trained", "original" and "dequantized"."""
    what, row = ("loss", 1) if test.text is not None else ("divergence from the trained model", 0)
    gaps = (scores[ORIGINAL][row] - scores[DEQUANTIZED][row]).mean(1)
    gap, error = gaps.mean().item(), interval95(gaps)
    on = f"{test.text.name}" if test.text is not None else "samples of the trained model"
    finite = {key: bool(scores[key].isfinite().all()) for key in (ORIGINAL, DEQUANTIZED)}
    if not all(finite.values()):
        chosen = ORIGINAL if finite[ORIGINAL] else DEQUANTIZED
        if not finite[chosen]:
            raise ValueError("neither merged model gives finite numbers; is the adapter of this base?")
        why = "the other gives numbers that are not finite"
    elif abs(gap) > error:
        chosen = ORIGINAL if gap < 0 else DEQUANTIZED
        why = f"its {what} is lower by {1e3 * abs(gap):.2f} ± {1e3 * error:.2f} millinats/token, on {on}"
    else:
        chosen = ORIGINAL
        why = (
            f"the {what} differs by {1e3 * gap:.2f} ± {1e3 * error:.2f} millinats/token on {on}, which is "
            "within error, and the original weights have no errors of quantization"
        )
    figures = {key: _figures(one) for key, one in scores.items()}
    count, length = scores["trained"].shape[1:]
    return Choice(chosen, why, figures, gap, error, count, count * length, on)


def _figures(scores: Tensor) -> Figures:
    found = quality(scores)
    loss = scores[1].mean(1)
    return Figures(loss.mean().item(), interval95(loss), found.perplexity, found.kl_mean, found.kl_interval95)


def show(choice: Choice, console: Console) -> None:
    """The figures as a table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("merged into")
    for head in ("loss, nats/token", "perplexity", "KL from trained, millinats/token"):
        table.add_column(head, justify="right")
    for key, one in choice.figures.items():
        divergence = f"{1e3 * one.kl:.2f} ± {1e3 * one.kl_interval95:.2f}"
        loss = f"{one.loss:.4f} ± {one.loss_interval95:.4f}" if math.isfinite(one.loss) else "not finite"
        is_trained = key == "trained"
        table.add_row(
            "not merged, as trained" if is_trained else key,
            loss,
            f"{one.perplexity:.3f}",
            "" if is_trained else divergence,
        )
    console.print(table)
    console.print(
        f"{choice.tokens:,} tokens of {choice.measured_on}, in {choice.sequences} sequences; ± is a 95 % "
        "interval. Both are measured on the same tokens, so their difference is surer than each of them.",
        style="dim",
        markup=False,
    )
