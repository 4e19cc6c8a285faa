"""Preparing for FSDP: other dtypes hold the same bits, and layers compute the same with them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import GptOssConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import fewbits
from fewbits import columns, distributed
from fewbits.config import FewbitsConfig
from fewbits.experts import QuantExperts
from fewbits.model import dequantize_model, fill, quantize_model
from fewbits.nn import QuantEmbedding, QuantLinear
from fewbits.report import report

FORMATS = [
    "nf4:g64",
    "nf4:g64:dq",
    "fp4:g32",
    "int8:row",
    "int8:row@int8:t6",
    "int4:g32:f16:zero",
    "int3:g32:zero",
    "fp8_e5m2:row",
    "mxfp4",
    "nvfp4",
]
DTYPES = [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
every_format = pytest.mark.parametrize("spelling", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def linear(spelling: str, out: int = 37, columns: int = 67) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(columns, out))
    quantize_model(model, FewbitsConfig({"format": spelling}))
    return model.requires_grad_(False)


def parts(layer: QuantLinear | QuantEmbedding) -> list[torch.Tensor]:
    return list(layer.quantized_weight().parts().values())


def names(model: nn.Module) -> list[str]:
    return list(model.state_dict())


class TestColumns:
    @every_dtype
    @pytest.mark.parametrize("count", [0, 1, 3, 8, 13])
    @pytest.mark.parametrize("own", [torch.uint8, torch.float16, torch.float32])
    def test_every_byte_comes_back(self, dtype, count, own):
        part = torch.randint(0, 256, (count * own.itemsize,), dtype=torch.uint8).view(own)
        held = columns.as_column(part, dtype)
        assert held.dtype == dtype
        assert held.shape == (-(-part.nbytes // dtype.itemsize), 1)
        again = columns.from_column(held, part.shape, own)
        assert torch.equal(again.view(torch.uint8), part.view(torch.uint8))

    @every_dtype
    def test_stacks_keep_their_first_dimension(self, dtype):
        part = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
        held = columns.as_column(part, dtype, stack=True)
        assert held.shape == (3, -(-35 // dtype.itemsize))
        assert torch.equal(columns.from_column(held, (5, 7), torch.uint8, stack=True), part)

    def test_no_byte_moves_where_they_fit(self):
        part = torch.randn(6, 4)
        held = columns.as_column(part, torch.bfloat16)
        assert held.data_ptr() == part.data_ptr() == columns.from_column(held, (6, 4), part.dtype).data_ptr()

    def test_an_offset_between_elements_costs_a_copy(self):
        """As in a flat parameter of FSDP1."""
        part = torch.randn(5)
        flat = torch.zeros(13, dtype=torch.bfloat16)
        held = flat[3:]
        held.copy_(columns.as_column(part, torch.bfloat16).view(-1))
        assert torch.equal(columns.from_column(held.view(-1, 1), (5,), torch.float32), part)


class TestEveryFormatInEveryDtype:
    @every_format
    @every_dtype
    def test_nothing_changes_but_how_it_is_held(self, spelling, dtype):
        model = linear(spelling)
        before, exact = copy.deepcopy(model), parts(model[0])
        x = torch.randn(3, 67)
        with torch.no_grad():
            expected = model(x)  # also remembers addresses
        distributed.prepare(model, dtype)
        assert model[0].held == dtype
        assert names(model) == names(before)
        held = [tensor for name, tensor in model.named_parameters() if "bias" not in name]
        assert all(t.dtype == dtype and t.dim() == 2 and not t.requires_grad for t in held)
        for one, other in zip(parts(model[0]), exact, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        assert torch.equal(model[0].dequantize(), before[0].dequantize())
        assert report(model).bits_per_weight == pytest.approx(report(before).bits_per_weight, rel=0.02)

    @every_format
    def test_gradients_are_the_same(self, spelling):
        model = linear(spelling)
        held = copy.deepcopy(model)
        distributed.prepare(held)
        gradients = []
        for one in (model, held):
            torch.manual_seed(2)
            x = torch.randn(3, 67, requires_grad=True)
            functional.gelu(one(x)).sum().backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients)

    @every_format
    def test_casts_and_copies_keep_the_bits(self, spelling):
        model = linear(spelling)
        exact = parts(model[0])
        distributed.prepare(model, torch.bfloat16)
        model = copy.deepcopy(model).half().to("cpu", torch.float64)
        assert model[0].held == torch.bfloat16
        assert model[0].bias.dtype == model[0].dequantize().dtype == torch.float64
        assert all(torch.equal(*pair) for pair in zip(parts(model[0]), exact, strict=True))

    @pytest.mark.parametrize("spelling", ["nf4:g64:dq", "int8:row@int8:t6"])
    def test_it_compiles_without_graph_breaks(self, spelling):
        model = linear(spelling)
        distributed.prepare(model, torch.bfloat16)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        x = torch.randn(3, 67)
        assert torch.equal(compiled(x), model(x))


def test_none_gives_back_what_was():
    model = linear("nf4:g64:dq")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    distributed.prepare(model, torch.bfloat16)
    distributed.prepare(model, torch.float64)
    model[0].hold(None)
    assert names(model) == list(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
def test_codes_choose_the_dtype_when_none_is_given(storage):
    model = nn.Sequential(nn.Linear(64, 32))
    quantize_model(model, FewbitsConfig({"format": "nf4:g64", "storage_dtype": storage}))
    codes = model[0].weight
    distributed.prepare(model)
    assert {tensor.dtype for name, tensor in model.named_parameters() if "bias" not in name} == {
        getattr(torch, storage)
    }
    assert model[0].weight.data_ptr() == codes.data_ptr()


def test_a_weight_stored_later_is_held_the_same_way():
    model = linear("nf4:g64:dq")
    distributed.prepare(model, torch.bfloat16)
    weight = torch.randn(37, 67)
    model[0].store(fill(model[0], "weight", weight, "weight"))
    assert {model[0].weight.dtype, model[0].weight_scale_codes.dtype} == {torch.bfloat16}
    assert model[0].quantized_weight() == fewbits.quantize(weight, "nf4:g64:dq")


def test_dequantized_it_is_the_plain_layer():
    model = linear("nf4:g64")
    decoded = model[0].dequantize()
    distributed.prepare(model)
    dequantize_model(model)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, decoded)


def test_tied_layers_stay_tied():
    torch.manual_seed(0)
    sizes = {"vocab_size": 33, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True))
    modules = {"embed_tokens": "int8", "lm_head": "int8"}
    quantize_model(model, FewbitsConfig("nf4:g64", modules=modules))
    ids = torch.arange(8).view(1, 8)
    before, size = model(ids).logits, sum(tensor.nbytes for tensor in model.parameters())
    embedding, head = model.model.embed_tokens, model.lm_head
    assert not isinstance(embedding.weight_scale, nn.Parameter)
    distributed.prepare(model)
    for name in ("weight", "weight_scale"):
        assert getattr(embedding, name) is getattr(head, name)
        assert isinstance(getattr(head, name), nn.Parameter)
    assert not any("weight_scale" in name for name, _ in model.named_buffers())
    assert torch.equal(model(ids).logits, before)
    assert sum(tensor.nbytes for tensor in model.parameters()) > size  # scales count as parameters now


def routed_experts() -> nn.Module:
    config = MixtralConfig(hidden_size=48, intermediate_size=24, num_local_experts=5, num_experts_per_tok=2)
    return MixtralExperts(config)


def other_experts() -> nn.Module:
    config = GptOssConfig(hidden_size=48, intermediate_size=24, num_local_experts=5, num_experts_per_tok=2)
    return GptOssExperts(config)


@every_dtype
@pytest.mark.parametrize("spelling", ["nf4:g64:dq", "int8", "int4:g32:f16:zero"])
@pytest.mark.parametrize("kind", [routed_experts, other_experts])
def test_experts(kind, spelling, dtype):
    torch.manual_seed(0)
    source = kind()
    for parameter in source.parameters():
        nn.init.normal_(parameter, 0, 0.2)
    model = nn.Sequential(source)
    quantize_model(model, FewbitsConfig({"format": spelling}))
    held = copy.deepcopy(model)
    distributed.prepare(held, dtype)
    experts: QuantExperts = held[0]
    for weight in experts.weights():
        assert torch.equal(experts.dequantize(weight), model[0].dequantize(weight))
        assert experts.quantized_weight(weight, 4) == model[0].quantized_weight(weight, 4)
        assert all(len(getattr(experts, name)) == 5 for name in experts.part_names(weight).values())
    x, routes = torch.randn(7, 48), torch.tensor([[0, 1], [2, 4], [4, 0], [1, 2], [0, 2], [4, 1], [2, 1]])
    weights = torch.rand(7, 2)
    with torch.no_grad():
        assert torch.equal(experts(x, routes, weights), model[0](x, routes, weights))
    assert {entry.shape for entry in report(held).quantized} == {
        entry.shape for entry in report(model).quantized
    }


class TestErrors:
    def test_a_dtype_that_cannot_hold_bytes(self):
        with pytest.raises(ValueError, match=r"cannot hold codes as torch\.complex64; use one of uint8, "):
            distributed.prepare(linear("nf4:g64"), torch.complex64)

    @every_format
    @pytest.mark.parametrize("training", [True, False])
    def test_a_cast_is_noticed_and_says_what_to_call(self, spelling, training):
        """What mixed precision does to a part: a new tensor in its place."""
        model = linear(spelling)
        floating = [name for name, p in model[0].named_parameters() if p.is_floating_point()]
        attribute = next((name for name in floating if name != "bias"), "")
        if not attribute:
            pytest.skip("no part of it is floating")
        cast = getattr(model[0], attribute).to(torch.bfloat16)
        setattr(model[0], attribute, nn.Parameter(cast, requires_grad=False))
        x = torch.randn(3, 67, requires_grad=training)
        with pytest.raises(
            ValueError, match=rf"^{attribute} of .*bfloat16 now.*distributed\.prepare\(model\)"
        ):
            model(x)

    @pytest.mark.parametrize("held", [torch.bfloat16, torch.float32])
    def test_a_cast_of_held_codes_is_noticed_also_in_the_same_size(self, held):
        model = linear("nf4:g64")
        distributed.prepare(model, held)
        model[0].weight.data = model[0].weight.data.to(torch.float16)
        with pytest.raises(ValueError, match=r"^weight of .*param_dtype of mixed precision"):
            model(torch.randn(3, 67))


class TestLoadedInOneOfSeveralProcesses:
    @pytest.fixture(autouse=True)
    def _alone(self, monkeypatch):
        for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
            monkeypatch.delenv(name, raising=False)

    @pytest.mark.parametrize(
        ("environment", "held"),
        [
            ({}, None),
            ({"WORLD_SIZE": ""}, None),
            ({"WORLD_SIZE": "1", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, None),
            ({"WORLD_SIZE": "2"}, torch.uint8),
            ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, torch.uint8),
            ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, torch.uint8),
            ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, torch.bfloat16),
            ({"WORLD_SIZE": "2", "FSDP_VERSION": "1"}, torch.uint8),
        ],
    )
    def test_who_prepares(self, monkeypatch, environment, held):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        model = linear("nf4:g64")
        assert distributed.prepare_loaded(model, torch.bfloat16) is (held is not None)
        assert model[0].held == held

    def test_float_storage_is_what_fsdp1_gets(self, monkeypatch):
        for name, value in {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}.items():
            monkeypatch.setenv(name, value)
        model = nn.Sequential(nn.Linear(64, 32))
        quantize_model(model, FewbitsConfig({"format": "nf4:g64", "storage_dtype": "float32"}))
        distributed.prepare_loaded(model, torch.bfloat16)
        assert model[0].held == torch.float32

    def test_not_what_lies_on_the_disk(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        model = linear("nf4:g64").to("meta")
        assert not distributed.prepare_loaded(model, torch.bfloat16)
        assert model[0].held is None

    def test_not_a_model_without_quantized_layers(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert not distributed.prepare_loaded(nn.Linear(2, 2), torch.bfloat16)
