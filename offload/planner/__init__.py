"""The planner: from units and budgets to an immutable plan. Pure functions, no torch."""

from offload.planner.placement import place, smallest_budget
from offload.planner.spec import DiskSpec, Placement, Plan, UnitSpec

__all__ = ["DiskSpec", "Placement", "Plan", "UnitSpec", "place", "smallest_budget"]
