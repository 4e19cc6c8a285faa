"""State dicts of torch's optimizers and of these load, whatever their strides; junk is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fewbits import moments, optim
from fewbits.optim import AdamW8bit, AdamW32bit, Lion8bit, SGD8bit

from .conftest import parameters, take_steps, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_of_torch_adamw_are_taken_over(dtype):
    params = parameters(dtype)
    theirs = torch.optim.AdamW(params, lr=3e-3, betas=(0.8, 0.99))
    take_steps(theirs, params, 5)
    mine = AdamW8bit(params)
    mine.load_state_dict(theirs.state_dict())
    assert mine.param_groups[0]["lr"] == 3e-3
    assert mine.param_groups[0]["betas"] == (0.8, 0.99)
    state = mine.state[params[0]]
    assert state["step"] == 5
    found = moments.load(moments.Moment(state["exp_avg_sq"], state["exp_avg_sq_scale"]), moments.SECOND)
    exact = theirs.state[params[0]]["exp_avg_sq"].float()
    assert float((found - exact).norm() / exact.norm()) < 0.02
    small = mine.state[params[1]]["exp_avg"]
    assert small.dtype == torch.float32
    assert torch.equal(small, theirs.state[params[1]]["exp_avg"].float())
    wide = AdamW32bit(params)
    wide.load_state_dict(theirs.state_dict())
    assert all(wide.state[p][name].dtype == torch.float32 for p in params for name in wide.moment_names)


def turned() -> nn.Parameter:
    return nn.Parameter(torch.randn(80, 90, generator=torch.Generator().manual_seed(1)).t())


def channels_last() -> nn.Parameter:
    values = torch.randn(8, 70, 3, 3, generator=torch.Generator().manual_seed(1))
    return nn.Parameter(values.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("make", [turned, channels_last])
@pytest.mark.parametrize("min_8bit_size", [0, 10**9], ids=["8bit", "32bit"])
def test_states_of_torch_that_do_not_lie_row_by_row_go_on(make, min_8bit_size):
    param = make()
    theirs = torch.optim.AdamW([param], lr=1e-2)
    take_steps(theirs, [param], 3)
    assert not theirs.state[param]["exp_avg"].is_contiguous()
    results = []
    for values in (param.detach(), param.detach().contiguous()):
        other = nn.Parameter(values.clone())
        mine = AdamW8bit([other], min_8bit_size=min_8bit_size)
        mine.load_state_dict(theirs.state_dict())
        take_steps(mine, [other], 2, seed=5)
        results.append(other.detach())
    take_steps(theirs, [param], 2, seed=5)
    assert torch.equal(results[0], results[1])
    assert float((results[0] - param.detach()).abs().max()) < 5e-3


@pytest.mark.parametrize("make", [turned, channels_last])
def test_codes_that_do_not_lie_row_by_row_go_on(make):
    param = make()
    optimizer = AdamW8bit([param], lr=1e-2, min_8bit_size=0)
    take_steps(optimizer, [param], 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for name in optimizer.moment_names:
        codes = saved["state"][0][name]
        saved["state"][0][name] = torch.empty_strided(codes.shape, param.stride(), dtype=codes.dtype)
        saved["state"][0][name].copy_(codes)
    other = nn.Parameter(param.detach().clone())
    again = AdamW8bit([other], min_8bit_size=0)
    again.load_state_dict(saved)
    take_steps(optimizer, [param], 2, seed=5)
    take_steps(again, [other], 2, seed=5)
    assert torch.equal(param, other)


def test_codes_of_bitsandbytes_that_do_not_lie_row_by_row_go_on():
    param = turned()
    optimizer = Lion8bit([param], min_8bit_size=0)
    take_steps(optimizer, [param], 3)
    state = optimizer.state[param]
    table = torch.tensor(moments.FIRST.values)
    codes = state["exp_avg"].t().contiguous().t()
    theirs = {"step": 3, "state1": codes, "absmax1": state["exp_avg_scale"].clone(), "qmap1": table}
    other = nn.Parameter(param.detach().clone())
    again = Lion8bit([other], min_8bit_size=0)
    again.load_state_dict({"state": {0: theirs}, "param_groups": optimizer.state_dict()["param_groups"]})
    take_steps(optimizer, [param], 2, seed=5)
    take_steps(again, [other], 2, seed=5)
    assert torch.equal(param, other)


def test_states_of_torch_sgd_go_on():
    params, others = parameters(), parameters()
    theirs = torch.optim.SGD(params, 1e-2, 0.9, weight_decay=0.1)
    take_steps(theirs, params, 5)
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param.data)
    mine = SGD8bit(others, 0.5, 0.5)
    mine.load_state_dict(theirs.state_dict())
    assert mine.state[others[0]]["momentum_buffer"].dtype == torch.uint8
    take_steps(theirs, params, 2, seed=3)
    take_steps(mine, others, 2, seed=3)
    for got, wanted in zip(others, params, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=5e-3)


def test_decay_that_torch_adds_to_the_gradient_is_not_taken_over():
    params = parameters()
    theirs = torch.optim.Adam(params, weight_decay=0.1)
    take_steps(theirs, params, 1)
    saved = theirs.state_dict()
    with pytest.raises(ValueError, match=r"torch\.optim\.Adam, which adds a weight_decay of 0\.1"):
        optim.Adam8bit(params).load_state_dict(saved)
    saved["param_groups"][0]["weight_decay"] = 0
    mine = optim.Adam8bit(params)
    mine.load_state_dict(saved)
    mine.param_groups[0]["weight_decay"] = 0.1
    optim.Adam8bit(params).load_state_dict(mine.state_dict())


def broken(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    param = nn.Parameter(torch.randn(70, 100))
    optimizer = AdamW8bit([param])
    take_steps(optimizer, [param], 1)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    return saved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["state"][0].update(exp_avg=torch.zeros(7, 10, dtype=torch.uint8)),
            r"parameter 0 \[70, 100\]: exp_avg has shape \[7, 10\], not \[70, 100\]",
        ),
        (lambda s: s["state"][0].pop("exp_avg_scale"), r"exp_avg is torch.uint8 and has no scale"),
        (
            lambda s: s["state"][0].update(exp_avg_scale=torch.zeros(27)),
            "exp_avg has 27 scales; blocks of 256 need 28",
        ),
        (
            lambda s: s["state"][0].update(exp_avg_scale=torch.zeros(28, dtype=torch.float16)),
            "exp_avg is torch.uint8 with scales torch.float16",
        ),
        (lambda s: s["state"][0].pop("exp_avg_sq"), "this optimizer takes step, exp_avg, exp_avg_sq"),
        (lambda s: s["state"][0].pop("step"), "takes step"),
        (lambda s: s["state"][0].update(step=-1), "step is a number of steps, at least 0; got -1"),
        (lambda s: s["state"][0].update(step=math.nan), "step is a number of steps"),
        (lambda s: s["state"][0].update(step="1"), "step is a number of steps"),
        (lambda s: s["state"][0].update(exp_avg=[0.0]), "exp_avg is list and no tensor"),
        (lambda s: s["state"][0].update(exp_avg_scale=1.0), "exp_avg_scale is float and no tensor"),
        (lambda s: s["state"].update({0: [1.0]}), r"the state of parameter 0 .* is list"),
        (lambda s: s.pop("state"), "has state and param_groups with params, got"),
        (lambda s: s.clear(), r"has state and param_groups with params, got \[\]"),
        (lambda s: s["param_groups"].insert(0, None), "has state and param_groups with params"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "lr is at least 0"),
        (lambda s: s["param_groups"][0].update(betas=(0.9,)), "betas are two numbers"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), "saved with amsgrad=True"),
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "different number of parameter groups"),
        (lambda s: s["param_groups"][0]["params"].append(1), "doesn't match the size"),
    ],
)
def test_states_that_do_not_fit_are_refused_and_nothing_changes(change, message):
    param = nn.Parameter(torch.randn(70, 100))
    optimizer = AdamW8bit([param])
    take_steps(optimizer, [param], 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken(change))
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert all(torch.equal(a, b) for a, b in zip(tensors(before), tensors(after), strict=True))


def test_states_of_another_kind_of_optimizer_are_refused():
    param = nn.Parameter(torch.randn(70, 100))
    lion = Lion8bit([param])
    take_steps(lion, [param], 1)
    with pytest.raises(ValueError, match="has exp_avg, exp_avg_scale, step; this optimizer takes"):
        AdamW8bit([param]).load_state_dict(lion.state_dict())
    with pytest.raises(ValueError, match="optimizer of another kind"):
        SGD8bit([param], 0.1, 0.9).load_state_dict(lion.state_dict())
