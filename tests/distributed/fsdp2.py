"""FSDP2: `fully_shard` on QLoRA models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from processes import (
    IDS,
    ODD,
    assert_same_state,
    assert_trains_like,
    copy_of,
    layers,
    llama,
    mean,
    prepared,
    same_bits,
    share,
    stored,
    train,
    with_adapters,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from transformers import MixtralConfig, MixtralForCausalLM

import fewbits
from fewbits import distributed

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def sharded(model: Any, **options: Any) -> Any:
    for layer in [one for one in model.modules() if type(one).__name__.endswith("DecoderLayer")]:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def check_losses_and_gradients(_: Path) -> None:
    """Every storage, as it is and prepared; sizes that do not divide by two where codes are bytes."""
    for format, storage, sizes in (
        ("nf4:g64", "uint8", ODD),
        ("nf4:g64:dq", "uint8", ODD),
        ("nf4:g64:dq", "bfloat16", {}),
        ("nf4:g64", "float32", {}),
        ("int8:row@int8:t6", "uint8", ODD),
        ("int4:g32:f16:zero", "uint8", ODD),
    ):
        single = with_adapters(llama(stored(format, storage), **sizes))
        # Which columns hold outliers is a question to the whole batch that a process sees, and activations
        # in int8 jump where a hair's breadth decides how they are rounded.
        int8 = "@" in format
        for other in (copy_of(single), prepared(copy_of(single))):
            assert_trains_like(sharded(other), copy_of(single), int8, 1e-2 if int8 else 1e-4)


def slow_check_held_as_another_dtype(_: Path) -> None:
    """Also where the bytes of codes do not fill the last element, and each part is padded."""
    for dtype in (torch.bfloat16, torch.float64):
        single = with_adapters(llama("nf4:g64:dq", **ODD))
        assert_trains_like(sharded(prepared(copy_of(single), dtype)), single)


def check_options_of_fully_shard(_: Path) -> None:
    single = with_adapters(llama("nf4:g64:dq"))
    for options in (
        {"reshard_after_forward": False},
        {"reshard_after_forward": True},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    ):
        assert_trains_like(sharded(prepared(copy_of(single)), **options), single)
    checkpointed = prepared(copy_of(single))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed.enable_input_require_grads()
    assert_trains_like(sharded(checkpointed.train()), single)


def check_quantized_embeddings(_: Path) -> None:
    """Tied ones, whose parts two layers share."""
    modules = {"embed_tokens": "int8", "lm_head": "int8"}
    config = fewbits.FewbitsConfig("nf4:g64:dq", modules=modules)
    single = with_adapters(llama(config, tie_word_embeddings=True))
    assert_trains_like(sharded(prepared(copy_of(single))), single)


def slow_check_experts(_: Path) -> None:
    for config in ("nf4:g64:dq", "int8"):
        single = with_adapters(mixtral(config))
        for dtype in (None, torch.float32):
            assert_trains_like(sharded(prepared(copy_of(single), dtype)), copy_of(single))


def mixtral(config: str) -> Any:
    """Three experts for two processes."""
    torch.manual_seed(7)
    sizes = {"hidden_size": 64, "intermediate_size": 24, "num_local_experts": 3, "num_hidden_layers": 2}
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, vocab_size=96, num_attention_heads=4, num_key_value_heads=2)
    )
    fewbits.quantize_model(model, config)
    return model.requires_grad_(False)


def check_mixed_precision_leaves_codes_and_scales_alone(_: Path) -> None:
    """The same as a model whose other parameters are bfloat16, in one process."""
    for format, storage in (
        ("nf4:g64", "uint8"),
        ("nf4:g64:dq", "bfloat16"),
        ("int8:row@int8:t6", "uint8"),
        ("int4:g32:f16:zero", "uint8"),
    ):
        single = with_adapters(llama(stored(format, storage)))
        parallel = sharded(prepared(copy_of(single)), mp_policy=BF16)
        parts = {id(tensor) for _, layer in layers(single) for tensor in layer.parameters(recurse=False)}
        for parameter in single.parameters():
            if id(parameter) not in parts:
                parameter.data = parameter.data.to(torch.bfloat16)
        (loss,), expected = train(single, IDS, steps=1, halves=True)
        losses, got = train(parallel, share(), steps=1)
        torch.testing.assert_close(mean(losses), [loss], rtol=1e-5, atol=0)
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name].float(), gradient.float(), rtol=2e-2, atol=1e-4)


def check_mixed_precision_that_would_change_values_is_refused(_: Path) -> None:
    prepare, param_dtype = r"distributed\.prepare\(model\)", "the param_dtype of mixed precision"
    for model, words in (
        (llama("nf4:g64"), f"^weight_scale of .*float32 .* torch.bfloat16 now.*{prepare}"),
        (llama("int4:g32:f16:zero"), f"^weight_scale of .*float16 .* torch.bfloat16 now.*{prepare}"),
        (llama(stored("nf4:g64", "float16")), f"^weight of .*float16 .* torch.bfloat16 now.*{param_dtype}"),
        (
            prepared(llama(stored("nf4:g64", "float32"))),
            f"^weight of .*float32 .* torch.bfloat16.*{param_dtype}",
        ),
    ):
        parallel = sharded(with_adapters(model), mp_policy=BF16)
        for training in (True, False):
            with pytest.raises(ValueError, match=words), torch.set_grad_enabled(training):
                parallel.train(training)(input_ids=share())


def check_evaluation_between_steps(_: Path) -> None:
    """Evaluation remembers addresses, and the memory at them comes and goes."""
    single = with_adapters(llama("nf4:g64", **ODD))
    parallel = sharded(prepared(copy_of(single)))
    train(single, IDS)
    for _ in range(2):
        train(parallel, share())
        with torch.no_grad():
            one = parallel.eval()(input_ids=IDS[:1, :3]).logits
            two = parallel(input_ids=IDS[:1, :3]).logits
        assert torch.equal(one, two)
        parallel.train()
    train(single, IDS)
    with torch.no_grad():
        torch.testing.assert_close(one, single(input_ids=IDS[:1, :3]).logits, rtol=1e-3, atol=1e-3)


def check_layers_that_are_sharded_say_so(_: Path) -> None:
    parallel = sharded(prepared(llama("nf4:g64")))
    layer = next(layer for _, layer in layers(parallel))
    for call in (lambda: layer(torch.ones(1, 64)), lambda: layer.dequantize()):
        with pytest.raises(ValueError, match="is sharded; call the whole model"), torch.no_grad():
            call()
    with pytest.raises(ValueError, match="sharded already"):
        distributed.prepare(parallel, torch.bfloat16)


def check_checkpoints(folder: Path) -> None:
    """DCP, and full state dicts that only one process has, into a model that was never in memory."""
    for storage in ("uint8", "bfloat16"):
        source = with_adapters(prepared(llama(stored("nf4:g64:dq", storage), intermediate_size=88)))
        exact = {name: tensor.clone() for name, tensor in source.state_dict().items()}
        parallel = sharded(source)
        dcp.save({"model": get_model_state_dict(parallel)}, checkpoint_id=str(folder / storage))
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        full = get_model_state_dict(parallel, options=options)
        assert bool(full) == (dist.get_rank() == 0)
        assert all(same_bits(full[name], tensor) for name, tensor in exact.items() if full)

        other = sharded(
            with_adapters(prepared(llama(stored("nf4:g64:dq", storage), seed=9, intermediate_size=88)))
        )
        state = {"model": get_model_state_dict(other)}
        dcp.load(state, checkpoint_id=str(folder / storage))
        set_model_state_dict(other, state["model"])
        assert_same_state(other, exact)

        with torch.device("meta"):
            empty = with_adapters(prepared(llama(stored("nf4:g64:dq", storage), intermediate_size=88)))
        empty = sharded(empty).to_empty(device="cpu")
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(empty, full, options=options)
        assert_same_state(empty, exact)


def check_adapters_are_saved_from_the_gathered_state(folder: Path) -> None:
    base = llama("nf4:g64")
    parallel = sharded(with_adapters(prepared(copy_of(base))))
    train(parallel, share())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(parallel, options=options)
    if dist.get_rank() == 0:
        parallel.save_pretrained(folder / "adapter", state_dict=state)
    dist.barrier()
    again = PeftModel.from_pretrained(base, folder / "adapter")
    with torch.no_grad():
        expected = parallel(input_ids=IDS).logits
        torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
