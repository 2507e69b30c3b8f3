"""An optimizer class's own step, on one parameter at a time.

1. The step runs on a fresh object of the real class, which has the attributes of the optimizer but
   one param group with one parameter and that parameter's state alone. It has no step hooks.
2. Each of them starts from what the optimizer and the group were before the step. What the step
   sets on its object or in its group (a step counter, say) is the same for every parameter then,
   and is applied once, when all are done.
3. A class whose step uses several parameters together gives other results so: see separable.py.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from offload.errors import UnsupportedError

Group = dict[str, Any]

_NOT_COPIED = {"state", "param_groups", "step", "_spill"}
"""Attributes of an optimizer that the objects of single parameters have their own of, or none."""
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def bare_step(cls: type[Optimizer]) -> Callable[..., Any]:
    """Return the step function of `cls` without what torch puts around it to call hooks."""
    step: Any = cls.step
    bare: Callable[..., Any] = step.__wrapped__ if getattr(step, "hooked", False) else step
    return bare


class ClassStep:
    """The step of a class, with the attributes that an optimizer has when this is made."""

    def __init__(self, cls: type[Optimizer], optimizer: Optimizer) -> None:
        """Take the attributes of `optimizer`.

        Args:
            cls: the real class.
            optimizer: made by the constructor of `cls`.
        """
        self.cls = cls
        self.bare = bare_step(cls)
        self.attributes = {k: v for k, v in vars(optimizer).items() if k not in _NOT_COPIED}
        self.attributes.update({name: OrderedDict() for name in _HOOKS})

    def on(self, group: Group, index: int, state: Any) -> ParameterStep:
        """Return the step of parameter `index` of `group`, to be run once.

        Args:
            group: not changed.
            index: in ``group["params"]``.
            state: the parameter's state, changed in place; None: it has none yet.
        """
        return ParameterStep(self, group, index, state)


class ParameterStep:
    """One step on one parameter, and what it left behind.

    Attributes:
        param: the parameter.
    """

    def __init__(self, step: ClassStep, group: Group, index: int, state: Any) -> None:
        """Prepare the object on which the step runs; see ``ClassStep.on``."""
        self.param: torch.Tensor = group["params"][index]
        self._step = step
        self._group = {**group, "params": [self.param]}
        if "param_names" in group:
            self._group["param_names"] = [group["param_names"][index]]
        self._before = dict(self._group)
        self._worker: Optimizer = object.__new__(step.cls)
        self._worker.__dict__.update(step.attributes)
        self._worker.param_groups = [self._group]
        self._worker.state = defaultdict(dict)
        if state is not None:
            self._worker.state[self.param] = state

    def run(self) -> None:
        """Take the step.

        Raises:
            UnsupportedError: it kept state that belongs to no parameter.
            Exception: whatever the class's step raises.
        """
        self._step.bare(self._worker)
        if any(key is not self.param for key in self._worker.state):
            raise UnsupportedError(
                f"{self._step.cls.__name__}.step() keeps state that belongs to no parameter, so it "
                "cannot be spilled"
            )

    @property
    def unscales(self) -> bool:
        """Whether the step replaces the gradient: torch's fused kernels, for a GradScaler.

        They do not count a version of it.
        """
        return self._step.attributes.get("grad_scale") is not None

    def forget(self) -> None:
        """Let go of the state: an error's traceback may keep this object."""
        self._worker.state = defaultdict(dict)

    @property
    def state(self) -> Any:
        """The parameter's state now; None: it has none."""
        return self._worker.state.get(self.param)

    @property
    def group_changes(self) -> Group:
        """What the step set in its group."""
        before = self._before
        return {k: v for k, v in self._group.items() if k not in before or v is not before[k]}

    @property
    def attribute_changes(self) -> dict[str, Any]:
        """What the step set on its object."""
        before, now = self._step.attributes, vars(self._worker)
        return {
            k: v
            for k, v in now.items()
            if k not in _NOT_COPIED and (k not in before or v is not before[k])
        }


class SharedChanges:
    """What the steps of one pass set in groups and on their objects, applied once at the end."""

    def __init__(self) -> None:
        """Collect for a pass over all parameters."""
        self._groups: dict[int, tuple[Group, Group]] = {}
        self._attributes: dict[str, Any] = {}

    def add(self, group: Group, step: ParameterStep) -> None:
        """Note what `step`, on a parameter of `group`, left.

        Raises:
            UnsupportedError: the step of another parameter set something else in the group.
        """
        changes = step.group_changes
        _, earlier = self._groups.setdefault(id(group), (group, changes))
        if not same(earlier, changes):
            raise UnsupportedError(
                "this optimizer's step keeps in its param groups what it computes from all "
                f"parameters ({', '.join(changes)}): it cannot be spilled"
            )
        self._attributes = step.attribute_changes

    def apply(self, optimizer: Optimizer) -> None:
        """Set on `optimizer` and its groups what the steps set."""
        for group, changes in self._groups.values():
            group.update(changes)
        vars(optimizer).update(self._attributes)


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, tensors by their bits, also inside of containers.

    Objects that define no equality count as equal to others of their type.
    """
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        return alike and (a.numel() == 0 or torch.equal(_bits(a), _bits(b)))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    without_equality: Any = object.__eq__
    return type(a).__eq__ is without_equality or bool(a == b)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
