"""The benchmarks of EXACT's tables: where their examples come from and how an answer is scored."""
