"""What tensors mean: which belong to one weight, and what it is stored as."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.checkpoint.folder import Folder, open_folder
from fewbits.checkpoint.safetensors import ELEMENT_BITS, CheckpointError, layout
from fewbits.checkpoint.stored import StoredWeight, read_weight, stored_weights
from fewbits.config import FewbitsConfig
from fewbits.experts import QuantExperts
from fewbits.model import quantize_model

from .conftest import Model, found_in, own, write

Change = Callable[[dict[str, Tensor]], object]

Q = "layers.0.q_proj.weight"
UP = "model.layers.0.mlp.up_proj"
STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "bitsandbytes"


def u8(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def i32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def without(*names: str) -> Change:
    """Take tensors away."""
    return lambda tensors: [tensors.pop(name) for name in names]


def replaced(name: str, tensor: Tensor) -> Change:
    """Put a tensor in, or another in its place."""
    return lambda tensors: tensors.update({name: tensor})


FORMATS = (
    "nf4:g64", "nf4:g32:dq", "nf4:g64:bf16", "fp4:g128", "dynamic8:g256", "udynamic8:g64:offset",
    "int8", "int8:zero", "int8:g32:f16", "int4:g32", "int4:g32:bf16:zero", "int3:g48:zero", "int2:g64",
    "int3:row", "int8:tensor", "int2:tensor", "int4:b16x32:zero",
    "fp8_e4m3", "fp8_e5m2:tensor", "fp8_e4m3:b32x32", "mxfp4", "nvfp4",
)  # fmt: skip


class TestOwnSchema:
    @pytest.mark.parametrize("spelling", FORMATS)
    def test_every_format(self, tmp_path: Path, spelling: str) -> None:
        folder, model = own(tmp_path, FewbitsConfig(spelling))
        weights = found_in(folder)
        name = "layers.1.q_proj.weight"
        weight, layer = weights[name], model.get_submodule("layers.1.q_proj")
        assert weight.problem == ""
        assert weight.quantized
        assert weight.format == layer.scheme.weight
        assert weight.stored == str(weight.format)
        assert weight.shape in (None, (33, 96))
        assert 0 <= weight.count - 33 * 96 < 8
        parts = layer.quantized_weight().parts()
        assert weight.nbytes == sum(part.nbytes for part in parts.values())
        (read,) = read_weight(folder, weight)
        for part, tensor in read.parts().items():
            assert torch.equal(tensor.view(-1).view(torch.uint8), parts[part].view(-1).view(torch.uint8))

    @pytest.mark.parametrize(
        "spelling", ["nf4:g64:dq", "int4:g32:zero", "int8", "mxfp4", "dynamic8", "nvfp4"]
    )
    def test_experts(self, tmp_path: Path, spelling: str) -> None:
        folder, model = own(tmp_path, FewbitsConfig(spelling))
        weight = found_in(folder)["layers.0.experts.gate_up_proj"]
        layer = model.get_submodule("layers.0.experts")
        assert isinstance(layer, QuantExperts)
        assert (weight.problem, weight.experts, weight.role) == ("", 3, "experts")
        assert weight.shape in (None, (3, 20, 64))
        assert weight.count == 3 * 20 * 64
        for expert, read in enumerate(read_weight(folder, weight)):
            wanted = layer.quantized_weight("gate_up_proj", expert)
            assert torch.equal(read.dequantize().view(-1), wanted.dequantize().view(-1))

    @pytest.mark.parametrize(
        ("spelling", "shape"),
        [("int8", (33, 96)), ("int4:g32", (33, 96)), ("nf4:g64", None), ("int8:tensor", None)],
    )
    def test_shapes_that_headers_tell(self, tmp_path: Path, spelling: str, shape: Any) -> None:
        folder, _ = own(tmp_path, FewbitsConfig(spelling))
        assert found_in(folder)["layers.0.q_proj.weight"].shape == shape

    def test_codes_held_as_another_dtype(self, tmp_path: Path) -> None:
        config = FewbitsConfig({"format": "nf4:g64", "storage_dtype": "bfloat16"}, {"experts": "skip"})
        folder, model = own(tmp_path, config)
        assert folder.info("layers.0.q_proj.weight").dtype == "BF16"
        (read,) = read_weight(folder, found_in(folder)["layers.0.q_proj.weight"])
        wanted = model.get_submodule("layers.0.q_proj").quantized_weight()
        assert torch.equal(read.codes, wanted.codes)

    def test_formats_by_module(self, tmp_path: Path) -> None:
        modules = {"layers.0": "int8", "embed_tokens": "int4:g32", "lm_head": "skip"}
        folder, _ = own(tmp_path, FewbitsConfig("nf4:g64", modules))
        stored = {name: weight.stored for name, weight in found_in(folder).items()}
        assert stored["layers.0.q_proj.weight"] == "int8:row"
        assert stored["layers.0.experts.gate_up_proj"] == "int8:row"
        assert stored["layers.1.q_proj.weight"] == "nf4:g64"
        assert stored["embed_tokens.weight"] == "int4:g32"
        assert stored["lm_head.weight"] == "F32"
        assert stored["layers.0.q_proj.bias"] == "F32"

    def test_a_tied_embedding_is_named_as_the_head(self, tmp_path: Path) -> None:
        own(tmp_path, FewbitsConfig("int8", {"embed_tokens": "int8"}))
        (tmp_path / "config.json").write_text(
            json.dumps({"quantization_config": FewbitsConfig("nf4:g64", {"head|layers": "int8"}).to_dict()})
        )
        weight = found_in(open_folder(tmp_path))["embed_tokens.weight"]
        assert (weight.stored, weight.problem) == ("int8:row", "")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (without(f"{Q}_zero"), "int4:g32:zero needs zero too; the checkpoint is incomplete"),
            (without(Q), "int4:g32:zero needs codes too"),
            (without(f"{Q}_zero", f"{Q}_scale"), f"{Q} has codes but no scales"),
            (
                replaced(f"{Q}_offset", torch.ones(1)),
                "int4:g32:zero has no offset; config.json is of another",
            ),
            (
                replaced(f"{Q}_scale", torch.ones(33, 4)),
                r"scale F32 \[33, 4\], .* fit no weight in int4:g32:zero",
            ),
            (replaced(f"{Q}_scale", torch.ones(33, 3).double()), r"scale F64 \[33, 3\]"),
            (replaced(f"{Q}_scale", torch.tensor(1.0)), r"scale F32 \[\]"),
            (replaced(Q, torch.ones(33, 50, dtype=torch.uint8)), r"codes U8 \[33, 50\]"),
            (
                replaced("layers.0.experts.quantized_gate_up_proj_scale", torch.ones(2, 20, 2)),
                r"layers.0.experts.gate_up_proj: .* fit no weight",
            ),
        ],
    )
    def test_parts_that_are_missing_or_do_not_fit(self, tmp_path: Path, change: Change, message: str) -> None:
        config = FewbitsConfig("int4:g32:zero")
        model = Model()
        quantize_model(model, config)
        tensors = dict(model.state_dict())
        change(tensors)
        weights = found_in(write(tmp_path, tensors, config.to_dict()))
        problems = [weight.problem for weight in weights.values() if weight.problem]
        assert len(problems) == 1
        assert problems[0].startswith("layers.0.")
        assert re.search(message, problems[0])

    def test_another_config(self, tmp_path: Path) -> None:
        own(tmp_path, FewbitsConfig("nf4:g64:dq"))
        text = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(text.replace('"nf4:g64:dq"', '"skip"'))
        problems = {weight.problem for weight in found_in(open_folder(tmp_path)).values() if weight.quantized}
        assert (
            "layers.0.q_proj.weight: config.json names no format for it; give it one under modules"
            in problems
        )
        (tmp_path / "config.json").write_text(text.replace('"nf4:g64:dq"', '"nf9"'))
        with pytest.raises(
            CheckpointError, match=r"config.json, quantization_config: .*unknown format 'nf9'"
        ):
            stored_weights(open_folder(tmp_path))

    def test_huge_groups_do_not_make_it_slow(self, tmp_path: Path) -> None:
        """A hostile block size leaves millions of shapes to try."""
        tensors = {"a.weight": torch.zeros(997, 1, dtype=torch.uint8), "a.weight_scale": torch.ones(1, 1)}
        config = FewbitsConfig("int8:b16777216x16777216:zero")
        tensors["a.weight_zero"] = torch.zeros(1, 1, dtype=torch.uint8)
        folder = write(tmp_path, tensors, config.to_dict())
        assert "fit no weight" in found_in(folder)["a.weight"].problem


class TestBitsAndBytes:
    @pytest.mark.parametrize(
        ("name", "spelling"),
        [
            ("nf4", "nf4:g64"),
            ("fp4", "fp4:g64"),
            ("nf4_double", "nf4:g64:dq"),
            ("nf4_double_after_forward", "nf4:g64:dq"),
            ("nf4_bfloat16_storage", "nf4:g64"),
            ("nf4_transposed", "nf4:g64"),
            ("int8", "int8:row"),
        ],
    )
    def test_golden_files(self, name: str, spelling: str) -> None:
        folder = open_folder(GOLDEN / name)
        weights = found_in(folder)
        assert not [weight.problem for weight in weights.values() if weight.problem]
        quantized = [weight for weight in weights.values() if weight.quantized]
        assert len(quantized) >= 7
        for weight in quantized:
            assert (weight.stored, weight.schema) == (spelling, "bitsandbytes")
            assert weight.name.endswith("_proj.weight")
            (read,) = read_weight(folder, weight)
            assert tuple(read.shape) == weight.shape
            assert weight.count == math.prod(weight.shape or ())
        assert weights["lm_head.weight"].reason == "output head: kept unless named"
        assert weights["model.norm.weight"].reason == "1-dimensional"

    def damaged(self, path: Path, name: str, change: Change) -> StoredWeight:
        tensors = safetensors.torch.load_file(GOLDEN / name / "model.safetensors")
        change(tensors)
        folder = write(path, tensors, {"quant_method": "bitsandbytes"})
        return found_in(folder)[f"{UP}.weight"]

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("nf4", without(f"{UP}.weight.absmax"), "is not a whole bitsandbytes weight"),
            ("nf4", without(f"{UP}.weight"), "is not a whole bitsandbytes weight"),
            ("nf4", without(STATE), "is not a whole bitsandbytes weight"),
            ("int8", without(f"{UP}.weight"), "is not a whole bitsandbytes weight"),
            ("nf4", replaced(STATE, torch.full((9,), 91, dtype=torch.uint8)), "quant_state is not JSON"),
            ("nf4", replaced(STATE, u8(5000)), "quant_state is torch.uint8 of 5000 elements, not short JSON"),
            (
                "nf4",
                replaced(f"{UP}.weight.absmax", torch.ones(3)),
                r"scale of a \[80, 64\] weight in nf4:g64 is torch.float32 \[80\]; got torch.float32 \[3\]",
            ),
            ("int8", replaced(f"{UP}.SCB", torch.ones(3)), r"got .* \[3, 1\]"),
            ("int8", replaced(f"{UP}.weight_format", u8() + 1), "only 0 .* is known"),
        ],
    )
    def test_damaged(self, tmp_path: Path, name: str, change: Any, message: str) -> None:
        weight = self.damaged(tmp_path, name, change)
        assert weight.quantized
        assert weight.format is None
        assert weight.problem.startswith("model.layers.0.mlp.up_proj")
        assert re.search(message, weight.problem)

    def test_codes_without_scales(self, tmp_path: Path) -> None:
        weight = self.damaged(tmp_path, "int8", without(f"{UP}.SCB", f"{UP}.weight_format"))
        assert weight.problem == f"{UP}.weight has codes but no scales; the checkpoint is incomplete"

    def test_a_parameter_of_its_own(self, tmp_path: Path) -> None:
        """As bitsandbytes names parameters of modules that are no linear layers."""
        loaded = safetensors.torch.load_file(GOLDEN / "nf4" / "model.safetensors")
        tensors = {
            name.replace(f"{UP}.weight", "experts.up_proj"): tensor
            for name, tensor in loaded.items()
            if UP in name
        }
        weight = found_in(write(tmp_path, tensors))["experts.up_proj"]
        assert (weight.stored, weight.shape, weight.problem) == ("nf4:g64", (80, 64), "")


class TestOtherQuantizers:
    @pytest.mark.parametrize(
        ("config", "tensors", "stored"),
        [
            (
                {"quant_method": "gptq", "bits": 4},
                {
                    "x.qweight": i32(8, 32),
                    "x.qzeros": i32(1, 4),
                    "x.scales": torch.ones(1, 32).half(),
                    "x.g_idx": i32(64),
                },
                "gptq 4 bit",
            ),
            (
                {"quant_method": "awq", "bits": 8},
                {"x.qweight": i32(64, 8), "x.qzeros": i32(1, 8), "x.scales": torch.ones(1, 32).half()},
                "awq 8 bit",
            ),
            (
                {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"num_bits": 4}}}},
                {
                    "x.weight_packed": i32(32, 8),
                    "x.weight_scale": torch.ones(32, 1),
                    "x.weight_shape": torch.tensor([32, 64]),
                },
                "compressed-tensors 4 bit",
            ),
            (
                {"quant_method": "compressed-tensors"},
                {
                    "x.weight": u8(32, 64).view(torch.int8),
                    "x.weight_scale": torch.ones(32, 1),
                    "x.input_scale": torch.ones(1),
                },
                "compressed-tensors 8 bit",
            ),
            (
                {"quant_method": "fp8"},
                {"x.weight": u8(32, 64).view(torch.float8_e4m3fn), "x.weight_scale_inv": torch.ones(1, 1)},
                "fp8 8 bit",
            ),
            (
                {"quant_method": "modelopt"},
                {"x.weight": u8(32, 32), "x.weight_scale": torch.ones(32, 4), "x.weight_scale_2": u8()},
                "modelopt 4 bit",
            ),
            (
                {"quant_method": "mxfp4"},
                {"x.weight_blocks": u8(2, 16, 2, 16), "x.weight_scales": u8(2, 16, 2)},
                "mxfp4 4 bit",
            ),
        ],
    )
    def test_parts_go_to_their_weight(self, tmp_path: Path, config: Any, tensors: Any, stored: str) -> None:
        weights = found_in(write(tmp_path, {**tensors, "y.weight": torch.ones(4, 4)}, config))
        assert set(weights) == {"x.weight", "y.weight"}
        weight = weights["x.weight"]
        assert (weight.stored, weight.count, weight.schema, weight.format) == (stored, 64 * 32, "other", None)
        assert weight.problem == ""
        assert not weights["y.weight"].quantized

    def test_scales_of_nothing_are_tensors_of_their_own(self, tmp_path: Path) -> None:
        tensors = {
            "attn.weight_scale": torch.ones(1),
            "x.scales": torch.ones(1),
            "cls.weight": torch.ones(2, 2),
        }
        weights = found_in(write(tmp_path, tensors, {"quant_method": "gptq"}))
        assert set(weights) == set(tensors)
        assert not any(weight.quantized for weight in weights.values())

    @pytest.mark.parametrize(
        "config",
        [{"bits": "many"}, {"bits": 0}, {"bits": True}, {"config_groups": {"a": 3}}, {"config_groups": []}],
    )
    def test_odd_configs(self, tmp_path: Path, config: dict[str, Any]) -> None:
        folder = write(tmp_path, {"x.qweight": i32(8, 32)}, {"quant_method": ["gptq"], **config})
        assert found_in(folder)["x.weight"].stored == "['gptq'] 4 bit"


class TestPlain:
    def test_the_demo_model(self, demo_model: Path) -> None:
        weights = found_in(open_folder(demo_model))
        assert len(weights) == 38
        assert sum(weight.count for weight in weights.values()) == 3_279_104
        assert {weight.stored for weight in weights.values()} == {"BF16"}
        assert not any(weight.quantized or weight.reason or weight.problem for weight in weights.values())

    def test_names_that_resemble_parts(self, tmp_path: Path) -> None:
        tensors = {name: torch.ones(2, 2) for name in ("a.weight", "a.weight_scale", "b.scales", "c_scales")}
        assert set(found_in(write(tmp_path, tensors))) == set(tensors)

    def test_an_empty_tensor(self, tmp_path: Path) -> None:
        weight = found_in(write(tmp_path, {"a": torch.ones(0, 3)}))["a"]
        assert (weight.count, weight.bits_per_weight) == (0, 0.0)


_SUFFIXES = {
    "bitsandbytes": """weight weight.absmax weight.quant_map weight.nested_absmax weight.nested_quant_map SCB
        weight_format weight.quant_state.bitsandbytes__nf4 weight.quant_state.bitsandbytes__x""",
    "fewbits": """weight weight_scale weight_scale_codes weight_scale_scale weight_scale_offset weight_zero
        weight_offset quantized_weight_codes quantized_weight_scale""",
    "gptq": "weight qweight scales weight_packed weight_scale weight_blocks weight_scales",
}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_parts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever the sizes and dtypes of a weight's parts: a problem at most, no error."""
    method = data.draw(st.sampled_from(sorted(_SUFFIXES)))
    suffixes = data.draw(st.sets(st.sampled_from(_SUFFIXES[method].split()), min_size=1))
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    wanted = {
        f"x.{suffix}": (data.draw(st.sampled_from(sorted(ELEMENT_BITS))), data.draw(shapes))
        for suffix in suffixes
    }
    wanted = {
        name: (dtype, shape)
        for name, (dtype, shape) in wanted.items()
        if math.prod(shape) * ELEMENT_BITS[dtype] % 8 == 0
    }
    header, places = layout(wanted, {})
    path = tmp_path_factory.getbasetemp() / "any_parts"
    path.mkdir(exist_ok=True)
    content = data.draw(st.binary(min_size=8, max_size=8))
    size = max((info.end for info in places.values()), default=len(header)) - len(header)
    (path / "model.safetensors").write_bytes(header + (content * (size // 8 + 1))[:size])
    config = {"quant_method": method} | (
        {"format": data.draw(st.sampled_from(FORMATS))} if method == "fewbits" else {}
    )
    (path / "config.json").write_text(json.dumps({"quantization_config": config}))
    folder = open_folder(path)
    for weight in found_in(folder).values():
        assert weight.count >= 0
        if weight.format is not None:
            assert weight.problem == ""
            assert all(read.format == weight.format for read in _read_or_refuse(folder, weight))


def _read_or_refuse(folder: Folder, weight: StoredWeight) -> list[Any]:
    try:
        return list(read_weight(folder, weight))
    except ValueError:
        return []
