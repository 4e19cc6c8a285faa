"""What all optimizers with blockwise states share: groups, steps, state dicts, memory."""

from __future__ import annotations

import itertools
import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fewbits import backends, moments
from fewbits.codebook import Codebook
from fewbits.moments import Moment, Step
from fewbits.optim import states


@dataclass(frozen=True)
class StateMemory:
    """What an optimizer's states take now. `parameters`: elements that have one; `in_8bit`: in 8 bits."""

    parameters: int
    in_8bit: int
    nbytes: int

    @property
    def bytes_per_parameter(self) -> float:
        return self.nbytes / self.parameters if self.parameters else 0.0

    def __str__(self) -> str:
        return (
            f"optimizer states: {self.nbytes / 1e6:.1f} MB for {self.parameters / 1e6:.2f} M parameters, "
            f"{self.bytes_per_parameter:.2f} bytes each; {self.in_8bit / 1e6:.2f} M of them in 8 bits"
        )


@dataclass
class _Batch:
    """Parameters that take the same step together, with their gradients and moments."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    moments: list[list[Moment]] = field(default_factory=list)


class BlockwiseOptimizer(Optimizer):
    """A torch optimizer whose states are stored in blocks of 256, 8 bits an element (`fewbits.moments`).

    state of a parameter, by the names that torch gives the moments (`moment_names`):
        step              int
        exp_avg           uint8, shaped like the parameter (its local part where it is a DTensor)
        exp_avg_scale     float32 [ceil(elements / 256)]
        exp_avg           or float32, and no scale: see below

    Further entries of a group, beside `lr`, `weight_decay` and so on:
        min_8bit_size     states of smaller parameters stay in float32
        keep_32bit        parameters of the group whose states do so as well, or their places in it; kept as
                          places

    All parameters of a group on the same device are updated in a few large calls; nothing waits for the
    device. Temporary memory does not depend on the size of the parameters.

    A DTensor (FSDP2, tensor parallelism) is updated where its shard lies, without communication. Blocks run
    over the local shard, so its `state_dict` holds float32 DTensors, which load with any other sharding,
    rounded to the nearest codes once more.
    """

    moment_names: ClassVar[tuple[str, ...]]
    bits: ClassVar[int] = 8

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], min_8bit_size: int, keep_32bit: Iterable[Tensor]
    ) -> None:
        defaults = {**defaults, "min_8bit_size": min_8bit_size}
        _check_hyperparameters(defaults)
        super().__init__(params, defaults)
        kept = {id(param) for param in keep_32bit}
        for group in self.param_groups:
            also = (place for place, param in enumerate(group["params"]) if id(param) in kept)
            group["keep_32bit"] = sorted({*group["keep_32bit"], *also})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. ValueError for impossible hyperparameters, or a `keep_32bit` of other groups."""
        _check_hyperparameters({**self.defaults, **param_group})
        given = dict(param_group)
        kept = given.pop("keep_32bit", ())
        super().add_param_group(given)
        group = self.param_groups[-1]
        try:
            group["keep_32bit"] = _places(kept, group["params"])
        except ValueError:
            self.param_groups.pop()
            raise

    @abstractmethod
    def _step_of(self, group: dict[str, Any], number: int) -> Step:
        """Step `number` with the hyperparameters of `group`."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of all parameters that have a gradient. `closure` computes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for number, batch in self._batches(group):
                take_step(batch, self._step_of(group, number))
        return loss

    def memory(self) -> StateMemory:
        """Bytes of all states, scales and 32-bit states included; nothing before the first step."""
        found = [self._moments(state) for state in self.state.values() if state]
        return StateMemory(
            parameters=sum(kinds[0].codes.numel() for kinds in found),
            in_8bit=sum(kinds[0].codes.numel() for kinds in found if kinds[0].scale is not None),
            nbytes=sum(moment.nbytes for kinds in found for moment in kinds),
        )

    def state_dict(self) -> dict[str, Any]:
        """The states by number of their parameter, as torch has it; of DTensors in float32, as DTensors."""
        saved = super().state_dict()
        for number, param in enumerate(self._params()):
            if number in saved["state"] and _is_dtensor(param):
                saved["state"][number] = self._whole(param, saved["state"][number])
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, of bitsandbytes', or of torch's Adam, AdamW or SGD.

        States are stored in 8 or 32 bits as this optimizer stores them, whatever the file has: its own
        `min_8bit_size` and `keep_32bit` stay. ValueError, naming the parameter, where shapes, dtypes, lengths
        or maps are not what such a state has. Hooks that run after loading see no states yet.
        """
        states.check_form(state_dict)
        groups = [
            {**_options(mine), **states.group(theirs, mine), **_storage(mine)}
            for mine, theirs in zip(self.param_groups, state_dict["param_groups"], strict=False)
        ] + state_dict["param_groups"][len(self.param_groups) :]
        for group in groups:
            _check_hyperparameters(group)
        names = [number for group in groups for number in group["params"]]
        saved = state_dict["state"]
        known = dict(zip(names, self._placed(), strict=False))
        loaded = {
            param: self._loaded(saved[number], number, param, in_8bit)
            for number, (param, in_8bit) in known.items()
            if saved.get(number)
        }
        super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})
        self.state.update(loaded)

    # --- states ---------------------------------------------------------------------------------------

    def _params(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(group["params"] for group in self.param_groups)

    def _placed(self) -> Iterator[tuple[Tensor, bool]]:
        """Every parameter, and whether its states are in 8 bits."""
        for group in self.param_groups:
            kept = set(group.get("keep_32bit", ()))
            for place, param in enumerate(group["params"]):
                yield param, self.bits == 8 and place not in kept and param.numel() >= group["min_8bit_size"]

    def _books(self, in_8bit: bool) -> list[Codebook | None]:
        books = (moments.FIRST, moments.SECOND)[: len(self.moment_names)]
        return [book if in_8bit else None for book in books]

    def _moments(self, state: dict[str, Any]) -> list[Moment]:
        return [Moment(state[name], state.get(f"{name}_scale")) for name in self.moment_names]

    def _entries(self, number: int, kinds: Iterable[Moment]) -> dict[str, Any]:
        """The state of a parameter that has taken `number` steps."""
        state: dict[str, Any] = {"step": number}
        for name, moment in zip(self.moment_names, kinds, strict=True):
            state[name] = moment.codes
            if moment.scale is not None:
                state[f"{name}_scale"] = moment.scale
        return state

    def _loaded(self, saved: object, number: int, param: Tensor, in_8bit: bool) -> dict[str, Any]:
        what = f"the state of parameter {number} {list(param.shape)}"
        if not isinstance(saved, Mapping):
            raise ValueError(f"{what} is {type(saved).__name__}, and holds no moments by name")
        local = local_part(param)
        here = {
            key: _copied(local_part(value), local.device) if _is_tensor_of(key, value) else value
            for key, value in states.flat(saved).items()
        }
        stored = states.read(here, self.moment_names, tuple(local.shape), what)
        return self._entries(stored.step, stored.as_moments(self._books(in_8bit)))

    def _whole(self, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """The state of a DTensor with float32 DTensors in the place of codes and scales."""
        books = (moments.FIRST, moments.SECOND)
        whole: dict[str, Any] = {"step": state["step"]}
        for name, moment, book in zip(self.moment_names, self._moments(state), books, strict=False):
            whole[name] = _like_dtensor(moments.load(moment, book), param)
        return whole

    def _batches(self, group: dict[str, Any]) -> Iterator[tuple[int, _Batch]]:
        """What can be done at once, with the number of its step, to which the states are set."""
        batches: dict[tuple[torch.device, bool, int], _Batch] = {}
        kept = set(group.get("keep_32bit", ()))
        for place, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            grad = _checked(param)
            state = self.state[param]
            local = local_part(param)
            if not state:
                in_8bit = self.bits == 8 and place not in kept and param.numel() >= group["min_8bit_size"]
                kinds = [moments.zeros(local, book) for book in self._books(in_8bit)]
                state.update(self._entries(0, kinds))
            state["step"] += 1
            found = self._moments(state)
            batch = batches.setdefault((local.device, found[0].scale is not None, state["step"]), _Batch())
            batch.params.append(local)
            batch.grads.append(grad)
            batch.moments.append(found)
        for (_, _, number), batch in batches.items():
            yield number, batch


def take_step(batch: _Batch, step: Step) -> None:
    """Parameters that do not lie row by row are worked on as copies that do."""
    dense = [param.contiguous() for param in batch.params]
    grads = [grad.contiguous() for grad in batch.grads]
    backends.choose_update(dense[0].device)(dense, grads, list(zip(*batch.moments, strict=True)), step)
    for param, worked_on in zip(batch.params, dense, strict=True):
        if worked_on is not param:
            param.copy_(worked_on)


def local_part(tensor: Tensor) -> Tensor:
    """The shard of a DTensor that lies here; any other tensor itself."""
    if not _is_dtensor(tensor):
        return tensor
    local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


def _dtensor_module() -> Any:
    # Nobody has a DTensor who has not imported it; the import takes long.
    return sys.modules.get("torch.distributed.tensor")


def _is_dtensor(tensor: Tensor) -> bool:
    module = _dtensor_module()
    return module is not None and isinstance(tensor, module.DTensor)


def _like_dtensor(local: Tensor, like: Any) -> Tensor:
    made: Tensor = _dtensor_module().DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """Row by row, as states lie: those of torch's optimizers have the strides of their parameters."""
    return tensor.to(device, copy=True).contiguous()


def _is_tensor_of(key: str, value: object) -> bool:
    return isinstance(value, Tensor) and key != "step"


def _checked(param: Tensor) -> Tensor:
    """The local gradient of `param`; errors for what has no update here."""
    grad = param.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"8-bit optimizers take no sparse gradients, got {grad.layout} for a parameter "
            f"{list(param.shape)}; use torch.optim.SparseAdam for it, or an embedding with sparse=False"
        )
    if not param.is_floating_point():
        raise RuntimeError(f"8-bit optimizers take real floating parameters, got {param.dtype}")
    theirs, mine = getattr(grad, "placements", None), getattr(param, "placements", None)
    if theirs != mine:
        raise RuntimeError(
            f"the gradient of a DTensor {list(param.shape)} is placed as {theirs}, the parameter as {mine}; "
            "redistribute the gradient first"
        )
    return local_part(grad)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _storage(group: dict[str, Any]) -> dict[str, Any]:
    """What decides which states of a group are in 8 bits."""
    return {"min_8bit_size": group["min_8bit_size"], "keep_32bit": list(group.get("keep_32bit", ()))}


def _places(kept: Iterable[Tensor | int], params: list[Tensor]) -> list[int]:
    """Where in a group the parameters `kept` are, which may be given by their places."""
    places = {id(param): place for place, param in enumerate(params)}
    found = {places.get(id(entry), -1) if isinstance(entry, Tensor) else entry for entry in kept}
    if not all(type(place) is int and 0 <= place < len(params) for place in found):
        raise ValueError(
            f"keep_32bit of a group holds some of its {len(params)} parameters, or their places in it; got "
            "something else"
        )
    return sorted(found)


def _check_hyperparameters(values: dict[str, Any]) -> None:
    limits = {"lr": math.inf, "eps": math.inf, "weight_decay": math.inf, "momentum": 1.0}
    given = {key: value for key, value in values.items() if key in limits}
    betas = values.get("betas", (0.0, 0.0))
    if len(betas) != 2:
        raise ValueError(f"betas are two numbers, got {betas!r}")
    given |= {f"betas[{i}]": beta for i, beta in enumerate(betas)}
    size = values.get("min_8bit_size", 0)
    if size < 0:
        raise ValueError(f"min_8bit_size is a number of elements, at least 0; got {size}")
    for name, value in given.items():
        limit = limits.get(name, 1.0)
        if not 0 <= float(value) < limit:
            raise ValueError(f"{name} is at least 0 and below {limit}, got {value}")


def refuse(name: str, **asked: tuple[object, object]) -> None:
    """ValueError for arguments of bitsandbytes' signature, given with their defaults, that were asked for."""
    for argument, (value, default) in asked.items():
        if value != default:
            raise ValueError(f"{name} has no {argument}, got {value!r}; leave it at {default!r}")
