"""What confidence-based weighting costs: steps of each rule with stored scores, and of ppmi with its own.

    python benchmarks/confidence_cost.py
    python benchmarks/confidence_cost.py --document-tokens 600
    python benchmarks/confidence_cost.py --pairs 4 --layers 2 --hidden 128

One training job of a small Llama in float32 on one thread takes every step on the same row; steps of all
alternate. They differ by what deals out the weights and by whether short windows are scored inside
the step, which is exchanged between steps. Scoring is the same for every rule, so its own scores are timed
with one of them. Given are the medians over rounds of the ratio to the `exact`
step of the same round. Without `--document-tokens` one document fills each row, so that three quarters of
its targets have short windows: the most that the rule can cost with its default windows.

Stored scores have to be made first, once a pack: the last line is the time in which the scorer of
`score_tokens.py` (transformers, a Llama of the same shape) scores a row, against the same step.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import small_job
import torch
from small_job import Clock

from megatron_exact.command_line import ToolParser, run_tool
from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.data.manifest import read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.rows import RowReader
from megatron_exact.data.score_files import ScoreReader
from megatron_exact.exposure import bucket_lower_bounds, build_weighting
from megatron_exact.exposure.confidence import CONFIDENCE_RULES, default_windows
from megatron_exact.scoring import ScoreOptions, Scorer, score_pack, score_rows

STORED = {f"{rule}, stored scores": rule for rule in CONFIDENCE_RULES}
CONTENDERS = ("exact", *STORED, "ppmi, its own scores")
WARM_UP_ROUNDS = 1
SCORED_TIMES = 3


class AlternatingWeights:
    """Exchanges what weighs the training rows between steps, and keeps the times."""

    def __init__(self, pack: Path, scores: Path) -> None:
        self.times: dict[str, list[Clock]] = {name: [] for name in CONTENDERS}
        self._pack, self._scores = pack, scores
        self._dataset: Any = None
        self._run: Any = None
        self._weights: dict[str, Any] = {}

    def watch_datasets(self) -> None:
        """Learn of the run and its dataset when the job opens it."""
        from megatron_exact.training.run import TrainingRun

        stock = TrainingRun.provide_datasets

        @functools.wraps(stock)
        def provide(run: Any, *args: Any, **kwargs: Any) -> Any:
            datasets = stock(run, *args, **kwargs)
            self._run, self._dataset = run, datasets[0]
            manifest = read_manifest(self._pack)
            counts = manifest.splits["train"].exposure.counts
            bounds = bucket_lower_bounds(manifest.row_tokens)
            for name in CONTENDERS[:-1]:
                rule = STORED.get(name, name)
                weighting = build_weighting(rule, counts, bounds, manifest.row_tokens, has_scores=True)
                self._weights[name] = weighting.row_weights
            self._weights[CONTENDERS[-1]] = None  # the step makes them
            self._dataset._scores = ScoreReader(self._scores, manifest, "train")
            self._short_scores = run.short_scores
            self._dataset.row_of = lambda index: 0
            return datasets

        TrainingRun.provide_datasets = provide  # type: ignore[method-assign]

    def step(self, stock: Callable[[], Any], number: int) -> Any:
        """a b c ... c b a ...: no contender always follows the same one."""
        turn, place = divmod(number, len(CONTENDERS))
        name = CONTENDERS[place if turn % 2 == 0 else -1 - place]
        weights = self._weights[name]
        self._dataset._row_weights = weights
        self._run.short_scores = self._short_scores if weights is None else None
        if weights is None:
            vars(self._short_scores).pop("_score", None)
        else:  # the schedule of this job scores unless told otherwise
            self._short_scores._score = lambda schedule, iterator, count, step: iterator
        result, clock = small_job.timed(stock)
        self.times[name].append(clock)
        return result

    def ratio(self, name: str, kind: int) -> float:
        """Median over rounds of name / exact; kind 0 is wall time, 1 CPU time."""
        rounds = zip(self.times[name], self.times["exact"], strict=True)
        return statistics.median([a[kind] / b[kind] for a, b in rounds][WARM_UP_ROUNDS:])


def make_pack(folder: Path, *, row_tokens: int, document_tokens: int, seed: int) -> Path:
    """A pack of rows cut from documents of one length."""
    writer = IndexedWriter(f"{folder}/docs.bin", f"{folder}/docs.idx", small_job.VOCABULARY)
    generator = np.random.default_rng(seed)
    for _ in range(-(-3 * row_tokens // document_tokens)):
        writer.add(generator.integers(1, small_job.VOCABULARY, document_tokens))
    writer.close()
    options = PackOptions(row_tokens=row_tokens, policy="concat", seed=seed, validation_fraction=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the corpus has no tokenizer
        pack_corpora([f"{folder}/docs"], folder / "pack", options)
    return folder / "pack"


def make_scorer(folder: Path, options: argparse.Namespace) -> Path:
    """A Hugging Face Llama of the job's shape, random weights."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=small_job.VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        max_position_embeddings=options.row_tokens,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "scorer")
    return folder / "scorer"


def main() -> None:
    """Run the benchmark."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=measure.whole_number, default=12, help="rounds; %(default)s")
    parser.add_argument("--row-tokens", type=measure.whole_number, default=4096, help="%(default)s")
    parser.add_argument(
        "--document-tokens", type=measure.whole_number, help="of every document; default: 4 rows"
    )
    parser.add_argument("--layers", type=measure.whole_number, default=4, help="default: %(default)s")
    parser.add_argument("--hidden", type=measure.whole_number, default=256, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the documents; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="append the result to FILE")
    options = parser.parse_args()
    options.document_tokens = options.document_tokens or 4 * options.row_tokens
    torch.set_num_threads(1)
    from megatron_exact.training import cpu_runtime

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        windows = default_windows(options.row_tokens)
        pack = make_pack(
            folder,
            row_tokens=options.row_tokens,
            document_tokens=options.document_tokens,
            seed=options.seed,
        )
        scorer = make_scorer(folder, options)
        score_pack(pack, scorer, folder / "scores", ScoreOptions(windows=windows, device="cpu"))
        reader = RowReader(pack, "train")
        model = Scorer(scorer, options.row_tokens, device="cpu", dtype="float32")
        scoring = [
            small_job.timed(lambda: score_rows(reader, [0], windows, model))[1] for _ in range(SCORED_TIMES)
        ]
        row = reader.read(0)
        scored = windows.scored(row.by_context(np.arange(options.row_tokens + 1)), row.loss_mask > 0)
        extra = sum(window.stop - window.start for window in windows.place(row.cu_seqlens, scored))
        cpu_runtime.install()
        weights = AlternatingWeights(pack, folder / "scores")
        weights.watch_datasets()
        small_job.run_job(job_arguments(pack, options), weights.step)
    publish(weights, scoring, extra, options)


def publish(
    weights: AlternatingWeights, scoring: list[Clock], extra: int, options: argparse.Namespace
) -> None:
    """Print, and append to --json."""
    step = [statistics.median(clock[kind] for clock in weights.times["exact"][1:]) for kind in (0, 1)]
    rows: list[measure.Row] = [
        {
            "step": name,
            "CPU, of exact": f"{weights.ratio(name, 1):.3f}",
            "wall, of exact": f"{weights.ratio(name, 0):.3f}",
        }
        for name in CONTENDERS
    ]
    once = [statistics.median(clock[kind] for clock in scoring) / step[kind] for kind in (0, 1)]
    rows.append(
        {
            "step": "scoring a row, once a pack",
            "CPU, of exact": f"{once[1]:.3f}",
            "wall, of exact": f"{once[0]:.3f}",
        }
    )
    measure.publish(
        "confidence_cost",
        rows,
        title=f"Cost of confidence rules: {options.layers} layers of {options.hidden}, rows of "
        f"{options.row_tokens}, documents of {options.document_tokens}",
        notes=(
            f"Median step of exact: {step[1]:.3g} CPU s. The short windows of the row hold {extra:,} "
            f"tokens, {extra / options.row_tokens:.0%} of it.",
        ),
        file=options.json,
    )


def job_arguments(pack: Path, options: argparse.Namespace) -> list[Any]:
    """Of the job."""
    return [
        *("--pack", pack, "--token-weighting", "ppmi"),
        *("--num-layers", options.layers, "--hidden-size", options.hidden),
        *("--ffn-hidden-size", 3 * options.hidden, "--num-attention-heads", 4),
        *("--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear"),
        *("--position-embedding-type", "rope", "--untie-embeddings-and-output-weights"),
        *("--vocab-size", small_job.VOCABULARY, "--global-batch-size", 1, "--lr", "1e-4"),
        *("--lr-decay-style", "constant", "--log-interval", 1000, "--eval-iters", 0),
        *("--train-iters", len(CONTENDERS) * (options.pairs + WARM_UP_ROUNDS)),
    ]


if __name__ == "__main__":
    run_tool(main)
