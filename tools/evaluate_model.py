"""Evaluate a Hugging Face model on RULER, NoLiMa or standard QA, with lm-eval as the engine.

Writes RESULTS/results.json, RESULTS/<suite>/<task>/<length>.jsonl with every example, and
RESULTS/summary.csv in the layout of Table 1. Suites, tasks and lengths may come in several calls to the
same folder; what is finished is skipped. A length is a window: prompt and generated tokens fit into it
together.

A base model is evaluated with --template none, which is what holds if nothing is said. For a model that
tools/fine_tune_qa.py tuned, say which: --template model is the template of its tuning.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_exact.command_line import ToolParser, positive_int, run_tool
from megatron_exact.evaluation.backend import AUTO, DTYPES
from megatron_exact.evaluation.regimes import K_TOKENS, token_lengths

SUITES = ("ruler", "nolima", "qa")
EPILOG = """\
examples:

  evaluate_model.py --model models/exact --suite ruler --lengths 1K,1.5K,2K,3K,4K --output results/exact
  evaluate_model.py --model models/exact --suite nolima --nolima-data NoLiMa/data --lengths 1K,4K \\
      --samples 520 --output results/exact
  evaluate_model.py --model models/exact-qa --suite qa --qa-data qa --template model \\
      --output results/exact-qa
  evaluate_model.py --model models/tiny --suite nolima --nolima-data examples/needles --lengths 512 \\
      --tasks needle_set --samples 26 --output results/tiny

offline: --essays FILE (RULER), --nolima-data DIR, --qa-data DIR; docs/evaluation.md says what lies in them.
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face folder")
    add("--suite", required=True, choices=SUITES)
    add("--output", required=True, metavar="RESULTS", help="folder to write, or to go on with")
    add("--lengths", type=token_lengths, default=(), metavar="N,N", help="windows in tokens; K is 1,024")
    add("--samples", type=positive_int, metavar="N", help="examples a cell (RULER 500, else all there are)")
    add("--tasks", metavar="T,T", default="", help="some tasks of the suite (all)")
    add("--seed", type=int, default=0, help="of the generated examples (%(default)s)")
    add(
        "--template",
        metavar="none|model|FILE",
        help="chat template: none, the tokenizer's own, or a file (none; must be said for tuned models)",
    )
    add("--essays", type=Path, metavar="FILE", help="RULER: a text instead of the essays of the Hub")
    add("--nolima-data", type=Path, metavar="DIR", help="NoLiMa: needlesets/ and haystack/rand_shuffle/")
    add("--placements", type=positive_int, default=26, help="NoLiMa: depths of the needle (%(default)s)")
    add("--qa-data", type=Path, metavar="DIR", help="QA: local copies of the data sets")
    add("--shots", type=int, help="QA: worked examples in a prompt (each task's own number)")
    add("--backend", choices=("hf", "vllm"), default="hf", help="(%(default)s)")
    add("--device", help="hf: such as cpu or cuda:0 (a GPU where there is one)")
    add("--dtype", choices=(AUTO, *DTYPES), default=AUTO, help="type of the weights (auto: as stored)")
    add("--batch-size", type=positive_int, metavar="N", help="hf: prompts at a time (1)")
    add("--tensor-parallel", type=positive_int, metavar="N", help="vllm: GPUs that share the model (1)")
    add("--allow-beyond-positions", action="store_true", help="windows beyond max_position_embeddings")
    add(
        "--cpt-window",
        type=positive_int,
        help="training window, for summary.csv (from the export's record)",
    )
    add("--model-name", help="for summary.csv (the folder's name)")
    add("--example-cache", type=Path, metavar="DIR", help="generated examples (under ~/.cache)")
    return parser


def main() -> None:
    """Run the tool."""
    arguments = build_parser().parse_args()
    from megatron_exact.evaluation.backend import Backend
    from megatron_exact.evaluation.options import SuiteOptions
    from megatron_exact.evaluation.run import Evaluation

    options = SuiteOptions(
        suite=arguments.suite,
        lengths=tuple(length.tokens(K_TOKENS) for length in arguments.lengths),
        tasks=tuple(task for task in arguments.tasks.split(",") if task),
        samples=arguments.samples,
        seed=arguments.seed,
        template=arguments.template,
        essays=arguments.essays,
        nolima_data=arguments.nolima_data,
        placements=arguments.placements,
        qa_data=arguments.qa_data,
        shots=arguments.shots,
        allow_beyond_positions=arguments.allow_beyond_positions,
    )
    backend = Backend(
        name=arguments.backend,
        device=arguments.device,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        tensor_parallel=arguments.tensor_parallel,
    )
    evaluation = Evaluation(
        arguments.model, arguments.output, options, backend=backend, cache=arguments.example_cache
    )
    evaluation.run(
        lambda result: print(
            f"{result.cell}: {100 * result.score:.2f} over {result.examples:,} examples"
            + ("" if result.is_new else " (finished before)"),
            flush=True,
        )
    )
    print(evaluation.write_summary(arguments.model_name, arguments.cpt_window))


if __name__ == "__main__":
    run_tool(main)
