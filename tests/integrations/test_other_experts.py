"""Experts outside of transformers' experts interface: quantized as well, computed by their own forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import fewbits
from fewbits.model import dequantize_model
from fewbits.nn import QuantModule

Checkpoint = Callable[..., Path]
Load = Callable[..., Any]
Run = Callable[..., Tensor]
Layers = Callable[[nn.Module], dict[str, QuantModule]]
Same = Callable[[Path, Path], None]

CONFIGS: dict[str, Any] = {
    "nf4_dq": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "int4": fewbits.FewbitsConfig("int4:g16:zero"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
class TestLlama4:
    """Its experts take their tokens sorted into one batch an expert."""

    def test_quantize_save_reload(
        self,
        config: Any,
        checkpoint: Checkpoint,
        load: Load,
        run: Run,
        quantized: Layers,
        same_tensors: Same,
        tmp_path: Path,
    ) -> None:
        path = checkpoint("llama4", torch.bfloat16)
        plain, model = load(path), load(path, config)
        experts = "model.layers.0.feed_forward.experts"
        assert experts in quantized(model)
        assert model.get_memory_footprint() < 0.45 * plain.get_memory_footprint()
        result = run(model)
        model.save_pretrained(tmp_path / "saved")
        again = load(tmp_path / "saved")
        assert quantized(again).keys() == quantized(model).keys()
        assert run(again).equal(result)
        again.save_pretrained(tmp_path / "again")
        same_tensors(tmp_path / "saved", tmp_path / "again")

    def test_dequantized_it_computes_the_same(
        self, config: Any, checkpoint: Checkpoint, load: Load, run: Run, tmp_path: Path
    ) -> None:
        path = checkpoint("llama4")
        plain, model = load(path), load(path, config)
        result, full = run(model), run(plain)
        assert 1e-3 < (result - full).norm() / full.norm() < 0.75
        model.dequantize()
        torch.testing.assert_close(run(model), result, rtol=1e-3, atol=1e-3)
        assert {name: value.shape for name, value in model.named_parameters()} == {
            name: value.shape for name, value in plain.named_parameters()
        }
        model.save_pretrained(tmp_path)
        assert run(load(tmp_path)).equal(run(model))

    def test_decoded_weights_live_only_during_forward(
        self, config: Any, checkpoint: Checkpoint, load: Load, run: Run, quantized: Layers
    ) -> None:
        model = load(checkpoint("llama4"), config)
        run(model)
        layer = quantized(model)["model.layers.0.feed_forward.experts"]
        for weight in layer.weights():
            assert not hasattr(layer, weight)
        assert not any(name.endswith(tuple(layer.weights())) for name in model.state_dict())


class OwnExperts(nn.Module):
    """Each token goes through all experts; weights under names of its own, [experts, out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 32, 16))
        self.second = nn.Parameter(torch.randn(3, 16, 32) / 4)
        self.shift = nn.Parameter(torch.randn(16))
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("ti,eoi->teo", x, self.first).relu()
        return torch.einsum("teo,eio->ti", hidden, self.second) * self.scale + self.shift


class TestAnyModule:
    def test_it_computes_with_decoded_weights(self) -> None:
        model = nn.ModuleDict({"experts": OwnExperts(), "linear": nn.Linear(16, 16)})
        x = torch.randn(5, 16)
        full = model["experts"](x)
        weights = {name: model["experts"].get_parameter(name).detach() for name in ("first", "second")}
        report = fewbits.quantize_model(model, "nf4:g64")
        assert [entry.name for entry in report.quantized] == [
            "experts.first",
            "experts.second",
            "linear.weight",
        ]
        result = model["experts"](x)
        assert 1e-3 < (result - full).norm() / full.norm() < 0.3
        for name, weight in weights.items():
            for index, matrix in enumerate(weight):
                wanted = fewbits.quantize(matrix, "nf4:g64")
                assert model["experts"].quantized_weight(name, index) == wanted
        dequantize_model(model)
        assert type(model["experts"]) is OwnExperts
        assert model["experts"](x).equal(result)

    def test_gradients_reach_the_input_and_kept_parameters(self) -> None:
        model = nn.ModuleDict({"experts": OwnExperts()})
        fewbits.quantize_model(model, "int8:row")
        grads = []
        for dequantize in (False, True):
            if dequantize:
                dequantize_model(model)
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
            model.zero_grad()
            model["experts"](x).square().sum().backward()
            grads.append((x.grad, model["experts"].shift.grad.clone()))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)

    def test_an_error_inside_leaves_no_decoded_weights(self) -> None:
        model = nn.ModuleDict({"experts": OwnExperts()})
        fewbits.quantize_model(model, "nf4:g64")
        with pytest.raises(RuntimeError):
            model["experts"](torch.randn(5, 7))
        assert not hasattr(model["experts"], "first")
