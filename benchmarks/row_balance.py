"""How evenly data-parallel ranks share the attention of a step, with and without `--balance-rows`.

Rows are planned with best fit from lognormal document lengths (median 900 tokens, sigma 1.4: heavy-tailed,
as web text), and drawn in the order of training's seed. A step has 0.5 M tokens, as in our recipes, or 4 M.
"slowest" is the work of the busiest rank over the mean, averaged over steps; the worst step stands behind
it. `attention` counts attention alone, `layer` a whole layer of Llama-3.1-8B in FLOP, in which the matrices
cost every row the same. The table is arithmetic on lengths: no job runs, and the same command prints the
same table on every machine.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray
from synthetic import document_lengths

from megatron_exact.command_line import ToolParser, positive_int, run_tool
from megatron_exact.data.attention_work import StepLayout, balance_steps, row_pairs, step_balance
from megatron_exact.data.document_pool import ChosenDocuments, DocumentPool
from megatron_exact.data.plan import BestFitPlan
from megatron_exact.data.shuffle import derive_key, row_permutation
from megatron_exact.model.families import preset
from megatron_exact.report.page import markdown_table
from megatron_exact.training.memory_forecast import layer_parameters

EPILOG = """example:
  python benchmarks/row_balance.py
  python benchmarks/row_balance.py --documents 1000000
"""
DOCUMENTS = 200_000
MODEL = "llama-3.1-8b"
STEP_TOKENS = (1 << 19, 1 << 22)
LAYOUTS = (
    (16_384, 8),
    (16_384, 32),
    (32_768, 8),
    (32_768, 32),
    (65_536, 8),
    (65_536, 32),
    (131_072, 4),
    (131_072, 16),
)
"""(tokens of a row, data-parallel ranks)."""


def planned_arrays(lengths: NDArray[np.int32], row_tokens: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """Return `row_offsets` and `segment_tokens` of a best-fit plan, as a pack stores them."""
    pool = DocumentPool(tokens=lengths, first=np.array([0, lengths.size]))
    chosen = ChosenDocuments(pool=pool, numbers=None, key=derive_key("benchmark", seed))
    blocks = list(BestFitPlan(chosen, row_tokens, seed=seed, split="train").blocks())
    ends = np.flatnonzero(np.concatenate([block.ends_row for block in blocks])) + 1
    tokens = np.concatenate([block.tokens for block in blocks]).astype(np.int64)
    return {"row_offsets": np.concatenate([[0], ends]), "segment_tokens": tokens}


def measure(documents: int, seed: int) -> list[dict[str, str]]:
    """Return the rows of the table."""
    shape = preset(MODEL)
    lengths = document_lengths(documents, seed)
    table = []
    work: dict[int, NDArray[np.int64]] = {}
    for row_tokens, ranks in LAYOUTS:
        if row_tokens not in work:
            pairs = row_pairs(planned_arrays(lengths, row_tokens, seed), row_tokens=row_tokens)
            work[row_tokens] = pairs[row_permutation(pairs.size, seed, 0).all()]
        rest = row_tokens * layer_parameters(shape, 1) / (2 * shape.num_attention_heads * shape.head_dim)
        drawn = work[row_tokens]
        for step_tokens in STEP_TOKENS:
            rows = step_tokens // row_tokens
            if rows < ranks:
                continue
            layout = StepLayout(rows=rows, ranks=ranks)
            balanced = balance_steps(drawn, layout)
            row = {
                "row": f"{row_tokens // 1024}K",
                "ranks": f"{ranks}",
                "rows a step": f"{rows}",
                "attention of a layer": f"{drawn.mean() / (drawn.mean() + rest):.1%}",
            }
            for part, constant in (("attention", 0.0), ("layer", rest)):
                for name, order in (("as drawn", drawn), ("balanced", balanced)):
                    found = step_balance(order + constant, layout)
                    row[f"{part}, {name}"] = f"{found.step_mean:.3f} ({found.step_worst:.2f})"
            table.append(row)
    return table


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the options."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--documents", type=positive_int, default=DOCUMENTS, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="(default: %(default)s)")
    return parser.parse_args(words)


def page_table(documents: int = DOCUMENTS, seed: int = 0) -> str:
    """Return the table in Markdown: that of docs/sharing_attention.md, where nothing is given."""
    table = measure(documents, seed)
    columns = list(table[0])
    return markdown_table(columns, [[row[column] for column in columns] for row in table])


def main() -> None:
    """Print the table."""
    options = parse()
    print(page_table(options.documents, options.seed), end="")


if __name__ == "__main__":
    run_tool(main)
