"""Run `megatron-exact export-hf` from a checkout, with the same options."""

from megatron_exact.command_line import run_tool
from megatron_exact.commands.conversions import export_hf as main

if __name__ == "__main__":
    run_tool(main)
