"""The benchmarks that a model can be evaluated on: one file each, which registers itself (`suite.py`)."""
