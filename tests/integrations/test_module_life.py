"""Casting, moving, copying, pickling and state dicts leave codes and scales as they are."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import fewbits
from fewbits.nn import QuantLinear, QuantModule

Checkpoint = Callable[..., Path]
Load = Callable[..., Any]
Run = Callable[..., Tensor]
Layers = Callable[[nn.Module], dict[str, QuantModule]]

BITSANDBYTES: dict[str, Any] = {
    "nf4_dq": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "fp4_in_bf16": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16"),
    "nf4_in_fp32": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage="float32"
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
OWN: dict[str, Any] = {
    "int4_f16": fewbits.FewbitsConfig("int4:g16:f16:zero"),
    "mxfp4": fewbits.FewbitsConfig("mxfp4"),
    "nvfp4": fewbits.FewbitsConfig("nvfp4"),
    "with_embedding": fewbits.FewbitsConfig("nf4:g64:dq", modules={"embed_tokens": "int8:row"}),
}
ALL = {**BITSANDBYTES, **OWN}
CAST_REFUSED = r"You cannot cast a bitsandbytes model|is not supported for quantized model"


def parts_of(model: nn.Module) -> dict[str, Tensor]:
    """Every stored tensor of every quantized weight, by name."""
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantModule):
            for weight in layer.weights():
                for attribute in layer.part_names(weight).values():
                    found[f"{name}.{attribute}"] = getattr(layer, attribute)
    return found


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def snapshot(model: nn.Module) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {name: (part.dtype, part.shape, bits(part)) for name, part in parts_of(model).items()}


@pytest.fixture
def build(checkpoint: Checkpoint, load: Load) -> Callable[..., Any]:
    def build(config: Any, kind: str = "llama_bias", dtype: torch.dtype = torch.bfloat16) -> Any:
        return load(checkpoint(kind, dtype), config)

    return build


@pytest.mark.parametrize("config", OWN.values(), ids=OWN)
class TestCastsOfOwnModels:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
    def test_to_casts_all_but_codes_and_scales(
        self, dtype: torch.dtype, config: Any, build: Callable[..., Any], run: Run
    ) -> None:
        model = build(config)
        before, codes = run(model), snapshot(model)
        assert model.to(dtype) is model
        assert snapshot(model) == codes
        parts = parts_of(model)
        for name, parameter in model.named_parameters():
            if name not in parts:
                assert parameter.dtype == dtype, name
        assert model.dtype == dtype
        after = run(model)
        assert after.isfinite().all()
        torch.testing.assert_close(after.float(), before.float(), rtol=0.1, atol=0.4)

    def test_there_and_back_is_exact(self, config: Any, build: Callable[..., Any]) -> None:
        model = build(config)
        before = {name: (value.dtype, bits(value)) for name, value in model.state_dict().items()}
        model.to(torch.float32).to(torch.bfloat16)
        assert {name: (value.dtype, bits(value)) for name, value in model.state_dict().items()} == before

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_after_a_cast_it_dequantizes_to_that_dtype(
        self, dtype: torch.dtype, config: Any, build: Callable[..., Any], run: Run
    ) -> None:
        model = build(config).to(dtype)
        result = run(model)
        model.dequantize()
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        torch.testing.assert_close(run(model).float(), result.float(), rtol=0.02, atol=0.05)

    def test_half_and_float_keep_bits_or_refuse(self, config: Any, build: Callable[..., Any]) -> None:
        for cast in ("half", "float", "bfloat16", "double"):
            model = build(config)
            codes = snapshot(model)
            if cast in ("half", "float"):
                with pytest.raises(ValueError, match=r"is not supported for quantized model"):
                    getattr(model, cast)()
            else:
                getattr(model, cast)()
            assert snapshot(model) == codes


@pytest.mark.parametrize("config", BITSANDBYTES.values(), ids=BITSANDBYTES)
class TestCastsOfBitsAndBytesModels:
    def test_casts_raise_as_in_transformers(self, config: Any, build: Callable[..., Any], run: Run) -> None:
        model = build(config)
        before, codes = run(model), snapshot(model)
        for cast in (
            lambda: model.to(torch.float16),
            lambda: model.to(dtype=torch.float32),
            lambda: model.half(),
            lambda: model.float(),
        ):
            with pytest.raises(ValueError, match=CAST_REFUSED):
                cast()
        assert snapshot(model) == codes
        assert run(model).equal(before)

    def test_moves_to_the_same_place_pass(self, config: Any, build: Callable[..., Any], run: Run) -> None:
        model = build(config)
        before = run(model)
        for moved in (model.to("cpu"), model.to(torch.device("cpu")), model.cpu()):
            assert moved is model
            assert run(moved).equal(before)

    def test_casts_of_submodules_keep_codes_and_scales(
        self, config: Any, build: Callable[..., Any], run: Run
    ) -> None:
        model = build(config)
        codes = snapshot(model)
        for cast in (lambda m: m.half(), lambda m: m.to(torch.float64), lambda m: m.bfloat16()):
            for layer in model.model.layers:
                cast(layer)
            assert snapshot(model) == codes
        assert run(model).isfinite().all()


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
class TestCopies:
    def test_deepcopy_is_equal_and_apart(self, config: Any, build: Callable[..., Any], run: Run) -> None:
        model = build(config)
        before, codes = run(model), snapshot(model)
        twin = copy.deepcopy(model)
        assert snapshot(twin) == codes
        assert run(twin).equal(before)
        own = {part.data_ptr() for part in parts_of(model).values()}
        assert not own & {part.data_ptr() for part in parts_of(twin).values()}
        for part in parts_of(twin).values():
            part.zero_()
        assert snapshot(model) == codes

    def test_pickle_and_torch_save(self, config: Any, build: Callable[..., Any], run: Run) -> None:
        model = build(config)
        before, codes = run(model), snapshot(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for twin in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
            assert snapshot(twin) == codes
            assert run(twin).equal(before)
            assert twin.is_quantized
            assert str(fewbits.report(twin)) == str(fewbits.report(model))

    def test_state_dict_loads_strictly_into_a_twin(
        self, config: Any, build: Callable[..., Any], new_model: Callable[..., Any], run: Run
    ) -> None:
        model, twin = build(config), build(config)
        before, codes = run(model), snapshot(model)
        with torch.no_grad():
            for tensor in [*twin.parameters(), *twin.buffers()]:
                tensor.zero_()
        assert not run(twin).equal(before)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        twin.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
        for name, tensor in model.named_buffers():  # rotary frequencies are in no state dict
            if name not in model.state_dict():
                twin.get_buffer(name).copy_(tensor)
        assert snapshot(twin) == codes
        assert run(twin).equal(before)

    def test_state_dict_of_other_sizes_is_refused(self, config: Any, build: Callable[..., Any]) -> None:
        state = build(config).state_dict()
        name = next(name for name in state if name.endswith("up_proj.weight"))
        twin = build(config)
        with pytest.raises(RuntimeError, match="size mismatch"):
            twin.load_state_dict({**state, name: state[name][:-1]})
        with pytest.raises(RuntimeError, match="Missing key"):
            twin.load_state_dict({key: value for key, value in state.items() if key != name})

    def test_meta_keeps_shapes_and_dtypes(self, config: Any, build: Callable[..., Any]) -> None:
        model = build(config)
        shapes = {name: (part.dtype, part.shape) for name, part in parts_of(model).items()}
        footprint = model.get_memory_footprint()
        model.to("meta")
        assert all(part.is_meta for part in parts_of(model).values())
        assert {name: (part.dtype, part.shape) for name, part in parts_of(model).items()} == shapes
        assert model.get_memory_footprint() == footprint
        ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
        assert model(input_ids=ids).logits.shape == (2, 5, 96)

    def test_shared_memory_keeps_everything(self, config: Any, build: Callable[..., Any], run: Run) -> None:
        model = build(config)
        before = run(model)
        model.share_memory()
        assert all(part.is_shared() for part in parts_of(model).values())
        assert run(model).equal(before)

    def test_codes_and_scales_are_frozen(self, config: Any, build: Callable[..., Any], run: Run) -> None:
        model = build(config)
        assert not any(part.requires_grad for part in parts_of(model).values())
        model.train()
        assert all(layer.training for layer in model.modules() if isinstance(layer, QuantModule))
        assert not any(part.requires_grad for part in parts_of(model).values())
        kept = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        assert kept["model.norm.weight"]
        assert kept["lm_head.weight"]


def test_tied_codes_stay_tied_through_copies(checkpoint: Checkpoint, load: Load, run: Run) -> None:
    model = load(checkpoint("llama_tied"), fewbits.FewbitsConfig(modules={"lm_head": "int8:row"}))
    before = run(model)
    cast = copy.deepcopy(model).to(torch.float64).to(torch.float32)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), cast):
        head, table = twin.lm_head, twin.model.embed_tokens
        for mine, other in zip(head._parts(), table._parts(), strict=True):
            assert mine.data_ptr() == other.data_ptr()
        assert run(twin).equal(before)


def test_repr_names_the_format(build: Callable[..., Any]) -> None:
    layer = build(BITSANDBYTES["int8"]).model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantLinear)
    assert repr(layer) == "QuantLinear(in_features=64, out_features=80, bias=True, int8:row@int8:t6)"
