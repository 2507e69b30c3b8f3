"""The runtime: hooks on modules and on autograd that obey the plan."""
