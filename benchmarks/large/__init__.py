"""What benchmarks/large_model.py runs in a process of its own."""
