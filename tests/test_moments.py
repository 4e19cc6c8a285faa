"""Moments in 8 bits: what rounding promises, and that updates are those of the papers."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits import moments
from fewbits.codebook import CODEBOOKS, f32
from fewbits.moments import BLOCK, FIRST, SECOND, Moment, Step

ROOTS = CODEBOOKS["udynamic8"].values
G = 2.75  # the promise of the module's docstring
SMALLEST = 3.25e-7
SHAPES = [(1,), (255,), (256,), (257,), (3, 100), (2, 7, 61), (1000,)]
ADAM = Step("adam", 3, 1e-2, 0.9, 0.999, 1e-8, 0.1)
LION = Step("lion", 3, 1e-2, 0.9, 0.99, 0.0, 0.1)
SGD = Step("sgd", 3, 1e-2, 0.9, weight_decay=0.1)
RULES = {"adam": ADAM, "lion": LION, "sgd": SGD}


def kinds_of(step: Step) -> int:
    return 2 if step.rule == "adam" else 1


def fresh(tensors: Sequence[Tensor], step: Step, in_8bit: bool = True) -> list[list[Moment]]:
    books = (FIRST, SECOND)[: kinds_of(step)]
    return [[moments.zeros(t, book if in_8bit else None) for t in tensors] for book in books]


def rounded(values: Tensor, book: str = "second", number: int = 1) -> Tensor:
    """`values` [n], n ≤ 256, as they decode after the rounding of step `number`."""
    block = torch.zeros(1, BLOCK)
    block[0, : len(values)] = values
    seed = Step("adam", number, 1, 0.9).seed
    first, second = moments._uniform(torch.arange(BLOCK, dtype=torch.int32)[None], seed)
    chosen, noise = (SECOND, second) if book == "second" else (FIRST, first)
    codes, scale = moments._encode(block, chosen, noise)
    decoded = torch.tensor(chosen.values)[codes.int()] * scale[:, None]
    return decoded[0, : len(values)]


# --- the table --------------------------------------------------------------------------------------


def test_second_moments_are_squares_of_the_unsigned_dynamic_map():
    assert SECOND.values == tuple(f32(root * root) for root in ROOTS)
    assert ROOTS[1] == pytest.approx(SMALLEST, rel=1e-6)
    assert 0 < SECOND.values[1] < 1.1e-13


@pytest.mark.parametrize(("from_root", "quotient"), [(0.0, G), (1e-3, 1.25), (1e-2, 1.14)])
def test_the_quotients_of_neighbours_are_as_stated(from_root, quotient):
    quotients = [b / a for a, b in itertools.pairwise(ROOTS[1:]) if a >= from_root]
    assert quotient - 0.01 < max(quotients) <= quotient


# --- rounding ---------------------------------------------------------------------------------------

magnitudes = st.lists(st.floats(-20, 6).map(lambda e: 10.0**e), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(magnitudes, st.integers(1, 10**6))
def test_roots_of_second_moments_are_never_far_from_exact(roots, number):
    """(2), (3) and (4) of the module."""
    v = torch.tensor(roots, dtype=torch.float64).square().float()
    got = rounded(v, number=number).double().sqrt()
    exact = v.double().sqrt()
    largest = exact.max()
    assert bool((got >= exact / G * (1 - 1e-6)).all())
    upper = torch.maximum(exact * G, largest * SMALLEST)
    assert bool((got <= upper * (1 + 1e-6)).all())
    assert bool((got > 0).all())
    assert got[exact.argmax()] == exact.max()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60), st.integers(1, 10**6))
def test_first_moments_become_one_of_their_two_neighbours(values, number):
    m = torch.tensor(values)
    got = rounded(m, "first", number)
    largest = m.abs().max()
    table = np.array(FIRST.values, dtype=np.float32)
    for value, decoded in zip(m, got, strict=True):
        if largest == 0:
            assert decoded == 0
            continue
        below = int(np.clip(np.searchsorted(table, (value / largest).numpy(), side="left") - 1, 0, 254))
        assert decoded in [f32(float(near) * float(largest)) for near in table[below : below + 2]]


@pytest.mark.parametrize("book", ["first", "second"])
def test_what_is_decoded_is_the_value_on_the_average(book):
    values = torch.logspace(-4, 0, 200)
    values = values if book == "first" else values.square()
    steps = 4000
    mean = sum(rounded(values, book, number).double() for number in range(1, steps + 1)) / steps
    table = torch.tensor(FIRST.values if book == "first" else SECOND.values)
    above = torch.bucketize(values, table).clamp(1, 255)
    gap = (table[above] - table[above - 1]).double()
    # Five standard deviations of a mean of `steps` roundings within the gap.
    assert bool(((mean - values).abs() <= 2.5 * gap / math.sqrt(steps) + 1e-6 * values).all())


def test_zeros_stay_zeros_and_do_not_spread():
    assert bool((rounded(torch.zeros(256)) == 0).all())
    assert bool((rounded(torch.zeros(256), "first") == 0).all())
    mixed = torch.tensor([1.0, 0.0, 1e-12])
    assert rounded(mixed)[1] == 0
    assert rounded(mixed)[2] > 0


def test_the_random_numbers_are_even_and_do_not_depend_on_each_other():
    places = torch.arange(2**18, dtype=torch.int32)
    first, second = moments._uniform(places, ADAM.seed)
    later, _ = moments._uniform(places, Step("adam", 4, 1, 0.9).seed)
    both = torch.stack([first, second, later, first.roll(1), first.roll(256), first.roll(4096)]).double()
    assert 0 < float(both.min()) < float(both.max()) < 1
    assert bool((both.mean(1) - 0.5).abs().max() < 0.005)
    off_diagonal = torch.corrcoef(both) - torch.eye(len(both))
    assert float(off_diagonal.abs().max()) < 0.01
    counts = torch.histc(first, 256, 0, 1)
    chi_squared = float(((counts - 1024) ** 2 / 1024).sum())
    assert 150 < chi_squared < 380  # 255 degrees of freedom


def test_the_random_numbers_stay_the_same_from_version_to_version():
    first, second = moments._uniform(torch.arange(1000, dtype=torch.int32), Step("adam", 1, 1, 0.9).seed)
    digest = hashlib.sha256(first.numpy().tobytes() + second.numpy().tobytes()).hexdigest()
    assert digest[:16] == "51c33238230e2470"


def test_stored_moments_store_to_the_same_codes_again():
    for book in (FIRST, SECOND):
        values = torch.randn(700) ** 3
        values = values if book is FIRST else values.abs()
        once = moments.store(values, book)
        twice = moments.store(moments.load(once, book), book)
        assert torch.equal(once.codes, twice.codes)
        assert once.scale is not None
        assert twice.scale is not None
        assert torch.equal(once.scale, twice.scale)


def track(rule: str, steps: int) -> Tensor:
    """v as stored over exact v after `steps` normal gradients of scales 1e-2 … 1; rule: ours, up."""
    places = torch.arange(2048, dtype=torch.int32).view(-1, BLOCK)
    sigma = torch.logspace(-2, 0, BLOCK).expand(8, BLOCK)
    table = torch.tensor(SECOND.values)
    stored, exact = torch.zeros(8, BLOCK), torch.zeros(8, BLOCK)
    for number in range(1, steps + 1):
        square = (torch.randn(8, BLOCK) * sigma).square() * 0.001
        exact = exact * 0.999 + square
        _, noise = moments._uniform(places, Step("adam", number, 1, 0.9).seed)
        noise = noise if rule == "ours" else torch.full_like(noise, 1e-9)
        codes, scale = moments._encode(stored * 0.999 + square, SECOND, noise)
        stored = table[codes.int()] * scale[:, None]
    return stored / exact


def test_second_moments_follow_the_gradients_and_rounding_up_does_not():
    ours = track("ours", 1200)
    assert 0.9 < float(ours.mean()) < 1.1
    assert bool((ours > 0.1).all())
    assert float(track("up", 1200).mean()) > 5


# --- updates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_float32_moments_give_the_formulas_in_double(rule):
    """Against the papers' formulas, written out once more."""
    params = [torch.randn(shape) for shape in SHAPES]
    kinds = fresh(params, RULES[rule], in_8bit=False)
    exact = [p.double() for p in params]
    m = [torch.zeros_like(p) for p in exact]
    v = [torch.zeros_like(p) for p in exact]
    for number in range(1, 6):
        grads = [torch.randn(shape) for shape in SHAPES]
        moments.update(params, grads, kinds, replace(RULES[rule], number=number))
        for i, g in enumerate(g.double() for g in grads):
            if rule == "adam":
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = 0.999 * v[i] + 0.001 * g * g
                step = m[i] / (1 - 0.9**number) / ((v[i] / (1 - 0.999**number)).sqrt() + 1e-8)
                exact[i] = exact[i] * (1 - 1e-3) - 1e-2 * step
            elif rule == "lion":
                exact[i] = exact[i] * (1 - 1e-3) - 1e-2 * torch.sign(0.9 * m[i] + 0.1 * g)
                m[i] = 0.99 * m[i] + 0.01 * g
            else:
                m[i] = 0.9 * m[i] + g + 0.1 * exact[i]
                exact[i] = exact[i] - 1e-2 * m[i]
    for got, wanted in zip(params, exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("in_8bit", [True, False], ids=["8bit", "32bit"])
def test_results_depend_neither_on_chunks_nor_on_what_is_updated_beside(rule, in_8bit, monkeypatch):
    """Many tensors at once, in chunks of every size, against one tensor at a time."""

    def run(chunk: int, together: bool) -> list[Tensor]:
        monkeypatch.setitem(moments._CHUNK, "cpu", chunk)
        generator = torch.Generator().manual_seed(1)
        params = [torch.randn(shape, generator=generator) for shape in SHAPES]
        kinds = fresh(params, RULES[rule], in_8bit)
        for number in range(1, 4):
            step = replace(RULES[rule], number=number)
            grads = [torch.randn(shape, generator=generator) for shape in SHAPES]
            if together:
                moments.update(params, grads, kinds, step)
            else:
                for i in range(len(params)):
                    moments.update([params[i]], [grads[i]], [[kind[i]] for kind in kinds], step)
        found = params + [moment.codes for kind in kinds for moment in kind]
        return found + [moment.scale for kind in kinds for moment in kind if moment.scale is not None]

    wanted = run(2**20, together=False)
    for chunk in (BLOCK, 3 * BLOCK, 2**20):
        got = run(chunk, together=True)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), chunk


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_are_rounded_once(rule, dtype):
    param, grad = torch.randn(300).to(dtype), torch.randn(300).to(dtype)
    wide = param.float()
    for tensor, kinds in ((param, fresh([param], RULES[rule])), (wide, fresh([wide], RULES[rule]))):
        moments.update([tensor], [grad], kinds, RULES[rule])
    assert torch.equal(param, wide.to(dtype))


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_zero_change_nothing_but_by_decay(rule):
    step = replace(RULES[rule], weight_decay=0.0)
    param = torch.randn(777)
    before = param.clone()
    kinds = fresh([param], step)
    for number in range(1, 5):
        moments.update([param], [torch.zeros(777)], kinds, replace(step, number=number))
    assert torch.equal(param, before)
    for kind, book in zip(kinds, (FIRST, SECOND), strict=False):
        assert not moments.load(kind[0], book).any()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-12, 3), st.booleans(), st.integers(0, 3)), min_size=1, max_size=30),
    st.integers(2, 12),
)
def test_no_step_is_larger_than_exact_moments_allow(spans, steps):
    """(5): whatever the gradients, |step| ≤ limit · rate."""
    scale = torch.tensor([10.0**e * (-1 if negative else 1) for e, negative, _ in spans])
    period = torch.tensor([k for *_, k in spans])
    param = torch.zeros(len(spans))
    kinds = fresh([param], ADAM)
    for number in range(1, steps + 1):
        step = Step("adam", number, 1.0, 0.9, 0.999, 1e-30)
        before = param.clone()
        grad = torch.where((number + period) % (period + 1) == 0, scale, torch.zeros(()))
        moments.update([param], [grad], kinds, step)
        assert bool(param.isfinite().all())
        assert float((param - before).abs().max()) <= step.limit * step.rate * (1 + 1e-5) + 1e-5


def test_the_limit_is_reached_by_the_worst_gradients_and_never_passed():
    """Cauchy and Schwarz' inequality is an equation for gradients proportional to aᵢ/bᵢ."""
    beta1, beta2, steps = 0.9, 0.999, 200
    worst = np.array([(beta1 / beta2) ** (steps - i) for i in range(1, steps + 1)])
    m = v = 0.0
    for g in worst:
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    step = Step("adam", steps, 1.0, beta1, beta2)
    corrected = m / (math.sqrt(v) * step.root_factor)
    assert corrected == pytest.approx(step.limit, rel=1e-5)
    assert Step("adam", 1, 1.0, beta1, beta2).limit == pytest.approx(0.1, rel=1e-5)  # times rate: 1
    assert step.limit * step.rate == pytest.approx(3.08, abs=0.1)


def test_a_nan_spoils_its_block_alone():
    param = torch.ones(600)
    kinds = fresh([param], ADAM)
    grad = torch.ones(600)
    grad[300] = math.nan
    for number in (1, 2):
        moments.update([param], [grad], kinds, Step("adam", number, 1e-2, 0.9, 0.999, 1e-8))
    assert param[:256].isfinite().all()
    assert param[512:].isfinite().all()
    assert param[256:512].isnan().all()
