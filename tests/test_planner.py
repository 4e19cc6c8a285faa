"""The arithmetic of memory, against numbers worked out by hand and tensors that are really made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits import FewbitsConfig, ops, reference
from fewbits.format import Format
from fewbits.model import quantize_model
from fewbits.planner import (
    RUNTIME,
    Device,
    Estimate,
    LayerCache,
    Live,
    LiveBytes,
    adapter_bytes,
    best,
    cache_bytes,
    decoding_bytes,
    loading_bytes,
    lookup_bytes,
    tiled_attention,
)

GIB = 2**30


def peak_of(work: Callable[[], Any], *existing: Tensor) -> int:
    """Most bytes that `work` has in use, its result included."""
    with LiveBytes(existing) as live:
        result = work()
    assert live.now > 0, "the result was not counted"
    del result
    assert live.now == 0, "something stayed"
    return live.peak


def linear_of(shape: tuple[int, int], format: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    rows, columns = shape
    model = nn.Sequential(nn.Linear(columns, rows, bias=False, dtype=dtype))
    quantize_model(model, format)
    return model


class TestCache:
    @pytest.mark.parametrize(
        ("layers", "tokens", "batch", "expected"),
        [
            # Llama 2 7B: 32 layers of 32 heads of 128, 16 bit
            ([LayerCache.attention(32, 128)] * 32, 4096, 1, 2_147_483_648),
            # Llama 3 8B: grouped queries, 8 heads hold keys and values
            ([LayerCache.attention(8, 128)] * 32, 8192, 1, GIB),
            ([LayerCache.attention(8, 128)] * 32, 8192, 3, 3 * GIB),
            ([LayerCache.attention(8, 128, 4)] * 32, 8192, 1, 2 * GIB),
            # Mistral 7B v0.1: a window of 4096
            ([LayerCache.attention(8, 128, window=4096)] * 32, 32768, 1, GIB // 2),
            ([LayerCache.attention(8, 128, window=4096)] * 32, 1000, 1, 32 * 2 * 8 * 128 * 2 * 1000),
            # DeepSeek V3: the latent of 512 and a rotated key of 64 for all heads
            ([LayerCache(per_token=(512 + 64) * 2)] * 61, 1000, 1, 70_272_000),
            # alternating: recurrent states do not grow
            ([LayerCache(state=1000), LayerCache(per_token=2)], 500, 2, 2 * (1000 + 1000)),
            ([], 10, 1, 0),
        ],
    )
    def test_known_sizes(self, layers: list[LayerCache], tokens: int, batch: int, expected: int) -> None:
        assert cache_bytes(layers, tokens, batch) == expected


class TestAdapters:
    def test_one_layer(self) -> None:
        assert adapter_bytes([(8, 4)], rank=2) == 2 * (8 + 4) * 16

    def test_all_linear_layers_of_llama_2_7b(self) -> None:
        """PEFT counts 39,976,960 trainable parameters at rank 16."""
        attention, mlp = [(4096, 4096)] * 4, [(11008, 4096)] * 2 + [(4096, 11008)]
        assert adapter_bytes((attention + mlp) * 32, rank=16) == 39_976_960 * 16


class TestDevice:
    def test_a_tenth_and_the_runtime_stay_free(self) -> None:
        device = Device("x", 10**10)
        room = 9 * 10**9 - RUNTIME
        assert device.usable == room
        assert device.fits(Estimate(room, room, 0, 0)) == "yes"
        assert device.fits(Estimate(room + 1, room + 1, 0, 0)) == "tight"
        assert device.fits(Estimate(10**10 - RUNTIME, 0, 0, 0)) == "tight"
        assert device.fits(Estimate(10**10 - RUNTIME + 1, 0, 0, 0)) == "no"

    def test_each_part_counts(self) -> None:
        device = Device("x", 10**9 + RUNTIME)
        assert device.fits(Estimate(0, 10**9 + 1, 0, 0)) == "no"
        assert device.fits(Estimate(250_000_000, 0, 250_000_000, 250_000_000, 250_000_000)) != "no"
        assert device.fits(Estimate(250_000_000, 0, 250_000_000, 250_000_000, 250_000_001)) == "no"

    def test_a_device_too_small_for_the_runtime_fits_nothing(self) -> None:
        device = Device("x", RUNTIME - 1)
        assert device.usable == 0
        assert device.fits(Estimate(0, 0, 0, 0)) == "no"

    def test_what_is_not_known_is_said(self) -> None:
        device = Device("x", 10**10)
        for partly in (Estimate(10, 10, None, None), Estimate(10, 10, 5, None), Estimate(10, 10, None, 5)):
            assert partly.running is None
            assert device.fits(partly) == "unknown"
        assert device.fits(Estimate(10**10, 10**10, None, None)) == "no"

    def test_the_least_device_just_has_room(self) -> None:
        one = Estimate(123_456_789, 0, 11, 0)
        assert Device("x", one.least_device).fits(one) == "yes"
        assert Device("x", one.least_device - 2).fits(one) == "tight"

    def test_the_best_is_the_first_with_room(self) -> None:
        device = Device("x", 10**10)
        no, tight, yes, unknown = (
            Estimate(10**11, 0, 0, 0),
            Estimate(9 * 10**9, 0, 0, 0),
            Estimate(10**9, 0, 0, 0),
            Estimate(10**9, 0, None, None),
        )
        assert [device.fits(one) for one in (no, tight, yes, unknown)] == ["no", "tight", "yes", "unknown"]
        assert best([no, tight, yes, yes], device) == 2
        assert best([no, unknown, tight], device) == 2
        assert best([no, unknown], device) == 1
        assert best([no, no], device) is None


class TestLiveBytes:
    @pytest.mark.parametrize("device", ["meta", "cpu"])
    def test_what_lives_is_counted_once(self, device: str) -> None:
        with LiveBytes() as live:
            one = torch.empty(1000, device=device)
            view = one.view(10, 100)[2:]
            assert live.now == 4000
            two = one + 1
            assert live.now == live.peak == 8000
            del one
            assert live.now == 8000, "a view keeps its memory"
            del view
            assert (live.now, live.peak) == (4000, 8000)
            two.add_(1)
            assert (live.now, live.peak) == (4000, 8000)
        del two
        assert live.now == 0

    def test_what_was_there_before_is_not_counted(self) -> None:
        weight = torch.empty(1000, device="meta")
        with LiveBytes([weight]) as live:
            view = weight.view(10, 100)
            other = view * 2
            assert live.now == 4000
        del other

    def test_products_are_a_moment_of_their_own(self) -> None:
        matrix = torch.empty(10, 100, device="meta")
        with LiveBytes([matrix]) as live:
            large = matrix + 1  # 4000 bytes
            larger = torch.cat([large, large])  # 12000
            del large, larger
            product = matrix @ matrix.T  # 400
        assert (live.peak, live.products) == (12000, 400)
        assert Live(live.peak, live.products).with_decoding(1000) == 12000
        assert Live(live.peak, live.products).with_decoding(20000) == 20400
        del product


class TestTiledAttention:
    def test_no_scores_are_made(self) -> None:
        query, key, value = (torch.empty(2, 3, 512, 8, device="meta") for _ in range(3))
        with tiled_attention():
            tiled = peak_of(lambda: F.scaled_dot_product_attention(query, key, value), query, key, value)
        plain = peak_of(lambda: F.scaled_dot_product_attention(query, key, value), query, key, value)
        assert tiled == query.nbytes
        assert plain >= 2 * 3 * 512 * 512 * 4

    def test_a_mask_of_truths_becomes_numbers_for_a_while(self) -> None:
        query = torch.empty(1, 3, 100, 8, device="meta", dtype=torch.bfloat16)
        mask = torch.empty(1, 1, 100, 100, device="meta", dtype=torch.bool)
        with tiled_attention():
            peak = peak_of(
                lambda: F.scaled_dot_product_attention(query, query, query, attn_mask=mask), query, mask
            )
        assert peak == query.nbytes + 100 * 100 * 2

    def test_values_may_be_narrower(self) -> None:
        query, value = torch.empty(1, 3, 5, 8, device="meta"), torch.empty(1, 3, 7, 4, device="meta")
        with tiled_attention():
            result = F.scaled_dot_product_attention(query, torch.empty(1, 3, 7, 8, device="meta"), value)
        assert result.shape == (1, 3, 5, 4)

    def test_gradients_have_the_shapes_of_the_inputs(self) -> None:
        inputs = [torch.empty(1, 2, 5, 8, device="meta", requires_grad=True) for _ in range(3)]
        with tiled_attention():
            F.scaled_dot_product_attention(*inputs).sum().backward()
        assert all(one.grad is not None and one.grad.shape == one.shape for one in inputs)

    def test_afterwards_attention_is_as_before(self) -> None:
        before = F.scaled_dot_product_attention

        def fail() -> None:
            with tiled_attention():
                assert F.scaled_dot_product_attention is not before
                raise RuntimeError("inside")

        with pytest.raises(RuntimeError, match="inside"):
            fail()
        assert F.scaled_dot_product_attention is before


class TestDecoding:
    @pytest.mark.parametrize("format", ["nf4:g64", "nf4:g64:dq", "int8:row", "int3:g64:f16:zero"])
    @pytest.mark.parametrize("shape", [(1536, 1024), (2048, 2048)])
    def test_the_largest_weight_is_decoded_in_blocks(self, format: str, shape: tuple[int, int]) -> None:
        """To the byte the decoded weight, and roughly the block at work."""
        weight = reference.quantize(torch.randn(shape, dtype=torch.bfloat16), Format.parse(format))
        made = peak_of(lambda: reference.dequantize(weight, torch.bfloat16), *weight.parts().values())
        model = linear_of(shape, format)
        assert 0.6 * decoding_bytes(model, tokens=7) < made < 1.25 * decoding_bytes(model, tokens=7)
        count = shape[0] * shape[1]
        assert decoding_bytes(model, tokens=7) == 2 * count + 16 * min(2**19, count)

    @pytest.mark.parametrize(
        ("tokens", "shape"), [(256, (2816, 1024)), (256, (1024, 2816)), (512, (512, 512)), (64, (2048, 2048))]
    )
    def test_llm_int8_to_the_byte(self, tokens: int, shape: tuple[int, int]) -> None:
        weight = ops.quantize(torch.randn(shape, dtype=torch.bfloat16), "int8:row")
        x = torch.rand(tokens, shape[1], dtype=torch.bfloat16)
        made = peak_of(lambda: reference.linear_int8(x, weight, None, 6.0), x, *weight.parts().values())
        estimated = decoding_bytes(linear_of(shape, "int8:row@int8:t6"), tokens)
        assert made == pytest.approx(estimated, rel=0.01)

    @pytest.mark.parametrize("format", ["nf4:g64:dq", "int8:row", "int4:g128:f16:zero"])
    def test_rows_of_an_embedding(self, format: str) -> None:
        model = nn.ModuleDict({"table": nn.Embedding(500, 256, dtype=torch.bfloat16)})
        weight = reference.quantize(model["table"].weight.detach(), Format.parse(format))
        wanted = torch.arange(400)
        made = peak_of(
            lambda: reference.embedding(wanted, weight, torch.bfloat16), wanted, *weight.parts().values()
        )
        quantize_model(model, FewbitsConfig(None, {"table": format}))
        assert 0.4 * lookup_bytes(model, 400) < made <= 1.05 * lookup_bytes(model, 400)
        assert lookup_bytes(model, 400) == 21 * 400 * 256
        assert decoding_bytes(model, 400) == 0

    def test_nothing_is_decoded_where_nothing_is_quantized(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(8, 8))
        assert decoding_bytes(model, 100) == lookup_bytes(model, 100) == 0


class TestLoading:
    def test_a_plain_model_takes_its_weights(self) -> None:
        model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 30))
        assert loading_bytes(model) == 4 * (10 * 20 + 20 + 20 * 30 + 30)

    def test_the_last_large_weight_comes_on_top(self) -> None:
        """In the order of names: what is quantized first, with little in memory, does not count."""
        small, large = (64, 64), (512, 512)
        last = nn.ModuleDict({"a": linear_of(small, "nf4"), "b": linear_of(large, "nf4")})
        first = nn.ModuleDict({"a": linear_of(large, "nf4"), "b": linear_of(small, "nf4")})
        weights = sum(tensor.nbytes for tensor in last.parameters())
        in_flight = 512 * 512 * (2 + 16)
        assert loading_bytes(last) == weights + in_flight
        of_small = sum(tensor.nbytes for tensor in first["b"].parameters())
        assert loading_bytes(first) == weights - of_small + in_flight

    def test_tied_weights_count_once(self) -> None:
        model = nn.ModuleDict({"a": nn.Embedding(10, 8), "b": nn.Linear(8, 10, bias=False)})
        model["b"].weight = model["a"].weight
        assert loading_bytes(model) == 4 * 80

    def test_quantizing_makes_no_more_than_estimated(self) -> None:
        """One weight, from when it is read to when its codes are stored."""
        source = torch.randn(1024, 1536, dtype=torch.bfloat16)
        model = linear_of((1024, 1536), "nf4:g64:dq")

        def load() -> Any:
            weight = ops.quantize(source, "nf4:g64:dq")
            return weight, (source - weight.dequantize()).sum()

        made = peak_of(load, source)
        assert 0.4 * loading_bytes(model) < made <= loading_bytes(model)
