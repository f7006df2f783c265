"""The verbs of results.

`evaluate` and `probe` measure a model; `verify-results`, `export-predictions`, `compare` and `report` read
what they wrote.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_exact.command_line import ToolParser, command_parser, positive_int, printable
from megatron_exact.evaluation.engine import AUTO, DTYPES
from megatron_exact.evaluation.suites.suite import K_TOKENS, all_options, registered, token_lengths
from megatron_exact.shares import add_share_arguments, run_processes, without_processes

if TYPE_CHECKING:
    from megatron_exact.evaluation.evidence import VerifiedCell

EVALUATE_EXAMPLES = """\
examples:

  %(prog)s --model models/exact --suite ruler --lengths 1K,1.5K,2K,3K,4K --output results/exact
  %(prog)s --model models/exact --suite nolima --nolima-data NoLiMa/data --lengths 1K,4K \\
      --samples 520 --output results/exact
  %(prog)s --model models/exact-qa --suite qa --qa-data qa --template model \\
      --output results/exact-qa
  %(prog)s --model models/tiny --suite nolima --nolima-data examples/needles --lengths 500 \\
      --tasks needle_set --samples 26 --output results/tiny
  %(prog)s --model models/tiny --suite ruler --lengths 4K --samples 10 --prompts-only prompts.jsonl

offline: --essays FILE (RULER), --nolima-data DIR, --qa-data DIR; docs/evaluation.md says what lies in them.
"""


def evaluate_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `evaluate`."""
    parser = command_parser(evaluate, prog, EVALUATE_EXAMPLES)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face folder")
    add("--suite", required=True, choices=tuple(registered()))
    add("--output", metavar="RESULTS", help="folder to write, or to resume")
    add(
        "--prompts-only",
        type=Path,
        metavar="FILE",
        help="write what would be sent as JSON lines and stop; --model needs a tokenizer alone",
    )
    add(
        "--lengths",
        type=token_lengths,
        default=(),
        metavar="N,N",
        help="windows in tokens, K is 1,024; officially NoLiMa's are of the haystack, and K is 1,000",
    )
    own_numbers = ", ".join(
        f"{suite.title} {suite.default_samples}" for suite in registered().values() if suite.default_samples
    )
    add(
        "--samples",
        type=positive_int,
        metavar="N",
        help=f"examples a cell ({own_numbers}, else all there are)",
    )
    add("--tasks", metavar="T,T", default="", help="some tasks of the suite (all)")
    add("--seed", type=int, default=0, help="of the generated examples (%(default)s)")
    add(
        "--template",
        metavar="none|model|FILE",
        help="chat template: none, the tokenizer's own, or a file (none; must be said for tuned models)",
    )
    for own in all_options():
        add(own.flag, type=own.parse, metavar=own.metavar, default=own.default, help=own.help)
    add("--backend", choices=("hf", "vllm"), default="hf", help="(%(default)s)")
    add("--device", help="hf: such as cpu or cuda:0 (a GPU where there is one)")
    add("--dtype", choices=(AUTO, *DTYPES), default=AUTO, help="type of the weights (auto: as stored)")
    add("--batch-size", type=positive_int, metavar="N", help="hf: prompts at a time (1)")
    add(
        "--no-shared-prefixes",
        action="store_true",
        help="hf: read each prompt from its start, also where others of its cell begin alike",
    )
    add("--tensor-parallel", type=positive_int, metavar="N", help="vllm: GPUs that share the model (1)")
    add("--allow-beyond-positions", action="store_true", help="windows beyond max_position_embeddings")
    add(
        "--cpt-window",
        type=positive_int,
        help="training window, for summary.csv (from the export's record)",
    )
    add("--model-name", help="for summary.csv (the folder's name)")
    add("--example-cache", type=Path, metavar="DIR", help="generated examples (under ~/.cache)")
    add("--keep-prompts", action="store_true", help="write prompts into the results beside their hashes")
    add_share_arguments(parser, "every Nth example of each cell")
    return parser


def evaluate(words: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Evaluate a Hugging Face model on RULER, NoLiMa or standard QA, with lm-eval as the engine.

    Writes RESULTS/results.json, RESULTS/<suite>/<task>/<length>.jsonl with every example, and
    RESULTS/summary.csv in the layout of Table 1. Suites, tasks and lengths may come in several calls
    with the same folder; what is finished is skipped. A length is a window, prompt and generated tokens
    together; NoLiMa's, unless another protocol is named, is that of the haystack alone.

    Several processes can share the work, over the GPUs of a node (--processes) or a job array
    (--shard, examples/slurm/evaluate.sbatch): each answers a part of every cell, and the last one puts
    the cells together, bit-identical to what one process writes. With --batch-size above 1 and with
    vLLM an answer may depend on the prompts beside it, so that there it may differ as it does between
    two batch sizes.

    A base model is evaluated with --template none, the default. For a model tuned by `megatron-exact
    fine-tune`, say which: --template model is the template of its tuning.
    """
    arguments = evaluate_parser(prog).parse_args(words)
    is_shared = arguments.processes is not None or not arguments.shard.is_whole
    if arguments.prompts_only is not None and is_shared:
        raise ValueError("--prompts-only writes all prompts to one file: leave out --shard and --processes")
    if arguments.processes is not None:
        run_processes(
            "evaluate",
            without_processes(sys.argv[1:] if words is None else words),
            arguments.processes,
            devices_each=arguments.tensor_parallel or 1,
        )
        return
    from megatron_exact.evaluation.engine import Backend
    from megatron_exact.evaluation.evaluate import Evaluation, write_prompts
    from megatron_exact.evaluation.suites.suite import SuiteOptions

    if (arguments.output is None) == (arguments.prompts_only is None):
        raise ValueError("give --output RESULTS to evaluate, or --prompts-only FILE to write prompts alone")
    own = {option.name: getattr(arguments, option.name) for option in all_options()}
    k_tokens = registered()[arguments.suite].k_of_options(own)
    options = SuiteOptions(
        suite=arguments.suite,
        lengths=tuple(length.tokens(k_tokens) for length in arguments.lengths),
        tasks=tuple(task for task in arguments.tasks.split(",") if task),
        samples=arguments.samples,
        seed=arguments.seed,
        template=arguments.template,
        own=own,
        allow_beyond_positions=arguments.allow_beyond_positions,
    )
    if arguments.prompts_only is not None:
        count = write_prompts(arguments.model, arguments.prompts_only, options)
        print(f"{arguments.prompts_only}: {count:,} prompts")
        return
    backend = Backend(
        name=arguments.backend,
        device=arguments.device,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        tensor_parallel=arguments.tensor_parallel,
        shares_prefixes=not arguments.no_shared_prefixes,
    )
    evaluation = Evaluation(
        arguments.model,
        arguments.output,
        options,
        backend=backend,
        cache=arguments.example_cache,
        share=arguments.shard,
        keep_prompts=arguments.keep_prompts,
    )
    evaluation.run(
        lambda result: print(
            f"{result.cell}: {100 * result.score:.2f} over {result.examples:,} examples"
            + ("" if result.is_new else " (finished before)"),
            flush=True,
        )
    )
    waiting = evaluation.waiting()
    if waiting:
        cell, shares = next(iter(waiting.items()))
        print(
            f"--shard {arguments.shard} is finished; {len(waiting)} cells wait for others, first {cell} "
            f"for --shard {', '.join(map(str, shares))}"
        )
        return
    digest = evaluation.write_digest()
    if digest is not None:
        print(digest)
    print(evaluation.write_summary(arguments.model_name, arguments.cpt_window))


PROBE_EXAMPLES = """\
examples:

  %(prog)s --model models/exact --output results/exact
  %(prog)s --model models/exact --kinds answer-position,field-lookup --distances 4K,16K,64K \\
      --items-per-cell 200 --filler book.txt --allow-beyond-positions --output results/exact
  %(prog)s --model models/exact --kinds evidence-field --distances 256,1K,4K --contexts 1K,4K,8K \\
      --needles NoLiMa/data/needlesets/needle_set.json --output results/exact-field
  %(prog)s --model models/tiny --items items.jsonl --output results/tiny

Then compare two models by megatron-exact compare; docs/evaluation.md has the schema of --items.
"""


def probe_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `probe`."""
    parser = command_parser(probe, prog, PROBE_EXAMPLES)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face folder")
    add("--output", required=True, metavar="RESULTS", help="folder to write, or to resume")
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
    add(
        "--items-per-cell",
        type=positive_int,
        default=96,
        metavar="N",
        help="they take the 24 sentence forms of a kind in turn (%(default)s)",
    )
    add("--seed", type=int, default=0, help="of the items (%(default)s)")
    add(
        "--filler",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="texts around the evidence, which items take in turn (four of own sentences)",
    )
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


def probe(words: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Measure how much evidence at a distance moves a model towards the right answer.

    Every item is a prompt with evidence, the same prompt without, and answers to choose from. The
    margin is log p(gold) - log p(competing answer); the effect of the evidence is margin with minus
    margin without it. Prompts are built as token ids, so that distances and contexts are exact. Writes
    RESULTS/probe.json and RESULTS/probe/<kind>.jsonl with every item; what is finished is skipped. It
    uses no chat template: this is for base models.

      answer-position   one sentence contains the answer; ablated: filler in its place
      field-lookup      a record of four fields, one of which is asked for; ablated: filler in its place
      evidence-field    NoLiMa-like, distance x context; ablated: a distractor of the same type in its place

    Each kind has 24 sentence forms and four fillers, so that intervals of comparisons cover wording, too.
    The tokenizer is byte-level BPE or SentencePiece.
    """
    arguments = probe_parser(prog).parse_args(words)
    from megatron_exact.evaluation.engine import Backend
    from megatron_exact.evaluation.probe import Probe
    from megatron_exact.evaluation.probe_items import KINDS, ProbeOptions

    options = ProbeOptions(
        kinds=tuple(kind for kind in arguments.kinds.split(",") if kind) or KINDS,
        distances=tuple(length.tokens(K_TOKENS) for length in arguments.distances),
        contexts=tuple(length.tokens(K_TOKENS) for length in arguments.contexts),
        items_per_cell=arguments.items_per_cell,
        seed=arguments.seed,
        filler=tuple(arguments.filler),
        needles=arguments.needles,
        items=arguments.items,
    )
    probe = Probe(
        arguments.model,
        arguments.output,
        options,
        backend=Backend(device=arguments.device, dtype=arguments.dtype),
        batch_tokens=arguments.batch_tokens,
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


VERIFY_RESULTS_EXAMPLES = """\
examples:

  %(prog)s results/standard results/exact
  %(prog)s results/standard results/exact --comparison comparison
"""


def verify_results_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `verify_results`."""
    parser = command_parser(verify_results, prog, VERIFY_RESULTS_EXAMPLES)
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="folders of megatron-exact evaluate")
    parser.add_argument(
        "--comparison",
        nargs="+",
        default=[],
        metavar="DIR",
        help="comparisons, too: their own numbers, and that their results are those that lie there now",
    )
    return parser


def verify_results(words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Verify result folders: that each cell is whole, of this model and protocol, and scored as it says.

    For each cell it compares the hash of the file and the number of examples with results.json, the
    model, template, options and code with the cell's binding, kept prompts with their hashes, and the
    score of each example with the one of its answer. Standard QA's likelihoods are not stored: there a
    wrong choice must score 0. It finds mistakes and edits by hand; who wants to deceive can compute the
    hashes again. The exit code is 0 if no line says FAILED.
    """
    arguments = verify_results_parser(prog).parse_args(words)
    from megatron_exact.evaluation.evidence import verify_compared, verify_results
    from megatron_exact.json_input import read_json_object
    from megatron_exact.report.compared import COMPARISON, check_comparison

    failures = count = unverified = 0

    def tell(found: Iterable[VerifiedCell]) -> None:
        nonlocal failures, count, unverified
        for one in found:
            said = f"FAILED: {one.fault}" if one.fault else f"ok ({', '.join(one.checks) or 'readable'})"
            number = f", {one.examples:,} examples" if one.examples else ""
            print(printable(f"{one.name}{number}: {said}"), flush=True)
            if one.unverified:
                print(printable(f"  not verified as this model's: {one.unverified}"), flush=True)
            failures += bool(one.fault)
            unverified += bool(one.unverified)
            count += 1

    for folder in arguments.results:
        print(folder)
        tell(verify_results(folder))
    for folder in arguments.comparison:
        path = Path(folder) / COMPARISON
        content = read_json_object(path, "run megatron-exact compare again")
        check_comparison(path, content)
        print(path)
        tell(verify_compared(content))
    without = f", {unverified} of them without a binding to their model" if unverified else ""
    print(f"{failures} of {count} failed" if failures else f"all {count} verified{without}")
    return 1 if failures else 0


EXPORT_PREDICTIONS_EXAMPLES = """\
example:

  %(prog)s results/exact --output exported
  python RULER/scripts/eval/evaluate.py --data_dir exported/ruler/4096 --benchmark synthetic
"""


def export_predictions_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `export_predictions`."""
    parser = command_parser(export_predictions, prog, EXPORT_PREDICTIONS_EXAMPLES)
    parser.add_argument("results", metavar="RESULTS", help="folder of megatron-exact evaluate")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write into")
    return parser


def export_predictions(words: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Write the answers of RULER and NoLiMa as their authors' scorers read them.

    RULER: DIR/ruler/<length>/<task>.jsonl, the prediction files of NVIDIA's repository; `input` is
    empty unless the evaluation kept its prompts. NoLiMa: DIR/nolima/<task>/<length>/<question>_<book>.json,
    result files of the authors' repository, without the texts of their needle sets. Scores are verified
    first.
    """
    arguments = export_predictions_parser(prog).parse_args(words)
    from megatron_exact.evaluation.evidence import export_predictions

    written = export_predictions(arguments.results, arguments.output)
    print(f"{arguments.output}: {len(written):,} files, first {written[0]}")


COMPARE_EXAMPLES = """\
example:

  %(prog)s --baseline results/standard --treatment results/exact --output comparison \\
      --trained-lengths 1K,1.5K,2K,3K,4K --extrapolated-lengths 5K,6K,8K,12K,16K
  %(prog)s --baseline results/standard-seed1 results/standard-seed2 \\
      --treatment results/exact-seed1 results/exact-seed2 --output comparison-seeds

K means 1,024 tokens; a suite that was not evaluated at a length does without it.
"""


def compare_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `compare`."""
    parser = command_parser(compare, prog, COMPARE_EXAMPLES)
    for side in ("baseline", "treatment"):
        parser.add_argument(
            f"--{side}",
            nargs="+",
            required=True,
            metavar="RESULTS",
            help="folders of megatron-exact evaluate or probe, one a training seed",
        )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write into")
    for regime, meaning in (("trained", "up to the training window"), ("extrapolated", "beyond it")):
        parser.add_argument(
            f"--{regime}-lengths",
            type=token_lengths,
            default=(),
            metavar="N,N",
            help=f"lengths {meaning}, such as 1024,1.5K (default: none, all lengths together only)",
        )
    for suite in registered().values():
        if len(suite.k_tokens) > 1:
            parser.add_argument(
                f"--{suite.name}-k",
                type=int,
                choices=sorted(suite.k_tokens),
                help=f"tokens that K means for {suite.title}'s lengths; {suite.k_note} "
                "(default: as the results' own protocol)",
            )
    parser.add_argument(
        "--probe-distances",
        type=token_lengths,
        default=(),
        metavar="N,N",
        help="average the evidence probe from the first distance to the second, too, such as 4K,64K",
    )
    parser.add_argument(
        "--resamples",
        type=positive_int,
        default=10_000,
        metavar="N",
        help="exchanges of the test, and resamples of --resample cells (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of their random numbers (default: %(default)s)"
    )
    parser.add_argument(
        "--resample",
        choices=("units", "cells"),
        default="units",
        help="what intervals are made from: units drawn together, over all cells and seeds; or each cell's "
        "examples by a bootstrap, the paper's kind, which is often too narrow (default: %(default)s)",
    )
    return parser


def compare(words: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Compare evaluated models in pairs: points, intervals and tests, as comparison.json and
    comparison.md.

    Scores are averaged over each cell (task x length), then over the cells of a suite. The 95 %
    intervals are Student's t over what was drawn: examples, or questions with all their depths and
    lengths. Give several folders on each side for several seeds of training: they pair in order. From
    four pairs on the intervals are about other seeds, too; from six on a difference can be significant
    over seeds. Where an interval would not cover, there is none, and a reason.

    Both sides must have answered the same examples, and their trainings must agree in pack, start
    checkpoint, seed, schedule and layout as far as the models carry a record; any other difference is
    an error that names it. Where all folders contain an evidence probe (`megatron-exact probe`), alone
    or beside the suites, it is compared, too.
    """
    arguments = compare_parser(prog).parse_args(words)
    from megatron_exact.evaluation.comparison import compare_runs, write_comparison
    from megatron_exact.evaluation.pairing import Regimes
    from megatron_exact.evaluation.statistics import Sampling
    from megatron_exact.report.comparison_page import (
        DETECTABLE,
        aggregates_table,
        detectable_lines,
        probe_table,
        write_comparison_page,
    )

    distances = tuple(length.tokens(K_TOKENS) for length in arguments.probe_distances)
    if len(distances) not in (0, 2):
        raise ValueError(f"--probe-distances: {len(distances)} lengths, give the shortest and the longest")
    content = compare_runs(
        arguments.baseline,
        arguments.treatment,
        regimes=Regimes(
            trained=arguments.trained_lengths,
            extrapolated=arguments.extrapolated_lengths,
            k_tokens={
                suite.name: getattr(arguments, f"{suite.name}_k")
                for suite in registered().values()
                if len(suite.k_tokens) > 1 and getattr(arguments, f"{suite.name}_k") is not None
            },
        ),
        sampling=Sampling(resamples=arguments.resamples, seed=arguments.seed, kind=arguments.resample),
        probe_ranges=[(distances[0], distances[1])] if distances else [],
    )
    write_comparison(arguments.output, content)
    page = write_comparison_page(arguments.output)
    print(content["pairing"]["statement"])
    for note in content["notes"]:
        print(printable(f"note: {note}"))
    if content["aggregates"]:
        print(f"\n{aggregates_table(content['aggregates'])}")
    if "probe" in content:
        print(f"\n{probe_table(content['probe'])}")
    if smallest := detectable_lines(content):
        print("\n".join(printable(line) for line in (f"{DETECTABLE}:", *smallest)))
    print(page)


REPORT_EXAMPLES = """\
example:

  %(prog)s --comparison comparisons/qwen-0.5b --pack packs/web-4k --output report
  %(prog)s --comparison Qwen2.5-0.5B=comparisons/a LLaMA-3.1-8B=comparisons/exact \\
      LLaMA-3.1-8B=comparisons/packed-position --exposure exposure-16k.json --output report

exposure-16k.json is what megatron-exact inspect --json printed, with its --alpha, --gamma and --tau.
"""


def report_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `report`."""
    parser = command_parser(report, prog, REPORT_EXAMPLES)
    parser.add_argument(
        "--comparison",
        nargs="+",
        default=[],
        metavar="[LABEL=]DIR",
        help="folders of megatron-exact compare; without any the page shows the paper's numbers alone",
    )
    parser.add_argument(
        "--pack",
        nargs="+",
        default=[],
        metavar="DIR",
        help="packs, for figure 1, with the weights that treatments were trained with",
    )
    parser.add_argument(
        "--exposure",
        nargs="+",
        default=[],
        metavar="FILE.json",
        help="outputs of megatron-exact inspect --json, for figure 1 without the packs or with other "
        "parameters",
    )
    parser.add_argument(
        "--losses",
        nargs=3,
        action="append",
        default=[],
        metavar=("ARM", "BASELINE_RUN", "RUN"),
        help="folders of two training runs of one seed, for the loss by effective context; once for each "
        "arm and seed",
    )
    parser.add_argument(
        "--ledger", metavar="FILE.json", help="ledger.json of megatron-exact experiment, for the cost"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write into")
    return parser


def report(words: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Write the report of an experiment: the paper's tables and figures, its numbers beside yours.

    It reads result files alone: comparisons of `megatron-exact compare` (with the evidence probe where
    it was run), packs and training runs. First what a reader should know after one minute; then tables
    1, 2 and 3, figures 1, 3, 4 and 5, loss by effective context, and licences, as report.md with PNG
    figures and as one report.html that needs no other file, no network and no script. What
    was not run is shown as not run.

    A comparison belongs to the paper's model that its models were exported as, or to the one that LABEL
    names. Table 1 takes EXACT with the paper's parameters; other rules and parameters are rows of table
    3.
    """
    arguments = report_parser(prog).parse_args(words)
    from megatron_exact.report.experiment import read_experiment, write_experiment_report

    files = read_experiment(
        arguments.comparison,
        arguments.pack,
        arguments.exposure,
        losses=arguments.losses,
        ledger=arguments.ledger,
    )
    for path in write_experiment_report(arguments.output, files):
        print(path)
