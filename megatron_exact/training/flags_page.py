"""The page `docs/flags.md`, made of the parser and the table of refusals."""

from __future__ import annotations

import argparse

from megatron_exact.training.options import build_parser
from megatron_exact.training.refusals import REFUSED

HEAD = """\
# Flags of a training job

Made by `python -m megatron_exact.training.flags_page > docs/flags.md`.

`megatron_exact.training.pretrain` takes the flags of the first table and every flag of Megatron's
(`--megatron-help` lists them). A recipe's flags come first, yours win.

The pack dictates `--seq-length`, `--vocab-size` (without a model that has more rows) and the tokenizer, the
checkpoint or `--preset` the shape of the model: such flags are compared, not needed. Always set:
`--calculate-per-token-loss` (gradients are divided by the targets of the whole batch, whatever the layout),
`--dataloader-inter-document-masking`, `--make-vocab-size-divisible-by 1` and
`--dist-ckpt-strictness raise_all`.

## Ours
"""
REFUSED_HEAD = """
## Megatron's that are refused

A job with one of these stops before any model is built.
"""


def flags_page() -> str:
    """The page as Markdown."""
    lines = [HEAD, "| flag | default | meaning |", "|---|---|---|"]
    for action in build_parser()._actions:
        if action.dest != "help":
            lines.append(f"| `{_spelled(action)}` | {_default(action)} | {_help(action)} |")
    lines += [REFUSED_HEAD, "| flag | only | why |", "|---|---|---|"]
    for name, only, reason in REFUSED:
        words = " ".join(only) if isinstance(only, list) else only
        allowed = "not given" if only in (None, False) else f"`{words}`"
        lines.append(f"| `--{name.replace('_', '-')}` | {allowed} | {reason} |")
    return "\n".join(lines) + "\n"


def _spelled(action: argparse.Action) -> str:
    flag = action.option_strings[-1]
    if action.nargs == 0:
        return flag
    value = action.metavar or ("/".join(map(str, action.choices)) if action.choices else "VALUE")
    return f"{flag} {value}"


def _default(action: argparse.Action) -> str:
    if action.nargs == 0 or action.default in (None, [], ()):
        return ""
    return f"`{action.default}`"


def _help(action: argparse.Action) -> str:
    text = (action.help or "") % {"default": action.default}
    return text.replace("|", "\\|").replace(f" (default: {action.default})", "")


if __name__ == "__main__":
    print(flags_page(), end="")
