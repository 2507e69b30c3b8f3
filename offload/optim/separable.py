"""Whether the step of an optimizer class goes parameter by parameter: found out by trying it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from offload.errors import UnsupportedError
from offload.optim.one_parameter import ClassStep, Group, SharedChanges, bare_step, same

_STEPS = 3
_SIZE = 4


def check_separable(
    cls: type[Optimizer], groups: Sequence[Group], arguments: dict[str, Any]
) -> bool:
    """Compare, on small stand-ins, the step of `cls` with its steps on one parameter at a time.

    Where the class does not step the stand-ins at all, nothing is found out. The random number
    generator is left as it was.

    Args:
        cls: the real class.
        groups: the optimizer's param groups; not changed.
        arguments: of the constructor of `cls`, beside the parameters.

    Returns:
        Whether a step with a closure evaluates it once, before anything else.

    Raises:
        UnsupportedError: the two differ.
    """
    closure = inspect.signature(bare_step(cls)).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise _not_separable(cls, "step() needs its closure, to evaluate it as often as it likes")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            together = _run(_Trial(cls, groups, arguments), _Trial.step)
        except Exception:  # noqa: BLE001  (it needs a closure, or the stand-ins do not suit it)
            together = None
        evaluated = None
        if closure is not None:
            try:
                evaluated = _run(_Trial(cls, groups, arguments), _Trial.step_with_closure)
            except Exception:  # noqa: BLE001  (likewise)
                evaluated = None
        if together is None and evaluated is None:
            return True
        try:
            apart = _run(_Trial(cls, groups, arguments), _Trial.step_each)
        except Exception as error:
            raise _not_separable(cls, f"for one parameter alone it fails: {error}") from error
    if not same(together if together is not None else evaluated, apart):
        raise _not_separable(cls, "one parameter alone is updated differently")
    return same(evaluated, apart)


def _run(trial: _Trial, step: Callable[[_Trial], None]) -> Any:
    torch.manual_seed(0)
    for _ in range(_STEPS):
        step(trial)
    return trial.outcome()


def _not_separable(cls: type[Optimizer], why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{cls.__name__} cannot be spilled: its step does not go parameter by parameter ({why}), "
        "so all of its state is needed at once"
    )


class _Trial:
    """An optimizer of the real class on stand-ins: two parameters of up to two groups."""

    def __init__(
        self, cls: type[Optimizer], groups: Sequence[Group], arguments: dict[str, Any]
    ) -> None:
        self._cls = cls
        self._calls = 0  # of closures, less one per step
        self._random = torch.Generator().manual_seed(0)
        groups = [self._stand_in_group(group) for group in groups[:2]]
        self._optimizer = cls(groups, **_own_tensors(arguments))
        self._params = [p for group in self._optimizer.param_groups for p in group["params"]]

    def _stand_in_group(self, group: Group) -> Group:
        likes = group["params"]
        params = [self._stand_in(like) for like in (*likes, *likes)[:2]]
        own = {**_own_tensors(group), "params": params}
        if "param_names" in group:
            own["param_names"] = [str(i) for i in range(len(params))]
        return own

    def _stand_in(self, like: torch.Tensor) -> torch.nn.Parameter:
        shape = [min(size, _SIZE) for size in like.shape]
        return torch.nn.Parameter(self._noise(shape, like.dtype))

    def _noise(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        precise = torch.complex64 if dtype.is_complex else torch.float32
        return torch.randn(shape, generator=self._random, dtype=precise).to(dtype)

    def step(self) -> None:
        """Take the class's step."""
        self._set_gradients(self._new_gradients())
        with torch.no_grad():
            bare_step(self._cls)(self._optimizer)

    def step_with_closure(self) -> None:
        """Take the class's step, where the closure makes the gradients."""
        grads = self._new_gradients()

        def closure() -> torch.Tensor:
            self._calls += 1
            self._set_gradients(grads)
            return torch.tensor(1.0)

        self._set_gradients(grads)
        self._calls -= 1
        with torch.no_grad():
            bare_step(self._cls)(self._optimizer, closure)

    def _new_gradients(self) -> list[torch.Tensor]:
        return [self._noise(p.shape, p.dtype) for p in self._params]

    def _set_gradients(self, grads: Sequence[torch.Tensor]) -> None:
        for param, grad in zip(self._params, grads, strict=True):
            param.grad = grad.clone()

    def step_each(self) -> None:
        """Take a step parameter by parameter."""
        self._set_gradients(self._new_gradients())
        optimizer = self._optimizer
        step, changes = ClassStep(self._cls, optimizer), SharedChanges()
        with torch.no_grad():
            for group in optimizer.param_groups:
                for i, param in enumerate(group["params"]):
                    one = step.on(group, i, optimizer.state.get(param))
                    one.run()
                    changes.add(group, one)
                    if one.state is not None:
                        optimizer.state[param] = one.state
        changes.apply(optimizer)

    def outcome(self) -> Any:
        """Return all that the steps left behind."""
        groups, states = self._optimizer.param_groups, self._optimizer.state
        return [
            [p.detach() for p in self._params],
            [states.get(p) for p in self._params],
            len(states),
            self._calls,
            [{k: v for k, v in group.items() if k != "params"} for group in groups],
        ]


def _own_tensors(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if type(v) is torch.Tensor else v for k, v in values.items()}
