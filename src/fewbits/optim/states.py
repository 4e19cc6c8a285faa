"""States as files have them: of these optimizers, of bitsandbytes', of torch's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewbits import moments
from fewbits.codebook import CODEBOOKS, Codebook
from fewbits.moments import BLOCK, Moment

# Where bitsandbytes hides its tensors from FSDP.
_WRAPPED = "__bnb_optimizer_quant_state__"
_THEIR_BOOKS = (CODEBOOKS["dynamic8"], CODEBOOKS["udynamic8"])
# Elements that share a scale; bitsandbytes had 2048 before 0.44.
_THEIR_BLOCKS = (256, 2048, 1024, 512, 4096, 128, 64)
_REFUSED = ("amsgrad", "maximize", "nesterov", "dampening")


@dataclass(frozen=True)
class Stored:
    """A state that was read: moments as the file has them, each with the table of its codes.

    `block`: elements that share a scale. `theirs`: bitsandbytes rounded second moments to 0.
    """

    step: int
    moments: tuple[Moment, ...]
    books: tuple[Codebook, ...]
    block: int = BLOCK
    theirs: bool = False

    def as_moments(self, wanted: Sequence[Codebook | None]) -> list[Moment]:
        """The same in the codes of `wanted`, or float32 for None; as they are where they fit."""
        same = [
            self.block == BLOCK and (book if moment.scale is not None else None) == target
            for moment, book, target in zip(self.moments, self.books, wanted, strict=True)
        ]
        return [
            _exact(moment) if as_it_is else moments.store(self._values(number), target)
            for number, (moment, target, as_it_is) in enumerate(zip(self.moments, wanted, same, strict=True))
        ]

    def _values(self, number: int) -> Tensor:
        moment, book = self.moments[number], self.books[number]
        values = moments.load(moment, book, self.block)
        if number == 0 or not self.theirs or moment.scale is None:
            return values
        # A second moment of 0 beside a first one that is not was rounded to it: from half the smallest code
        # at most, which makes no step larger than it would have been.
        smallest = replace(book, name=f"{book.name} above 0", values=(book.values[1] / 2, *book.values[1:]))
        above = moments.load(moment, smallest, self.block)
        return torch.where(self._values(0) != 0, above, values)


def _exact(moment: Moment) -> Moment:
    """As it is, in float32 where it has no codes."""
    return moment if moment.scale is not None else Moment(moment.codes.float(), None)


def check_form(state_dict: Mapping[str, Any]) -> None:
    """ValueError for what is no state dict of an optimizer."""
    groups = state_dict.get("param_groups")
    if (
        not isinstance(state_dict.get("state"), Mapping)
        or not isinstance(groups, list)
        or not all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups)
    ):
        raise ValueError(
            f"a state dict of an optimizer has state and param_groups with params, got {sorted(state_dict)}"
        )


def flat(saved: Mapping[str, Any]) -> dict[str, Any]:
    """One level, whether or not bitsandbytes wrapped its tensors."""
    wrapped = saved.get(_WRAPPED, {})
    if not isinstance(wrapped, Mapping):
        raise ValueError(f"{_WRAPPED} of a state holds its tensors by name, got {type(wrapped).__name__}")
    return {**{key: value for key, value in saved.items() if key != _WRAPPED}, **wrapped}


def read(saved: Mapping[str, Any], names: Sequence[str], shape: tuple[int, ...], what: str) -> Stored:
    """The state of a parameter of `shape`, with moments called `names`; `what` is its name in errors."""
    if "momentum_buffer" in saved:  # torch.optim.SGD counts no steps; here they only seed the rounding
        saved = {"step": 1, **saved}
    theirs = "state1" in saved
    keys = [f"state{i + 1}" for i in range(len(names))] if theirs else list(names)
    scales = [f"absmax{i + 1}" if theirs else f"{name}_scale" for i, name in enumerate(names)]
    missing = [key for key in ("step", *keys) if key not in saved]
    extra = "state2" in saved and len(names) == 1
    if missing or extra:
        raise ValueError(
            f"{what} has {', '.join(sorted(saved))}; this optimizer takes step, {', '.join(keys)}. "
            "It was saved by an optimizer of another kind"
        )
    step = saved["step"]
    counted = isinstance(step, int | float) or (isinstance(step, Tensor) and step.numel() == 1)
    if not counted or not 0 <= step < 2**53:
        raise ValueError(f"{what}: step is a number of steps, at least 0; got {step!r}")
    for key in (*keys, *(scale for scale in scales if saved.get(scale) is not None)):
        if not isinstance(saved[key], Tensor):
            raise ValueError(f"{what}: {key} is {type(saved[key]).__name__} and no tensor")
    found = tuple(Moment(saved[key], saved.get(scale)) for key, scale in zip(keys, scales, strict=True))
    blocks = {_check(moment, key, shape, theirs, what) for moment, key in zip(found, keys, strict=True)}
    if len(blocks) > 1:
        raise ValueError(f"{what}: {' and '.join(keys)} have blocks of {sorted(blocks)}")
    ours = (moments.FIRST, moments.SECOND)
    if theirs:
        for number, moment in enumerate(found):
            _check_map(saved, f"qmap{number + 1}", moment, _THEIR_BOOKS[number], what)
    books = (_THEIR_BOOKS if theirs else ours)[: len(names)]
    return Stored(int(step), found, books, blocks.pop(), theirs)


def group(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group of a file, with the entries of a group `mine` under the same names."""
    for key in _REFUSED:
        if saved.get(key):
            raise ValueError(
                f"the state dict was saved with {key}={saved[key]!r}, which 8-bit optimizers do not have"
            )
    taken = dict(saved)
    coupled = taken.pop("decoupled_weight_decay", True) is False  # torch.optim.Adam
    if coupled and saved.get("weight_decay"):
        raise ValueError(
            f"the state dict was saved by torch.optim.Adam, which adds a weight_decay of "
            f"{saved['weight_decay']!r} to the gradient; 8-bit optimizers do not. Set it to 0 in its "
            "param_groups to load the states, and choose a decoupled one afterwards"
        )
    if "momentum" in mine and "momentum" not in saved and "betas" in saved:  # bitsandbytes' SGD
        taken["momentum"] = taken.pop("betas")[0]
        taken.pop("eps", None)
    return taken


def _check(moment: Moment, key: str, shape: tuple[int, ...], theirs: bool, what: str) -> int:
    """Elements that share a scale. ValueError where shape, dtype or length is not a moment's."""
    codes, scale = moment.codes, moment.scale
    if tuple(codes.shape) != shape:
        raise ValueError(f"{what}: {key} has shape {list(codes.shape)}, not {list(shape)}")
    if scale is None:
        if not codes.is_floating_point():
            raise ValueError(f"{what}: {key} is {codes.dtype} and has no scale")
        return BLOCK
    if codes.dtype != torch.uint8 or scale.dtype != torch.float32 or scale.ndim != 1:
        raise ValueError(
            f"{what}: {key} is {codes.dtype} with scales {scale.dtype} {list(scale.shape)}; 8-bit states are "
            "torch.uint8 with torch.float32 [blocks]"
        )
    count = math.prod(shape)
    sizes = _THEIR_BLOCKS if theirs else (BLOCK,)
    for size in sizes:
        if -(-count // size) == len(scale):
            return size
    raise ValueError(
        f"{what}: {key} has {len(scale)} scales; blocks of {' or '.join(map(str, sizes))} need "
        f"{' or '.join(str(-(-count // size)) for size in sizes)}"
    )


def _check_map(saved: Mapping[str, Any], key: str, moment: Moment, book: Codebook, what: str) -> None:
    if moment.scale is None:
        return
    table = saved.get(key)
    wanted = torch.tensor(book.values)
    if table is None or table.shape != wanted.shape or not torch.equal(table.float().cpu(), wanted):
        raise ValueError(f"{what}: {key} is not the map {book.name}, the only one that is known for it")
