"""Score every target of a pack at long and at short context, for the confidence-based weighting rules.

Long: the loss of a target with all of its document that its row holds. Short: with a window of it, at most
--short-window tokens, a new one every --short-stride; the first window of a document needs no pass of its
own. No window crosses a document. Training reads d = long - short with --confidence-scores.

The scorer may be much smaller than the model that is trained, but has to have the same tokenizer. Weights
of a run or an import go in with --checkpoint; they are converted to a Hugging Face folder meanwhile.

Arrays of float16 appear shard by shard in --output: 4 bytes a target. If this is killed, call it again with
the same arguments; it goes on with the shards that are missing. The result is bound to the fingerprint of
the pack and to the hashes of the model. --verify DIR hashes finished scores again.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

from megatron_exact.command_line import ArgumentError, ToolParser, positive_int, run_tool

EPILOG = """\
examples:

  score_tokens.py --pack packs/long --model models/Qwen2.5-0.5B --output packs/long-scores
  score_tokens.py --pack packs/long --checkpoint runs/short --iteration 500 --output packs/long-scores
  score_tokens.py --verify packs/long-scores

on four GPUs of a machine, side by side; the last to end marks the scores complete:

  for n in 0 1 2 3; do score_tokens.py ... --device cuda:$n --part $n/4 & done; wait

then

  torchrun ... -m megatron_exact.training.pretrain --pack packs/long --token-weighting ppmi \\
      --confidence-scores packs/long-scores ...
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verify", metavar="DIR", help="hash finished scores again; no other argument")
    parser.add_argument("--pack", metavar="DIR", help="packed dataset (pack_corpus.py)")
    scorer = parser.add_mutually_exclusive_group()
    scorer.add_argument("--model", metavar="DIR", help="scorer, a Hugging Face folder with *.safetensors")
    scorer.add_argument("--checkpoint", metavar="CKPT", help="scorer, a run or an import of import_hf.py")
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
    parser.add_argument(
        "--part",
        type=part_of_parts,
        default=(0, 1),
        metavar="K/N",
        help="score every Nth shard, beginning with K, 0 to N - 1, while other processes score the others",
    )
    parser.add_argument("--source-root", metavar="DIR", help="where the .bin/.idx files are, if moved")
    return parser


def part_of_parts(text: str) -> tuple[int, int]:
    """argparse type: `0/4` to `3/4`."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise ArgumentError(f"{text!r} is no part such as 0/4")
    return int(part), int(parts)


def main() -> int:
    """Run the tool."""
    arguments = build_parser().parse_args()
    if arguments.verify is not None:
        from megatron_exact.data.score_files import verify_scores

        print(f"{arguments.verify}: {verify_scores(arguments.verify):,} bytes as recorded")
        return 0
    for name in ("pack", "output"):
        if getattr(arguments, name) is None:
            raise ValueError(f"--{name} is missing (see score_tokens.py --help)")
    if arguments.checkpoint is not None:
        from megatron_exact.conversion.export_hf import export_hf

        Path(arguments.output).absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=Path(arguments.output).absolute().parent, prefix=".scorer-"
        ) as made:
            folder = f"{made}/model"
            export_hf(arguments.checkpoint, folder, iteration=arguments.iteration)
            score(arguments, folder)
    elif arguments.model is not None:
        score(arguments, arguments.model)
    else:
        raise ValueError("no scorer: name a Hugging Face folder (--model) or a checkpoint (--checkpoint)")
    return 0


def score(arguments: argparse.Namespace, model: str) -> None:
    """Score with a Hugging Face folder."""
    from megatron_exact.data.manifest import read_manifest
    from megatron_exact.exposure.confidence import default_windows
    from megatron_exact.scoring.score_pack import ScoreOptions, doubt_about_tokenizer, score_pack

    manifest = read_manifest(arguments.pack)
    doubt = doubt_about_tokenizer(manifest, model)
    if doubt is not None:
        warnings.warn(doubt, stacklevel=1)
    options = ScoreOptions(
        windows=default_windows(
            manifest.row_tokens, window=arguments.short_window, stride=arguments.short_stride
        ),
        splits=tuple(arguments.splits.split(",")),
        batch_rows=arguments.batch_rows,
        device=arguments.device,
        dtype=arguments.dtype,
        source_root=arguments.source_root,
        part=arguments.part[0],
        parts=arguments.part[1],
    )
    record = score_pack(arguments.pack, model, arguments.output, options)
    if not record.is_complete:
        print(f"{arguments.output}: this part is scored, others are not yet")
        return
    for split, rows in record.rows.items():
        print(f"{arguments.output}: {rows:,} rows of the {split} split scored in {record.dtype}")
    print(f"short windows of {record.short_window:,} tokens every {record.short_stride:,}")


if __name__ == "__main__":
    run_tool(main)
