"""transformers' Trainer through accelerate's FSDP plugin, and what it asks of loading."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from processes import (
    IDS,
    assert_same_state,
    assert_trains_like,
    layers,
    llama,
    train,
    whole,
    with_adapters,
)
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import fewbits

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
SAVED = {"save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.02}


def check_trainer(folder: Path) -> None:
    """Full state dicts saved and resumed; codes loaded from the first process."""
    assert_trainer_trains(folder / "full", BitsAndBytesConfig(**NF4), {}, **SAVED)
    config = BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True)
    assert_trainer_trains(folder / "loaded", config, {"cpu_ram_efficient_loading": True})


def slow_check_trainer_in_every_storage(folder: Path) -> None:
    config = BitsAndBytesConfig(**NF4)
    assert_trainer_trains(folder / "shards", config, {"state_dict_type": "SHARDED_STATE_DICT"}, **SAVED)
    for number, config in enumerate(
        (
            BitsAndBytesConfig(**NF4, bnb_4bit_quant_storage="float32"),
            fewbits.FewbitsConfig("int4:g32:f16:zero"),
            fewbits.FewbitsConfig("nf4:g64:dq", modules={"embed_tokens": "int8", "lm_head": "int8"}),
            BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
        )
    ):
        assert_trainer_trains(folder / str(number), config, {"cpu_ram_efficient_loading": True})


def assert_trainer_trains(folder: Path, config: Any, fsdp: dict[str, Any], **options: Any) -> None:
    """Losses and adapters of three steps are those of one process, also when resumed after the second."""
    expected, final = single_process(folder, config, options.get("learning_rate"))
    trainer = run(folder, config, fsdp, **options)
    assert_ends(trainer, expected, final)
    if options:
        again = run(folder, config, fsdp, resume=str(folder / "checkpoint-2"), **options)
        assert_ends(again, expected, final)
    trainer.save_model(str(folder / "final"))
    if dist.get_rank() == 0 and "state_dict_type" not in fsdp:  # with shards, it writes nothing
        saved = load_file(folder / "final" / "adapter_model.safetensors")
        named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in saved.items()}
        assert_close_adapters(named, final)


def check_trainer_in_bfloat16(folder: Path, storage: str = "uint8") -> None:
    """Mixed precision: near what one process makes in float32."""
    config = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype="bfloat16", bnb_4bit_quant_storage=storage)
    expected, _ = single_process(folder, config)
    assert_close_losses(run(folder, config, {"cpu_ram_efficient_loading": True}, bf16=True), expected, 5e-3)


def slow_check_trainer_in_bfloat16_with_codes_in_it(folder: Path) -> None:
    check_trainer_in_bfloat16(folder, "bfloat16")


def check_scales_that_mixed_precision_casts_stop_training(folder: Path) -> None:
    """A model that was not loaded in one of several processes, and that nobody prepared."""
    with pytest.raises(ValueError, match=r"weight_scale of .*distributed\.prepare\(model\)"):
        run(folder, None, {}, model=llama("nf4:g64"), bf16=True)


def check_loading_under_accelerate_launch(folder: Path) -> None:
    """As in its environment, where transformers leaves all but the first process empty if it can."""
    with environment(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_CPU_RAM_EFFICIENT_LOADING="true"):
        single = with_adapters(load(folder, BitsAndBytesConfig(**NF4)))
        model = with_adapters(load(folder, BitsAndBytesConfig(**NF4)))
        exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True)
        plugin.transformer_cls_names_to_wrap = ["LlamaDecoderLayer"]
        PartialState(cpu=True)
        shard_on_cpu()
        optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad])
        parallel, _ = Accelerator(cpu=True, fsdp_plugin=plugin).prepare(model, optimizer)
        assert isinstance(parallel, FSDPModule)
        assert_same_state(parallel, exact)
        assert_trains_like(parallel, single)
    with environment(ACCELERATE_USE_FSDP="true", FSDP_VERSION="1"):
        config = BitsAndBytesConfig(**NF4)
        held = {layer.held for _, layer in layers(load(folder, config, dtype=torch.bfloat16))}
        assert held == {torch.bfloat16}, held


def check_loaded_models_are_saved_as_before(folder: Path) -> None:
    """What files hold does not depend on how layers hold it."""
    for number, config in enumerate(
        (
            BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True),
            fewbits.FewbitsConfig("int4:g32:f16:zero", modules={"embed_tokens": "int8", "lm_head": "int8"}),
        )
    ):
        own = folder / f"saved-{number}"
        with environment(WORLD_SIZE="1"):
            load(folder, config, tied=True).save_pretrained(own / "one")
        model = load(folder, config, tied=True)
        assert {layer.held for _, layer in layers(model)} == {torch.uint8}
        model.save_pretrained(own / "several")
        if dist.get_rank():
            continue  # transformers writes in the first process only
        one, several = (load_file(own / each / "model.safetensors") for each in ("one", "several"))
        assert one.keys() == several.keys()
        assert all(
            torch.equal(several[name], tensor) and several[name].dtype == tensor.dtype
            for name, tensor in one.items()
        )
        again = AutoModelForCausalLM.from_pretrained(own / "several")
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def load(folder: Path, config: Any, dtype: torch.dtype = torch.float32, tied: bool = False) -> Any:
    plain = folder / f"plain-{tied}"
    folder.mkdir(exist_ok=True)
    if dist.get_rank() == 0 and not plain.exists():
        llama("skip", tie_word_embeddings=tied).save_pretrained(folder / "written")
        (folder / "written").rename(plain)
    dist.barrier()
    fewbits.enable(takeover=True)
    return AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, dtype=dtype, device_map="cpu"
    )


def single_process(
    folder: Path, config: Any, adam: float | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three steps of SGD, or of Adam at that rate, and the adapters after them."""
    model = with_adapters(load(folder, config))
    losses, _ = train(model, IDS, adam=adam)
    return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def run(
    folder: Path,
    config: Any,
    fsdp: dict[str, Any],
    resume: str | None = None,
    model: Any = None,
    **options: Any,
) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # what an Accelerator of an earlier check left
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="steps" if "save_steps" in options else "no",
        fsdp=True,
        fsdp_config={"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **fsdp},
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"optim": "sgd", "learning_rate": 0.5, **options},
    )
    shard_on_cpu()
    model = with_adapters(model or load(folder, config))
    data = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    assert isinstance(trainer.model, FSDPModule)
    return trainer


def shard_on_cpu() -> None:
    """accelerate takes its FSDP plugin for GPUs only, and falls back to DDP on a CPU without a word."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def assert_ends(trainer: Trainer, losses: list[float], adapters: dict[str, torch.Tensor]) -> None:
    assert_close_losses(trainer, losses)
    trained = {name: whole(p) for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert_close_adapters(trained, adapters)


def assert_close_losses(trainer: Trainer, expected: list[float], rtol: float = 1e-4) -> None:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.testing.assert_close(losses, expected, rtol=rtol, atol=0)


def assert_close_adapters(adapters: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert adapters.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(adapters[name], tensor, rtol=1e-3, atol=1e-4)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
