"""QLoRA in several processes: FSDP2 shards 4-bit weights, LoRA adapters train, the first process saves them.

On CPUs (gloo), from the root of the repository:

    torchrun --nproc-per-node 2 examples/fsdp_qlora.py

On GPUs (nccl), with a model and a text of your own:

    torchrun --nproc-per-node 8 examples/fsdp_qlora.py --model path/to/model --text text.txt --bf16
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import fewbits

STORY = "Once upon a time there was a small red fox. It lived near a big wood and liked to count its steps. "


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo/model", help="folder of a causal language model")
    parser.add_argument("--text", type=Path, help="text file to train on; a short story unless given")
    parser.add_argument("--output", type=Path, default=Path("fsdp-adapter"), help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2, help="sequences per process and step")
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (mixed precision)")
    return parser.parse_args()


def place() -> torch.device:
    """This process's device, with the process group on it."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def sharded_model(options: argparse.Namespace, device: torch.device) -> nn.Module:
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=config, dtype=dtype, device_map={"": device}
    )
    fewbits.distributed.prepare(
        model
    )  # from_pretrained did it under torchrun; it has to come before sharding
    model = get_peft_model(
        model, LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def sequences(options: argparse.Namespace) -> Tensor:
    """Token ids [n, length]."""
    text = STORY * 100 if options.text is None else options.text.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(options.model)(text, return_tensors="pt").input_ids[0]
    return ids[: len(ids) // options.length * options.length].view(-1, options.length)


def train(model: nn.Module, data: Tensor, options: argparse.Namespace, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=options.lr)
    order = torch.Generator().manual_seed(0)  # the same in all processes; each takes rows of its own
    for step in range(1, options.steps + 1):
        rows = torch.randint(len(data), (world, options.batch), generator=order)[rank]
        ids = data[rows].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: loss {mean.item():.4f}", flush=True)


def main() -> None:
    options = arguments()
    fewbits.enable(takeover=True)
    device = place()
    model = sharded_model(options, device)
    train(model, sequences(options), options, device)
    gather = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    adapters = get_model_state_dict(model, options=gather)  # all processes give, the first has
    if dist.get_rank() == 0:
        model.save_pretrained(options.output, state_dict=adapters)
        print(f"saved {options.output}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
