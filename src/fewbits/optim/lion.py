"""Lion, with its moment in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from fewbits.moments import Step
from fewbits.optim.blockwise import BlockwiseOptimizer, refuse


class Lion8bit(BlockwiseOptimizer):
    """Lion (arXiv 2302.06675) with its state in blocks of 8 bits (arXiv 2110.02861).

    Each parameter moves by `lr` against the sign of a mean of gradients; weight decay is decoupled. The
    arguments are those of bitsandbytes' class of this name, and `min_8bit_size`, `is_paged` and `keep_32bit`
    as in `fewbits.optim.AdamW8bit`. After a NaN gradient its block of 256 elements does not move any more, as
    the sign of NaN is 0: check gradients.
    """

    moment_names: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        keep_32bit: Iterable[Tensor] = (),
    ) -> None:
        refuse(
            type(self).__name__,
            args=(args, None),
            percentile_clipping=(percentile_clipping, 100),
            block_wise=(block_wise, True),
        )
        defaults = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}
        super().__init__(params, defaults, min_8bit_size, keep_32bit)

    def _step_of(self, group: dict[str, Any], number: int) -> Step:
        beta1, beta2 = group["betas"]
        return Step("lion", number, float(group["lr"]), beta1, beta2, weight_decay=group["weight_decay"])


class Lion32bit(Lion8bit):
    """Lion with a float32 state for parameters of any dtype."""

    bits: ClassVar[int] = 32


class PagedLion8bit(Lion8bit):
    """Lion8bit under another name; see `fewbits.optim.PagedAdamW8bit`."""


class PagedLion32bit(Lion32bit):
    """Lion32bit under another name; see `fewbits.optim.PagedAdamW8bit`."""
