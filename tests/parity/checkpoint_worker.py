"""Reads and writes checkpoints with bitsandbytes, in a process of its own that has no fewbits in it.

    python checkpoint_worker.py FOLDER

FOLDER/jobs.json lists the cases: name, source (a plain model), options (of BitsAndBytesConfig, dtypes by
name), dtype. For each, with CASE = FOLDER/NAME:

    CASE/fewbits        read: CASE/fewbits.safetensors gets its decoded weights and logits, or
                        CASE/fewbits.error the traceback
    CASE/bitsandbytes   written, from the source, with CASE/bitsandbytes.safetensors beside it
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging


def decoded(layer: torch.nn.Module) -> torch.Tensor:
    """The weight of a layer in float32, from the fields of its state by the formula that they stand for.

    Not with bitsandbytes' CPU kernel: that takes wrong scales when rows are no multiple of the block size.
    """
    if isinstance(layer, Linear8bitLt):
        return layer.weight.CB.float() * layer.weight.SCB.view(-1, 1) * (1 / 127)
    state, packed = layer.weight.quant_state, layer.weight.data.view(torch.uint8).flatten()
    absmax = state.absmax
    if state.nested:
        outer = state.state2
        values = outer.code[absmax.long()]
        absmax = values * outer.absmax.repeat_interleave(outer.blocksize)[: len(values)] + state.offset
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: state.shape.numel()]
    scale = absmax.repeat_interleave(state.blocksize)[: len(codes)]
    return (state.code[codes.long()] * scale).view(state.shape)


def describe(model: Any, file: Path) -> None:
    """Decoded weights and logits of a model that bitsandbytes runs."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}
    found = {name: decoded(layer).contiguous() for name, layer in layers.items()}
    # In eval mode 4-bit layers rewrite themselves for AVX512-BF16; in training mode they decode and multiply.
    # 8-bit layers decode in training mode, and use LLM.int8() in eval mode.
    model.train(any(isinstance(layer, Linear4bit) for layer in layers.values()))
    with torch.no_grad():
        found["logits"] = model(torch.arange(12).view(2, 6)).logits.float()
    save_file(found, file)


def run(folder: Path, job: dict[str, Any]) -> None:
    case = folder / job["name"]
    ours = case / "fewbits"
    try:
        describe(AutoModelForCausalLM.from_pretrained(ours, device_map="cpu"), case / "fewbits.safetensors")
    except Exception:  # one file that it cannot read must not hide what it does with the others
        (case / "fewbits.error").write_text(traceback.format_exc())
    model = AutoModelForCausalLM.from_pretrained(
        folder / job["source"],
        quantization_config=BitsAndBytesConfig(**job["options"]),
        dtype=getattr(torch, job["dtype"]),
        device_map="cpu",
    )
    model.save_pretrained(case / "bitsandbytes")
    describe(model, case / "bitsandbytes.safetensors")


if __name__ == "__main__":
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the models are tiny
    root = Path(sys.argv[1])
    for entry in json.loads((root / "jobs.json").read_text()):
        run(root, entry)
    assert "fewbits" not in sys.modules
