"""The verbs that make packs and what belongs to them: `pack`, `pack-qa` and `score`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_exact.command_line import (
    ToolParser,
    command_parser,
    fraction,
    one_line,
    positive_int,
    printable,
)
from megatron_exact.shares import add_share_arguments, run_processes, waiting_line, without_processes

if TYPE_CHECKING:  # it imports numpy
    from megatron_exact.data.manifest import Manifest

PACK_EXAMPLES = """examples:
  %(prog)s --source data/web --row-tokens 4096 --policy concat --validation-fraction 0.01 \\
      --seed 1 --output packs/web-4k
  %(prog)s --source 6:data/web --source 1:data/code --train-tokens 1000000000 --row-tokens 8192 \\
      --policy best-fit --validation-fraction 0.01 --seed 1 --output packs/mix-8k
  %(prog)s --source 6:shards/fineweb-edu/ 24:shards/slimpajama/ 32:shards/open-web-math/ \\
      --row-tokens 8K --policy concat --validation-fraction 0.01 --seed 1 --output packs/paper-8k
  %(prog)s --source data/web --row-tokens 8K --policy concat --validation-fraction 0.01 --seed 1 \\
      --corpus-slice 2/3 --output packs/web-8k      (the second of three stages: 4K, 8K, 16K)
  %(prog)s --verify packs/web-4k
"""


SHARE_TOLERANCE = 0.01  # of all train tokens


def pack_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `pack`."""
    from megatron_exact.data.manifest import POLICIES, WEIGHT_UNITS

    parser = command_parser(pack, prog, PACK_EXAMPLES)
    parser.add_argument("--verify", metavar="DIR", help="verify this pack instead of making one")
    parser.add_argument("--source-root", metavar="DIR", help="with --verify: where the corpora lie now")
    parser.add_argument(
        "--source",
        action="extend",
        nargs="+",
        default=[],
        metavar="[WEIGHT:]PREFIX",
        help="a corpus PREFIX.bin/.idx, or a folder of such shards; weights are shares of the train split, "
        "on all sources or none",
    )
    parser.add_argument(
        "--row-tokens", type=positive_int, metavar="N", help="inputs of a row; 4K means 4,096"
    )
    parser.add_argument(
        "--policy",
        choices=POLICIES,
        help="concat: documents end to end, cut at row ends, as stock Megatron; "
        "best-fit: only documents longer than a row are cut, a little padding",
    )
    parser.add_argument(
        "--validation-fraction", type=float, metavar="F", help="of each source's documents, in [0, 1)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="of the split, the choice and the order")
    parser.add_argument("--train-tokens", type=positive_int, metavar="N", help="tokens of the train split")
    parser.add_argument(
        "--allow-repeats", action="store_true", help="repeat sources shorter than their share"
    )
    parser.add_argument(
        "--tokenizer", metavar="X", help="the tokenizer that made the tokens, where no record says"
    )
    parser.add_argument(
        "--weight-unit",
        choices=WEIGHT_UNITS,
        default="tokens",
        help="what weights are shares of (default: %(default)s)",
    )
    parser.add_argument(
        "--mask-cross-document-targets",
        action="store_true",
        help="do not supervise the first token of a document",
    )
    parser.add_argument(
        "--corpus-slice",
        metavar="I/N",
        help="the I-th of N disjoint parts of every source's training documents, by the hash of seed, "
        "source and document: stages packed with one seed and different I read different documents and "
        "evaluate on the same ones",
    )
    parser.add_argument("--output", metavar="DIR", help="folder to make")
    return parser


def pack(words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Pack tokenized corpora into rows, or verify an existing pack.

    A pack says which piece of which document fills which row; tokens are not copied. `concat` cuts the
    stream of documents at row ends, as stock Megatron does; `best-fit` cuts only documents longer than
    a row. --verify plans the pack again and accounts for every token of every source.
    """
    parser = pack_parser(prog)
    arguments = parser.parse_args(words)
    if arguments.verify is not None:
        given = [name for name, value in vars(arguments).items() if value != parser.get_default(name)]
        foreign = ["--" + name.replace("_", "-") for name in given if name not in ("verify", "source_root")]
        if foreign:
            raise ValueError(
                f"{', '.join(foreign)} with --verify: the options of a pack are in its manifest, only "
                "--source-root goes with --verify"
            )
        return verify(arguments.verify, source_root=arguments.source_root)
    required = ("source", "row_tokens", "policy", "validation_fraction", "seed", "output")
    missing = [name for name in required if getattr(arguments, name) in (None, [])]
    if missing:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise ValueError(f"give {flags} as well: see {parser.prog} --help")
    if arguments.source_root is not None:
        raise ValueError("--source-root belongs to --verify: name the corpora with --source")
    from megatron_exact.data.pack import PackOptions, pack_corpora

    tokenizer = None
    if arguments.tokenizer is not None:
        from megatron_exact.data.manifest import TokenizerIdentity
        from megatron_exact.data.tokenizers import identify_tokenizer

        tokenizer = TokenizerIdentity(**identify_tokenizer(arguments.tokenizer))
    options = PackOptions(
        **{name: getattr(arguments, name) for name in PackOptions.__dataclass_fields__},
    )
    manifest = pack_corpora(arguments.source, arguments.output, options, tokenizer=tokenizer)
    print(summarize(manifest, arguments.output))
    warn_of_shares(manifest)
    return 0


def train_shares(manifest: Manifest) -> list[tuple[float, float]] | None:
    """Return (wanted, realized) share of each source in the train split, or None without weights."""
    weights = [source.weight for source in manifest.sources if source.weight is not None]
    if not weights:
        return None
    amounts = [getattr(use, manifest.weight_unit) for use in manifest.splits["train"].sources]
    return [
        (weight / sum(weights), amount / sum(amounts))
        for weight, amount in zip(weights, amounts, strict=True)
    ]


def warn_of_shares(manifest: Manifest) -> None:
    """Warn where whole documents could not meet a weight or --train-tokens within a hundredth."""
    for source, (wanted, found) in zip(manifest.sources, train_shares(manifest) or [], strict=False):
        if abs(found - wanted) > SHARE_TOLERANCE:
            warnings.warn(
                f"{source.prefix} gives {found:.2%} of the train {manifest.weight_unit} where its weight "
                f"says {wanted:.2%}: documents are taken whole; raise --train-tokens to come nearer",
                stacklevel=1,
            )
    taken = sum(use.tokens for use in manifest.splits["train"].sources)
    asked = manifest.train_tokens
    if asked is not None and abs(taken - asked) > SHARE_TOLERANCE * asked:
        warnings.warn(
            f"the train split takes {taken:,} tokens where --train-tokens says {asked:,}: documents are "
            "taken whole",
            stacklevel=1,
        )


def verify(pack: str, *, source_root: str | None) -> int:
    """Verify a pack, print one line for each check, and return the exit code."""
    from megatron_exact.data.verify_pack import verify_pack

    failures = 0
    for check in verify_pack(pack, source_root=source_root):
        line = one_line(f"{check.name}: {check.detail}")
        print(("ok      " if check.passed else "FAILED  ") + line, flush=True)
        failures += not check.passed
    print(f"{pack}: " + (f"{failures} of its checks failed" if failures else "every check passed"))
    return 1 if failures else 0


def summarize(manifest: Manifest, output: str) -> str:
    """Return the summary of a pack in a few lines."""
    lines = [
        f"{output}: rows of {manifest.row_tokens:,}, {manifest.policy}, "
        + (f"slice {manifest.corpus_slice}, " if manifest.corpus_slice else "")
        + f"fingerprint {manifest.fingerprint[:16]}"
    ]
    for name, split in manifest.splits.items():
        share = split.padding_tokens / max(1, split.tokens + split.padding_tokens)
        lines.append(
            f"  {name}: {split.rows:,} rows, {split.segments:,} segments, {split.tokens:,} tokens, "
            f"padding {share:.4%}, left out {split.left_out_tokens:,}, targets {split.supervised_targets:,}"
        )
        shares = train_shares(manifest) if name == "train" else None
        for index, (source, use) in enumerate(zip(manifest.sources, split.sources, strict=True)):
            lines.append(
                f"    {source.prefix}: {use.documents:,} documents, {use.tokens:,} tokens"
                + (", share {1:.2%} (wanted {0:.2%})".format(*shares[index]) if shares else "")
                + (f", {use.repeated_tokens:,} repeated" if use.repeated_tokens else "")
                + (f", {use.unused_tokens:,} unused" if use.unused_tokens else "")
            )
    lines += [
        f"  {source.prefix}: {source.empty_documents:,} of {source.documents:,} documents are empty (they "
        "have no token) and left out"
        for source in manifest.sources
        if source.empty_documents
    ]
    return "\n".join(map(printable, lines))


PACK_QA_EXAMPLES = """examples:
  %(prog)s --hub --tokenizer models/llama-3.1-8b --output packs/dolly
  %(prog)s --input databricks-dolly-15k.jsonl --licence "CC BY-SA 3.0" --tokenizer models/llama-3.1-8b \\
      --row-tokens 4K --output packs/dolly-4k
"""


def pack_qa_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `pack_qa`."""
    parser = command_parser(pack_qa, prog, PACK_QA_EXAMPLES)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="FILE", help=".jsonl, .jsonl.gz or .jsonl.zst")
    source.add_argument(
        "--hub",
        nargs="?",
        const="databricks/databricks-dolly-15k",
        metavar="REPO",
        help="a data set of the Hub with the same fields (default: %(const)s)",
    )
    parser.add_argument("--revision", metavar="R", help="with --hub: commit, tag or branch (the newest)")
    parser.add_argument("--licence", metavar="TEXT", help="of the records (Dolly-15K: CC BY-SA 3.0)")
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="Hugging Face folder of the model"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--template",
        metavar="FILE",
        help="Jinja chat template, or `model` for the tokenizer's own (default: "
        "megatron_exact/data/templates/question_answer.jinja; not stated in the paper)",
    )
    parser.add_argument(
        "--context-place",
        choices=("before", "after"),
        default="before",
        help="where a record's context stands, seen from its instruction (default: %(default)s, as in the "
        "prompts of RULER; not stated in the paper)",
    )
    parser.add_argument(
        "--eod-token",
        metavar="T",
        help="token that ends every answer (default: the tokenizer's eos; not stated in the paper)",
    )
    parser.add_argument("--force-eod-token", action="store_true", help="see megatron-exact tokenize")
    parser.add_argument(
        "--row-tokens",
        type=positive_int,
        default=2048,
        metavar="N",
        help="inputs of a row (default: %(default)s; not stated in the paper)",
    )
    parser.add_argument(
        "--validation-fraction",
        type=fraction,
        default=0.02,
        metavar="F",
        help="of the records, held out (default: %(default)s; not stated in the paper)",
    )
    parser.add_argument(
        "--seed", type=int, default=1234, metavar="S", help="of split and order (default: %(default)s)"
    )
    parser.add_argument(
        "--skip-invalid",
        action="store_true",
        help="leave out and count invalid records, instead of stopping",
    )
    return parser


def pack_qa(words: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Pack question-answer records for QA-SFT: rows of whole records, loss on answers and their EOD alone.

    Records are JSON lines with `instruction`, `context` (may be empty) and `response`, as in Dolly-15K.
    Each is written with a Jinja chat template. The manifest records the template and every fine-tuned
    model contains it, so that `megatron-exact evaluate --template model` finds it. A record longer than
    a row is left out and counted. The pack contains its own tokens: `megatron-exact pack --verify`
    verifies it, `megatron-exact inspect` shows it and `megatron-exact fine-tune` trains on it. Both
    arms of a pair need the same pack.
    """
    arguments = pack_qa_parser(prog).parse_args(words)
    if arguments.revision is not None and arguments.hub is None:
        raise ValueError("--revision belongs to --hub: leave it out")
    from megatron_exact.data.corpus_record import read_corpus_record
    from megatron_exact.data.qa_pack import (
        DEFAULT_TEMPLATE,
        DOLLY,
        DOLLY_LICENCE,
        QaOptions,
        pack_qa,
        qa_files,
        qa_hub,
    )

    is_dolly = arguments.hub == DOLLY
    records = (
        qa_files(arguments.input) if arguments.input else qa_hub(arguments.hub, revision=arguments.revision)
    )
    manifest = pack_qa(
        records,
        arguments.tokenizer,
        arguments.output,
        QaOptions(
            row_tokens=arguments.row_tokens,
            seed=arguments.seed,
            validation_fraction=arguments.validation_fraction,
            template=arguments.template or DEFAULT_TEMPLATE,
            context_place=arguments.context_place,
            skip_invalid=arguments.skip_invalid,
        ),
        licence=arguments.licence or (DOLLY_LICENCE if is_dolly else None),
        eod_token=arguments.eod_token,
        force_eod=arguments.force_eod_token,
    )
    assert manifest.supervision is not None
    record = read_corpus_record(Path(arguments.output) / manifest.sources[0].prefix)
    assert record is not None
    print(
        f"{arguments.output}: rows of {manifest.row_tokens:,}, fingerprint {manifest.fingerprint[:16]}, "
        f"{record.documents:,} records; left out: {manifest.supervision.left_out_records:,} longer than a "
        f"row, {record.skipped:,} invalid"
    )
    for name, split in manifest.splits.items():
        print(
            f"  {name}: {split.rows:,} rows, {split.segments:,} records, {split.tokens:,} tokens, of which "
            f"{split.supervised_targets:,} are targets"
        )


SCORE_EXAMPLES = """\
examples:

  %(prog)s --pack packs/long --model models/Qwen2.5-0.5B --output packs/long-scores
  %(prog)s --pack packs/long --checkpoint runs/short --iteration 500 --output packs/long-scores
  %(prog)s --verify packs/long-scores

on four GPUs of a machine, side by side; the last to end marks the scores complete:

  %(prog)s --pack packs/long --model models/Qwen2.5-0.5B --output packs/long-scores --processes 4

then

  torchrun ... -m megatron_exact.training.pretrain --pack packs/long --token-weighting ppmi \\
      --confidence-scores packs/long-scores ...
"""


def score_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `score`."""
    from megatron_exact.exposure.confidence import BORDERS

    parser = command_parser(score, prog, SCORE_EXAMPLES)
    parser.add_argument("--verify", metavar="DIR", help="hash finished scores again; no other argument")
    parser.add_argument("--pack", metavar="DIR", help="packed dataset (megatron-exact pack)")
    scorer = parser.add_mutually_exclusive_group()
    scorer.add_argument("--model", metavar="DIR", help="scorer, a Hugging Face folder with *.safetensors")
    scorer.add_argument(
        "--checkpoint", metavar="CKPT", help="scorer, a run or an import of megatron-exact import-hf"
    )
    parser.add_argument("--iteration", type=int, metavar="N", help="of --checkpoint; default: the newest")
    parser.add_argument("--output", metavar="DIR", help="folder of the scores")
    parser.add_argument(
        "--splits", default="train", metavar="NAMES", help="train, validation (default: %(default)s)"
    )
    parser.add_argument(
        "--short-window",
        type=positive_int,
        metavar="N",
        help="tokens of a short window (default: a quarter of the row: 8K for 32K, the source's)",
    )
    parser.add_argument(
        "--short-stride",
        type=positive_int,
        metavar="N",
        help="tokens from one short window to the next (default: three quarters of it, the source's)",
    )
    parser.add_argument(
        "--short-border",
        choices=BORDERS,
        default=BORDERS[0],
        help="target: the first window that contains the predicted token scores it, so that the first one "
        "past a window sees the overlap, as in the authors' code; input: the first window that contains "
        "its input does, so that it sees a whole window (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-rows",
        type=positive_int,
        default=1,
        metavar="N",
        help="inputs of a batch of the scorer, in rows of the pack (default: %(default)s)",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="in which the scorer computes (default: as its weights are stored)",
    )
    add_share_arguments(parser, "every Nth file of scores", "--part")
    parser.add_argument("--source-root", metavar="DIR", help="where the .bin/.idx files are, if moved")
    return parser


def score(words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Score every target of a pack at long and at short context, for the confidence-based weighting rules.

    Long: the loss of a target with all of its document that its row contains. Short: with a window of
    it, at most --short-window tokens, a new one every --short-stride; the first window of a document
    needs no pass of its own. A window never crosses a document boundary. Training reads d = long -
    short with --confidence-scores.

    The scorer may be much smaller than the model that is trained, but must have the same tokenizer.
    Weights of a run or an import go in with --checkpoint; they are converted to a Hugging Face folder
    meanwhile.

    Arrays of float16 appear file by file in --output: 4 bytes a target. If this is killed, the same
    command resumes with the files that are missing. Several processes can share the files, over the
    GPUs of a node (--processes) or a job array (--shard, examples/slurm/evaluate.sbatch). The result is
    bound to the fingerprint of the pack and to the hashes of the model. --verify DIR hashes finished
    scores again.
    """
    parser = score_parser(prog)
    arguments = parser.parse_args(words)
    if arguments.verify is not None:
        from megatron_exact.data.score_files import verify_scores

        print(f"{arguments.verify}: {verify_scores(arguments.verify):,} bytes as recorded")
        return 0
    for name in ("pack", "output"):
        if getattr(arguments, name) is None:
            raise ValueError(f"--{name} is missing (see {parser.prog} --help)")
    if arguments.processes is not None:
        if arguments.checkpoint is not None:
            raise ValueError(
                "--processes with --checkpoint would convert it in each of them: make a Hugging Face "
                "folder once (megatron-exact export-hf) and give it as --model"
            )
        run_processes(
            "score", without_processes(sys.argv[1:] if words is None else words), arguments.processes
        )
        return 0
    if arguments.checkpoint is not None:
        from megatron_exact.conversion.export_hf import export_hf

        Path(arguments.output).absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=Path(arguments.output).absolute().parent, prefix=".scorer-"
        ) as made:
            folder = f"{made}/model"
            export_hf(arguments.checkpoint, folder, iteration=arguments.iteration)
            score_with(folder, arguments)
    elif arguments.model is not None:
        score_with(arguments.model, arguments)
    else:
        raise ValueError("no scorer: name a Hugging Face folder (--model) or a checkpoint (--checkpoint)")
    return 0


def score_with(model: str, arguments: argparse.Namespace) -> None:
    """Score the pack of the arguments with a model, a Hugging Face folder."""
    from megatron_exact.data.manifest import read_manifest
    from megatron_exact.data.score_files import missing_shards
    from megatron_exact.exposure.confidence import default_windows
    from megatron_exact.scoring import ScoreOptions, doubt_about_tokenizer, score_pack

    manifest = read_manifest(arguments.pack)
    doubt = doubt_about_tokenizer(manifest, model)
    if doubt is not None:
        warnings.warn(doubt, stacklevel=1)
    options = ScoreOptions(
        windows=default_windows(
            manifest.row_tokens,
            window=arguments.short_window,
            stride=arguments.short_stride,
            border=arguments.short_border,
        ),
        splits=tuple(arguments.splits.split(",")),
        batch_rows=arguments.batch_rows,
        device=arguments.device,
        dtype=arguments.dtype,
        source_root=arguments.source_root,
        share=arguments.shard,
    )
    record = score_pack(arguments.pack, model, arguments.output, options)
    if not record.is_complete:
        missing = [shard for _, shard in missing_shards(arguments.output, record)]
        print(waiting_line(arguments.output, arguments.shard, missing))
        return
    for split, rows in record.rows.items():
        print(f"{arguments.output}: {rows:,} rows of the {split} split scored in {record.dtype}")
    print(
        f"short windows of {record.short_window:,} tokens every {record.short_stride:,}, border "
        f"{record.short_border}"
    )
