"""transformers' Trainer: `TrainingArguments(optim="paged_adamw_8bit")` and the like without bitsandbytes.

Trainer looks up what an `optim` name stands for in a table of functions,
`trainer_optimizer._OPTIMIZER_HANDLERS`. transformers has no function for entering something there, and
`optim` has to be one of its own names; so the entries of bitsandbytes' names are replaced, and come back when
bitsandbytes is to serve them. Names that fewbits has no optimizer for (RMSprop, AdEMAMix) stay with
bitsandbytes. `Trainer(optimizer_cls_and_kwargs=…)`, which takes any optimizer, goes by neither.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import trainer_optimizer

from fewbits import optim
from fewbits.optim import BlockwiseOptimizer

_CLASSES: dict[str, type[BlockwiseOptimizer]] = {
    "adamw_bnb_8bit": optim.AdamW8bit,
    "adamw_8bit": optim.AdamW8bit,
    "paged_adamw_8bit": optim.PagedAdamW8bit,
    "paged_adamw_32bit": optim.PagedAdamW32bit,
    "lion_8bit": optim.Lion8bit,
    "lion_32bit": optim.Lion32bit,
    "paged_lion_8bit": optim.PagedLion8bit,
    "paged_lion_32bit": optim.PagedLion32bit,
}
# Private: where it is gone, Trainer goes on and says that these names need bitsandbytes.
_TABLE: dict[str, Any] = getattr(trainer_optimizer, "_OPTIMIZER_HANDLERS", {})
_ORIGINAL: dict[str, Any] = {name: _TABLE[name] for name in _CLASSES if name in _TABLE}


def register(*, takeover: bool) -> None:
    """Enter fewbits' optimizers into Trainer's table, or what was there before."""
    for name, original in _ORIGINAL.items():
        _TABLE[name] = _choose if takeover else original


def _choose(context: Any) -> tuple[type[BlockwiseOptimizer], dict[str, Any]]:
    """Class and arguments for `context.args.optim`, as Trainer's own functions return them.

    States of embeddings stay in 32 bits, as with bitsandbytes: most rows of their gradients are zero.
    """
    made = _CLASSES[str(context.args.optim.value)]
    options = dict(context.optimizer_kwargs)
    if made.moment_names == optim.Lion8bit.moment_names:
        options["betas"] = context.adam_kwargs["betas"]
    else:
        options.update(context.adam_kwargs)
    return made, {**options, "keep_32bit": _embeddings(context.model)}


def _embeddings(model: nn.Module | None) -> list[Tensor]:
    modules = () if model is None else model.modules()
    return [p for m in modules if isinstance(m, nn.Embedding) for p in m.parameters() if p.requires_grad]
