"""The page `docs/flags.md`, made of our parser and the table of Megatron's flags."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_exact.training.arguments import build_parser
from megatron_exact.training.flag_classes import (
    CHOICES,
    CONDITIONS,
    HARMLESS,
    Kind,
    MegatronFlag,
    megatron_flags_by_spelling,
)

HEAD = """\
# Flags of a training job

Made by `python -m megatron_exact.training.flags_page > docs/flags.md`.

`megatron_exact.training.pretrain` takes the flags of the first table and Megatron's (`--megatron-help`
describes them). A recipe's flags come first, yours win. Every flag of Megatron has one of three classes,
from one table (`megatron_exact/training/flag_classes.py`):

* **supported**: it does what Megatron documents, and a test shows that;
* **inert here**: the job would be the same without it; it is accepted, and named once at the start;
* **not supported**: an error with the reason. What was never run with packed rows is in this class.

Training and `megatron-exact preflight` report such an error in one line with exit code 1, where possible
before Megatron and torch are imported. torchrun adds a report of its own below that line; `megatron-exact
train`, `run_stages.py` and jobs on SLURM do not.

A job needs `--pack`, a length (`--train-iters` or `--train-samples`), `--lr`, and a model:
`--pretrained-checkpoint`, `--preset`, or flags. A model of flags that can be exported has `--num-layers`,
`--hidden-size`, `--ffn-hidden-size`, `--num-attention-heads`, `--swiglu`, `--normalization RMSNorm`,
`--disable-bias-linear` and `--position-embedding-type rope`, and may have `--group-query-attention` with
`--num-query-groups`, `--add-qkv-bias` and `--untie-embeddings-and-output-weights`. `--save` needs
`--save-interval`.

The pack dictates `--seq-length`, `--vocab-size` (without a model that has more rows) and the tokenizer, the
checkpoint or `--preset` the shape of the model: such flags are compared, not needed. Always set:
`--calculate-per-token-loss` (gradients are divided by the targets of the whole batch, whatever the layout),
`--dataloader-inter-document-masking`, `--make-vocab-size-divisible-by 1` and
`--dist-ckpt-strictness raise_all`.

Defaults that differ from Megatron's: `--micro-batch-size 1`; no dropout; `--log-interval 10`, on the CPU 1;
`--eval-interval 1000`; `--eval-iters` a tenth of the iterations between two evaluations, from 1 to 100 and
as far as the validation rows reach. An evaluation is a forward pass, so all of them cost about 3 % of the
training; a line at the start gives the number of rows and the share. A resumed run keeps its number.
`--eval-iters 0` means no evaluation.

The losses on the console are those of `losses.jsonl` for the iteration that the line names, not Megatron's
mean over the interval.

## Our flags
"""
SUPPORTED_HEAD = """
## Megatron's flags that are supported

The last column names the test that shows the effect. Values other than those in parentheses are an error.
"""
CONDITIONS_HEAD = """
A supported flag that does nothing because something else is missing is named at the start, too:
"""
INERT_HEAD = """
## Megatron's flags that are inert here
"""
REFUSED_HEAD = """
## Megatron's flags that are not supported

Values in parentheses are accepted, because they are what happens anyway.
"""


def flags_page() -> str:
    """Return the page as Markdown."""
    lines = [HEAD, "| flag | default | meaning |", "|---|---|---|"]
    for action in build_parser()._actions:
        if action.dest != "help":
            lines.append(f"| `{_spelled(action)}` | {_default(action)} | {_help(action)} |")
    lines += [SUPPORTED_HEAD, "| flags | shown by |", "|---|---|"]
    lines += _rows("supported", reason_first=False)
    lines += ["", *(f"* `{flag}`: {why}." for flag, why in CHOICES.items())]
    lines += [CONDITIONS_HEAD, "| needs | flags |", "|---|---|"]
    for (words, _), flags in CONDITIONS:
        lines.append(f"| {words} | {', '.join(f'`--{flag}`' for flag in flags.split())} |")
    lines += [INERT_HEAD, "| why | flags |", "|---|---|", *_rows("inert")]
    lines += [REFUSED_HEAD, "| why | flags |", "|---|---|", *_rows("refused")]
    return "\n".join(lines) + "\n"


def _rows(kind: Kind, *, reason_first: bool = True) -> Iterator[str]:
    """Yield a row for each reason, with its flags in the order of the table."""
    groups: dict[str, list[str]] = {}
    for flag in dict.fromkeys(megatron_flags_by_spelling().values()):
        if flag.kind == kind:
            groups.setdefault(flag.why, []).append(_with_values(flag))
    for why, flags in groups.items():
        shown = f"`{why}`" if kind == "supported" else why
        cells = [shown, ", ".join(flags)]
        yield f"| {' | '.join(cells if reason_first else cells[::-1])} |"


def _with_values(flag: MegatronFlag) -> str:
    accepted = flag.choices or HARMLESS.get(flag.name, ())[:1]
    return f"`{flag.name}`{f' ({", ".join(accepted)})' if accepted else ''}"


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
