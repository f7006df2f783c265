"""Run `megatron-exact tokenize-shards` from a checkout, with the same options."""

from megatron_exact.command_line import run_tool
from megatron_exact.commands.corpora import tokenize_shards as main

if __name__ == "__main__":
    run_tool(main)
