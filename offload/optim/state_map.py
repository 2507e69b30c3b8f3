"""StateMap: ``optimizer.state`` of an optimizer whose state does not stay in memory.

Of each parameter's state the large tensors are in one slab; everything else (step counters, small
tensors, whatever is no plain tensor) stays as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._pytree import tree_iter, tree_map

from offload.errors import UnsupportedError
from offload.tiers.slab import Slab
from offload.tiers.state_home import StateHome
from offload.tiers.unit import owner_of

ALIGNMENT = 64
"""Tensors start at multiples of this many bytes in a slab: a cache line, any vector width."""

SMALL_BYTES = 64 << 10
"""Smaller tensors stay in memory: a transfer costs a request, and would save next to nothing."""


@dataclass(frozen=True)
class _Stored:
    """Stands, in the state of a parameter, for a tensor in its slab."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, slab: Slab) -> torch.Tensor:
        return slab.view(self.offset, self.shape, self.stride, self.dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Place:
    """A slab, and what made it."""

    home: StateHome
    slab: Slab

    def free(self) -> None:
        if not self.home.closed:
            self.slab.locks = 0
            self.home.free_slab(self.slab)


@dataclass
class _Entry:
    """The state of one parameter: `content`, with a _Stored for each tensor in the slab."""

    content: Any
    place: _Place | None = None

    def free(self) -> None:
        if self.place is not None:
            self.place.free()


class StateMap(MutableMapping[Any, Any]):
    """Maps parameters to their state.

    Reading gives copies: a read-only mapping whose tensors are the caller's own, so that changing
    them changes nothing here. Assigning to a key replaces the state of that parameter. Other keys
    than parameters are kept as they are.

    Not thread-safe beside a step.
    """

    def __init__(self, home_of: Callable[[torch.Tensor], StateHome | None]) -> None:
        """Be empty.

        `home_of` tells where the state of a parameter lives; None: in memory, as plain tensors.
        """
        self._home_of = home_of
        self._entries: dict[Any, _Entry] = {}
        self.plain_copies = False
        """Reading gives ordinary dicts: a state_dict is being made."""

    # -- what users see -------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Any:
        """Return a copy of the state; of a parameter that has none, an empty mapping."""
        entry = self._entries.get(key)
        if entry is None:
            if isinstance(key, torch.Tensor):
                return MappingProxyType({})
            raise KeyError(key)
        content = self._copy(entry)
        plain = self.plain_copies or not isinstance(content, dict)
        return content if plain else MappingProxyType(content)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return a copy of the state of `key`, or `default` when it has none."""
        if key not in self:
            return default
        return self[key]

    def __setitem__(self, key: Any, state: Any) -> None:
        """Make a copy of `state` the state of `key`.

        Raises:
            BudgetError, SwapSpaceError: there is no room; the state is kept in memory then.
        """
        self.take(key, tree_map(_own, dict(state) if isinstance(state, Mapping) else state))

    def __delitem__(self, key: Any) -> None:
        """Forget the state of `key`."""
        self._entries.pop(key).free()

    def __contains__(self, key: Any) -> bool:
        """Whether `key` has state."""
        return key in self._entries

    def __iter__(self) -> Iterator[Any]:
        """Iterate over what has state, in the order in which it came."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Return how many parameters have state."""
        return len(self._entries)

    def __repr__(self) -> str:
        """Describe it without reading anything."""
        places = [e.place for e in self._entries.values() if e.place is not None]
        spilled = sum(place.slab.nbytes for place in places)
        return f"StateMap({len(self)} states, {spilled} bytes of them in slabs)"

    def _copy(self, entry: _Entry) -> Any:
        if entry.place is None:
            return tree_map(_own, entry.content)
        entry.place.home.check_open()
        flat = entry.place.home.copy_out(entry.place.slab)

        def own(leaf: Any) -> Any:
            if not isinstance(leaf, _Stored):
                return _own(leaf)
            values = flat[leaf.offset : leaf.offset + leaf.nbytes].view(leaf.dtype)
            return values.as_strided(leaf.shape, leaf.stride)

        return tree_map(own, entry.content)

    # -- what the step uses ---------------------------------------------------------------------

    def slab(self, key: Any) -> Slab | None:
        """Return the slab with the large tensors of the state of `key`, if it has any."""
        entry = self._entries.get(key)
        return entry.place.slab if entry is not None and entry.place is not None else None

    def lend(self, key: Any) -> Any:
        """Return the state of `key` itself, in memory until give_back(); None when it has none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.place is None:
            return entry.content
        home, slab = entry.place.home, entry.place.slab
        home.check_open()
        with home.lock:
            slab.locks += 1
            try:
                home.mover.fetch(slab)
                home.mover.settle(slab)  # it will be changed
            except BaseException:
                slab.locks -= 1
                raise
        return tree_map(lambda x: x.view(slab) if isinstance(x, _Stored) else x, entry.content)

    def give_back(self, key: Any) -> None:
        """End what lend() began."""
        slab = self.slab(key)
        if slab is not None and slab.locks:
            slab.locks -= 1

    def take(self, key: Any, state: Any) -> None:
        """Make `state` the state of `key`; its large tensors move to the slab.

        Raises:
            BudgetError, SwapSpaceError, UnsupportedError: the tensors can move nowhere. They are
                kept in memory then, so that nothing is lost.
        """
        old = self._entries.get(key)
        self._entries[key] = _Entry(state)  # should anything fail
        home = self._home_of(key) if isinstance(key, torch.Tensor) else None
        try:
            content, nbytes = _laid_out(state)
            if home is None or nbytes == 0:
                return
            with home.lock:
                if old is not None and old.place is not None and _fits(old, content, home):
                    place, old = old.place, None
                    home.mover.hold_new(place.slab)  # all of it is replaced
                else:
                    place = _Place(home, _new_slab(home, key, nbytes))
                _fill(place.slab, content, state)
            self._entries[key] = _Entry(content, place)
        finally:
            if old is not None:
                old.free()

    def drop(self, key: Any) -> None:
        """Forget the state of `key`, if there is any."""
        if key in self._entries:
            del self[key]

    def free(self) -> None:
        """Forget everything."""
        while self._entries:
            self._entries.popitem()[1].free()

    def discard(self) -> None:
        """Forget everything in a finalizer, which may run in the middle of anything."""
        places = [entry.place for entry in self._entries.values() if entry.place is not None]
        self._entries.clear()
        for place in places:
            place.slab.locks = 0
            place.home.discard(place.slab)


def _fits(entry: _Entry, content: Any, home: StateHome) -> bool:
    """Whether the tensors of `content` have the places that those of `entry` have."""
    here = entry.place is not None and entry.place.home is home
    return here and _stored(entry.content) == _stored(content)


def _stored(content: Any) -> list[_Stored]:
    return [leaf for leaf in tree_iter(content) if isinstance(leaf, _Stored)]


def _own(leaf: Any) -> Any:
    if isinstance(leaf, torch.nn.Parameter):
        return leaf
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf)


def _name(param: torch.Tensor) -> str:
    owner = owner_of(param)
    what = f"shape {tuple(param.shape)}" if owner is None else owner.name
    return f"optimizer state of the parameter {what}"


def _laid_out(state: Any) -> tuple[Any, int]:
    """Return `state` with a _Stored for each large tensor, and the bytes of a slab for them."""
    nbytes = 0

    def place(leaf: Any) -> Any:
        nonlocal nbytes
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, torch.nn.Parameter):
            return leaf
        if leaf.numel() * leaf.dtype.itemsize < SMALL_BYTES:
            return leaf
        if type(leaf) is not torch.Tensor or leaf.layout is not torch.strided or not leaf.is_cpu:
            raise UnsupportedError(
                f"the optimizer keeps state of type {type(leaf).__name__} with layout "
                f"{leaf.layout} on {leaf.device}; only dense tensors on the CPU can be spilled"
            )
        stride = torch.empty_like(leaf, device="meta").stride()  # of a dense copy
        stored = _Stored(nbytes, tuple(leaf.shape), tuple(stride), leaf.dtype)
        nbytes += -(-stored.nbytes // ALIGNMENT) * ALIGNMENT
        return stored

    return tree_map(place, state), nbytes


def _new_slab(home: StateHome, param: torch.Tensor, nbytes: int) -> Slab:
    slab = home.make_slab(_name(param), nbytes)
    try:
        home.mover.hold_new(slab)
    except BaseException:
        home.free_slab(slab)
        raise
    return slab


def _fill(slab: Slab, content: Any, state: Any) -> None:
    """Copy the tensors of `state` to their places, where they are not there already."""
    moves: list[tuple[torch.Tensor, torch.Tensor]] = []
    for stored, leaf in zip(tree_iter(content), tree_iter(state), strict=True):
        if isinstance(stored, _Stored):
            place = stored.view(slab)
            if leaf.data_ptr() != place.data_ptr() or leaf.stride() != place.stride():
                moves.append((place, leaf))
    if len(moves) > 1:  # the step may have exchanged two of them
        moves = [(place, leaf.clone() if _within(leaf, slab) else leaf) for place, leaf in moves]
    for place, leaf in moves:
        place.copy_(leaf)


def _within(tensor: torch.Tensor, slab: Slab) -> bool:
    begin = slab.lease.address if slab.lease is not None else 0
    return begin <= tensor.data_ptr() < begin + slab.nbytes
