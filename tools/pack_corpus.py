#!/usr/bin/env python3
"""Pack tokenized corpora into rows, or prove an existing pack.

A pack says which piece of which document fills which row; tokens are not copied. `concat` cuts the stream
of documents at row ends, as stock Megatron does; `best-fit` cuts only documents longer than a row. --verify
makes the plan again and accounts for every token of every source.
"""

from __future__ import annotations

import argparse
import warnings

from megatron_exact.command_line import ToolParser, one_line, positive_int, printable, run_tool
from megatron_exact.data.manifest import POLICIES, WEIGHT_UNITS, Manifest, TokenizerIdentity

EPILOG = """examples:
  pack_corpus.py --source data/web --row-tokens 4096 --policy concat --validation-fraction 0.01 \\
      --seed 1 --output packs/web-4k
  pack_corpus.py --source 6:data/web --source 1:data/code --train-tokens 1000000000 --row-tokens 8192 \\
      --policy best-fit --validation-fraction 0.01 --seed 1 --output packs/mix-8k
  pack_corpus.py --source 6:shards/fineweb-edu/ 24:shards/slimpajama/ 32:shards/open-web-math/ \\
      --row-tokens 8K --policy concat --validation-fraction 0.01 --seed 1 --output packs/paper-8k
  pack_corpus.py --source data/web --row-tokens 8K --policy concat --validation-fraction 0.01 --seed 1 \\
      --corpus-slice 2/3 --output packs/web-8k      (the second of three stages: 4K, 8K, 16K)
  pack_corpus.py --verify packs/web-4k
"""
SHARE_TOLERANCE = 0.01  # of all train tokens


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verify", metavar="DIR", help="prove this pack instead of making one")
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


def main() -> int:
    """Run the tool."""
    parser = build_parser()
    arguments = parser.parse_args()
    if arguments.verify is not None:
        given = [name for name, value in vars(arguments).items() if value != parser.get_default(name)]
        foreign = ["--" + name.replace("_", "-") for name in given if name not in ("verify", "source_root")]
        if foreign:
            raise ValueError(
                f"{', '.join(foreign)} with --verify: the options of a pack are in its manifest, only "
                "--source-root goes with --verify"
            )
        return verify(arguments)
    required = ("source", "row_tokens", "policy", "validation_fraction", "seed", "output")
    missing = [name for name in required if getattr(arguments, name) in (None, [])]
    if missing:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise ValueError(f"give {flags} as well: see pack_corpus.py --help")
    if arguments.source_root is not None:
        raise ValueError("--source-root belongs to --verify: name the corpora with --source")
    from megatron_exact.data.pack import PackOptions, pack_corpora

    tokenizer = None
    if arguments.tokenizer is not None:
        from megatron_exact.data.tokenizers import identify_tokenizer

        tokenizer = TokenizerIdentity(**identify_tokenizer(arguments.tokenizer))
    options = PackOptions(
        **{name: getattr(arguments, name) for name in PackOptions.__dataclass_fields__},
    )
    manifest = pack_corpora(arguments.source, arguments.output, options, tokenizer=tokenizer)
    print(summarise(manifest, arguments.output))
    warn_of_shares(manifest)
    return 0


def train_shares(manifest: Manifest) -> list[tuple[float, float]] | None:
    """(wanted, realised) share of each source in the train split, of what weights count; None without."""
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


def verify(arguments: argparse.Namespace) -> int:
    """Prove a pack; one line a check."""
    from megatron_exact.data.verify import verify_pack

    failures = 0
    for check in verify_pack(arguments.verify, source_root=arguments.source_root):
        line = one_line(f"{check.name}: {check.detail}")
        print(("ok      " if check.passed else "FAILED  ") + line, flush=True)
        failures += not check.passed
    print(f"{arguments.verify}: " + (f"{failures} checks failed" if failures else "every check passed"))
    return 1 if failures else 0


def summarise(manifest: Manifest, output: str) -> str:
    """A few lines for people."""
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


if __name__ == "__main__":
    run_tool(main)
