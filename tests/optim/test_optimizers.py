"""What torch optimizers do, these do: groups, closures, schedulers, scalers, copies, state dicts."""

from __future__ import annotations

import copy
import gc
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fewbits import backends, moments, optim
from fewbits.optim import AdamW8bit, AdamW32bit, BlockwiseOptimizer, Lion8bit, Lion32bit, SGD8bit

from .conftest import parameters, take_steps, tensors

Make = Callable[[Any], BlockwiseOptimizer]
MAKE: dict[str, Make] = {
    "AdamW8bit": lambda p: AdamW8bit(p, lr=1e-2),
    "Adam8bit": lambda p: optim.Adam8bit(p, lr=1e-2),
    "Lion8bit": lambda p: Lion8bit(p, lr=1e-3, weight_decay=0.1),
    "SGD8bit": lambda p: SGD8bit(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "PagedAdamW8bit": lambda p: optim.PagedAdamW8bit(p, lr=1e-2),
    "PagedAdam8bit": lambda p: optim.PagedAdam8bit(p, lr=1e-2),
    "PagedLion8bit": lambda p: optim.PagedLion8bit(p, lr=1e-3),
    "AdamW32bit": lambda p: AdamW32bit(p, lr=1e-2),
    "PagedAdamW32bit": lambda p: optim.PagedAdamW32bit(p, lr=1e-2),
    "Lion32bit": lambda p: Lion32bit(p, lr=1e-3),
    "PagedLion32bit": lambda p: optim.PagedLion32bit(p, lr=1e-3),
}
ARITHMETIC = {f"aten::{name}" for name in ("mul", "add", "sub", "div", "sqrt", "bucketize", "index_select")}
every_optimizer = pytest.mark.parametrize("make", MAKE.values(), ids=list(MAKE))
main_optimizers = pytest.mark.parametrize("make", [MAKE[n] for n in ("AdamW8bit", "Lion8bit", "SGD8bit")])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_every_public_optimizer_is_tested_here():
    classes = {
        name
        for name in optim.__all__
        if isinstance(getattr(optim, name), type)
        and issubclass(getattr(optim, name), BlockwiseOptimizer)
        and name != "BlockwiseOptimizer"
    }
    assert classes == set(MAKE)


@every_optimizer
@every_dtype
def test_a_run_that_was_saved_and_loaded_goes_on_with_the_same_bits(make, dtype):
    params = parameters(dtype)
    optimizer = make(params)
    take_steps(optimizer, params, 3)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    again = make(others)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    take_steps(optimizer, params, 3, seed=1)
    take_steps(again, others, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    mine, theirs = tensors(optimizer.state_dict()), tensors(again.state_dict())
    assert len(mine) == len(theirs) > 0
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert not any(a.data_ptr() == b.data_ptr() for a, b in zip(mine, theirs, strict=True) if a.numel())


@every_optimizer
def test_states_have_the_promised_form(make):
    params = parameters(torch.bfloat16)
    optimizer = make(params)
    take_steps(optimizer, params, 1)
    large, small = optimizer.state[params[0]], optimizer.state[params[1]]
    assert large["step"] == small["step"] == 1
    for name in optimizer.moment_names:
        assert small[name].dtype == torch.float32
        assert f"{name}_scale" not in small
        if optimizer.bits == 32:
            assert large[name].dtype == torch.float32
            continue
        assert large[name].dtype == torch.uint8
        assert large[name].shape == (70, 61)
        assert large[f"{name}_scale"].dtype == torch.float32
        assert large[f"{name}_scale"].shape == (math.ceil(70 * 61 / 256),)
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize(
    ("make", "theirs"),
    [
        (lambda p: AdamW32bit(p, lr=1e-2), lambda p: torch.optim.AdamW(p, lr=1e-2)),
        (
            lambda p: SGD8bit(p, 1e-2, 0.9, weight_decay=0.1, min_8bit_size=10**9),
            lambda p: torch.optim.SGD(p, 1e-2, 0.9, weight_decay=0.1),
        ),
    ],
    ids=["AdamW", "SGD"],
)
def test_with_32_bit_states_steps_are_those_of_torch(make, theirs):
    params, others = parameters(), parameters()
    mine, reference = make(params), theirs(others)
    take_steps(mine, params, 20)
    take_steps(reference, others, 20)
    for got, wanted in zip(params, others, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    param = nn.Parameter(torch.ones(5000))
    optimizer = AdamW8bit([param], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 5000
    assert optimizer.step(closure) < 5000
    optimizer.zero_grad()
    assert param.grad is None
    assert optimizer.step() is None


def test_schedulers_and_clipping_work_on_groups():
    params = parameters()
    optimizer = AdamW8bit([{"params": params[:1], "lr": 1e-1}, {"params": params[1:2]}], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = [p.detach().clone() for p in params]
    for number in range(3):
        for param in params[:2]:
            param.grad = torch.randn_like(param) * 100
        nn.utils.clip_grad_norm_(params[:2], 1.0)
        optimizer.step()
        scheduler.step()
        factor = 0.5 ** (number + 1)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1 * factor, 0.01 * factor]
    moved = [float((p - b).detach().abs().max()) for p, b in zip(params[:2], before, strict=False)]
    assert moved[0] > 5 * moved[1] > 0
    optimizer.add_param_group({"params": [params[2]], "min_8bit_size": 0})
    take_steps(optimizer, params, 1)
    assert optimizer.state[params[2]]["exp_avg"].dtype == torch.uint8


def test_a_grad_scaler_skips_steps_with_infinite_gradients():
    param = nn.Parameter(torch.ones(5000))
    optimizer = AdamW8bit([param], lr=0.1, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(param.detach(), torch.full((5000,), 0.9))
    scaler.scale(param.sum()).backward()
    assert param.grad is not None
    param.grad[7] = math.inf
    scaler.step(optimizer)
    torch.testing.assert_close(param.detach(), torch.full((5000,), 0.9))
    assert optimizer.state[param]["step"] == 1


@main_optimizers
def test_a_deep_copy_goes_its_own_way(make):
    params = parameters()
    optimizer = make(params)
    take_steps(optimizer, params, 2)
    before = [t.clone() for t in tensors(optimizer.state_dict())]
    others, again = copy.deepcopy((params, optimizer))
    take_steps(again, others, 2)
    after = tensors(optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    take_steps(optimizer, params, 2)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@main_optimizers
def test_parameters_of_any_stride_take_the_same_steps(make):
    values, grads = torch.randn(80, 90), torch.randn(80, 90)
    dense = nn.Parameter(values.clone())
    turned = nn.Parameter(values.t().contiguous().t())
    sparse = nn.Parameter(torch.zeros(80, 180)[:, ::2].copy_(values))
    assert not turned.is_contiguous()
    results = []
    for param in (dense, turned, sparse):
        optimizer = make([param])
        param.grad = grads.clone() if param is dense else grads.t().contiguous().t()
        stride = param.stride()
        optimizer.step()
        optimizer.step()
        assert param.stride() == stride
        results.append(param.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_parameters_without_gradient_wait_and_count_their_own_steps():
    first, second = (nn.Parameter(torch.ones(5000)) for _ in range(2))
    optimizer = AdamW8bit([first, second], lr=0.1, weight_decay=0.0)
    first.grad = torch.ones(5000)
    optimizer.step()
    assert second not in optimizer.state
    assert torch.equal(second, torch.ones(5000))
    second.grad = torch.ones(5000)
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in (first, second)] == [2, 1]
    torch.testing.assert_close(second.detach(), torch.full((5000,), 0.9))


def test_keep_32bit_holds_through_copies_and_files():
    params = [nn.Parameter(torch.randn(5000)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = copy.deepcopy(AdamW8bit(groups, keep_32bit=[params[2]]))
    copied = [p for group in optimizer.param_groups for p in group["params"]]
    take_steps(optimizer, copied, 1)
    kinds = [optimizer.state[p]["exp_avg_sq"].dtype for p in copied]
    assert kinds == [torch.uint8, torch.uint8, torch.float32]
    fresh = AdamW8bit([{"params": params[:1]}, {"params": params[1:]}], keep_32bit=[params[2]])
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[1]["keep_32bit"] == [1]
    assert [fresh.state[p]["exp_avg_sq"].dtype for p in params] == kinds


@pytest.mark.parametrize("theirs", [{"keep_32bit": [0]}, {"min_8bit_size": 10**6}], ids=str)
def test_what_is_in_8_bits_is_not_up_to_the_file(theirs):
    param = nn.Parameter(torch.randn(5000))
    kept = AdamW8bit([{"params": [param], **theirs}])
    take_steps(kept, [param], 1)
    fresh = AdamW8bit([param])
    for source in (kept, fresh):
        fresh.load_state_dict(source.state_dict())
        assert fresh.state[param]["exp_avg"].dtype == torch.uint8
        assert fresh.param_groups[0]["keep_32bit"] == []
        assert fresh.param_groups[0]["min_8bit_size"] == 4096
    kept.load_state_dict(fresh.state_dict())
    assert kept.state[param]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("by_place", [True, False])
def test_a_group_keeps_states_in_32_bits(by_place):
    params = [nn.Parameter(torch.randn(5000)) for _ in range(4)]
    optimizer = AdamW8bit(
        [{"params": params[:2], "keep_32bit": [1] if by_place else [params[1]]}], keep_32bit=[params[0]]
    )
    optimizer.add_param_group({"params": params[2:], "keep_32bit": [1 if by_place else params[3]]})
    assert [group["keep_32bit"] for group in optimizer.param_groups] == [[0, 1], [1]]
    take_steps(optimizer, params, 1)
    kinds = [optimizer.state[p]["exp_avg"].dtype for p in params]
    assert kinds == [torch.float32, torch.float32, torch.uint8, torch.float32]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_32bit": [2]}, "keep_32bit of a group holds some of its 2 parameters"),
        ({"keep_32bit": [-1]}, "keep_32bit of a group"),
        ({"keep_32bit": ["x"]}, "keep_32bit of a group"),
        ({"keep_32bit": [torch.ones(3)]}, "keep_32bit of a group"),
        ({"lr": -1.0}, "lr is at least 0 and below inf, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is at least 0 and below 1.0"),
        ({"betas": (0.9,)}, r"betas are two numbers, got \(0.9,\)"),
        ({"weight_decay": -0.1}, "weight_decay is at least 0"),
        ({"min_8bit_size": -1}, "min_8bit_size is a number of elements"),
    ],
)
def test_groups_that_make_no_sense_are_refused_and_not_added(options, message):
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    with pytest.raises(ValueError, match=message):
        AdamW8bit([{"params": params[1:], **options}])
    optimizer = AdamW8bit(params[:1])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], **options})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params[1:]})


def test_steps_of_any_number_can_be_taken_with_any_betas():
    param = nn.Parameter(torch.ones(300))
    optimizer = AdamW8bit([param], betas=(0.9, 0.5), min_8bit_size=0)
    param.grad = torch.ones(300)
    optimizer.step()
    for number in (374, 375, 10**6):
        optimizer.state[param]["step"] = number
        before = param.detach().clone()
        optimizer.step()
        assert 0 < float((before - param.detach()).max()) < 2e-3


def test_memory_is_that_of_the_states():
    param, small = nn.Parameter(torch.randn(100, 256)), nn.Parameter(torch.randn(16))
    optimizer = AdamW8bit([param, small])
    assert optimizer.memory().parameters == 0
    assert optimizer.memory().bytes_per_parameter == 0
    take_steps(optimizer, [param, small], 1)
    memory = optimizer.memory()
    assert memory.nbytes == sum(t.nbytes for t in tensors(optimizer.state_dict())) == 2 * (25600 + 400) + 128
    assert (memory.parameters, memory.in_8bit) == (25616, 25600)
    assert str(memory) == (
        "optimizer states: 0.1 MB for 0.03 M parameters, 2.03 bytes each; 0.03 M of them in 8 bits"
    )


# --- what is refused --------------------------------------------------------------------------------


def test_gradients_that_cannot_be_used_are_refused():
    sparse = nn.Parameter(torch.ones(10, 3))
    sparse.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 3), (10, 3), check_invariants=True)
    with pytest.raises(RuntimeError, match=r"no sparse gradients, got torch.sparse_coo.*\[10, 3\]"):
        AdamW8bit([sparse]).step()
    whole = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    whole.grad = torch.ones(3, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"real floating parameters, got torch\.complex64"):
        AdamW8bit([whole]).step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: AdamW8bit(p, amsgrad=True), "AdamW8bit has no amsgrad, got True; leave it at False"),
        (lambda p: AdamW8bit(p, optim_bits=8), "no optim_bits, got 8; leave it at 32"),
        (lambda p: AdamW8bit(p, percentile_clipping=5), "no percentile_clipping, got 5; leave it at 100"),
        (lambda p: AdamW8bit(p, block_wise=False), "no block_wise"),
        (lambda p: Lion8bit(p, block_wise=False), "Lion8bit has no block_wise"),
        (lambda p: optim.PagedAdamW8bit(p, args=object()), "PagedAdamW8bit has no args"),
        (lambda p: SGD8bit(p, 0.1), "momentum=0; use torch.optim.SGD"),
        (lambda p: SGD8bit(p, 0.1, 0.9, dampening=0.5), "no dampening"),
        (lambda p: SGD8bit(p, 0.1, 0.9, nesterov=True), "no nesterov"),
        (lambda p: SGD8bit(p, 0.1, 1.5), "momentum is at least 0 and below 1.0, got 1.5"),
        (lambda p: AdamW8bit(p, lr=-1.0), "lr is at least 0 and below inf, got -1.0"),
        (lambda p: AdamW8bit(p, lr=math.nan), "lr is at least 0"),
        (lambda p: AdamW8bit(p, betas=(0.9, 1.0)), r"betas\[1\] is at least 0 and below 1.0, got 1.0"),
        (lambda p: AdamW8bit(p, eps=-1e-8), "eps is at least 0"),
        (lambda p: Lion8bit(p, weight_decay=-1), "weight_decay is at least 0"),
        (lambda p: AdamW8bit(p, min_8bit_size=-1), "min_8bit_size is a number of elements"),
    ],
)
def test_arguments_that_mean_nothing_here_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.ones(3))])


# --- cost -------------------------------------------------------------------------------------------


def test_temporaries_do_not_grow_with_the_parameter(monkeypatch):
    """Bytes that torch allocates during a step, besides the states, for parameters of two sizes."""
    monkeypatch.setitem(moments._CHUNK, "cpu", 2**14)
    monkeypatch.setattr(backends, "choose_update", lambda device: moments.update)

    def peak(elements: int) -> int:
        param = nn.Parameter(torch.zeros(elements))
        param.grad = torch.ones(elements)
        optimizer = AdamW8bit([param])
        optimizer.step()
        gc.collect()
        with torch.profiler.profile(profile_memory=True) as profile:
            optimizer.step()
        held = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        return most

    small, large = peak(2**16), peak(2**19)
    assert 0 < small < 80 * 2**14
    assert large < 1.2 * small


def test_operators_per_step_do_not_grow_with_the_number_of_parameters(monkeypatch):
    """Besides one copy for each tensor that is gathered or written back."""

    monkeypatch.setattr(backends, "choose_update", lambda device: moments.update)

    def operators(count: int) -> int:
        params = [nn.Parameter(torch.zeros(300)) for _ in range(count)]
        optimizer = AdamW8bit(params, min_8bit_size=0)
        take_steps(optimizer, params, 1)
        with torch.profiler.profile() as profile:
            optimizer.step()
        names = [e.key for e in profile.key_averages() for _ in range(e.count)]
        assert "aten::_local_scalar_dense" not in names
        return sum(name.rstrip("_") in ARITHMETIC for name in names)

    assert operators(4) > 0
    assert operators(40) == operators(4)
