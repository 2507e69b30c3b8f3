"""offload: train models many times larger than memory, exactly, within a hard budget."""

from offload import optim
from offload.api import deferred_init, load_weights, materialize, report, unwrap, wrap
from offload.errors import (
    BudgetError,
    CheckpointError,
    CorruptionError,
    DeviceError,
    OffloadError,
    PolicyError,
    SpilledTensorError,
    SwapIOError,
    SwapSpaceError,
    TransferCancelledError,
    UnorderedAccessError,
    UnsupportedError,
)
from offload.optim import AdamW
from offload.policy import Budget, Policy

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "Budget",
    "BudgetError",
    "CheckpointError",
    "CorruptionError",
    "DeviceError",
    "OffloadError",
    "Policy",
    "PolicyError",
    "SpilledTensorError",
    "SwapIOError",
    "SwapSpaceError",
    "TransferCancelledError",
    "UnorderedAccessError",
    "UnsupportedError",
    "deferred_init",
    "load_weights",
    "materialize",
    "optim",
    "report",
    "unwrap",
    "wrap",
]
