"""One study a module: `rows(quick)` in the long form of `benchmarks/core.py`, each runnable alone."""
