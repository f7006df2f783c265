"""Run `megatron-exact status` from a checkout, with the same options."""

from megatron_exact.command_line import run_tool
from megatron_exact.commands.runs import status as main

if __name__ == "__main__":
    run_tool(main)
