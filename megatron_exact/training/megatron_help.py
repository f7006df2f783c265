"""`--megatron-help`: the flags of Megatron's own parser."""

from __future__ import annotations

import argparse
import sys


def show_megatron_help() -> None:
    """Print upstream's help and exit with code 0.

    Some of its texts hold a bare %, which argparse takes for a format: those are printed as they are.
    """
    from megatron.training.arguments import parse_args

    stock = argparse.HelpFormatter._expand_help

    def expand(self: argparse.HelpFormatter, action: argparse.Action) -> str:
        try:
            return stock(self, action)
        except (KeyError, TypeError, ValueError):
            return action.help or ""

    argparse.HelpFormatter._expand_help = expand  # type: ignore[method-assign]
    try:
        sys.argv = [sys.argv[0], "--help"]
        parse_args()
    finally:
        argparse.HelpFormatter._expand_help = stock  # type: ignore[method-assign]
