#!/usr/bin/env python3
"""Run `megatron-exact inspect` from a checkout, with the same options."""

from megatron_exact.command_line import run_tool
from megatron_exact.commands.exposures import inspect as main

if __name__ == "__main__":
    run_tool(main)
