"""Measure what quantization does to a language model: perplexity, KL divergence, weight errors, speed.

A causal language model is here anything that answers `model(input_ids=ids).logits` and
`model.generate(...)`. No text is needed: the model's own seeded samples serve as the test set.
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewbits.nn import QuantModule, is_transposed

# Logits of one forward pass of one model, in bytes at most (256 MiB).
LOGIT_BYTES = 1 << 28
# Logits, and weights, are widened to float32 in chunks of at most this many elements (16 MiB each).
CHUNK_ELEMENTS = 1 << 22


class CausalLM(Protocol):
    """What a model must offer to be measured; every causal model of transformers does."""

    config: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def generate(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Quality:
    """How close a model is to its reference on given sequences.

    perplexity: exp of the model's mean negative log-likelihood per scored token.
    kl_mean, kl_median, kl_p99, kl_max: KL(reference ‖ model) of the next-token distributions, nats/token.
    kl_interval95: half width of the 95 % interval of kl_mean, nats/token. Sequences, not tokens, count
        as independent; normal approximation, so trust it from about 20 sequences on.
    same_top_share: share of positions, 0 to 1, at which both models rank the same token first.
    tokens: number of scored tokens (all but the first of each sequence).
    """

    perplexity: float
    kl_mean: float
    kl_interval95: float
    kl_median: float
    kl_p99: float
    kl_max: float
    same_top_share: float
    tokens: int


@torch.inference_mode()
def sample_sequences(model: CausalLM, *, count: int, length: int, seed: int, batch: int = 32) -> Tensor:
    """Draw `count` sequences of `length` tokens from the model itself (ancestral, temperature 1).

    Each starts with the begin token, which counts towards `length`. The end token is an ordinary token,
    so all rows are equally long. The result depends on the seed alone; `batch` only bounds memory (it
    can matter where the model's own arithmetic depends on the batch size).

    Returns int64 [count, length] on the CPU.
    Raises ValueError if the model has no begin token, or if count, length or batch is out of range.
    """
    config = _text_config(model)
    begin = getattr(config, "bos_token_id", None)
    if not isinstance(begin, int):
        raise ValueError(
            f"sampling starts from the begin token; got model.config.bos_token_id={begin!r}. "
            "Set it to a token id, or score sequences of your own."
        )
    longest = getattr(config, "max_position_embeddings", None) or length
    for name, value, low, high in (
        ("count", count, 1, math.inf),
        ("length", length, 2, longest),
        ("batch", batch, 1, math.inf),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} must lie between {low} and {high}; got {value}.")
    generator = torch.Generator().manual_seed(seed)
    # Drawn before any batching: row i always uses the same numbers.
    chance = torch.rand(count, length - 1, generator=generator, dtype=torch.float64)
    rows = [_sample_rows(model, begin, part) for part in torch.split(chance, batch)]
    return torch.cat(rows)


def _sample_rows(model: CausalLM, begin: int, chance: Tensor) -> Tensor:
    """chance float64 [rows, steps] in [0, 1) -> tokens int64 [rows, steps + 1], by the inverse CDF."""
    tokens = torch.full((chance.shape[0], 1), begin, dtype=torch.int64)
    drawn, cache = [tokens], None
    for step in range(chance.shape[1]):
        output = model(input_ids=tokens.to(_device(model)), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        cumulative = output.logits[:, -1].cpu().double().softmax(-1).cumsum(-1)
        # Scaling by the total keeps a chance next to 1 from falling behind the last token.
        target = chance[:, step : step + 1] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[1] - 1)
        drawn.append(tokens)
    return torch.cat(drawn, dim=1)


def compare_logits(
    reference: CausalLM,
    model: CausalLM,
    sequences: Tensor,
    *,
    batch: int = 8,
    progress: Callable[[float], None] | None = None,
) -> Quality:
    """Score `model` against `reference` on sequences, int64 [count, length], each fed as it stands.

    Arguments and errors are those of `token_scores`; ValueError also for a single sequence, which gives no
    interval.
    """
    if sequences.ndim != 2 or sequences.shape[0] < 2 or sequences.shape[1] < 2:
        raise ValueError(
            "comparing needs sequences of shape [count, length] with count and length of at least 2; "
            f"got {list(sequences.shape)}."
        )
    return quality(token_scores(reference, model, sequences, batch=batch, progress=progress))


@torch.inference_mode()
def token_scores(
    reference: CausalLM,
    model: CausalLM,
    sequences: Tensor,
    *,
    batch: int = 8,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """KL(reference ‖ model), negative log-likelihood under `model`, and whether both rank the same token
    first (0 or 1), of every token but the first of each sequence: float64 [3, count, length - 1].

    A forward pass takes at most `batch` sequences, and makes at most LOGIT_BYTES of logits: where one
    sequence makes more, it is fed again for each part of its logits. Only a model whose forward knows no
    `logits_to_keep` makes all those of a sequence at once. `progress` is told the share done, 0 to 1.

    Raises ValueError for a batch below 1, or two models with vocabularies of different size.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1; got {batch}.")
    parts: list[Tensor] = []
    total = sequences.shape[0] * (sequences.shape[1] - 1)
    for rows, kept in _passes(reference, model, sequences, batch):
        parts.append(_score(reference, model, rows, kept))
        if progress is not None:
            progress(sum(part.shape[1] for part in parts) / total)
    return torch.cat(parts, dim=1).double().view(3, sequences.shape[0], -1)


def quality(scores: Tensor) -> Quality:
    """What `token_scores` say in a few figures."""
    divergence, loss, same = scores.flatten(1).unbind()
    per_sequence = divergence.view(scores.shape[1], -1).mean(1)
    return Quality(
        perplexity=loss.mean().exp().item(),
        kl_mean=divergence.mean().item(),
        kl_interval95=interval95(per_sequence),
        kl_median=_quantile(divergence, 0.5),
        kl_p99=_quantile(divergence, 0.99),
        kl_max=divergence.max().item(),
        same_top_share=same.mean().item(),
        tokens=divergence.numel(),
    )


def interval95(values: Tensor) -> float:
    """Half width of the 95 % interval of the mean of independent values [n], by the normal
    approximation."""
    return 1.96 * values.std().item() / math.sqrt(len(values))


def _passes(
    reference: CausalLM, model: CausalLM, sequences: Tensor, batch: int
) -> Iterator[tuple[Tensor, range]]:
    """(rows of sequences, positions of theirs to score) of every forward pass, in order."""
    steps = sequences.shape[1] - 1
    probes = [one(input_ids=sequences[:1, :1].to(_device(one))).logits for one in (reference, model)]
    size, other = (probe.shape[-1] for probe in probes)
    if size != other:
        raise ValueError(
            f"comparing needs one vocabulary; the reference has {size} tokens, the model {other}."
        )
    fitting = max(1, LOGIT_BYTES // (size * max(probe.element_size() for probe in probes)))
    if not (_keeps_logits(reference) and _keeps_logits(model)):
        fitting = max(fitting, steps)
    for rows in torch.split(sequences, max(1, min(batch, fitting // steps))):
        for start in range(0, steps, fitting):
            yield rows, range(start, min(start + fitting, steps))


def _keeps_logits(model: CausalLM) -> bool:
    """Whether the forward of `model` can be asked for the logits of some positions only."""
    return "logits_to_keep" in inspect.signature(getattr(model, "forward", model)).parameters


def _quantile(values: Tensor, share: float) -> float:
    """Linear between neighbours; torch.quantile refuses more than 2**24 values."""
    ordered = values.sort().values
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], position - below).item()


def _score(reference: CausalLM, model: CausalLM, rows: Tensor, kept: range) -> Tensor:
    """rows int64 [count, length] -> float32 [3, count * len(kept)]: divergence, loss, same top token."""
    truth = _logits(reference, rows, kept)
    guess = truth if model is reference else _logits(model, rows, kept)
    targets = rows[:, kept.start + 1 : kept.stop + 1].reshape(-1, 1)
    size = max(1, CHUNK_ELEMENTS // truth.shape[-1])
    chunks = zip(torch.split(truth, size), torch.split(guess, size), torch.split(targets, size), strict=True)
    return torch.cat([_score_chunk(*chunk) for chunk in chunks], dim=1)


def _logits(model: CausalLM, rows: Tensor, kept: range) -> Tensor:
    """Logits at the positions `kept` of rows: [count * len(kept), vocabulary]."""
    # The last token predicts nothing that could be scored, so it is not fed.
    feed = partial(model, input_ids=rows[:, :-1].to(_device(model)), use_cache=False)
    if len(kept) < rows.shape[1] - 1:
        feed = partial(feed, logits_to_keep=torch.arange(kept.start, kept.stop, device=_device(model)))
    logits: Tensor = feed().logits
    return logits.flatten(0, 1)


def _score_chunk(truth: Tensor, guess: Tensor, targets: Tensor) -> Tensor:
    """Logits [positions, vocabulary], targets int64 [positions, 1] -> float32 [3, positions]."""
    log_p = truth.float().log_softmax(-1)
    log_q = guess.to(truth.device).float().log_softmax(-1)
    # A token the reference excludes (-inf) adds nothing; 0 * inf would make it nan.
    divergence = (log_p.exp() * (log_p - log_q)).masked_fill_(log_p == -math.inf, 0.0).sum(-1)
    loss = -log_q.gather(-1, targets.to(log_q.device)).squeeze(-1)
    same = log_p.argmax(-1) == log_q.argmax(-1)
    return torch.stack([divergence, loss, same.float()]).cpu()


@torch.inference_mode()
def weight_errors(reference: nn.Module, model: nn.Module) -> dict[str, float]:
    """‖R - W‖ / ‖R‖ of every weight W of `model` against R of `reference`, both decoded, by name.

    Biases and norms count as weights; what is tied in both models appears once. Works for plain models and
    for those that fewbits quantized or loaded, in any pairing. One weight at a time is decoded.

    Raises ValueError if the two do not have the same weights, by name and shape.
    """
    truth, guess = _weights(reference), _weights(model)
    if odd := sorted(truth.keys() ^ guess.keys()):
        place = "reference" if odd[0] in truth else "model"
        raise ValueError(
            f"errors of weights need two models of one architecture; {len(odd)} weights are in one of them "
            f"only, such as {odd[0]} in the {place}."
        )
    errors: dict[str, float] = {}
    seen: set[tuple[int, int]] = set()
    for name, (identity, decode) in truth.items():
        other_identity, other_decode = guess[name]
        if (identity, other_identity) not in seen:
            seen.add((identity, other_identity))
            errors[name] = _relative_error(name, decode(), other_decode())
    return errors


def _weights(model: nn.Module) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """Name → (identity of the stored tensor, how to get the weight; of linear layers as [out, in])."""
    found: dict[str, tuple[int, Callable[[], Tensor]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        parts: set[str] = set()
        if isinstance(module, QuantModule):
            for weight in module.weights():
                names = module.part_names(weight)
                parts.update(names.values())
                codes = getattr(module, names["codes"])
                found[prefix + weight] = (id(codes), partial(module.dequantize, weight))
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if name not in parts:
                turned = is_transposed(getattr(module, "source_class", type(module))) and parameter.dim() == 2
                found[prefix + name] = (id(parameter), partial(_as_stored, parameter, turned))
    return found


def _as_stored(parameter: Tensor, turned: bool) -> Tensor:
    return parameter.T if turned else parameter


def _relative_error(name: str, exact: Tensor, decoded: Tensor) -> float:
    if exact.shape != decoded.shape:
        raise ValueError(
            f"errors of weights need two models of one architecture; {name} is {list(exact.shape)} in the "
            f"reference and {list(decoded.shape)} in the model."
        )
    error = total = 0.0
    pairs = (tensor.reshape(-1).split(CHUNK_ELEMENTS) for tensor in (exact, decoded))
    for one, other in zip(*pairs, strict=True):
        wide = one.float()
        error += (wide - other.to(wide.device).float()).double().square().sum().item()
        total += wide.double().square().sum().item()
    return math.sqrt(error / total) if total else (math.inf if error else 0.0)


@torch.inference_mode()
def decode_rate(model: CausalLM, prompt_ids: Tensor, new_tokens: int, *, repeats: int = 3) -> float:
    """Tokens per second of greedy generation: the median of `repeats` runs after one warm-up.

    prompt_ids: int64 [batch, length]. The time covers reading the prompt and `new_tokens` new tokens per
    row; the end token does not stop it.

    Raises ValueError if new_tokens or repeats is below 1.
    """
    if new_tokens < 1 or repeats < 1:
        raise ValueError(f"new_tokens and repeats must be at least 1; got {new_tokens} and {repeats}.")
    prompt = prompt_ids.to(_device(model))
    mask = torch.ones_like(prompt)
    rates: list[float] = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        output = model.generate(
            input_ids=prompt,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )
        made = output.cpu()[:, prompt.shape[1] :].numel()  # .cpu() waits for an accelerator
        rates.append(made / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def _text_config(model: CausalLM) -> Any:
    """The configuration that holds the token ids; multimodal models nest it."""
    get = getattr(model.config, "get_text_config", None)
    return get() if get is not None else model.config


def _device(model: CausalLM) -> torch.device:
    return torch.device(getattr(model, "device", "cpu"))
