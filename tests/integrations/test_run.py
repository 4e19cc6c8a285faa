"""Quantized models compile, generate, differentiate and take adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

import fewbits

Checkpoint = Callable[..., Path]
Load = Callable[..., Any]
Run = Callable[..., Tensor]

CONFIGS: dict[str, Any] = {
    "nf4_dq": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "fp4_in_bf16": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "int8_no_outliers": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "own": fewbits.FewbitsConfig(
        "int4:g16:zero", modules={"embed_tokens": "int8:row", "lm_head": "int8:row"}
    ),
}
by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])


@by_config
class TestCompile:
    def test_forward_is_one_graph_and_equals_eager(
        self, config: Any, checkpoint: Checkpoint, load: Load
    ) -> None:
        torch._dynamo.reset()
        model = load(checkpoint("llama_bias"), config)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            for ids in (IDS, IDS - 1):
                torch.testing.assert_close(
                    compiled(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5
                )

    def test_gradients_pass_through_a_compiled_model(
        self, config: Any, checkpoint: Checkpoint, load: Load
    ) -> None:
        torch._dynamo.reset()
        model = load(checkpoint("llama"), config)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        grads = []
        for run in (model, compiled):
            x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
            run(inputs_embeds=x).logits.square().mean().backward()
            grads.append(x.grad)
        assert grads[0].abs().max() > 0
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


@by_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_equal_those_of_the_dequantized_model(
    config: Any, dtype: torch.dtype, checkpoint: Checkpoint, load: Load
) -> None:
    model = load(checkpoint("llama_bias", dtype), config)
    grads = []
    for dequantize in (False, True):
        if dequantize:
            model.dequantize()
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        model(inputs_embeds=x).logits.float().square().mean().backward()
        grads.append(x.grad.float())
    error = (grads[0] - grads[1]).norm() / grads[1].norm()
    # int8 rounds its inputs, so the activations that gradients depend on differ
    bound = 0.1 if "int8" in str(config) or dtype == torch.bfloat16 else 1e-3
    assert grads[1].norm() > 0
    assert error < bound


class TestGenerate:
    @by_config
    @pytest.mark.parametrize("cache", ["static", "dynamic", None])
    def test_every_cache_gives_the_same_tokens(
        self, config: Any, cache: str | None, checkpoint: Checkpoint, load: Load
    ) -> None:
        model = load(checkpoint("llama"), config)
        settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        wanted = model.generate(IDS, use_cache=False, **settings)
        options = {"use_cache": True} if cache is None else {"cache_implementation": cache}
        got = model.generate(IDS, **options, **settings)
        assert got.shape == (1, IDS.shape[1] + 8)
        if config in (CONFIGS["int8"],):  # outlier columns are those of the tokens seen together
            got, wanted = got[:, : IDS.shape[1] + 1], wanted[:, : IDS.shape[1] + 1]
        assert got.equal(wanted)

    @pytest.mark.parametrize("kind", ["gpt2", "opt", "mixtral", "gpt_oss", "t5"])
    def test_every_kind_of_model_generates(self, kind: str, checkpoint: Checkpoint, load: Load) -> None:
        model = load(checkpoint(kind), CONFIGS["nf4_dq"])
        lengths = {"max_new_tokens": 5, "min_new_tokens": 5}
        settings: dict[str, Any] = {**lengths, "do_sample": False, "pad_token_id": 0}
        tokens = model.generate(IDS, **settings)
        start = 1 if kind == "t5" else IDS.shape[1]
        assert tokens.shape == (1, start + 5)
        wanted = load(checkpoint(kind), CONFIGS["nf4_dq"]).dequantize().generate(IDS, **settings)
        assert tokens.equal(wanted)

    def test_a_batch_with_padding(self, demo_model: Path, load: Load) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(demo_model, padding_side="left")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
        model = load(demo_model, CONFIGS["nf4_dq"], dtype=torch.float32)
        prompts = ["Once upon a time", "One day, a little girl named Lily"]
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        together = model.generate(**batch, **settings)[:, -6:]
        for row, prompt in enumerate(prompts):
            alone = model.generate(**tokenizer(prompt, return_tensors="pt"), **settings)[:, -6:]
            assert together[row : row + 1].equal(alone)


def test_autocast_sets_the_dtype_of_results(checkpoint: Checkpoint, load: Load) -> None:
    model = load(checkpoint("llama"), CONFIGS["own"])
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert model(input_ids=IDS).logits.isfinite().all()
    assert layer(x).dtype == torch.float32


def test_gradient_checkpointing_changes_no_gradient(checkpoint: Checkpoint, load: Load) -> None:
    model = load(checkpoint("llama"), CONFIGS["nf4_dq"]).train()
    grads = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model(inputs_embeds=x, use_cache=False).logits.square().mean().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


@by_config
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
class TestAdapters:
    """PEFT, as far as a plain linear layer takes part in it."""

    def test_lora_trains(self, kind: str, config: Any, checkpoint: Checkpoint, load: Load, run: Run) -> None:
        peft = pytest.importorskip("peft")
        if kind == "gpt2" and config is CONFIGS["own"]:
            config = fewbits.FewbitsConfig("int4:g16:zero")
        model = load(checkpoint(kind), config)
        before = run(model)
        names = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}[kind]
        settings = peft.LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM", lora_dropout=0.0)
        adapted = peft.get_peft_model(model, settings)
        torch.testing.assert_close(run(adapted), before, rtol=1e-5, atol=1e-5)
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        assert len(trained) == 2 * len(names) * 2
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses = []
        for _ in range(4):
            loss = adapted(input_ids=IDS, labels=IDS).loss
            loss.backward()
            losses.append(float(loss))
            grads = [parameter.grad for parameter in trained]
            assert all(grad is not None and grad.isfinite().all() for grad in grads)
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0]
        assert not run(adapted).equal(before)
        with adapted.disable_adapter():
            torch.testing.assert_close(run(adapted), before, rtol=1e-5, atol=1e-5)


def test_adapters_save_and_load(checkpoint: Checkpoint, load: Load, run: Run, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    path = checkpoint("llama")
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    settings = peft.LoraConfig(r=4, **options)
    adapted = peft.get_peft_model(load(path, CONFIGS["nf4_dq"]), settings)
    result = run(adapted)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(path, CONFIGS["nf4_dq"]), tmp_path)
    assert run(again).equal(result)
    assert sum("lora_A" in name for name, _ in again.named_parameters()) == 14
