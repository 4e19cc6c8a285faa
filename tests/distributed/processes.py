"""Run by the tests in two processes: `python processes.py <folder for files> <kind> <module>…`.

Every function of the modules whose name begins with the kind, `check_` or `slow_check_`, runs in both; what
fails is printed. One start serves many checks, since starting takes longer than most of them.
"""

from __future__ import annotations

import copy
import importlib
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits import distributed
from fewbits.nn import QuantModule

VOCABULARY = 96
IDS = torch.arange(48).reshape(4, 12) * 7 % (VOCABULARY - 2) + 2  # the whole batch: two sequences a process

# Sizes that two processes cannot share evenly: 23 x 66 / 2 bytes of codes, 24 scales of 64 weights, …
ODD = {"hidden_size": 66, "intermediate_size": 23, "head_dim": 22, "num_attention_heads": 3}


def stored(format: str, storage: str) -> fewbits.FewbitsConfig:
    """A config whose codes are held as `storage`, as bnb_4bit_quant_storage would have it."""
    return fewbits.FewbitsConfig({"format": format, "storage_dtype": storage})


def prepared(model: Any, dtype: torch.dtype | None = None) -> Any:
    distributed.prepare(model, dtype)
    return model


def llama(
    config: str | fewbits.FewbitsConfig = "nf4:g64",
    dtype: torch.dtype = torch.float32,
    seed: int = 7,
    **sizes: Any,
) -> Any:
    """A tiny Llama, the same in every process, quantized."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **sizes}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    model = model.to(dtype)
    fewbits.quantize_model(model, config)
    return model.requires_grad_(False)


def with_adapters(model: nn.Module, dtype: torch.dtype | None = None) -> Any:
    """LoRA on all linear layers, whose second factor is not zero, so that all of it has a gradient."""
    torch.manual_seed(8)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.2)
        if parameter.requires_grad and dtype is not None:
            parameter.data = parameter.data.to(dtype)
    return adapted


def layers(model: nn.Module) -> Iterator[tuple[str, QuantModule]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantModule):
            yield name.removeprefix("base_model.model."), module


def train(
    model: nn.Module, ids: Tensor, steps: int = 3, halves: bool = False, adam: float | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of `steps` steps of SGD, or of Adam at that rate; whole gradients of the first, by parameter.

    `halves`: a step takes one half of the batch after the other.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, lr=0.5)
    if adam is not None:
        optimizer = torch.optim.AdamW(trained, lr=adam, weight_decay=0.0)
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    for _ in range(steps):
        parts = ids.chunk(2 if halves else 1)
        losses.append(0.0)
        for part in parts:
            loss = model(input_ids=part, labels=part).loss / len(parts)
            loss.backward()
            losses[-1] += loss.item()
        first = first or {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return losses, first


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def share() -> Tensor:
    """This process's half of the batch."""
    return IDS.chunk(dist.get_world_size())[dist.get_rank()]


def mean(losses: list[float]) -> list[float]:
    """Losses of the processes → those of the whole batch."""
    summed = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(summed)
    return (summed / dist.get_world_size()).tolist()


def plain_name(name: str) -> str:
    for wrapping in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module."):
        name = name.replace(wrapping, "")
    return name


def assert_trains_like(
    sharded: nn.Module, single: nn.Module, halves: bool = False, losses_within: float = 1e-4
) -> None:
    """Three steps of `sharded` on halves of the batch are those of `single` on the whole of it."""
    expected, gradients = train(single, IDS, halves=halves)
    losses, found = train(sharded, share())
    assert expected[0] - expected[-1] > 0.01, f"nothing was learned: {expected}"
    torch.testing.assert_close(mean(losses), expected, rtol=losses_within, atol=0)
    got = {plain_name(name): gradient for name, gradient in found.items()}
    assert got.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: its gradient is off by {error}"


def assert_same_state(model: nn.Module, exact: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == exact.keys()
    for name, tensor in exact.items():
        assert same_bits(whole(state[name]), tensor), name


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Also where the bits are those of no number."""
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def copy_of(model: Any) -> Any:
    return copy.deepcopy(model)


def main() -> None:
    folder, kind, *modules = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(timeout=timedelta(seconds=120))
    failed = False
    for module in modules:
        for name, check in vars(importlib.import_module(module)).items():
            if not name.startswith(kind):
                continue
            place, start = Path(folder, module, name), time.perf_counter()
            place.mkdir(parents=True, exist_ok=True)
            try:
                check(place)
            except Exception:
                failed = True
                print(f"--- {module}.{name}, rank {dist.get_rank()}\n{traceback.format_exc()}", flush=True)
            if dist.get_rank() == 0:
                print(f"{module}.{name}: {time.perf_counter() - start:.1f} s", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(failed)


if __name__ == "__main__":
    main()
