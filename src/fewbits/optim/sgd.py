"""SGD with momentum, which is kept in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from fewbits.moments import Step
from fewbits.optim.blockwise import BlockwiseOptimizer, refuse


class SGD8bit(BlockwiseOptimizer):
    """SGD with momentum (torch.optim.SGD's formulas) with its state in blocks of 8 bits (arXiv 2110.02861).

    Weight decay is added to the gradient. The arguments are those of bitsandbytes' class of this name, and
    `min_8bit_size` and `keep_32bit` as in `fewbits.optim.AdamW8bit`. ValueError for a momentum of 0, which
    needs no state and no such optimizer, and for dampening and Nesterov's momentum, which bitsandbytes
    ignores.
    """

    moment_names: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        keep_32bit: Iterable[Tensor] = (),
    ) -> None:
        refuse(
            type(self).__name__,
            dampening=(dampening, 0.0),
            nesterov=(nesterov, False),
            args=(args, None),
            percentile_clipping=(percentile_clipping, 100),
            block_wise=(block_wise, True),
        )
        if momentum == 0:
            raise ValueError(
                "SGD8bit is for SGD with momentum, got momentum=0; use torch.optim.SGD, which has no state"
            )
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults, min_8bit_size, keep_32bit)

    def _step_of(self, group: dict[str, Any], number: int) -> Step:
        return Step("sgd", number, float(group["lr"]), group["momentum"], weight_decay=group["weight_decay"])
