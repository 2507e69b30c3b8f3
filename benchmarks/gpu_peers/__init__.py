"""The contestants of benchmarks/gpu.py, each in a process of its own: see worker.py."""
