"""Steps of optimizers with the CPU library, bit for bit as `fewbits.moments` for finite gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbits import moments
from fewbits.backends.cpu import library
from fewbits.backends.cpu.structs import DTYPES, Moments, StepOf, table_address
from fewbits.moments import FIRST, SECOND, Moment, Step

_RULES = {"adam": 0, "lion": 1, "sgd": 2}  # enum fewbits_rule


def update(
    params: Sequence[Tensor], grads: Sequence[Tensor], kinds: Sequence[Sequence[Moment]], step: Step
) -> None:
    """`fewbits.moments.update` in one call, where moments are in 8 bits; the specification elsewhere."""
    if any(m.scale is None for m in kinds[0]) or any(t.dtype not in DTYPES for t in (*params, *grads)):
        moments.update(params, grads, kinds, step)
        return
    described = (Moments * len(params))()
    for place, (param, grad) in enumerate(zip(params, grads, strict=True)):
        _describe(described[place], param, grad, [kind[place] for kind in kinds])
    status = library.library().fewbits_update(described, len(params), _step(step))
    library.check(status, "cannot take a step")


def _describe(made: Moments, param: Tensor, grad: Tensor, found: list[Moment]) -> None:
    made.param, made.grad = param.data_ptr(), grad.data_ptr()
    made.count, made.param_dtype, made.grad_dtype = param.numel(), DTYPES[param.dtype], DTYPES[grad.dtype]
    made.first, made.first_scale = _addresses(found[0])
    if len(found) == 2:
        made.second, made.second_scale = _addresses(found[1])


def _addresses(moment: Moment) -> tuple[int, int]:
    assert moment.scale is not None
    return moment.codes.data_ptr(), moment.scale.data_ptr()


def _step(step: Step) -> StepOf:
    # ctypes rounds to float32, as the specification does.
    return StepOf(
        first_table=table_address(FIRST),
        second_table=table_address(SECOND),
        beta1=step.beta1,
        take1=1 - step.beta1,
        beta2=step.beta2,
        take2=1 - step.beta2,
        eps=step.eps,
        root_factor=step.root_factor,
        limit=step.limit,
        rate=step.rate,
        shrink=step.shrink,
        decay=step.weight_decay,
        seed=step.seed,
        rule=_RULES[step.rule],
        threads=torch.get_num_threads(),
    )
