"""Who takes part in benchmarks/optim.py: each module is one contestant's process."""
