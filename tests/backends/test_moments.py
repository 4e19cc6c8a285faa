"""Steps of optimizers by the CPU library: the specification's bits, on every instruction set."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits import moments
from fewbits.backends.cpu import library
from fewbits.backends.cpu import moments as kernels
from fewbits.backends.cpu.structs import Moments
from fewbits.moments import FIRST, SECOND, Moment, Step

SHAPES = [(1,), (17,), (255,), (256,), (257,), (3, 100), (0,), (2, 7, 61), (40, 1000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = [
    Step("adam", 1, 1e-2, 0.9, 0.999, 1e-8, 0.1),
    Step("lion", 1, 1e-2, 0.9, 0.99, 0.0, 0.1),
    Step("sgd", 1, 1e-2, 0.9, weight_decay=0.1),
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda step: step.rule)


def gradients(step: int) -> Iterator[Tensor]:
    """Magnitudes from 1e-12 to 1e3 side by side, zeros among them, whole blocks of zeros too."""
    generator = torch.Generator().manual_seed(step)
    for shape in SHAPES:
        grad = torch.randn(shape, generator=generator)
        exponent = torch.randint(-12, 4, shape, generator=generator)
        grad = grad * 10.0**exponent * (torch.rand(shape, generator=generator) > 0.1)
        yield grad if grad.numel() < 1000 else grad * (torch.arange(grad.numel()).view(shape) // 256 % 3 > 0)


def run(
    update: Callable[..., None], rule: Step, dtype: torch.dtype, grad_dtype: torch.dtype, steps: int = 4
) -> list[Tensor]:
    """Every tensor that is left after some steps."""
    generator = torch.Generator().manual_seed(99)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    books = (FIRST, SECOND) if rule.rule == "adam" else (FIRST,)
    kinds = [[moments.zeros(p, book) for p in params] for book in books]
    for number in range(1, steps + 1):
        grads = [grad.to(grad_dtype) for grad in gradients(number)]
        update(params, grads, kinds, replace(rule, number=number))
    parts: Sequence[Any] = [(m.codes, m.scale) for kind in kinds for m in kind]
    return [*params, *itertools.chain.from_iterable(parts)]


@every_rule
def test_steps_give_the_bits_of_the_specification(rule, each):
    cases = list(itertools.product(DTYPES, DTYPES))
    wanted = [run(moments.update, rule, *case) for case in cases]
    for isa in each():
        for case, expected in zip(cases, wanted, strict=True):
            got = run(kernels.update, rule, *case)
            same = [torch.equal(a, b) for a, b in zip(got, expected, strict=True)]
            assert all(same), (isa, case, same)


@every_rule
def test_threads_and_company_change_nothing(rule, each):
    def one_by_one(params: list[Tensor], grads: list[Tensor], kinds: list[list[Moment]], step: Step) -> None:
        for i in range(len(params)):
            kernels.update([params[i]], [grads[i]], [[kind[i]] for kind in kinds], step)

    before = torch.get_num_threads()
    for isa in each():
        results = []
        for threads, update in ((1, kernels.update), (3, kernels.update), (2, one_by_one)):
            torch.set_num_threads(threads)
            results.append(run(update, rule, torch.float32, torch.float32))
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), isa


def test_a_nan_or_infinity_spoils_its_block_alone(each):
    for isa in each():
        for bad in (float("nan"), float("inf")):
            param = torch.ones(600)
            kinds = [[moments.zeros(param, book)] for book in (FIRST, SECOND)]
            grad = torch.ones(600)
            grad[300] = bad
            for number in (1, 2):
                kernels.update([param], [grad], kinds, replace(RULES[0], number=number))
            assert param[:256].isfinite().all(), isa
            assert param[512:].isfinite().all(), isa
            assert param[256:512].isnan().all(), isa


def test_float64_and_32_bit_moments_go_to_the_specification():
    for dtype, in_8bit in ((torch.float64, True), (torch.float32, False)):
        results = []
        for update in (kernels.update, moments.update):
            param = torch.linspace(-1, 1, 700, dtype=dtype)
            kinds = [[moments.zeros(param, book if in_8bit else None)] for book in (FIRST, SECOND)]
            update([param], [param.clone()], kinds, RULES[0])
            results.append(param)
        assert torch.equal(*results)
        assert not torch.equal(results[0], torch.linspace(-1, 1, 700, dtype=dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, s: setattr(m, "param", None), "a part of tensor 0 is null"),
        (lambda m, s: setattr(m, "second", None), "a part of tensor 0 is null"),
        (lambda m, s: setattr(m, "grad", m.grad + 1), "on an odd address"),
        (lambda m, s: setattr(m, "count", -1), "tensor 0 has -1 elements"),
        (lambda m, s: setattr(m, "param_dtype", 7), "unknown dtypes of tensor 0: 7, 0"),
        (lambda m, s: setattr(s, "rule", 3), "unknown rule: 3"),
        (lambda m, s: setattr(s, "threads", 0), "0 threads"),
        (lambda m, s: setattr(s, "first_table", None), "first moments is null"),
        (lambda m, s: setattr(s, "second_table", s.first_table), "second moments does not begin with 0"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(change, message, isas):
    param, grad = torch.ones(300), torch.ones(300)
    kinds = [moments.zeros(param, book) for book in (FIRST, SECOND)]
    described, step = (Moments * 1)(), kernels._step(RULES[0])
    kernels._describe(described[0], param, grad, kinds)
    change(described[0], step)
    status = library.library().fewbits_update(described, 1, step)
    with pytest.raises(ValueError, match=message):
        library.check(status, "cannot take a step")
    assert torch.equal(param, torch.ones(300))


def test_a_table_that_does_not_ascend_is_refused(isas):
    step = kernels._step(RULES[0])
    table = (ctypes.c_float * 256)(*FIRST.values)
    table[7] = table[8]
    step.first_table = ctypes.addressof(table)
    status = library.library().fewbits_update((Moments * 1)(), 0, step)
    with pytest.raises(ValueError, match="the table of first moments does not ascend"):
        library.check(status, "cannot take a step")
