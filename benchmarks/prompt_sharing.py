"""How many tokens the prompts of a cell have in common at their beginnings; no model is run.

    python -m examples.real_model.make        # its tokenizer counts, .cache/real-model
    python benchmarks/prompt_sharing.py --model .cache/real-model

Only beginnings can be shared: what follows the first different token sees it. NoLiMa's official protocol
asks all questions in the same piece of a book, up to the needle, and both questions about a needle after
the same haystack. RULER's essays begin alike up to the first needle. Everything else is drawn for each
prompt. `examples/needles` has ten needles and one book; a full cell of NoLiMa's own sets has more needles
and shares more. The probe shares what stands before the evidence: the farther away, the less.

"read" is what one process reads with the cuts of `PrefixPlan`, as a share of all tokens; "1 of 4" is the
same for a process that has every fourth prompt. `evaluate` shares the beginnings of a cell where the whole
cell reads at most 75 %.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import REPOSITORY, Row, publish, whole_number

from megatron_exact.command_line import ToolParser, run_tool
from megatron_exact.evaluation.engine import load_tokenizer
from megatron_exact.evaluation.evaluate import write_prompts
from megatron_exact.evaluation.prefix_sharing_model import LEAST_SAVED
from megatron_exact.evaluation.probe import BATCH_TOKENS, Request, batches
from megatron_exact.evaluation.probe_items import ProbeOptions, encode_item
from megatron_exact.evaluation.shared_prefixes import PrefixPlan, best_split
from megatron_exact.evaluation.suites.ruler import TASKS
from megatron_exact.evaluation.suites.suite import SuiteOptions, all_options

NEEDLES = REPOSITORY / "examples" / "needles"
BOOK = NEEDLES / "haystack" / "rand_shuffle" / "rand_book_1.txt"
SHARES = 4


def suite_row(model: str, tokenizer: Any, options: SuiteOptions, name: str) -> Row:
    """The sharing of one cell of a suite."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        write_prompts(model, path, options)
        texts = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [tuple(tokenizer.encode(text)) for text in texts]
    plan = PrefixPlan(prompts)

    def read(chosen: Sequence[tuple[int, ...]]) -> float:
        return plan.tokens_read(chosen) / sum(map(len, chosen))

    whole = read(prompts)
    return {
        "prompts of": name,
        "prompts": len(prompts),
        "tokens": sum(map(len, prompts)),
        "read, %": 100 * whole,
        f"read, 1 of {SHARES}, %": 100 * read(prompts[::SHARES]),
        "shared": "yes" if whole <= 1 - LEAST_SAVED else "no",
    }


def probe_rows(tokenizer: Any, distances: tuple[int, ...], items: int) -> list[Row]:
    """The sharing of cells of the probe, as its batches are cut."""
    source = ProbeOptions(distances=distances, items_per_cell=items, contexts=(4096,))
    rows: list[Row] = []
    for cell, make in source.item_source(tokenizer, None).items():
        encoded = [encode_item(item, tokenizer) for item in make()]
        requests = [
            Request(prompt=prompt, candidates=ids.candidates)
            for ids in encoded
            for prompt in (ids.prompt, ids.ablated)
        ]
        total = read = 0
        for batch in batches(requests, BATCH_TOKENS):
            prompts = [requests[position].prompt for position in batch]
            split = best_split(prompts, len(prompts[0]) - 1)
            total += sum(map(len, prompts))
            read += split * len({prompt[:split] for prompt in prompts})
            read += sum(len(prompt) - split for prompt in prompts)
        rows.append(
            {
                "prompts of": f"probe, {cell.kind}, distance {cell.distance:,}, context {cell.context:,}",
                "prompts": len(requests),
                "tokens": total,
                "read, %": 100 * read / total,
                "shared": "yes, in batches",
            }
        )
    return rows


def main() -> None:
    """Count."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder; its tokenizer")
    parser.add_argument("--length", type=whole_number, default=2000, help="window; default: %(default)s")
    parser.add_argument(
        "--samples", type=whole_number, default=100, help="of a cell of RULER; default: %(default)s"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="append the result to FILE, for benchmarks/write_page.py"
    )
    options = parser.parse_args()
    tokenizer = load_tokenizer(Path(options.model))
    defaults = {option.name: option.default for option in all_options()}

    def cell(suite: str, task: str, samples: int | None, **own: Any) -> SuiteOptions:
        return SuiteOptions(
            suite=suite,
            lengths=(options.length,),
            tasks=(task,),
            samples=samples,
            own={**defaults, **own},
        )

    rows = []
    for task in TASKS:
        essays = BOOK if TASKS[task].needs_essays else None
        made = cell("ruler", task, options.samples, essays=essays)
        rows.append(suite_row(options.model, tokenizer, made, f"RULER, {task}"))
    for task, protocol, samples in (
        ("needle_set", "official", None),
        ("needle_set", "official", 104),
        ("needle_set_ONLYDirect", "official", None),
        ("needle_set", "window", None),
    ):
        made = cell("nolima", task, samples, nolima_data=NEEDLES, nolima_protocol=protocol)
        which = "full cell" if samples is None else "some"
        rows.append(suite_row(options.model, tokenizer, made, f"NoLiMa {protocol}, {task}, {which}"))
    rows += probe_rows(tokenizer, (64, 1024), 24)
    publish(
        "prompt_sharing",
        rows,
        title=f"Tokens to be read where beginnings are read once, windows of {options.length:,} tokens",
        notes=["Tokens of the model's tokenizer; essays and book are examples/needles."],
        file=options.json,
    )


if __name__ == "__main__":
    run_tool(main)
