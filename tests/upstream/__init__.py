"""What this package takes from megatron-core, against another version of it."""
