"""Who benchmarks/io.py measures, and how: the swap store, fio, DeepSpeed's async_io."""
