"""The planner: from units and budgets to an immutable plan. Pure functions, no torch."""

from offload.planner.placement import place, smallest_budget
from offload.planner.spec import Placement, Plan, UnitSpec

__all__ = ["Placement", "Plan", "UnitSpec", "place", "smallest_budget"]
