"""Measure how much evidence at a distance moves a model towards the right answer.

Every item is a prompt with evidence, the same prompt without, and answers to choose from. The margin is
log p(gold) - log p(competing answer); the effect of the evidence is margin with minus margin without it.
Prompts are built as token ids, so that distances and contexts are exact. Writes RESULTS/probe.json and
RESULTS/probe/<kind>.jsonl with every item; what is finished is skipped. No chat template:
this is for base models.

  answer-position   one sentence holds the answer; ablated: filler in its place
  field-lookup      a record of four fields, one of which is asked for; ablated: filler in its place
  evidence-field    NoLiMa-like, distance x context; ablated: a distractor of the same type in its place
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_exact.command_line import ToolParser, positive_int, run_tool
from megatron_exact.evaluation.backend import AUTO, DTYPES
from megatron_exact.evaluation.regimes import K_TOKENS, token_lengths

EPILOG = """\
examples:

  probe_evidence.py --model models/exact --output results/exact
  probe_evidence.py --model models/exact --kinds answer-position,field-lookup --distances 4K,16K,64K \\
      --items-per-cell 200 --filler book.txt --allow-beyond-positions --output results/exact
  probe_evidence.py --model models/exact --kinds evidence-field --distances 256,1K,4K --contexts 1K,4K,8K \\
      --needles NoLiMa/data/needlesets/needle_set.json --output results/exact-field
  probe_evidence.py --model models/tiny --items items.jsonl --output results/tiny

Then compare two models by tools/compare_runs.py; docs/evaluation.md has the schema of --items.
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face folder")
    add("--output", required=True, metavar="RESULTS", help="folder to write, or to go on with")
    add("--kinds", metavar="K,K", default="", help="some of the three kinds (all)")
    add(
        "--distances",
        type=token_lengths,
        default=(),
        metavar="N,N",
        help="tokens from the last evidence token to the answer; K is 1,024 (64, 128, ... as it can)",
    )
    add(
        "--contexts",
        type=token_lengths,
        default=(),
        metavar="N,N",
        help="evidence-field: tokens of the prompt (256, 512, ... as the model can)",
    )
    add("--items-per-cell", type=positive_int, default=100, metavar="N", help="(%(default)s)")
    add("--seed", type=int, default=0, help="of the items (%(default)s)")
    add("--filler", type=Path, metavar="FILE", help="text around the evidence (own sentences)")
    add("--needles", type=Path, metavar="FILE", help="evidence-field: a NoLiMa needle set (own needles)")
    add("--items", type=Path, metavar="FILE", help="items made elsewhere, as JSON lines")
    add("--device", help="such as cpu or cuda:0 (a GPU where there is one)")
    add("--dtype", choices=(AUTO, *DTYPES), default=AUTO, help="type of the weights (auto: as stored)")
    add(
        "--batch-tokens",
        type=positive_int,
        default=65_536,
        metavar="N",
        help="of the KV cache at a time (%(default)s)",
    )
    add("--allow-beyond-positions", action="store_true", help="items beyond max_position_embeddings")
    return parser


def main() -> None:
    """Run the tool."""
    arguments = build_parser().parse_args()
    from megatron_exact.evaluation.probe.grid import KINDS
    from megatron_exact.evaluation.probe.options import ProbeOptions
    from megatron_exact.evaluation.probe.run import Probe, ProbeBackend

    options = ProbeOptions(
        kinds=tuple(kind for kind in arguments.kinds.split(",") if kind) or KINDS,
        distances=tuple(length.tokens(K_TOKENS) for length in arguments.distances),
        contexts=tuple(length.tokens(K_TOKENS) for length in arguments.contexts),
        items_per_cell=arguments.items_per_cell,
        seed=arguments.seed,
        filler=arguments.filler,
        needles=arguments.needles,
        items=arguments.items,
    )
    backend = ProbeBackend(
        device=arguments.device, dtype=arguments.dtype, batch_tokens=arguments.batch_tokens
    )
    probe = Probe(
        arguments.model,
        arguments.output,
        options,
        backend=backend,
        allow_beyond_positions=arguments.allow_beyond_positions,
    )
    probe.run(
        lambda done: print(
            f"{done.cell}: margin {done.margin:.3f} with evidence, {done.margin_ablated:.3f} without; "
            f"right {100 * done.correct:.1f} and {100 * done.correct_ablated:.1f} % of {done.items:,} items"
            + ("" if done.is_new else " (finished before)"),
            flush=True,
        )
    )


if __name__ == "__main__":
    run_tool(main)
