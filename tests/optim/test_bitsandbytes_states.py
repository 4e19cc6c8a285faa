"""State dicts written by bitsandbytes load, and a run goes on with them."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits import moments
from fewbits.moments import Moment
from fewbits.optim import AdamW8bit, BlockwiseOptimizer, Lion8bit, SGD8bit

pytestmark = pytest.mark.parity

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW8bit": (AdamW8bit, {"lr": 1e-3, "betas": (0.8, 0.99), "weight_decay": 0.05}),
    "Lion8bit": (Lion8bit, {"lr": 1e-4, "weight_decay": 0.1}),
    "SGD8bit": (SGD8bit, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1}),
}


@pytest.fixture(scope="module")
def bnb() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("bitsandbytes")


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(70, 61), (33,)]]


def take_steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int) -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def written(
    bnb: Any, name: str, **changed: Any
) -> tuple[list[nn.Parameter], torch.optim.Optimizer, dict[str, Any]]:
    """Parameters, the optimizer, and what it writes into a file after three steps."""
    params = parameters()
    theirs = getattr(bnb.optim, name)(params, **{**KINDS[name][1], **changed})
    take_steps(theirs, params, 3)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    return params, theirs, torch.load(file, weights_only=True)


def decoded(optimizer: BlockwiseOptimizer, param: Tensor) -> list[Tensor]:
    state = optimizer.state[param]
    books = (moments.FIRST, moments.SECOND)
    return [
        moments.load(Moment(state[name], state.get(f"{name}_scale")), book)
        for name, book in zip(optimizer.moment_names, books, strict=False)
    ]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "flat"])
def test_their_states_load(bnb, name, wrapped):
    params, theirs, saved = written(bnb, name)
    if not wrapped:  # as versions before 0.47 wrote them
        for state in saved["state"].values():
            state.update(state.pop("__bnb_optimizer_quant_state__"))
    make, options = KINDS[name]
    mine = make(params, **{**options, "lr": 0.5})
    mine.load_state_dict(saved)
    group = mine.param_groups[0]
    assert {key: group[key] for key in options} == options
    state, kept = theirs.state[params[0]], theirs.state[params[1]]
    found = mine.state[params[0]]
    assert found["step"] == 3
    assert torch.equal(found[mine.moment_names[0]], state["state1"])
    assert torch.equal(found[f"{mine.moment_names[0]}_scale"], state["absmax1"])
    assert torch.equal(mine.state[params[1]][mine.moment_names[0]], kept["state1"])
    if name == "AdamW8bit":
        exact = bnb.functional.dequantize_blockwise(
            state["state2"], absmax=state["absmax2"], code=state["qmap2"], blocksize=256
        )
        error = (decoded(mine, params[0])[1] - exact).norm() / exact.norm()
        assert float(error) < 0.02
        assert torch.equal(mine.state[params[1]]["exp_avg_sq"], kept["state2"])


@pytest.mark.parametrize("name", KINDS)
def test_a_run_of_theirs_goes_on_here(bnb, name):
    """Parameters stay near those of their own further steps, to which the first ones contribute."""
    params, theirs, saved = written(bnb, name)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    make, options = KINDS[name]
    mine = make(others, **options)
    mine.load_state_dict(saved)
    before = [p.detach().clone() for p in params]
    take_steps(theirs, params, 3)
    take_steps(mine, others, 3)
    for start, wanted, got in zip(before, params, others, strict=True):
        error = (got - wanted).detach().norm() / (wanted - start).detach().norm()
        assert float(error) < (0.15 if name == "Lion8bit" else 0.05)


def test_second_moments_that_they_rounded_to_zero_are_not_divided_by(bnb):
    params, _, saved = written(bnb, "AdamW8bit")
    quantized = saved["state"][0]["__bnb_optimizer_quant_state__"]
    quantized["state2"][:10] = 0
    quantized["state1"][0, :5] = 127  # the code of 0: nothing is known of these
    mine = AdamW8bit(params)
    mine.load_state_dict(saved)
    mean, square = decoded(mine, params[0])
    flushed = (torch.arange(70)[:, None] < 10) & (mean != 0)
    assert bool((square[flushed] > 0).all())
    assert not square[0, :5].any()
    largest = quantized["absmax2"].max()
    assert float(square[flushed].max()) <= 3.3e-7 * float(largest)
    before = params[0].detach().clone()
    params[0].grad = torch.zeros(70, 61)
    mine.param_groups[0]["lr"] = 1.0
    mine.step()
    assert float((params[0].detach() - before).abs().max()) < 10


def test_blocks_of_2048_as_in_old_versions(bnb):
    values = torch.randn(100, 100)
    table = bnb.functional.create_dynamic_map(signed=True)
    codes, state = bnb.functional.quantize_blockwise(values, code=table, blocksize=2048)
    saved = {
        "state": {0: {"step": 9, "state1": codes, "qmap1": table, "absmax1": state.absmax}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0, "params": [0]}],
    }
    param = nn.Parameter(torch.zeros(100, 100))
    mine = Lion8bit([param])
    mine.load_state_dict(saved)
    exact = bnb.functional.dequantize_blockwise(codes, state)
    assert float((decoded(mine, param)[0] - exact).norm() / exact.norm()) < 0.02


def test_their_32_bit_states_become_8_bit_ones_where_these_are_wanted(bnb):
    params, theirs, saved = written(bnb, "AdamW8bit", min_8bit_size=10**6)
    mine = AdamW8bit(params)
    mine.load_state_dict(saved)
    for found, key in zip(decoded(mine, params[0]), ("state1", "state2"), strict=True):
        exact = theirs.state[params[0]][key]
        assert float((found - exact).norm() / exact.norm()) < 0.02
    assert mine.state[params[0]]["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qmap2": torch.linspace(0, 1, 256)}, "qmap2 is not the map udynamic8"),
        ({"qmap1": None}, "qmap1 is not the map dynamic8"),
        ({"absmax1": torch.zeros(11)}, "state1 has 11 scales; blocks of 256 or 2048 or"),
        ({"state1": torch.zeros(5, dtype=torch.uint8)}, r"state1 has shape \[5\], not \[70, 61\]"),
        ({"state1": torch.zeros(70, 61, dtype=torch.int8)}, "state1 is torch.int8 with scales"),
    ],
)
def test_states_that_are_not_theirs_are_refused(bnb, change, message):
    params, _, saved = written(bnb, "AdamW8bit")
    saved = copy.deepcopy(saved)
    saved["state"][0]["__bnb_optimizer_quant_state__"].update(change)
    with pytest.raises(ValueError, match=message):
        AdamW8bit(params).load_state_dict(saved)


def test_states_of_their_lion_are_not_taken_for_adam(bnb):
    params, _, saved = written(bnb, "Lion8bit")
    with pytest.raises(ValueError, match="optimizer of another kind"):
        AdamW8bit(params).load_state_dict(saved)
