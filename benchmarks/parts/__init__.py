"""Benchmarks by subject: each module has `rows(quick)` in the long form of `benchmarks/core.py`."""
