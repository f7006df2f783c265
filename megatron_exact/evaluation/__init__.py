"""Evaluation of exported models and the statistics of paired runs; Megatron is never imported here."""
