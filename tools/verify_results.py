"""Run `megatron-exact verify-results` from a checkout, with the same options."""

from megatron_exact.command_line import run_tool
from megatron_exact.commands.evaluations import verify_results as main

if __name__ == "__main__":
    run_tool(main)
