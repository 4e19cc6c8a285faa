"""Quantized layers: they compute what the dequantized layer does, and no cast ever touches their bits."""

import copy
import io
import mmap
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from fewbits import backends, machine, reference
from fewbits.config import FewbitsConfig
from fewbits.experts import QuantExperts
from fewbits.format import Scheme
from fewbits.model import quantize_model
from fewbits.nn import QuantEmbedding, QuantLinear
from fewbits.recipe import Recipe, Rule

FORMATS = [
    "nf4:g64",
    "nf4:g64:dq",
    "fp4:g32",
    "int8:row",
    "int4:g32:f16:zero",
    "fp8_e5m2:row",
    "mxfp4",
    "nvfp4",
]
every_format = pytest.mark.parametrize("spelling", FORMATS)
STORAGES = ["uint8", "bfloat16", "float16", "float32"]
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def quantized(layer: nn.Module, scheme: Scheme | str) -> nn.Module:
    """The quantized layer that takes the place of `layer`."""
    model = nn.Sequential(layer)
    quantize_model(model, Recipe((Rule("0", Scheme.parse(scheme), "test"),)))
    return model[0]


def stored_bits(layer: nn.Module) -> dict[str, tuple[torch.dtype, torch.Tensor]]:
    """Every parameter and buffer but the biases: (dtype, bits)."""
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return {
        name: (tensor.dtype, tensor.detach().contiguous().view(INTEGER[tensor.element_size()]).clone())
        for name, tensor in tensors.items()
        if "bias" not in name
    }


def same_bits(one: nn.Module, other: dict) -> bool:
    mine = stored_bits(one)
    return mine.keys() == other.keys() and all(
        mine[name][0] == dtype and torch.equal(mine[name][1], bits) for name, (dtype, bits) in other.items()
    )


# --- forward ----------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_computes_what_the_dequantized_one_does(spelling, bias):
    source = nn.Linear(65, 12, bias=bias)
    layer = quantized(source, spelling)
    assert isinstance(layer, QuantLinear)
    assert isinstance(layer, nn.Linear)
    assert layer.dequantize().dtype == torch.float32
    for shape in ((65,), (3, 65), (2, 3, 65), (0, 65)):
        x = torch.randn(shape)
        truth = x.double() @ layer.dequantize().double().T + (source.bias.double() if bias else 0)
        torch.testing.assert_close(layer(x).double(), truth, rtol=1e-4, atol=1e-4)
    assert layer.weight.dtype in (torch.uint8, torch.int8)
    assert repr(layer) == f"QuantLinear(in_features=65, out_features=12, bias={bias}, {layer.scheme})"


@every_format
def test_an_embedding_returns_the_dequantized_rows_in_the_dtype_it_had(spelling):
    source = nn.Embedding(23, 33, padding_idx=2, dtype=torch.bfloat16)
    layer = quantized(source, spelling)
    assert isinstance(layer, QuantEmbedding)
    assert layer.padding_idx == 2
    indices = torch.tensor([[0, 22, 2], [5, 5, 1]])
    rows = layer(indices)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, layer.dequantize()[indices])
    with pytest.raises(IndexError):
        layer(torch.tensor([23]))


def test_llm_int8_layers_quantize_their_input():
    layer = quantized(nn.Linear(64, 8), "int8:row@int8:t6")
    plain = quantized(nn.Linear(64, 8), "int8:row")
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(4, 64)
    x[:, 3] = 50
    assert not torch.equal(layer(x), plain(x))
    torch.testing.assert_close(layer(x), plain(x), rtol=0.05, atol=0.1)


def test_the_result_has_the_dtype_of_the_input_whatever_the_compute_dtype():
    for computed in (None, "bfloat16", "float32", "float16"):
        layer = quantized(nn.Linear(64, 8), replace(Scheme.parse("nf4:g64"), compute_dtype=computed))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert layer(torch.randn(3, 64, dtype=dtype)).dtype == dtype


def test_the_compute_dtype_is_the_one_multiplied_in():
    layer = quantized(nn.Linear(64, 8), replace(Scheme.parse("nf4:g64"), compute_dtype="bfloat16"))
    x = torch.randn(3, 64)
    weight, bias = layer.dequantize().bfloat16(), layer.bias.bfloat16()
    y = layer(x)
    assert torch.equal(y, y.bfloat16().float())
    torch.testing.assert_close(
        y, nn.functional.linear(x.bfloat16(), weight, bias).float(), rtol=0.02, atol=0.02
    )


def test_under_autocast_the_result_has_its_dtype_like_any_linear_layer():
    layer = quantized(nn.Linear(64, 8), "nf4:g64")
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == nn.Linear(64, 8)(x).dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("spelling", ["nf4:g64", "int8:row@int8:t6"])
def test_under_autocast_an_explicit_compute_dtype_is_still_the_one_multiplied_in(spelling):
    layer = quantized(nn.Linear(64, 8), replace(Scheme.parse(spelling), compute_dtype="float32"))
    x = torch.randn(3, 64)
    alone = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x).float(), alone.to(layer(x).dtype).float())


def test_gradients_reach_the_input_and_a_bias_that_wants_them():
    layer = quantized(nn.Linear(65, 12), "nf4:g64:dq")
    layer.bias.requires_grad_(True)
    x = torch.randn(4, 65, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(4, 65))
    assert torch.equal(layer.bias.grad, torch.full((12,), 4.0))
    assert all(not p.requires_grad for name, p in layer.named_parameters() if name != "bias")


# --- bits survive -----------------------------------------------------------------------------------

CASTS = {
    "to(bfloat16)": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to(cpu, float16)": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "float": (lambda m: m.float(), torch.float32),
    "double": (lambda m: m.double(), torch.float64),
    "type": (lambda m: m.type(torch.float64), torch.float64),
}
every_cast = pytest.mark.parametrize(("cast", "dtype"), CASTS.values(), ids=CASTS)
COPIES = {"copy": copy.deepcopy, "pickle": lambda module: pickle.loads(pickle.dumps(module))}
every_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


@every_cast
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("spelling", ["nf4:g64", "nf4:g64:dq", "fp4:g64:f16"])
def test_casting_changes_the_bias_and_never_codes_or_scales(spelling, storage, cast, dtype):
    layer = quantized(nn.Linear(64, 8), replace(Scheme.parse(spelling), storage_dtype=storage))
    assert layer.weight.dtype == getattr(torch, storage)
    before, decoded = stored_bits(layer), layer.dequantize()
    assert cast(nn.Sequential(layer))[0] is layer
    assert same_bits(layer, before)
    assert layer.dequantize().dtype == layer.bias.dtype == dtype
    assert torch.equal(layer.dequantize(), decoded.to(dtype))
    assert torch.equal(layer.float().dequantize(), decoded), "nothing was rounded on the way"


@every_cast
@every_format
def test_an_embedding_returns_the_dtype_it_was_cast_to(spelling, cast, dtype):
    layer, indices = quantized(nn.Embedding(8, 64), spelling), torch.tensor([3, 0, 7])
    rows = layer(indices)
    cast(layer)
    assert layer(indices).dtype == dtype
    assert torch.equal(layer(indices), rows.to(dtype))


@every_cast
@pytest.mark.parametrize(
    "spelling", ["int8:row", "int4:g32:f16:zero", "int2:row:bf16", "fp8_e4m3:b4x8", "nvfp4"]
)
def test_casting_leaves_the_scales_of_other_formats_alone(spelling, cast, dtype):
    layer, table = quantized(nn.Linear(64, 8), spelling), quantized(nn.Embedding(8, 64), spelling)
    before = stored_bits(layer), stored_bits(table)
    cast(layer), cast(table)
    assert same_bits(layer, before[0])
    assert same_bits(table, before[1])
    assert layer.bias.dtype == dtype


@pytest.mark.parametrize("storage", STORAGES)
def test_the_meta_device_and_back_keep_shapes_and_dtypes(storage):
    layer = quantized(nn.Linear(64, 8), replace(Scheme.parse("nf4:g64:dq"), storage_dtype=storage))
    kinds = {name: (t.shape, t.dtype) for name, t in layer.state_dict().items()}
    layer.to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert {name: (t.shape, t.dtype) for name, t in layer.state_dict().items()} == kinds
    assert layer(torch.randn(3, 64, device="meta")).shape == (3, 8)
    layer.to_empty(device="cpu")
    assert {name: (t.shape, t.dtype) for name, t in layer.state_dict().items()} == kinds


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("scales", ["parameters", "buffers"])
def test_state_dicts_load_strictly_and_bit_for_bit(storage, scales):
    scheme = replace(Scheme.parse("nf4:g64:dq"), storage_dtype=storage)
    source = quantized(nn.Linear(64, 8), scheme)
    other = QuantLinear(64, 8, True, scheme, scales=scales)
    assert list(other.load_state_dict(source.state_dict(), strict=True).missing_keys) == []
    assert same_bits(other, stored_bits(source))
    assert torch.equal(other.dequantize(), source.dequantize())
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=True)
    fresh = QuantLinear(64, 8, True, scheme)
    fresh.load_state_dict(read, strict=True, assign=True)
    assert same_bits(fresh, stored_bits(source))


def test_a_state_dict_names_its_parts():
    layer = quantized(nn.Linear(64, 8), "nf4:g64:dq")
    assert set(layer.state_dict()) == {
        "weight", "weight_scale_codes", "weight_scale_scale", "weight_scale_offset", "bias",
    }  # fmt: skip
    assert set(quantized(nn.Embedding(8, 64), "int4:g32:zero").state_dict()) == {
        "weight", "weight_scale", "weight_zero",
    }  # fmt: skip


def test_buffers_that_are_shared_stay_out_of_the_state_dict():
    layer = QuantLinear(64, 8, False, Scheme.parse("nf4:g64"), scales="shared")
    assert set(layer.state_dict()) == {"weight"}
    assert dict(layer.named_buffers()).keys() == {"weight_scale"}


@every_copy
@pytest.mark.parametrize("storage", STORAGES)
def test_copies_are_equal_and_independent(storage, copied):
    layer = quantized(nn.Linear(64, 8), replace(Scheme.parse("nf4:g64:dq"), storage_dtype=storage))
    twin, x = copied(layer), torch.randn(3, 64)
    assert same_bits(twin, stored_bits(layer))
    assert twin.scheme == layer.scheme
    assert torch.equal(twin(x), layer(x))
    before = stored_bits(layer)
    twin.weight.data.zero_()
    assert same_bits(layer, before)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("scheme", [*FORMATS, "int8:row@int8:t6"])
def test_codes_held_as_floats_are_the_same_bytes_and_compute_the_same(scheme, storage):
    source = nn.Linear(64, 8)
    plain = quantized(copy.deepcopy(source), scheme)
    layer = quantized(source, replace(Scheme.parse(scheme), storage_dtype=storage))
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), plain(x))
    assert layer.weight.nbytes == plain.weight.nbytes == (512 if "8" in scheme.split(":")[0] else 256)
    assert torch.equal(layer.weight.view(torch.uint8).view(-1), plain.weight.view(torch.uint8).view(-1))
    before = stored_bits(layer)
    layer.half()
    assert same_bits(layer, before)


@pytest.mark.parametrize(
    ("spelling", "shape", "storage"),
    [
        ("nf4:g64", (2, 5), "bfloat16"),
        ("nf4:g64", (2, 6), "float32"),
        ("nf4:g64", (2, 6), "float64"),
        ("int8:row", (3, 5), "bfloat16"),
        ("int4:g32", (3, 6), "float32"),
    ],
)
def test_codes_that_do_not_fill_the_storage_dtype_are_refused(spelling, shape, storage):
    scheme = replace(Scheme.parse(spelling), storage_dtype=storage)
    what = rf"\[{shape[0]}, {shape[1]}\] weight in {spelling}"
    with pytest.raises(ValueError, match=rf"{what}.*{storage}.*uint8"):
        QuantLinear(shape[1], shape[0], False, scheme)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="large pages are asked for on Linux")
def test_large_codes_move_to_private_memory_on_large_pages() -> None:
    layer = QuantLinear(4096, 1024, False, Scheme.parse("nf4:g64"))
    layer.store(layer.stored("weight", [reference.quantize(torch.randn(1024, 4096), layer.scheme.weight)]))
    before = layer.weight.clone()
    layer.use_huge_pages()
    assert torch.equal(layer.weight, before)
    address = layer.weight.data_ptr()
    assert address % machine.HUGE_PAGE == 0
    with open("/proc/self/smaps") as lines:
        entries = iter(lines)
        for line in entries:
            first, _, rest = line.partition("-")
            last, mode = rest.split()[:2] if rest else ("", "")
            if mode[:2] == "rw" and int(first, 16) <= address < int(last, 16):
                assert mode == "rw-p"  # shared memory has no large pages by default
                flags = next(one for one in entries if one.startswith("VmFlags:"))
                assert " hg" in flags
                return
    pytest.fail("the codes lie in no mapping")


# --- experts ----------------------------------------------------------------------------------------


def experts(style: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' fused experts with random weights, computed one by one."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_local_experts": 5, "num_experts_per_tok": 2}
    kind = {"mixtral": MixtralExperts, "gpt-oss": GptOssExperts}[style]
    config = {"mixtral": MixtralConfig, "gpt-oss": GptOssConfig}[style](**sizes)
    config._experts_implementation = "eager"
    module = kind(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(dtype).requires_grad_(False)


def dequantized_copy(layer: QuantExperts, source: nn.Module) -> nn.Module:
    """The original class with the decoded weights of `layer`."""
    plain = copy.deepcopy(source)
    for name in ("gate_up_proj", "down_proj"):
        plain.get_parameter(name).data.copy_(layer.dequantize(name))
    return plain


def routing(tokens: int, hit: list[int], dtype: torch.dtype = torch.float32):
    index = torch.tensor(hit)[torch.stack([torch.randperm(len(hit))[:2] for _ in range(tokens)])]
    return torch.randn(tokens, 16, dtype=dtype), index, torch.rand(tokens, 2, dtype=dtype)


@pytest.mark.parametrize("style", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("spelling", ["nf4:g64:dq", "int4:g32:f16:zero", "mxfp4", "int8:row"])
def test_experts_compute_what_the_original_class_does_with_decoded_weights(style, spelling):
    source = experts(style)
    layer = quantized(copy.deepcopy(source), spelling)
    assert isinstance(layer, QuantExperts)
    plain = dequantized_copy(layer, source)
    for weight in ("gate_up_proj", "down_proj"):
        error = (plain.get_parameter(weight) - source.get_parameter(weight)).norm()
        assert 0 < error < 0.2 * source.get_parameter(weight).norm(), "the right way round"
    for hit in ([0, 1, 2, 3, 4], [1, 4]):
        inputs = routing(7, hit)
        torch.testing.assert_close(layer(*inputs), plain(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["mixtral", "gpt-oss"])
def test_experts_in_bfloat16_return_bfloat16(style):
    source = experts(style, torch.bfloat16)
    layer = quantized(copy.deepcopy(source), "nf4:g64")
    inputs = routing(7, [0, 2, 3], torch.bfloat16)
    result = layer(*inputs)
    assert result.dtype == torch.bfloat16
    assert layer.dequantize("down_proj").dtype == torch.bfloat16
    torch.testing.assert_close(result, dequantized_copy(layer, source)(*inputs), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("style", ["mixtral", "gpt-oss"])
def test_under_autocast_experts_compute_about_what_the_original_class_does(style):
    source = experts(style)
    layer = quantized(copy.deepcopy(source), "nf4:g64")
    inputs = routing(7, [0, 2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        result, wanted = layer(*inputs), dequantized_copy(layer, source)(*inputs)
    assert result.dtype == wanted.dtype
    torch.testing.assert_close(result, wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("style", ["mixtral", "gpt-oss"])
def test_only_the_experts_that_are_hit_are_decoded(style, monkeypatch):
    layer = quantized(experts(style), "nf4:g64")
    used: list[int] = []
    original = backends.reference.linear

    def spy(x, weight, bias):
        used.append(weight.codes.data_ptr())
        return original(x, weight, bias)

    monkeypatch.setattr(backends.reference, "linear", spy)
    only = tuple(backend for backend in backends.BACKENDS if backend.name == "reference")
    monkeypatch.setattr(backends, "BACKENDS", only)
    layer(*routing(6, [1, 4]))
    pairs = [(weight, expert) for expert in (1, 4) for weight in ("gate_up_proj", "down_proj")]
    assert used == [layer.quantized_weight(*pair).codes.data_ptr() for pair in pairs]


@pytest.mark.parametrize("style", ["mixtral", "gpt-oss"])
def test_experts_that_live_elsewhere_add_nothing(style):
    layer = quantized(experts(style), "nf4:g64")
    hidden, index, weights = routing(4, [0, 3])
    index[2] = 5  # one past the last expert: on another device
    result = layer(hidden, index, weights)
    assert torch.equal(result[2], torch.zeros(16))
    assert result[0].abs().max() > 0


@pytest.mark.parametrize("style", ["mixtral", "gpt-oss"])
@every_cast
def test_casting_never_touches_the_bits_of_experts(style, cast, dtype):
    layer = quantized(experts(style), "nf4:g64:dq")
    before = stored_bits(layer)
    cast(layer)
    assert same_bits(layer, before)
    if style == "gpt-oss":
        assert layer.down_proj_bias.dtype == dtype


@every_copy
@pytest.mark.parametrize("style", ["mixtral", "gpt-oss"])
def test_copies_of_experts_are_equal(style, copied):
    layer = quantized(experts(style), "int4:g32:f16:zero")
    inputs = routing(4, [0, 3])
    twin = copied(layer)
    assert same_bits(twin, stored_bits(layer))
    assert torch.equal(twin(*inputs), layer(*inputs))


@pytest.mark.parametrize("style", ["mixtral", "gpt-oss"])
def test_gradients_flow_through_experts_to_the_input(style):
    source = experts(style)
    layer = quantized(copy.deepcopy(source), "nf4:g64")
    hidden, index, weights = routing(5, [0, 3])
    results = []
    for module in (layer, dequantized_copy(layer, source)):
        x = hidden.clone().requires_grad_()
        module(x, index, weights).square().sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_stack_of_experts_takes_the_bytes_of_its_experts():
    layer = quantized(experts("mixtral"), "nf4:g64")
    sizes = {name: tensor.nbytes for name, tensor in layer.state_dict().items()}
    assert sizes == {
        "quantized_gate_up_proj_codes": 5 * 48 * 16 // 2,
        "quantized_gate_up_proj_scale": 5 * 12 * 4,
        "quantized_down_proj_codes": 5 * 16 * 24 // 2,
        "quantized_down_proj_scale": 5 * 6 * 4,
    }


class ForeignExperts(nn.Module):
    """Experts of a layout of their own: every token through all, weighted."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 8) * 0.3)
        self.down = nn.Parameter(torch.randn(3, 8, 16) * 0.3)

    def forward(self, x, weights):
        hidden = torch.einsum("ti,eih->teh", x, self.up).relu()
        return torch.einsum("teh,eho,te->to", hidden, self.down, weights)


def test_experts_of_an_unknown_layout_compute_what_their_class_does_with_decoded_weights():
    source = ForeignExperts().requires_grad_(False)
    layer = quantized(copy.deepcopy(source), "nf4:g64")
    assert isinstance(layer, QuantExperts)
    plain = copy.deepcopy(source)
    for name in ("up", "down"):
        plain.get_parameter(name).data.copy_(layer.dequantize(name))
    x, weights = torch.randn(4, 16), torch.rand(4, 3)
    torch.testing.assert_close(layer(x, weights), plain(x, weights))
    assert not hasattr(layer, "up"), "decoded weights live no longer than the call"
    assert set(layer.state_dict()) == {
        f"quantized_{name}_{part}" for name in ("up", "down") for part in ("codes", "scale")
    }


def test_formats_are_chosen_by_config_too():
    model = nn.Sequential(nn.Linear(64, 8))
    quantize_model(model, FewbitsConfig("int8:row@int8:t6"))
    assert str(model[0].scheme) == "int8:row@int8:t6"
