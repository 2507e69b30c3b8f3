"""Update: one step of one parameter, and its operands in ordinary memory."""

from __future__ import annotations

import torch

from offload import _native
from offload.optim.param_state import ParamState
from offload.tiers.state_layout import StateLayout


class Update:
    """One step of one parameter.

    Attributes:
        kept: its state.
        layout: that its state must have.
        group: the index of its group.
        grad: its gradient, of its shape and dtype.
        unscale: to be multiplied onto the gradient in fp32, after deferred factors.
        step: counted from 1, once it was; 1 where the rule counts none.
        hyper: the step's hyperparameters, once they were read.
    """

    __slots__ = ("grad", "group", "hyper", "kept", "layout", "step", "unscale")

    hyper: _native.UpdateHyper

    def __init__(
        self, kept: ParamState, layout: StateLayout, group: int, grad: torch.Tensor
    ) -> None:
        """Collect a step that was not counted."""
        self.kept = kept
        self.layout = layout
        self.group = group
        self.grad = grad
        self.step = 1.0
        self.unscale = 1.0

    @property
    def factors(self) -> list[float]:
        """What is a factor like others: of 16-bit parameters it is in ``hyper``."""
        return [self.unscale] if self.unscale != 1.0 and self.layout.master is None else []


class Operands:
    """The memory of one parameter in ordinary memory, and of its gradient in the same order.

    Attributes:
        param: the parameter's elements: itself, or a copy where they do not lie side by side.
        grad: its gradient's, likewise.
        numel: of them.
        pointer: address of the parameter's first element.
    """

    __slots__ = ("_dense", "_kept", "_stride", "grad", "numel", "param", "pointer")

    def __init__(self, kept: ParamState) -> None:
        """Look at the parameter; of() adds the gradient."""
        self._kept = kept
        param = kept.param.detach()
        self._dense: bool = torch.ops.aten.is_non_overlapping_and_dense(param)
        self._stride = param.stride()
        self.param = param
        self.grad = param
        self.numel = param.numel()
        self.pointer = param.data_ptr()

    @classmethod
    def of(cls, update: Update) -> Operands:
        """Return the operands of `update`; they are kept for the next one of the parameter."""
        kept = update.kept
        operands = kept.operands
        if operands is None or not operands._are_current():
            operands = kept.operands = cls(kept)
        if operands._dense and update.grad.stride() == operands._stride:
            operands.grad = update.grad
        else:
            operands.grad = kept.flat(update.grad.detach())
        if not operands._dense:
            operands.param = kept.flat(kept.param.detach())
        return operands

    def _are_current(self) -> bool:
        param = self._kept.param
        return param.data_ptr() == self.pointer and param.numel() == self.numel

    def publish(self) -> None:
        """Give the parameter its new values, tell autograd, and let go of the gradient."""
        param = self._kept.param
        if self._dense:
            torch.autograd.graph.increment_version(param)
        else:
            param.detach().copy_(self._kept.shaped(self.param))
            self.param = self.param[:0]
        self.grad = self.param

    def segment(self, update: Update) -> _native.UpdateSegment:
        """Return the update of the whole parameter as a segment of its job."""
        return _native.UpdateSegment(0, self.numel, update.hyper, update.factors, self._kept.number)


def borrowed(tensor: torch.Tensor) -> _native.UpdateOperand:
    """Return the memory of `tensor` as an operand, which keeps it alive."""
    return _native.UpdateOperand.borrowed(tensor.data_ptr(), tensor.nbytes, tensor)
