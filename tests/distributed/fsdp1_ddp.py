"""FSDP1, as QLoRA users of bitsandbytes have it, and DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft.utils.other import fsdp_auto_wrap_policy
from processes import (
    IDS,
    ODD,
    assert_trains_like,
    copy_of,
    layers,
    llama,
    mean,
    plain_name,
    prepared,
    same_bits,
    share,
    stored,
    train,
    with_adapters,
)
from torch import Tensor
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    StateDictType,
)
from torch.nn.parallel import DistributedDataParallel

from fewbits import FewbitsConfig

BF16 = torch.bfloat16


def flat(model: Any, **options: Any) -> FullyShardedDataParallel:
    policy = fsdp_auto_wrap_policy(model)
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)


def check_fsdp1(_: Path) -> None:
    """Sizes that put scales at offsets of the flat parameter where float32 cannot lie, in bfloat16."""
    for dtype in (torch.float32, BF16):
        single = with_adapters(llama("nf4:g64", dtype, **ODD))
        assert_same_training(flat(prepared(copy_of(single), dtype)), single)


def slow_check_fsdp1_in_every_format(_: Path) -> None:
    for format, dtype in (
        ("nf4:g64:dq", torch.float32),
        ("int8:row@int8:t0.0", torch.float32),
        ("int4:g32:f16:zero", torch.float32),
        ("nf4:g64:dq", BF16),
    ):
        single = with_adapters(llama(format, dtype))
        for original in (False, True):
            parallel = flat(prepared(copy_of(single), dtype), use_orig_params=original)
            assert_same_training(parallel, copy_of(single))


def check_fsdp1_with_float_quant_storage_and_mixed_precision(_: Path) -> None:
    """What transformers sets for bnb_4bit_quant_storage=bfloat16: everything is cast to it, buffers too."""
    precision = MixedPrecision(param_dtype=BF16, reduce_dtype=BF16, buffer_dtype=BF16)
    single = with_adapters(llama(stored("nf4:g64:dq", "bfloat16"), BF16), BF16)
    parallel = flat(prepared(copy_of(single)), mixed_precision=precision)
    assert_same_training(parallel, single)


def check_fsdp1_evaluates_with_the_memory_of_now(_: Path) -> None:
    """Layers of FSDP1 have plain attributes in place of parameters, whose memory comes and goes."""
    single = llama("nf4:g64")
    parallel = flat(prepared(copy_of(single), torch.float32))
    for length in (12, 3, 12):
        with torch.no_grad():
            got = parallel(input_ids=IDS[:2, :length]).logits
            torch.testing.assert_close(got, single(input_ids=IDS[:2, :length]).logits, rtol=1e-4, atol=1e-4)


def check_fsdp1_refuses_what_it_cannot_flatten(_: Path) -> None:
    """Errors of torch, which docs/distributed.md answers."""
    for model, words in (
        (llama("nf4:g64"), "integer dtype"),
        (prepared(llama("nf4:g64")), "integer dtype"),
        (llama(stored("nf4:g64", "float32"), BF16), "uniform dtype"),
        (prepared(llama("nf4:g64"), BF16), "uniform dtype"),  # its norms are float32
    ):
        with pytest.raises(ValueError, match=words):
            flat(with_adapters(model))


def check_fsdp1_full_state(_: Path) -> None:
    single = with_adapters(prepared(llama("nf4:g64:dq", **ODD), torch.float32))
    exact = {name: tensor.clone() for name, tensor in single.state_dict().items()}
    full = full_state(flat(single))
    assert full.keys() == exact.keys()
    assert all(same_bits(full[name], tensor) for name, tensor in exact.items())


def check_ddp(_: Path) -> None:
    """The first process' codes and scales reach the others, whatever dtype and size they have."""
    # Behind quantized embeddings, scales are buffers, which DDP sends at every step.
    embeddings = FewbitsConfig("nf4:g64:dq", modules={"embed_tokens": "int8", "lm_head": "int8"})
    for config, rtol in (
        ("nf4:g64:dq", 1e-4),
        ("int8:row@int8:t0.0", 1e-2),
        ("int4:g32:f16:zero", 1e-4),
        (embeddings, 1e-4),
    ):
        single = with_adapters(llama(config, **ODD, tie_word_embeddings=config is embeddings))
        for other in (copy_of(single), prepared(copy_of(single))):
            for _, layer in layers(other):
                for tensor in [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]:
                    if dist.get_rank():
                        tensor.data.view(torch.uint8).zero_()
            assert_trains_like(DistributedDataParallel(other), copy_of(single), losses_within=rtol)


def assert_same_training(parallel: FullyShardedDataParallel, single: Any) -> None:
    """Equal losses, and equal adapters after three steps of SGD, whose steps are gradients."""
    # Activations in int8 jump where a hair's breadth decides how they are rounded.
    exact = single.dtype == torch.float32 and "@" not in str(next(layers(single))[1].scheme)
    rtol = 1e-4 if exact else 1e-2
    before = {name: p.detach().clone() for name, p in single.named_parameters() if p.requires_grad}
    expected, _ = train(single, IDS)
    losses, _ = train(parallel, share())
    torch.testing.assert_close(mean(losses), expected, rtol=rtol, atol=0)
    state = full_state(parallel)
    for name, parameter in single.named_parameters():
        if parameter.requires_grad:
            moved, other = parameter.detach() - before[name], state[name] - before[name]
            error = (moved - other).float().norm() / moved.float().norm()
            assert error < 20 * rtol, f"{name}: {error}"


def full_state(parallel: FullyShardedDataParallel) -> dict[str, Tensor]:
    # Not offload_to_cpu: on a CPU, torch frees what it has just "moved" there.
    with FullyShardedDataParallel.state_dict_type(parallel, StateDictType.FULL_STATE_DICT):
        return {plain_name(name): tensor for name, tensor in parallel.state_dict().items()}
