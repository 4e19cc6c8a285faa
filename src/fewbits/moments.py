"""The moments of optimizers in 8 bits: how they are stored, rounded and updated. The specification.

A moment is stored in blocks of 256 elements of the flattened parameter (Dettmers et al. 2021, arXiv
2110.02861): codes uint8, and the largest magnitude of each block in float32. Moments of small parameters stay
in float32. An update decodes a block, follows the formulas of the optimizer in float32, rounds the parameter
to its dtype once, and encodes the block again.

First moments are in the signed dynamic map. Of second moments v, the roots are in the unsigned one: the table
`udynamic8_squared`. Roots have the unit of gradients, as first moments have, and now the same range, 3.3e-7
to 1 of the largest in the block. v itself in the dynamic map, as bitsandbytes has it, reaches down to
gradients of 5.7e-4 of the largest. Those below have a first moment, but a second one of 0, and steps of
m/eps: thousands of times too large.

Rounding is stochastic. Let lo ≤ x ≤ hi be the neighbours of x = value / (largest of the block) in the table.
The code of hi is taken with probability (x - lo)/(hi - lo), that of lo otherwise; so

(1) the expectation of what is decoded is the value (for first moments within the table, whose negative end is
    -0.993). With beta2 = 0.999 a second moment falls by a thousandth of itself at most, and codes lie 1 % to
    30 % apart: rounded to nearest it would stay where it is until the largest of its block changes, and
    rounded up it would climb towards the largest squared gradient ever seen, 73 times too high after 6,000
    steps of normal gradients.

A second moment above 0 never gets the code of 0: below the smallest code it gets that one. Hence, with r the
root of v, r' the root of what is decoded, R the largest root of the block, and G = 2.75 the largest quotient
of neighbouring roots in the table above 0 (1.14 between 1e-2 R and R, 1.25 from 1e-3 R on):

(2) r' ≥ r/G: a rounding makes a step at most 2.75 times (above 1e-2 R: 1.14 times) as large as with the exact
    v.
(3) r' ≤ max(G r, 3.3e-7 R): nor is it more than 2.75 times too small, down to gradients of 3.3e-7 of the
    largest.
(4) v > 0 decodes to more than 0, unless the product with a subnormal R² underflows; v = 0 decodes to 0.
(5) With finite gradients no step of Adam, decay aside, is larger than exact moments allow for any gradients:
    lr at first, 7.3 lr in the long run with betas of 0.9 and 0.999. Rounded moments would allow larger ones,
    which are cut off. With beta1² > beta2 that bound grows without end, and is dropped when it is above 1e17.

With (2), m = 0 gives no step and a block of zeros stays zero: there is no 0/0 while eps > 0. The set of roots
is what 4-bit optimizers (arXiv 2309.01507) leave zero out of, for the same reason.

The random numbers are a hash of the element's place in its parameter and of the number of the step: the same
in every run, on every device, in every replica, and after loading. A NaN or infinite gradient spoils its
block: parameters become NaN, but with Lion stay where they are, since the sign of NaN is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from fewbits.codebook import CODEBOOKS, Codebook, f32

BLOCK = 256
FIRST, SECOND = CODEBOOKS["dynamic8"], CODEBOOKS["udynamic8_squared"]
_ZERO = {book.name: book.values.index(0.0) for book in (FIRST, SECOND)}

Rule = Literal["adam", "lion", "sgd"]

# Elements worked on at a time: temporaries take about 50 bytes each.
_CHUNK = {"cpu": 2**18}
_CHUNK_ELSEWHERE = 2**22


@dataclass(frozen=True)
class Step:
    """One step of a rule, with number `number` ≥ 1.

    adam  AdamW (Loshchilov and Hutter, arXiv 1711.05101): decay is decoupled
    lion  arXiv 2302.06675
    sgd   with momentum `beta1`; decay is added to the gradient, as in torch.optim.SGD
    """

    rule: Rule
    number: int
    lr: float
    beta1: float
    beta2: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0

    @property
    def rate(self) -> float:
        """What the direction is multiplied with, float32: the learning rate, corrected for the start."""
        return f32(self.lr / (1 - self.beta1**self.number) if self.rule == "adam" else self.lr)

    @property
    def root_factor(self) -> float:
        """float32: corrects the root of the second moment for the start."""
        return f32(1 / math.sqrt(1 - self.beta2**self.number)) if self.rule == "adam" else 1.0

    @property
    def limit(self) -> float:
        """float32: what |mean / root| cannot exceed with exact moments, whatever the gradients (adam).

        By the inequality of Cauchy and Schwarz: the mean is Σ aᵢ gᵢ, the corrected square Σ bᵢ gᵢ².
        """
        if self.rule != "adam":
            return math.inf
        quotient = self.beta1**2 / self.beta2 if self.beta2 else math.inf if self.beta1 else 0.0
        if self.number * math.log(max(quotient, 1.0)) > 80:  # its square is beyond any use
            return math.inf
        powers = self.number if quotient == 1 else (1 - quotient**self.number) / (1 - quotient)
        squares = (1 - self.beta1) ** 2 * (1 - self.beta2**self.number) / (1 - self.beta2) * powers
        return f32(math.sqrt(squares) * (1 + 1e-6))

    @property
    def shrink(self) -> float:
        """float32: what parameters are multiplied with for decoupled decay."""
        return f32(1 - self.lr * self.weight_decay)

    @property
    def seed(self) -> int:
        """32 bits for the random numbers of this step."""
        mixed = (self.number * 0x9E3779B97F4A7C15) & (2**64 - 1)
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        return (mixed ^ (mixed >> 27)) & (2**32 - 1)


@dataclass(frozen=True, eq=False)
class Moment:
    """codes uint8, shaped like the parameter, and scale float32 [blocks]; or float32 values and no scale."""

    codes: Tensor
    scale: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)


def zeros(like: Tensor, book: Codebook | None) -> Moment:
    """A moment of 0 for a parameter: in the codes of `book`, or in float32 where it is None."""
    if book is None:
        return Moment(torch.zeros(like.shape, dtype=torch.float32, device=like.device), None)
    codes = torch.full(like.shape, _ZERO[book.name], dtype=torch.uint8, device=like.device)
    return Moment(codes, torch.zeros(-(-like.numel() // BLOCK), dtype=torch.float32, device=like.device))


def store(values: Tensor, book: Codebook | None) -> Moment:
    """float32 values as a moment, rounded to the nearest code (of second moments: in v, and never to 0)."""
    made = zeros(values, book)
    if book is None or made.scale is None:
        made.codes.copy_(values)
        return made
    flat = values.contiguous()
    for chunk in _chunks([flat]):
        decoded = chunk.gather([flat], 0, torch.float32)
        codes, scale = _encode(decoded, book, torch.full_like(decoded, 0.5))
        chunk.scatter(codes, [made.codes])
        chunk.scatter_blocks(scale, [made.scale])
    return made


def load(moment: Moment, book: Codebook, block: int = BLOCK) -> Tensor:
    """float32 values of a moment, shaped like its codes; `block`: elements that share a scale."""
    if moment.scale is None:
        return moment.codes.float()
    values = torch.empty(moment.codes.shape, dtype=torch.float32, device=moment.codes.device)
    flat, codes = values.view(-1), moment.codes.reshape(-1)
    table = _tables(book, codes.device)
    for start in range(0, codes.numel(), 2**20):  # a multiple of any block
        part = slice(start, min(start + 2**20, codes.numel()))
        scale = moment.scale[start // block : -(-part.stop // block)].repeat_interleave(block)
        flat[part] = table.index_select(0, codes[part].int()) * scale[: part.stop - start]
    return values


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Sequence[Moment]],
    step: Step,
) -> None:
    """One step of all `params`, in place, and of their moments.

    params   contiguous, on one device, of any floating dtypes; grads of the same shapes, of any dtypes
    moments  the first ones, and the second ones where the rule has them: all in 8 bits, or all in float32
    """
    books = (FIRST, SECOND)[: len(moments)]
    for chunk in _chunks(params):
        param = chunk.gather(params, 0, torch.float32)
        grad = chunk.gather(grads, 0, torch.float32)
        values = [_decoded(chunk, kind, book) for kind, book in zip(moments, books, strict=True)]
        _RULES[step.rule](step, param, grad, values)
        chunk.scatter(param, params)
        noise = chunk.noise(step.seed) if moments[0][0].scale is not None else None
        for number, (kind, book) in enumerate(zip(moments, books, strict=True)):
            _encoded(chunk, values[number], kind, book, None if noise is None else noise[number])


# --- formulas ---------------------------------------------------------------------------------------
# Each product and sum is rounded by itself, so that kernels can give the same bits.


def _adam(step: Step, param: Tensor, grad: Tensor, moments: list[Tensor]) -> None:
    mean, square = moments
    mean.mul_(f32(step.beta1)).add_(grad * f32(1 - step.beta1))
    square.mul_(f32(step.beta2)).add_(grad * f32(1 - step.beta2) * grad)
    # In float32 torch's roots on CPUs are not the nearest ones.
    root = square.double().sqrt_().float().mul_(step.root_factor).add_(f32(step.eps))
    direction = (mean / root).clamp_(-step.limit, step.limit)
    param.mul_(step.shrink).sub_(direction.mul_(step.rate))


def _lion(step: Step, param: Tensor, grad: Tensor, moments: list[Tensor]) -> None:
    (mean,) = moments
    direction = (mean * f32(step.beta1)).add_(grad * f32(1 - step.beta1)).sign_()
    param.mul_(step.shrink).sub_(direction.mul_(step.rate))
    mean.mul_(f32(step.beta2)).add_(grad * f32(1 - step.beta2))


def _sgd(step: Step, param: Tensor, grad: Tensor, moments: list[Tensor]) -> None:
    (momentum,) = moments
    momentum.mul_(f32(step.beta1)).add_(grad.add_(param * f32(step.weight_decay)))
    param.sub_(momentum * step.rate)


_RULES = {"adam": _adam, "lion": _lion, "sgd": _sgd}


# --- codes ------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _tables(book: Codebook, device: torch.device) -> Tensor:
    return torch.tensor(book.values, dtype=torch.float32, device=device)


def _encode(values: Tensor, book: Codebook, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scale [blocks]) of float32 [blocks, 256]: up where noise in (0, 1) is below the fraction."""
    table = _tables(book, values.device)
    scale = values.abs().amax(1)
    scaled = values / torch.where(scale > 0, scale, 1.0)[:, None]
    below = torch.bucketize(scaled, table[1:-1], out_int32=True)
    low = table.index_select(0, below.view(-1)).view_as(scaled)
    gap = table.index_select(0, (below + 1).view(-1)).view_as(scaled).sub_(low)
    codes = below.add_(scaled.sub_(low) > gap.mul_(noise))
    if book.values[0] == 0:  # see (4) of the module
        codes = torch.maximum(codes, (values > 0).int())
    return codes.to(torch.uint8), scale


def _decoded(chunk: _Chunk, kind: Sequence[Moment], book: Codebook) -> Tensor:
    """float32 [blocks, 256]."""
    codes = [moment.codes for moment in kind]
    scales = [moment.scale for moment in kind if moment.scale is not None]
    if not scales:
        return chunk.gather(codes, 0, torch.float32)
    gathered = chunk.gather(codes, _ZERO[book.name], torch.uint8)
    values = _tables(book, gathered.device).index_select(0, gathered.view(-1).int())
    return values.view_as(gathered).mul_(chunk.gather_blocks(scales)[:, None])


def _encoded(
    chunk: _Chunk, values: Tensor, kind: Sequence[Moment], book: Codebook, noise: Tensor | None
) -> None:
    codes = [moment.codes for moment in kind]
    if noise is None:
        chunk.scatter(values, codes)
        return
    made, scale = _encode(values, book, noise)
    chunk.scatter(made, codes)
    chunk.scatter_blocks(scale, [moment.scale for moment in kind if moment.scale is not None])


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _uniform(places: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Two numbers in (0, 1), of 16 bits each, for int32 places; arithmetic wraps around at 32 bits."""
    word = places + _signed(seed)
    word.bitwise_xor_((word >> 16).bitwise_and_(0xFFFF)).mul_(_signed(0x7FEB352D))
    word.bitwise_xor_((word >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    word.bitwise_xor_((word >> 16).bitwise_and_(0xFFFF))
    halves = (word >> 16).bitwise_and_(0xFFFF), word.bitwise_and_(0xFFFF)
    first, second = (half.float().mul_(2.0**-16).add_(2.0**-17) for half in halves)
    return first, second


# --- many tensors as one ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """Elements start … stop of tensor number `tensor`; start is a multiple of the block."""

    tensor: int
    start: int
    stop: int

    @property
    def blocks(self) -> slice:
        return slice(self.start // BLOCK, -(-self.stop // BLOCK))


@dataclass(frozen=True)
class _Chunk:
    """Pieces of many tensors, worked on as one tensor [blocks, 256]; a short block is filled up."""

    pieces: tuple[_Piece, ...]
    device: torch.device

    def gather(self, tensors: Sequence[Tensor], fill: float, dtype: torch.dtype) -> Tensor:
        whole = torch.full((self._count(), BLOCK), fill, dtype=dtype, device=self.device)
        torch._foreach_copy_(self._slots(whole), self._parts(tensors))
        return whole

    def scatter(self, whole: Tensor, tensors: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self._parts(tensors), self._slots(whole))

    def gather_blocks(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensors[piece.tensor][piece.blocks] for piece in self.pieces])

    def scatter_blocks(self, whole: Tensor, tensors: Sequence[Tensor]) -> None:
        parts = [tensors[piece.tensor][piece.blocks] for piece in self.pieces]
        torch._foreach_copy_(parts, list(whole.split([len(part) for part in parts])))

    def noise(self, seed: int) -> tuple[Tensor, Tensor]:
        """For both moments, by the places of elements in their tensors."""
        blocks = [
            torch.arange(p.blocks.start, p.blocks.stop, dtype=torch.int32, device=self.device)
            for p in self.pieces
        ]
        inside = torch.arange(BLOCK, dtype=torch.int32, device=self.device)
        return _uniform(torch.cat(blocks)[:, None] * BLOCK + inside, seed)

    def _count(self) -> int:
        return sum(piece.blocks.stop - piece.blocks.start for piece in self.pieces)

    def _slots(self, whole: Tensor) -> list[Tensor]:
        flat, at, slots = whole.view(-1), 0, []
        for piece in self.pieces:
            slots.append(flat[at : at + piece.stop - piece.start])
            at += (piece.blocks.stop - piece.blocks.start) * BLOCK
        return slots

    def _parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[piece.tensor].view(-1)[piece.start : piece.stop] for piece in self.pieces]


def _chunks(tensors: Sequence[Tensor]) -> Iterator[_Chunk]:
    """All elements of the tensors, some blocks at a time."""
    device = tensors[0].device
    limit = _CHUNK.get(device.type, _CHUNK_ELSEWHERE)
    pieces: list[_Piece] = []
    room = limit
    for number, tensor in enumerate(tensors):
        start, end = 0, tensor.numel()
        while start < end:
            stop = min(end, start + room)
            pieces.append(_Piece(number, start, stop))
            room -= -(-(stop - start) // BLOCK) * BLOCK
            start = stop
            if room <= 0:
                yield _Chunk(tuple(pieces), device)
                pieces, room = [], limit
    if pieces:
        yield _Chunk(tuple(pieces), device)
