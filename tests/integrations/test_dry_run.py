"""Runs on the meta device tell what real runs take: the cache to the byte, activations nearly so."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fewbits.integrations import dry_run
from fewbits.integrations.architecture import empty_model
from fewbits.planner import LiveBytes, adapter_bytes, cache_bytes

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# With dropout, torch has no fused attention on a CPU.
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
# What a model keeps: keys and values of all heads, of fewer, of a window, of some layers only; a latent of
# all heads; recurrent states; both.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_SMALL, "num_key_value_heads": 4},
    "qwen3": {**_SMALL, "num_key_value_heads": 2, "head_dim": 24},
    "gpt2": {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, **_NO_DROPOUT},
    "mistral": {**_SMALL, "num_key_value_heads": 2, "sliding_window": 16},
    "gemma3_text": {
        **_SMALL,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3_moe": {
        **_SMALL,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
    },
    "deepseek_v3": {
        **_SMALL,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 3,
    },
    "qwen3_next": {
        **_SMALL,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_experts": 0,
        "decoder_sparse_step": 0,
    },
    "mamba": {"vocab_size": 96, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
}
TOKENS = 40


@pytest.fixture(scope="module")
def real() -> Callable[[str], Any]:
    """real(kind): a small random model of CONFIGS on the CPU, in float32."""

    def build(kind: str) -> Any:
        config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return build


@pytest.fixture(scope="module")
def empty() -> Callable[[str], Any]:
    """empty(kind): the same without values, as `plan` sees it."""

    def build(kind: str) -> Any:
        settings = transformers.AutoConfig.for_model(kind, **CONFIGS[kind]).to_json_string(use_diff=False)
        return empty_model({**json.loads(settings), "dtype": "float32"})

    return build


def cached(model: Any) -> tuple[int, int]:
    """(bytes that the cache of `model` holds after TOKENS and one more, tokens)."""
    cache = transformers.DynamicCache(config=model.config)
    name = "cache_params" if model.config.model_type == "mamba" else "past_key_values"
    with torch.no_grad():
        for count in (TOKENS, 1):
            model(input_ids=torch.ones(2, count, dtype=torch.long), **{name: cache}, use_cache=True)
    tensors: list[Tensor] = []
    for layer in cache.layers:
        for value in vars(layer).values():
            tensors += value.values() if isinstance(value, dict) else [value]
    held = [one for one in tensors if isinstance(one, Tensor) and one.dim() > 0]
    return sum(one.untyped_storage().nbytes() for one in held), TOKENS + 1


class TestCache:
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_to_the_byte(self, kind: str, real: Callable[[str], Any], empty: Callable[[str], Any]) -> None:
        held, tokens = cached(real(kind))
        assert held > 0
        assert cache_bytes(dry_run.cache_layers(empty(kind)), tokens, batch=2) == held

    def test_windows_and_states_do_not_grow(self, empty: Callable[[str], Any]) -> None:
        for kind, grows in (("mistral", False), ("mamba", False), ("gemma3_text", True), ("llama", True)):
            layers = dry_run.cache_layers(empty(kind))
            assert (cache_bytes(layers, 10_000) < cache_bytes(layers, 20_000)) is grows, kind

    def test_an_encoder_with_a_decoder_is_refused(self) -> None:
        config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "num_layers": 1}
        with pytest.raises(ValueError, match="encoder"):
            dry_run.cache_layers(empty_model(config))

    def test_a_model_that_does_not_run_is_a_value_error(self, empty: Callable[[str], Any]) -> None:
        model = empty("llama")
        model.model.layers[0].self_attn.q_proj = torch.nn.Linear(3, 5, device="meta")
        with pytest.raises(ValueError, match="LlamaForCausalLM does not run without values"):
            dry_run.cache_layers(model)


def live_bytes(model: Any, work: Callable[[], Any]) -> int:
    with LiveBytes((*model.parameters(), *model.buffers())) as live:
        work()
    return live.peak


class TestActivations:
    @pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mistral", "gemma3_text", "qwen3_moe"])
    def test_reading_a_prompt(
        self, kind: str, real: Callable[[str], Any], empty: Callable[[str], Any]
    ) -> None:
        """Against the tensors of a real run."""
        model = real(kind)
        ids = torch.ones(2, 100, dtype=torch.long)

        def read() -> None:
            cache = transformers.DynamicCache(config=model.config)
            with torch.no_grad():
                model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )

        dry = dry_run.prefill(empty(kind), batch=2, tokens=100).peak
        assert dry == pytest.approx(live_bytes(model, read), rel=0.1)

    def test_it_grows_with_batch_and_length(self, empty: Callable[[str], Any]) -> None:
        model = empty("llama")
        once = dry_run.prefill(model, 1, 50).peak
        assert dry_run.prefill(model, 4, 50).peak == pytest.approx(4 * once, rel=0.1)
        assert dry_run.prefill(model, 1, 200).peak == pytest.approx(4 * once, rel=0.1)

    def test_recurrent_models_are_run_on_a_part(self, empty: Callable[[str], Any]) -> None:
        model = empty("mamba")
        short, long = (dry_run.prefill(model, 1, tokens).peak for tokens in (256, 256_000))
        assert long == 1000 * short

    def test_the_model_stays_as_it_was(self, empty: Callable[[str], Any]) -> None:
        model = empty("llama")
        before = [(name, tensor.requires_grad) for name, tensor in model.named_parameters()]
        dry_run.training_step(model, 1, 8, rank=2)
        assert [(name, tensor.requires_grad) for name, tensor in model.named_parameters()] == before
        assert not model.training
        assert not model.is_gradient_checkpointing


class TestTraining:
    @pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
    def test_against_a_step_with_peft(
        self, kind: str, real: Callable[[str], Any], empty: Callable[[str], Any]
    ) -> None:
        peft = pytest.importorskip("peft")
        model = real(kind)
        config = peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            fan_in_fan_out=kind == "gpt2",
        )
        model.gradient_checkpointing_enable({"use_reentrant": False})
        adapted = peft.get_peft_model(model, config).train()
        ids = torch.ones(2, 100, dtype=torch.long)

        def step() -> None:
            adapted(
                input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False
            ).loss.backward()

        trained = sum(one.numel() for one in adapted.parameters() if one.requires_grad)
        dry = dry_run.training_step(empty(kind), batch=2, tokens=100, rank=4).peak
        assert dry == pytest.approx(live_bytes(adapted, step), rel=0.15)
        targets = dry_run.adapter_targets(empty(kind))
        assert adapter_bytes([dry_run.linear_shape(layer) for _, layer in targets], 4) == 16 * trained

    def test_checkpoints_save_memory_by_layer(self, empty: Callable[[str], Any]) -> None:
        """Twice the layers keep twice the inputs of a layer, and nothing else of the layers in between."""
        deep = empty_model({**CONFIGS["llama"], "num_hidden_layers": 6, "model_type": "llama"})
        inputs = 2 * 100 * 64 * 4
        large, small = (dry_run.training_step(one, 2, 100, rank=4).peak for one in (deep, empty("llama")))
        grown = large - small
        assert grown == pytest.approx(3 * inputs, rel=0.5)
