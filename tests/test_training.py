"""Preparation for training: what is frozen, what is cast, what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fewbits
from fewbits.format import Scheme


class Norm(nn.LayerNorm):
    pass


def network(scheme: Scheme | str, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 128), Norm(128), nn.Linear(128, 64)).to(dtype)
    fewbits.quantize_model(model, scheme)
    return model


SCHEMES = [
    Scheme.parse("nf4:g64:dq"),
    Scheme(fewbits.Format.parse("nf4:g64"), storage_dtype="bfloat16"),
    Scheme(fewbits.Format.parse("nf4:g64"), storage_dtype="float16"),
    Scheme.parse("int4:g32:f16:zero"),
    Scheme.parse("int8:row@int8:t6"),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("norms", [False, True])
def test_all_is_frozen_and_only_norms_are_cast_on_request(scheme: Scheme, norms: bool) -> None:
    model = network(scheme)
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()}
    assert fewbits.prepare_for_training(model, norms_in_float32=norms) is model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        cast = norms and name.startswith("2.")
        assert tensor.dtype == (torch.float32 if cast else before[name][0]), name
        same = tensor.view(torch.uint8) if not cast else tensor
        other = before[name][1].view(torch.uint8) if not cast else before[name][1].float()
        assert torch.equal(same, other), name
    notes = {entry.name: entry.note for entry in fewbits.report(model).entries if entry.note}
    told = "cast from bfloat16 by prepare_for_training"
    assert notes == ({"2.weight": told, "2.bias": told} if norms else {})


def test_the_report_prints_what_was_cast() -> None:
    model = network("nf4:g64")
    fewbits.prepare_for_training(model, norms_in_float32=True)
    line = next(line for line in str(fewbits.report(model)).splitlines() if line.startswith("2.weight"))
    assert line.endswith("1-dimensional; cast from bfloat16 by prepare_for_training")
    entry = next(one for one in fewbits.report(model).to_json()["weights"] if one["name"] == "2.weight")
    assert entry["note"] == "cast from bfloat16 by prepare_for_training"


def test_gradients_pass_a_prepared_model() -> None:
    model = network("nf4:g64", torch.float32)
    fewbits.prepare_for_training(model)
    x = torch.randn(3, 64, requires_grad=True)
    model[1:](x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
