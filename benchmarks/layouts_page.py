"""The page docs/exactness.md: what `layouts.py` measured, and what it means."""

from __future__ import annotations

import datetime
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from measure import command, commit, machine
from write_page import circumstances

from megatron_exact.report.page import markdown_table
from megatron_exact.training.flag_classes import megatron_flags_by_spelling
from tests.distributed import jobs
from tests.distributed import layout_matrix as matrix

Differences = dict[str, float]
WIDTH = 108

HEAD = """# Exact on every layout

Made by `benchmarks/layouts.py`, which runs the jobs of this page again. The same table of layouts
(`tests/distributed/layout_matrix.py`) drives `tests/distributed/test_layouts.py`: a part of it in
`make test`, all of it in `make test-slow`.

## What "exact" means

A job is a pack, a checkpoint, a seed, a rule of token weighting and a schedule. How it is spread over
processes must not change what it computes: the same rows in the same iteration, the same targets in the
same buckets, the same weights, and so the same loss and gradients up to the rounding of sums that are taken
in another order. In float32, from one checkpoint, every iteration agrees with one process within
{loss:.0e} of the loss (plain and weighted) and {grad_norm:.0e} of the gradient norm, relative. Later
iterations count as well: a gradient that is wrong in direction but not in length shows there. Counts of
targets a bucket are integers and agree without any tolerance.

The model has {layers} layers, {heads} query heads and {groups} key/value heads. Rows have {row} tokens, a
batch {batch} rows, of documents of heavy-tailed length, cut wherever rows and ranks cut them. The weights
start ten times as large as usual, so that attention looks at something and a fault in it shows.
"""

WHY = """## What makes it so

- **Loss.** `L = sum(m w CE) / sum(m)` is one division over the whole global batch. Ranks add up numerators
  and counts (`--calculate-per-token-loss`); no mean of means exists that could depend on who holds which
  row. `exact-normalized` divides by the weight mass instead, summed over ranks in float64.
- **Weights** belong to the target's place in its row. They are made with the row, before anything is cut,
  and travel apart from the mask.
- **Tensor and sequence parallel.** Norms of our own, whose gradients are summed over the ranks that share
  them; a loss head that knows the true columns of the vocabulary, so that no padding enters the softmax.
- **Pipeline.** Every stage has the document boundaries. Rows of a micro-batch are flattened into one.
- **Context parallel** (`megatron_exact/model/context_parallel.py`). The stream of tokens is cut into
  2 x CP spans of one length wherever documents lie; keys and values are gathered, and each query sees those
  of its own document up to itself, rotated by its own position in the document.
- **Distributed optimizer, overlap, recomputation** change where numbers are kept and when they are made.
"""

NOT_RUN = """## What was not run

Everything above ran on CPUs over gloo with the local layer spec. On GPUs the same table is
`tests/gpu/test_layouts_on_gpus.py`, with Transformer Engine and with our own attention, in bfloat16 within
the bounds above; it was not run where this was written, for there was no GPU. Proved without one, with the
real Transformer Engine on a CPU: that its model asks a checkpoint for the same keys and shapes
(`tests/gpu/test_transformer_engine_keys.py`), and that its attention is called with arguments that fit its
signature and mean what our own attention means (`tests/gpu/test_transformer_engine_calls.py`).
"""

OF_LAYOUTS = (
    "--cp-comm-type",
    "--hierarchical-context-parallel-sizes",
    "--hybrid-context-parallel",
    "--tensor-parallel-num-weight-shards",
    "--use-megatron-fsdp",
    "--use-torch-fsdp2",
    "--step-batch-size-schedule",
    "--decrease-batch-size-if-needed",
)
"""Refused flags that are about layouts."""
BY_HAND = (
    "`--context-parallel-size` with rows that do not divide by 2 x CP",
    "`--tensor-model-parallel-size` that does not divide the vocabulary: padded columns would enter the "
    "softmax",
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Largest relative differences over all iterations, each by key of `BOUNDS`."""

    float32: Mapping[str, Mapping[str, Differences]]
    """By layout and rule."""
    bfloat16: Mapping[str, Differences]
    """By layout, rule exact, against bfloat16 on one process."""
    faults: Mapping[str, Differences]
    """By fault, CP2, rule exact."""
    rules: Mapping[str, Differences]
    """By pair of rules, both on one process."""

    def outside_bounds(self) -> list[str]:
        """One line for each number that should be smaller, or, of a control, larger."""
        bounded = [
            (f"{name}, {rule}", differences, matrix.BOUNDS)
            for name, by_rule in self.float32.items()
            for rule, differences in by_rule.items()
        ]
        bounded += [(f"{name}, bf16", found, matrix.BF16_BOUNDS) for name, found in self.bfloat16.items()]
        lines = [
            f"{what}: {key} differs by {differences[key]:.1e}, bound {bound:.0e}"
            for what, differences, bounds in bounded
            for key, bound in bounds.items()
            if differences[key] > bound
        ]
        return lines + [
            f"control {name}: {key} differs by {differences[key]:.1e} only"
            for name, differences in self.faults.items()
            for key, bound in matrix.BOUNDS.items()
            if differences[key] <= matrix.CONTROL_FACTOR * bound
        ]


def page(measured: Measured) -> str:
    """The Markdown page."""
    head = HEAD.format(
        **matrix.BOUNDS,
        layers=jobs.LARGE_LAYERS,
        heads=jobs.HEADS,
        groups=jobs.KV_GROUPS,
        row=jobs.ROW_TOKENS,
        batch=jobs.LARGE_BATCH,
    )
    result = {
        "command": command(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
    }
    parts = [
        *(head, _float32(measured), _bfloat16(measured), _controls(measured), WHY, _refused(), NOT_RUN),
        *("## How it was measured\n", circumstances(result)),
    ]
    return "\n".join(parts)


def _float32(measured: Measured) -> str:
    rows = [
        [name, str(matrix.LAYOUTS[name].world), *cells(by_rule[rule] for rule in matrix.RULES)]
        for name, by_rule in measured.float32.items()
    ]
    columns = [f"{rule}: {what}" for rule in matrix.RULES for what in ("loss", "grad norm")]
    text = (
        f"Largest relative difference of {matrix.ITERATIONS} iterations from one process with one row a "
        "micro-batch, the larger of plain and weighted loss. TP tensor, PP pipeline, VPP interleaved "
        "pipeline, DP data, CP context, SP sequence parallel; what is not named is as on one process."
    )
    return f"## float32\n\n{paragraph(text)}\n\n{markdown_table(['layout', 'processes', *columns], rows)}"


def _bfloat16(measured: Measured) -> str:
    bounds = matrix.BF16_BOUNDS
    text = (
        "Against bfloat16 on one process, rule exact. Where a layout changes the shape or the order of a "
        "matrix product or of a sum over ranks, a number is rounded to 8 bits at another place: the bounds "
        f"are one such rounding (2^-9) of the loss, {bounds['loss']:.0e}, and eight of the gradient norm, "
        f"{bounds['grad_norm']:.1e}. Where it changes neither, bfloat16 agrees as float32 does."
    )
    rows = [[name, *cells([found])] for name, found in measured.bfloat16.items()]
    return f"## bfloat16\n\n{paragraph(text)}\n\n{markdown_table(['layout', 'loss', 'grad norm'], rows)}"


def _controls(measured: Measured) -> str:
    text = (
        "What the bounds have to see: faults of context parallelism, put in on purpose (CP2, rule exact), "
        "and the difference between the rules (one process)."
    )
    rows = [[name, *cells([found])] for name, found in [*measured.faults.items(), *measured.rules.items()]]
    table = markdown_table(["control", "loss", "grad norm"], rows)
    return f"## Negative controls\n\n{paragraph(text)}\n\n{table}"


def _refused() -> str:
    table = megatron_flags_by_spelling()
    flags = [f"`{name}`: {table[name].why}" for name in OF_LAYOUTS]
    lines = "\n".join(
        textwrap.fill(line, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        for line in (*BY_HAND, *flags)
    )
    text = (
        "A job that could not be exact, or was never checked, ends with one line before a model is built "
        "(`megatron_exact/training/flag_classes.py`, `refusals.py`):"
    )
    return f"## What is not supported\n\n{paragraph(text)}\n\n{lines}\n"


def paragraph(text: str) -> str:
    """Text in lines of the width of the page."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def cells(found: Iterable[Differences]) -> list[str]:
    """Loss (the larger of plain and weighted) and gradient norm of each, as text."""
    return [
        f"{value:.1e}"
        for differences in found
        for value in (max(differences["loss"], differences["weighted_loss"]), differences["grad_norm"])
    ]
