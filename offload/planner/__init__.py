"""The planner: from units and budgets to an immutable plan. Pure functions, no torch."""

from offload.planner.activations import (
    BlockCost,
    Choice,
    Rates,
    activation_share,
    choose_treatment,
)
from offload.planner.device import DevicePlan, place_on_device, smallest_device_budget
from offload.planner.device_runs import device_runs
from offload.planner.placement import SMALL_BYTES, place, smallest_budget
from offload.planner.spec import DiskSpec, Placement, Plan, Traffic, UnitSpec
from offload.planner.traffic import step_traffic
from offload.planner.update_split import UpdateRates, UpdateSplit, split_updates

__all__ = [
    "SMALL_BYTES",
    "BlockCost",
    "Choice",
    "DevicePlan",
    "DiskSpec",
    "Placement",
    "Plan",
    "Rates",
    "Traffic",
    "UnitSpec",
    "UpdateRates",
    "UpdateSplit",
    "activation_share",
    "choose_treatment",
    "device_runs",
    "place",
    "place_on_device",
    "smallest_budget",
    "smallest_device_budget",
    "split_updates",
    "step_traffic",
]
