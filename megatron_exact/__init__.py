"""Effective-context weighted continued pretraining on Megatron-Core."""

__version__ = "0.1.0"
