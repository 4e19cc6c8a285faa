"""Adam and AdamW, with both moments in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from fewbits.moments import Step
from fewbits.optim.blockwise import BlockwiseOptimizer, refuse


class AdamW8bit(BlockwiseOptimizer):
    """AdamW (arXiv 1711.05101) with states in blocks of 8 bits (arXiv 2110.02861).

    The arguments are those of bitsandbytes' class of this name; what there is no use for here is refused
    unless it has its default. Formulas are torch.optim.AdamW's, in float32 for any dtype of the parameters.

    lr, betas, eps   as in torch.optim.AdamW
    weight_decay     decoupled; by default 0.01, for Adam 0
    min_8bit_size    states of parameters with fewer elements stay in float32
    is_paged         says nothing here, see `PagedAdamW8bit`
    keep_32bit       parameters whose states stay in float32 as well, such as embeddings; others are ignored
    """

    moment_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    default_decay: ClassVar[float] = 1e-2

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        *,
        optim_bits: int = 32,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        keep_32bit: Iterable[Tensor] = (),
    ) -> None:
        refuse(
            type(self).__name__,
            amsgrad=(amsgrad, False),
            optim_bits=(optim_bits, 32),  # what bitsandbytes' 8-bit classes have there, too
            args=(args, None),
            percentile_clipping=(percentile_clipping, 100),
            block_wise=(block_wise, True),
        )
        decay = self.default_decay if weight_decay is None else weight_decay
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": decay}
        super().__init__(params, defaults, min_8bit_size, keep_32bit)

    def _step_of(self, group: dict[str, Any], number: int) -> Step:
        beta1, beta2 = group["betas"]
        return Step("adam", number, float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"])


class Adam8bit(AdamW8bit):
    """Adam (arXiv 1412.6980) with 8-bit states: AdamW8bit without weight decay by default.

    With `weight_decay` it decays as AdamW does, decoupled, which is what bitsandbytes' class of this name
    does; torch.optim.Adam adds it to the gradient.
    """

    default_decay: ClassVar[float] = 0.0


class AdamW32bit(AdamW8bit):
    """AdamW with float32 states for parameters of any dtype (torch's have the dtype of the parameter)."""

    bits: ClassVar[int] = 32


class PagedAdamW8bit(AdamW8bit):
    """AdamW8bit under another name, for scripts that ask for it.

    bitsandbytes keeps paged states in CUDA's managed memory, which moves to the host when the GPU is full.
    Here states lie where their parameters do and never move: the same values, but no help when memory runs
    out.
    """


class PagedAdam8bit(Adam8bit):
    """Adam8bit under another name; see `PagedAdamW8bit`."""


class PagedAdamW32bit(AdamW32bit):
    """AdamW32bit under another name; see `PagedAdamW8bit`."""
