#!/usr/bin/env python3
"""Run `megatron-exact experiment` from a checkout, with the same options."""

from megatron_exact.command_line import run_tool
from megatron_exact.commands.experiments import experiment as main

if __name__ == "__main__":
    run_tool(main)
