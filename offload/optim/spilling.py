"""Spilling: the state of a spilled optimizer, and the pass over its parameters that a step is.

Protocol of a step, for each parameter that has a gradient, in the order of the param groups:
 1. a parameter of a wrapped model is attached, its gradient becomes a tensor. Its state is brought
    to memory and held there.
 2. reading of what the next parameters need begins, as far as there is room.
 3. the class's own step runs on the parameter.
 4. its state goes to its place; what changed starts on its way to the disk.
Where 1 or 2 fail, the parameter was not updated; after 3 its new state is kept whatever fails.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from offload.errors import PolicyError, UnsupportedError
from offload.optim.attached import AttachedUnit, gradient_as_tensor
from offload.optim.one_parameter import ClassStep, Group, ParameterStep, SharedChanges
from offload.optim.spill_order import SpillOrder
from offload.optim.state_map import StateMap
from offload.policy import Policy
from offload.tiers.slab import Slab
from offload.tiers.state_home import StateHome
from offload.tiers.unit import OffloadedParam, SpilledParameter, owner_of

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, SpilledParameter)


@dataclass(frozen=True)
class _Turn:
    """One parameter of a step."""

    group: Group
    index: int
    param: torch.Tensor
    owner: OffloadedParam | None

    def __str__(self) -> str:
        name = self.group["param_names"][self.index] if "param_names" in self.group else None
        name = self.owner.name if self.owner is not None else name
        return f"a parameter of shape {tuple(self.param.shape)}" + (f" ({name})" if name else "")


class Spilling:
    """What a spilled optimizer has beside what its class has.

    Attributes:
        cls: the real class.
        states: where the state is.
        takes_closure: a step of the class evaluates its closure once, before anything else.
    """

    def __init__(self, cls: type[Optimizer], policy: Policy | None) -> None:
        """Open the home of plain parameters' state.

        Raises:
            BudgetError, SwapIOError: the policy's memory or directory cannot be used.
        """
        self.cls = cls
        self.states = StateMap(self._home_of)
        self.takes_closure = True
        self._process = os.getpid()
        self._home = StateHome.passing(policy) if policy is not None else None
        self._open: defaultdict[Any, Any] | None = None

    def _home_of(self, param: torch.Tensor) -> StateHome | None:
        owner = owner_of(param)
        return self._home if owner is None else StateHome.of_context(owner.context)

    def close(self) -> None:
        """Give up the state, in a finalizer of the optimizer."""
        if os.getpid() != self._process:
            return  # a forked child has neither the threads nor the files
        self.states.discard()
        if self._home is not None:
            self._home.close()

    # -- what may be stepped --------------------------------------------------------------------

    def check_group(self, group: Group) -> None:
        """Refuse what cannot be supported of a param group.

        Raises:
            UnsupportedError: an option, or a parameter.
            PolicyError: a parameter of a plain model, and no policy.
        """
        refuse_options(group)
        for param in group["params"]:
            owner = owner_of(param)  # first: a spilled parameter is asked nothing it has to fetch
            if type(param) not in _PLAIN_TYPES or param.layout is not torch.strided:
                raise UnsupportedError(
                    f"spill() updates plain dense parameters; got a {type(param).__name__} with "
                    f"layout {param.layout} and shape {tuple(param.shape)}"
                )
            if owner is not None and owner.is_narrowed:
                raise UnsupportedError(
                    f"spill() would update {owner.name} in {owner.dtype} and keep nothing in fp32: "
                    "with Policy(param_dtype=...) use an optimizer of offload.optim, which updates "
                    "the fp32 masters"
                )
            if param.device.type != "cpu":
                raise UnsupportedError(
                    f"spill() updates parameters on the CPU; got one on {param.device} with shape "
                    f"{tuple(param.shape)}"
                )
            if owner is None and self._home is None:
                raise PolicyError(
                    f"a parameter of shape {tuple(param.shape)} belongs to no wrapped model: give "
                    "spill(policy=...), which says how much memory its state may take and which "
                    "disk is for the rest"
                )

    def check_policy(self, groups: list[Group]) -> None:
        """Raise PolicyError for a policy that no parameter uses."""
        if self._home is None:
            return
        if all(owner_of(p) is not None for group in groups for p in group["params"]):
            raise PolicyError(
                "spill(policy=...) is for parameters of plain models; the state of a wrapped model "
                "follows the policy that the model was wrapped with"
            )

    def check_closure(self) -> None:
        """Raise UnsupportedError when evaluating a closure first is not what the class does."""
        if not self.takes_closure:
            raise UnsupportedError(
                f"{self.cls.__name__}.step() does not just evaluate its closure first, so with "
                "spill() it takes none; compute the gradients before step() instead"
            )

    # -- the state ------------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """What ``optimizer.state`` is at the moment."""
        return self.states if self._open is None else self._open

    def replace(self, state: Mapping[Any, Any]) -> None:
        """Make copies of `state` all the state there is."""
        self.states.free()
        if self._open is not None:
            self._open.clear()
            self._open.update(state)
            return
        for key, value in state.items():
            self.states[key] = value

    @contextmanager
    def building(self) -> Iterator[None]:
        """Let the real class make state in ordinary dicts; it moves to its place bit by bit."""
        if self._open is not None:
            yield
            return
        building = self._open = _Building(self.states)
        try:
            yield
            building.put_away()
        finally:
            self._open = None

    @contextmanager
    def replacing(self, state: Mapping[Any, Any]) -> Iterator[None]:
        """Let the real class see and change `state` in a block; then it replaces all there is."""
        self._open = defaultdict(dict, state)
        try:
            yield
            loaded = self._open
        finally:
            self._open = None
        self.replace(loaded)

    @contextmanager
    def plain_copies(self) -> Iterator[None]:
        """Have ``optimizer.state`` give ordinary dicts within a block."""
        self.states.plain_copies = True
        try:
            yield
        finally:
            self.states.plain_copies = False

    # -- the step -------------------------------------------------------------------------------

    def step(self, optimizer: Optimizer) -> None:
        """Take the step of the real class for each parameter of `optimizer` that has a gradient."""
        turns = self._turns(optimizer)
        step, changes = ClassStep(self.cls, optimizer), SharedChanges()
        with ExitStack() as stack:
            homes = {id(h): h for t in turns if (h := self._home_of(t.param)) is not None}
            for home in homes.values():
                stack.enter_context(home.lock)
                home.mover.check_process()
            for owner in (t.owner for t in turns if t.owner is not None):
                owner.context.settle(owner.unit)
            places = self._places(turns, homes)
            attached = stack.enter_context(AttachedUnit())
            for done, (turn, (order, place)) in enumerate(zip(turns, places, strict=True)):
                try:
                    self._take(turn, step, changes, attached, order, place)
                except Exception as error:
                    _add_note(error, f"raised while stepping {turn}, after {done} others")
                    raise
            for group in optimizer.param_groups:
                if group["params"] and all(param.grad is None for param in group["params"]):
                    idle = step.on(group, 0, None)  # the group may have a counter
                    idle.run()
                    changes.add(group, idle)
        changes.apply(optimizer)

    def _turns(self, optimizer: Optimizer) -> list[_Turn]:
        turns = []
        for group in optimizer.param_groups:
            refuse_options(group)
            for index, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                if param.grad.layout is not torch.strided:
                    raise UnsupportedError(
                        f"{self.cls.__name__} with spill() does not support sparse gradients; use "
                        "sparse=False in the embedding, or an optimizer that is not spilled"
                    )
                turns.append(_Turn(group, index, param, owner_of(param)))
        return turns

    def _places(
        self, turns: list[_Turn], homes: dict[int, StateHome]
    ) -> list[tuple[SpillOrder | None, int]]:
        """The order that each turn belongs to, one for each home, and its number in it."""
        by_home: dict[int, list[_Turn]] = {key: [] for key in homes}
        places: list[tuple[int | None, int]] = []
        for turn in turns:
            home = self._home_of(turn.param)
            if home is None:
                places.append((None, 0))
                continue
            places.append((id(home), len(by_home[id(home)])))
            by_home[id(home)].append(turn)
        orders = {key: self._order(homes[key], own) for key, own in by_home.items()}
        return [(orders[key] if key is not None else None, i) for key, i in places]

    def _order(self, home: StateHome, turns: list[_Turn]) -> SpillOrder:
        def state(turn: int) -> Slab | None:
            return self.states.slab(turns[turn].param)

        wrapped = [_slabs_of(turn.owner) for turn in turns if turn.owner is not None]
        return SpillOrder(home, len(turns), state, wrapped)

    def _take(
        self,
        turn: _Turn,
        step: ClassStep,
        changes: SharedChanges,
        attached: AttachedUnit,
        order: SpillOrder | None,
        place: int,
    ) -> None:
        """Take one turn."""
        attached.use(turn.owner)
        one = step.on(turn.group, turn.index, self.states.lend(turn.param))
        try:
            if order is not None:
                order.begin(place)
            self._run(one, turn)
            changes.add(turn.group, one)
        finally:
            one.forget()
            self.states.give_back(turn.param)
        if order is not None:
            order.end(place)

    def _run(self, one: ParameterStep, turn: _Turn) -> None:
        version = turn.param._version
        try:
            with gradient_as_tensor(turn.param, turn.owner):
                one.run()
                if one.unscales and turn.param.grad is not None:
                    torch.autograd.graph.increment_version(turn.param.grad)
        finally:  # as in torch, what a step that failed has done stays
            if turn.param._version == version:  # not every kernel counts it up
                torch.autograd.graph.increment_version(turn.param)
            if one.state is None:
                self.states.drop(turn.param)
            else:
                self.states.take(turn.param, one.state)


class _Building(defaultdict[Any, Any]):
    """State that the real class makes, for one parameter after the other, in ordinary dicts."""

    def __init__(self, states: StateMap) -> None:
        """Put what is finished into `states`."""
        super().__init__(dict)
        self._states = states

    def __missing__(self, key: Any) -> Any:
        """Another parameter's turn: what there is is finished."""
        self.put_away()
        if key in self._states:
            self[key] = dict(self._states[key])
            self._states.drop(key)
            return self[key]
        return super().__missing__(key)

    def put_away(self) -> None:
        """Move everything to its place."""
        while self:
            key = next(iter(self))
            self._states[key] = self.pop(key)


def refuse_options(group: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for options that cannot be had with spilled state."""
    for name in ("capturable", "differentiable"):
        if group.get(name):
            raise UnsupportedError(f"spill() does not support {name}=True")


def _slabs_of(owner: OffloadedParam) -> list[Slab]:
    """What a step on a wrapped model's parameter needs beside its state."""
    unit = owner.unit
    if unit.grad_slab is None or not unit.grads_wanted():
        return [unit.param_slab]
    return [unit.param_slab, unit.grad_slab]


def _add_note(error: Exception, where: str) -> None:
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(f"spill(): {where}; those before it were updated, those after it were not")
