"""quantize_model and back: which layers are swapped, ties, the meta device, refusals."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fewbits.config import BitsAndBytesConfig, FewbitsConfig
from fewbits.format import Format, Scheme
from fewbits.model import dequantize_model, quantize_model
from fewbits.nn import QuantEmbedding, QuantLinear, QuantModule
from fewbits.recipe import Recipe, Rule
from fewbits.report import report

NF4, INT8 = Scheme.parse("nf4:g64"), Scheme.parse("int8:row")


def named(*pairs: tuple[str, Scheme | None]) -> Recipe:
    return Recipe(tuple(Rule(pattern, scheme, f"because of {pattern}") for pattern, scheme in pairs))


class Small(nn.Module):
    """An embedding, two layers, and a head that may be tied to the embedding."""

    def __init__(self, tied: bool = False, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embed = nn.Embedding(50, 64, dtype=dtype)
        up, down = nn.Linear(64, 96, dtype=dtype), nn.Linear(96, 64, bias=False, dtype=dtype)
        self.layers = nn.ModuleList([up, down])
        self.norm = nn.LayerNorm(64, dtype=dtype)
        self.head = nn.Linear(64, 50, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden).relu()
        return self.head(self.norm(hidden))


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, QuantModule)}


@pytest.mark.parametrize(
    "recipe",
    [
        "nf4:g64",
        Format.parse("nf4:g64"),
        NF4,
        FewbitsConfig("nf4:g64"),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=[]),
        named((".*", NF4)),
    ],
    ids=lambda recipe: type(recipe).__name__,
)
def test_all_linear_layers_are_quantized_in_place_by_any_kind_of_recipe(recipe):
    model = Small()
    result = quantize_model(model, recipe)
    assert kinds(model) == {"layers.0": QuantLinear, "layers.1": QuantLinear, "head": QuantLinear}
    assert [e.name for e in result.quantized] == ["layers.0.weight", "layers.1.weight", "head.weight"]
    assert {entry.stored for entry in result.quantized} == {"nf4:g64"}
    assert result == report(model)


SCHEMES = ["nf4:g64:dq", "int8:row", "int4:g32:f16:zero", "fp8_e4m3:tensor", "mxfp4"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_quantized_model_computes_what_the_dequantized_one_does(scheme):
    model, tokens = Small(), torch.randint(0, 50, (2, 7))
    original = model(tokens)
    quantize_model(model, scheme)
    quantized = model(tokens)
    plain = copy.deepcopy(model)
    dequantize_model(plain)
    torch.testing.assert_close(quantized, plain(tokens), rtol=1e-4, atol=1e-4)
    assert 0 < (quantized - original).norm() < 0.5 * original.norm()


def test_a_sequential_of_layers_with_and_without_bias():
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Sequential(nn.Linear(30, 10, bias=False)))
    bias = model[0].bias
    quantize_model(model, "nf4:g64")
    assert set(kinds(model)) == {"0", "2.0"}
    assert model[0].bias is bias, "the very same parameter: an optimizer may hold it"
    assert bias.requires_grad
    assert model[2][0].bias is None


def test_training_mode_carries_over():
    model = Small().eval()
    quantize_model(model, "nf4:g64")
    assert not any(module.training for module in model.modules())
    dequantize_model(model)
    assert not any(module.training for module in model.modules())


def test_rules_decide_in_order_and_their_reason_is_reported():
    model = Small()
    result = quantize_model(model, named(("layers.0", None), ("layers", INT8), (".*", NF4)))
    reasons = {entry.name: (entry.stored, entry.reason) for entry in result.entries}
    assert reasons["layers.0.weight"] == ("float32", "because of layers.0")
    assert reasons["layers.1.weight"] == ("int8:row", "")
    assert reasons["head.weight"] == ("nf4:g64", "")


def test_embeddings_are_quantized_only_when_a_rule_names_them():
    model = Small()
    quantize_model(model, "nf4:g64")
    assert type(model.embed) is nn.Embedding
    model = Small()
    quantize_model(model, FewbitsConfig("nf4:g64", modules={"embed": "int8:row"}))
    assert type(model.embed) is QuantEmbedding
    assert str(model.embed.scheme) == "int8:row"
    assert model(torch.randint(0, 50, (2, 7))).shape == (2, 7, 50)


def test_an_embedding_with_max_norm_is_kept_with_a_reason():
    model = nn.Sequential(nn.Embedding(8, 64, max_norm=1.0))
    (entry,) = quantize_model(model, named(("0", NF4))).entries
    assert not entry.quantized
    assert "max_norm" in entry.reason


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("rules", [named((".*", NF4)), named(("0", NF4))], ids=["default", "named"])
def test_a_subclass_of_linear_is_kept_with_a_reason_even_when_named(rules):
    model = nn.Sequential(Doubling(64, 8))
    result = quantize_model(model, rules)
    assert type(model[0]) is Doubling
    (entry,) = [entry for entry in result.entries if entry.name == "0.weight"]
    assert not entry.quantized
    assert "Doubling" in entry.reason
    assert "subclass" in entry.reason


def test_conv1d_layers_are_quantized_by_output_and_given_back_transposed():
    model = nn.Sequential(Conv1D(12, 65))
    nn.init.normal_(model[0].bias)
    before, x = model[0].weight.detach().clone(), torch.randn(3, 65)
    assert before.shape == (65, 12)
    quantize_model(model, "int8:row")
    assert isinstance(model[0], QuantLinear)
    scale = model[0].weight_scale.view(-1)
    assert torch.equal(scale, before.abs().amax(0)), "one scale for each output"
    y = model(x)
    dequantize_model(model)
    assert type(model[0]) is Conv1D
    assert model[0].weight.shape == (65, 12)
    assert (model[0].weight - before).abs().max() <= scale.max() / 254 * 1.001
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


# --- ties -------------------------------------------------------------------------------------------


def test_tied_layers_are_kept_unless_named_and_stay_tied():
    model = Small(tied=True)
    result = quantize_model(model, "nf4:g64")
    assert set(kinds(model)) == {"layers.0", "layers.1"}
    assert model.head.weight is model.embed.weight
    (entry,) = [entry for entry in result.entries if entry.name == "embed.weight"]
    assert "tied" in entry.reason or "embedding" in entry.reason


@pytest.mark.parametrize("name", ["embed", "head"])
def test_naming_one_of_two_tied_layers_names_both(name):
    model, tokens = Small(tied=True), torch.randint(0, 50, (2, 7))
    before = model.embed.weight.detach().clone()
    result = quantize_model(model, named((name, NF4)))
    assert kinds(model) == {"embed": QuantEmbedding, "head": QuantLinear}
    assert torch.equal(model.embed.dequantize(), model.head.dequantize())
    assert 0 < (model.embed.dequantize() - before).norm() < 0.2 * before.norm()
    tensors = {id(t) for t in [*model.embed.parameters(), *model.embed.buffers()]}
    assert tensors == {id(t) for t in [*model.head.parameters(), *model.head.buffers()]}, "one copy"
    assert [entry.name for entry in result.quantized] == ["embed.weight"]
    assert model(tokens).shape == (2, 7, 50)


@pytest.mark.parametrize("name", ["embed", "head"])
def test_ties_come_back_when_dequantized(name):
    model, tokens = Small(tied=True), torch.randint(0, 50, (2, 7))
    quantize_model(model, FewbitsConfig("int8:row", modules={name: "nf4:g64"}))
    decoded, y = model.embed.dequantize(), model(tokens)
    dequantize_model(model)
    assert kinds(model) == {}
    assert (type(model.embed), type(model.head)) == (nn.Embedding, nn.Linear)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, decoded)
    torch.testing.assert_close(model(tokens), y, rtol=1e-4, atol=1e-4)


def test_tied_layers_with_two_schemes_are_refused_by_name():
    message = "embed and head share one weight; give them one format, not int8:row, nf4:g64"
    with pytest.raises(ValueError, match=message):
        quantize_model(Small(tied=True), named(("embed", NF4), ("head", INT8)))


@pytest.mark.parametrize("name", ["0", "1", "2"])
def test_naming_one_of_three_tied_layers_names_all(name):
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    model[1].weight = model[2].weight = model[0].weight
    result = quantize_model(model, named((name, NF4)))
    assert set(kinds(model)) == {"0", "1", "2"}
    assert model[0].weight is model[1].weight is model[2].weight
    assert [entry.name for entry in result.quantized] == ["0.weight"]


def test_a_layer_used_twice_is_quantized_once_in_both_places():
    layer = nn.Linear(64, 64, bias=False)
    model, x = nn.Sequential(layer, nn.ReLU(), layer), torch.randn(3, 64)
    result = quantize_model(model, named(("0", NF4)))
    assert torch.equal(model[0].dequantize(), model[2].dequantize())
    assert len(result.quantized) == 1
    y = model(x)
    dequantize_model(model)
    assert model[0].weight is model[2].weight
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


class Head(nn.Module):
    def __init__(self, table: nn.Parameter):
        super().__init__()
        self.table = table

    def forward(self, x):
        return x @ self.table.T


def test_a_layer_that_shares_its_weight_with_another_kind_of_module_is_kept_and_stays_tied():
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, Head(layer.weight))
    result = quantize_model(model, "nf4:g64")
    (entry,) = [entry for entry in result.entries if entry.name == "0.weight"]
    assert not entry.quantized
    assert "tied" in entry.reason
    assert model[0].weight is model[1].table


# --- meta device ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_on_the_meta_device_only_the_layers_are_swapped(tied):
    with torch.device("meta"):
        model = Small(tied=tied)
    real = Small(tied=tied)
    recipe = FewbitsConfig("nf4:g64:dq", modules={"head": "int8:row"})
    result, expected = quantize_model(model, recipe), quantize_model(real, recipe)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert kinds(model) == kinds(real)
    assert {k: (v.shape, v.dtype) for k, v in model.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in real.state_dict().items()
    }
    columns = ("name", "shape", "stored", "nbytes", "quantized", "reason")
    assert [[getattr(e, c) for c in columns] for e in result.entries] == [
        [getattr(e, c) for c in columns] for e in expected.entries
    ]
    assert all(entry.relative_error is None for entry in result.entries)
    if tied:
        return  # torch's to_empty would untie any layers
    model.to_empty(device="cpu").load_state_dict(real.state_dict(), strict=True)
    tokens = torch.randint(0, 50, (2, 7))
    assert torch.equal(model(tokens), real(tokens))


# --- back to plain layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, torch.float16])
def test_dequantizing_leaves_plain_layers_with_exactly_the_decoded_weights(dtype, wanted):
    model = Small(dtype=dtype)
    biases = model.layers[0].bias.detach().clone()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    quantize_model(model, FewbitsConfig("nf4:g64:dq", modules={"embed": "int8:row"}))
    decoded = {name: model.get_submodule(name).dequantize() for name in kinds(model)}
    dequantize_model(model, wanted)
    assert kinds(model) == {}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes
    for name, weight in decoded.items():
        module = model.get_submodule(name)
        assert type(module) in (nn.Linear, nn.Embedding)
        assert weight.dtype == dtype
        assert module.weight.dtype == (wanted or dtype)
        assert torch.equal(module.weight, weight.to(wanted or dtype))
    assert torch.equal(model.layers[0].bias, biases.to(wanted or dtype))
    assert report(model).quantized == ()


def test_quantizing_again_leaves_quantized_layers_alone():
    model = Small()
    quantize_model(model, named(("layers.0", INT8)))
    first = model.layers[0]
    result = quantize_model(model, "nf4:g64")
    assert model.layers[0] is first
    stored = {entry.name: entry.stored for entry in result.quantized}
    assert stored == {"layers.0.weight": "int8:row", "layers.1.weight": "nf4:g64", "head.weight": "nf4:g64"}


# --- refusals ---------------------------------------------------------------------------------------


def test_a_weight_with_nan_is_refused_by_its_full_name():
    model = Small()
    model.layers[1].weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"^layers\.1\.weight holds NaN"):
        quantize_model(model, "nf4:g64")


def test_a_model_that_is_itself_a_layer_is_refused_with_a_way_out():
    layer = nn.Linear(64, 8)
    with pytest.raises(ValueError, match="Sequential"):
        quantize_model(layer, "nf4:g64")


def test_an_unknown_format_changes_nothing():
    model = Small()
    with pytest.raises(ValueError, match="nf5"):
        quantize_model(model, "nf5:g64")
    assert kinds(model) == {}


def test_the_weights_themselves_are_not_written_to():
    model = Small()
    weight = model.layers[0].weight
    before = weight.detach().clone()
    quantize_model(model, "nf4:g64:dq")
    assert torch.equal(weight, before)
