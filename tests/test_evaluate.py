"""fewbits.evaluate against direct computations on the embedded model."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fewbits
from fewbits import evaluate

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
PLACES = (ROOT / "demo" / "model", ROOT.parent / "shared" / "models" / "fewbits-demo")


@pytest.fixture(scope="module")
def model() -> Any:
    path = next((place for place in PLACES if place.is_dir()), None)
    if path is None:
        pytest.skip("the embedded model is not in this checkout")
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def perturbed(model: Any) -> Any:
    """The model with 2 % noise on every linear layer."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in other.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                noise = torch.randn(module.weight.shape, generator=generator)
                module.weight += 0.02 * module.weight.std() * noise
    return other


@pytest.fixture(scope="module")
def samples(model: Any) -> torch.Tensor:
    return evaluate.sample_sequences(model, count=5, length=24, seed=0)


@pytest.fixture(scope="module")
def quality(model: Any, perturbed: Any, samples: torch.Tensor) -> evaluate.Quality:
    return evaluate.compare_logits(model, perturbed, samples)


@torch.no_grad()
def log_probabilities(model: Any, samples: torch.Tensor) -> torch.Tensor:
    """float64 [count, length - 1, vocabulary], from whole sequences one by one."""
    logits = torch.cat([model(input_ids=row[None]).logits for row in samples])
    return logits[:, :-1].double().log_softmax(-1)


class Table:
    """A one-token-memory language model: next-token logits looked up by the last token."""

    def __init__(self, logits: torch.Tensor, begin: int | None = 0) -> None:
        self.logits = logits
        self.config = SimpleNamespace(bos_token_id=begin)

    def __call__(self, *, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits[input_ids], past_key_values=None)

    def generate(self, *, input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        return torch.nn.functional.pad(input_ids, (0, max_new_tokens))


def test_samples_depend_on_the_seed_alone(model: Any, samples: torch.Tensor) -> None:
    assert samples.shape == (5, 24)
    assert samples.dtype == torch.int64
    assert (samples[:, 0] == model.config.bos_token_id).all()
    torch.manual_seed(123)  # the global generator must not matter
    again = evaluate.sample_sequences(model, count=5, length=24, seed=0, batch=2)
    assert torch.equal(again, samples)
    other = evaluate.sample_sequences(model, count=5, length=24, seed=1)
    assert not torch.equal(other, samples)


def test_cached_and_uncached_sampling_agree(model: Any, samples: torch.Tensor) -> None:
    """Row 0 redone without a cache, from the same random numbers."""
    chance = torch.rand(5, 23, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[0]
    row = samples[:1, :1]
    with torch.no_grad():
        for number in chance:
            cumulative = model(input_ids=row).logits[0, -1].double().softmax(-1).cumsum(-1)
            token = (cumulative <= number * cumulative[-1]).sum()
            row = torch.cat([row, token.view(1, 1)], dim=1)
    assert torch.equal(row, samples[:1])


def test_samples_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    table = Table(probabilities.log().expand(5, 5))
    samples = evaluate.sample_sequences(table, count=400, length=51, seed=3)
    shares = torch.bincount(samples[:, 1:].flatten(), minlength=5) / 20_000
    assert (shares - probabilities).abs().max() < 0.015
    assert shares[4] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"count": 0}, "count"), ({"length": 1}, "length"), ({"length": 257}, "256"), ({"batch": 0}, "batch")],
)
def test_sampling_refuses_bad_sizes(model: Any, arguments: dict[str, int], message: str) -> None:
    sizes = {"count": 1, "length": 4, "batch": 1} | arguments
    with pytest.raises(ValueError, match=message):
        evaluate.sample_sequences(model, seed=0, **sizes)


def test_sampling_needs_a_begin_token() -> None:
    with pytest.raises(ValueError, match="bos_token_id=None"):
        evaluate.sample_sequences(Table(torch.zeros(3, 3), begin=None), count=1, length=4, seed=0)


def test_a_model_equals_itself(model: Any, samples: torch.Tensor) -> None:
    quality = evaluate.compare_logits(model, model, samples)
    assert abs(quality.kl_mean) <= 1e-7
    assert abs(quality.kl_max) <= 1e-7
    assert quality.same_top_share == 1.0
    assert quality.tokens == 5 * 23


def test_perplexity_is_the_exponential_of_cross_entropy(model: Any, samples: torch.Tensor) -> None:
    with torch.no_grad():
        loss = model(input_ids=samples, labels=samples).loss.item()
    quality = evaluate.compare_logits(model, model, samples)
    assert quality.perplexity == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-5)


def test_divergence_agrees_with_brute_force(
    model: Any, perturbed: Any, samples: torch.Tensor, quality: evaluate.Quality
) -> None:
    log_p, log_q = log_probabilities(model, samples), log_probabilities(perturbed, samples)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    spread = divergence.mean(1).std() / 5**0.5
    same = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    assert quality.kl_mean == pytest.approx(divergence.mean().item(), rel=1e-3)
    assert quality.kl_interval95 == pytest.approx(1.96 * spread.item(), rel=1e-3)
    assert quality.kl_median == pytest.approx(divergence.flatten().quantile(0.5).item(), rel=1e-2)
    assert quality.kl_p99 == pytest.approx(divergence.flatten().quantile(0.99).item(), rel=1e-2)
    assert quality.kl_max == pytest.approx(divergence.max().item(), rel=1e-2)
    assert quality.same_top_share == pytest.approx(same.item())
    assert quality.kl_mean > 1e-5


def test_bounds(quality: evaluate.Quality) -> None:
    assert 0.0 <= quality.same_top_share <= 1.0
    assert 0.0 < quality.kl_median <= quality.kl_p99 <= quality.kl_max
    assert quality.perplexity > 1.0


@pytest.mark.parametrize("elements", [1, 2048 * 7, 1 << 30])
@pytest.mark.parametrize("batch", [1, 3])
def test_chunks_and_batches_do_not_matter(
    model: Any,
    perturbed: Any,
    samples: torch.Tensor,
    quality: evaluate.Quality,
    monkeypatch: pytest.MonkeyPatch,
    elements: int,
    batch: int,
) -> None:
    monkeypatch.setattr(evaluate, "CHUNK_ELEMENTS", elements)
    again = evaluate.compare_logits(model, perturbed, samples, batch=batch)
    assert again.kl_mean == pytest.approx(quality.kl_mean, rel=1e-3)
    assert again.perplexity == pytest.approx(quality.perplexity, rel=1e-5)
    assert again.tokens == quality.tokens


def test_divergence_by_hand() -> None:
    """p = (1/2, 1/2, 0) against q = (3/4, 1/4, 0): an excluded token is no nan."""
    p = Table(torch.tensor([0.5, 0.5, 0.0]).log().expand(3, 3))
    q = Table(torch.tensor([0.75, 0.25, 0.0]).log().expand(3, 3))
    quality = evaluate.compare_logits(p, q, torch.tensor([[0, 1], [0, 0]]))
    expected = 0.5 * torch.tensor([2 / 3, 2.0]).log().sum().item()
    assert quality.kl_mean == pytest.approx(expected, rel=1e-5)
    assert quality.kl_interval95 == pytest.approx(0.0, abs=1e-6)
    assert quality.perplexity == pytest.approx((4 * 4 / 3) ** 0.5, rel=1e-5)


def test_comparing_refuses_what_it_cannot_score(model: Any, samples: torch.Tensor) -> None:
    small = Table(torch.zeros(2048, 7))
    with pytest.raises(ValueError, match="2048 tokens, the model 7"):
        evaluate.compare_logits(model, small, samples)
    with pytest.raises(ValueError, match=r"\[1, 24\]"):
        evaluate.compare_logits(model, model, samples[:1])
    with pytest.raises(ValueError, match="batch"):
        evaluate.compare_logits(model, model, samples, batch=0)


class Counting:
    """A model that notes the bytes of logits it makes at once."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.made = model, model.config, [0]

    def forward(self, *, input_ids: torch.Tensor, use_cache: bool = False, logits_to_keep: Any = 0) -> Any:
        output = self.model(input_ids=input_ids, use_cache=use_cache, logits_to_keep=logits_to_keep)
        self.made.append(output.logits.nbytes)
        return output

    __call__ = forward


@pytest.mark.parametrize("positions", [1, 5, 23, 50, 1000])
def test_logits_stay_bounded(
    model: Any,
    perturbed: Any,
    samples: torch.Tensor,
    quality: evaluate.Quality,
    monkeypatch: pytest.MonkeyPatch,
    positions: int,
) -> None:
    """Whole sequences where they fit, else parts of one: the figures are the same."""
    limit = positions * 2048 * 4
    monkeypatch.setattr(evaluate, "LOGIT_BYTES", limit)
    one, other = Counting(model), Counting(perturbed)
    again = evaluate.compare_logits(one, other, samples)
    assert max(one.made) <= limit
    assert max(other.made) <= limit
    assert again.tokens == quality.tokens
    assert again.kl_mean == pytest.approx(quality.kl_mean, rel=1e-3)
    assert again.kl_interval95 == pytest.approx(quality.kl_interval95, rel=1e-3)
    assert again.perplexity == pytest.approx(quality.perplexity, rel=1e-5)


def test_a_model_that_keeps_no_logits_is_scored_in_whole_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, 9)
    sequences = torch.randint(9, (4, 7))
    expected = evaluate.compare_logits(Table(logits), Table(logits.flip(0)), sequences)
    monkeypatch.setattr(evaluate, "LOGIT_BYTES", 1)
    assert evaluate.compare_logits(Table(logits), Table(logits.flip(0)), sequences) == expected


def test_perplexity_and_divergence_in_float64(
    model: Any, perturbed: Any, samples: torch.Tensor, quality: evaluate.Quality
) -> None:
    log_p, log_q = log_probabilities(model, samples), log_probabilities(perturbed, samples)
    loss = -log_q.gather(-1, samples[:, 1:, None]).mean()
    assert quality.perplexity == pytest.approx(loss.exp().item(), rel=1e-5)
    assert quality.kl_mean == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-3)


def test_progress_ends_at_one(model: Any, samples: torch.Tensor) -> None:
    shares: list[float] = []
    evaluate.compare_logits(model, model, samples, batch=2, progress=shares.append)
    assert shares == [2 / 5, 4 / 5, 1.0]


class TestWeightErrors:
    """‖R - W‖ / ‖R‖ of every weight, against torch."""

    def test_plain_models(self, model: Any, perturbed: Any) -> None:
        errors = evaluate.weight_errors(model, perturbed)
        others = dict(perturbed.named_parameters())
        assert errors.keys() == others.keys()
        for name, weight in model.named_parameters():
            expected = (weight.double() - others[name].double()).norm() / weight.double().norm()
            assert errors[name] == pytest.approx(expected.item(), rel=1e-5)
        assert errors["model.layers.0.mlp.down_proj.weight"] == pytest.approx(0.02, rel=0.05)
        assert errors["model.norm.weight"] == 0.0

    def test_chunks_do_not_matter(self, model: Any, perturbed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = evaluate.weight_errors(model, perturbed)
        monkeypatch.setattr(evaluate, "CHUNK_ELEMENTS", 1000)
        assert evaluate.weight_errors(model, perturbed) == pytest.approx(expected, rel=1e-6)

    def test_quantized_weights_are_decoded(self, model: Any) -> None:
        other = copy.deepcopy(model)
        report = fewbits.quantize_model(other, "nf4:g64:dq")
        errors = evaluate.weight_errors(model, other)
        quantized = {entry.name: entry.relative_error for entry in report.quantized}
        assert len(quantized) == 28
        assert {name: errors[name] for name in quantized} == pytest.approx(quantized, rel=1e-5)
        assert {error for name, error in errors.items() if name not in quantized} == {0.0}

    def test_either_side_may_be_quantized(self, model: Any) -> None:
        one, other = copy.deepcopy(model), copy.deepcopy(model)
        fewbits.quantize_model(one, "nf4")
        fewbits.quantize_model(other, "int8")
        name = "model.layers.1.self_attn.q_proj"
        left, right = (m.get_submodule(name).dequantize().double() for m in (one, other))
        expected = ((left - right).norm() / left.norm()).item()
        assert evaluate.weight_errors(one, other)[f"{name}.weight"] == pytest.approx(expected, rel=1e-5)
        assert set(evaluate.weight_errors(one, one).values()) == {0.0}

    def test_a_tied_embedding_appears_once(self, model: Any) -> None:
        other = copy.deepcopy(model)
        fewbits.quantize_model(other, fewbits.FewbitsConfig("nf4", modules={"lm_head": "int8"}))
        errors = evaluate.weight_errors(model, other)
        assert "lm_head.weight" not in errors
        table, decoded = model.model.embed_tokens.weight, other.model.embed_tokens.dequantize()
        expected = ((table - decoded).norm() / table.norm()).item()
        assert errors["model.embed_tokens.weight"] == pytest.approx(expected, rel=1e-4)
        assert 0.001 < expected < 0.02

    def test_an_untied_head_is_a_weight_of_its_own(self, model: Any) -> None:
        other = copy.deepcopy(model)
        other.lm_head.weight = torch.nn.Parameter(1.5 * other.lm_head.weight.detach())
        errors = evaluate.weight_errors(model, other)
        assert errors["model.embed_tokens.weight"] == 0.0
        assert errors["lm_head.weight"] == pytest.approx(0.5)

    def test_transposed_layers(self) -> None:
        config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=32, n_positions=16)
        plain = transformers.GPT2LMHeadModel(config).eval()
        other = copy.deepcopy(plain)
        report = fewbits.quantize_model(other, "nf4")
        errors = evaluate.weight_errors(plain, other)
        for entry in report.quantized:
            assert errors[entry.name] == pytest.approx(entry.relative_error, rel=1e-5)
        assert errors["transformer.h.0.attn.c_attn.weight"] > 0.05

    def test_fused_experts(self) -> None:
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 32}
        config = transformers.MixtralConfig(
            num_hidden_layers=1, num_key_value_heads=2, num_local_experts=3, **sizes
        )
        plain = transformers.MixtralForCausalLM(config).eval()
        other = copy.deepcopy(plain)
        report = fewbits.quantize_model(other, "nf4")
        errors = evaluate.weight_errors(plain, other)
        experts = [entry for entry in report.quantized if "experts" in entry.name]
        assert len(experts) == 2
        for entry in experts:
            assert errors[entry.name] == pytest.approx(entry.relative_error, rel=1e-5)

    def test_a_weight_of_zeros(self) -> None:
        zeros, ones = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            zeros.weight.zero_()
            ones.weight.fill_(1.0)
        assert evaluate.weight_errors(zeros, zeros) == {"weight": 0.0}
        assert evaluate.weight_errors(zeros, ones) == {"weight": math.inf}

    def test_other_architectures_are_refused(self, model: Any) -> None:
        with pytest.raises(ValueError, match=r"39 weights are in one of them only, such as"):
            evaluate.weight_errors(model, torch.nn.Sequential())
        with pytest.raises(ValueError, match=r"weight is \[3, 2\] in the reference and \[3, 4\]"):
            evaluate.weight_errors(torch.nn.Linear(2, 3), torch.nn.Linear(4, 3))


def test_decode_rate(model: Any) -> None:
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    assert evaluate.decode_rate(model, prompt, 4, repeats=1) > 0
    with pytest.raises(ValueError, match="new_tokens"):
        evaluate.decode_rate(model, prompt, 0)
