"""Convert a checkpoint of a run, or of import_hf.py, to a Hugging Face folder for from_pretrained.

Any layout, with or without optimizer states, local or Transformer Engine layers. Only the folder of the run
is needed: its hf/ holds config and tokenizer. Weights are streamed: no GPU, no model in memory, no process
group. The output appears when it is complete; if this is killed, call it again.
"""

from __future__ import annotations

import argparse
import sys

from megatron_exact.command_line import ArgumentError, ToolParser, run_tool

EPILOG = """\
example:

  export_hf.py --checkpoint runs/exact --output models/exact
  export_hf.py --checkpoint runs/exact --iteration 500 --output models/exact-500 --dtype bfloat16
"""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "B": 1}


def size_in_bytes(text: str) -> int:
    """argparse type: `5GB`, `500MB`, `2GiB`; a plain number counts bytes."""
    upper = text.strip().upper()
    unit = next((unit for unit in sorted(UNITS, key=len, reverse=True) if upper.endswith(unit)), "")
    try:
        size = round(float(upper.removesuffix(unit)) * UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        raise ArgumentError(f"{text!r} is no size such as 5GB") from None
    if size < 1:
        raise ArgumentError(f"{text!r} is not above 0")
    return size


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="folder of a run or an import")
    parser.add_argument("--iteration", type=int, metavar="N", help="default: the one the tracker names")
    parser.add_argument("--output", required=True, metavar="DIR", help="model folder to make")
    parser.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16"),
        default="keep",
        help="type of the weights (default: %(default)s, as the run trained them)",
    )
    parser.add_argument(
        "--shard-size",
        type=size_in_bytes,
        default="5GB",
        metavar="SIZE",
        help="largest weight file; several get an index (default: %(default)s)",
    )
    parser.add_argument(
        "--max-position-embeddings",
        type=int,
        metavar="N",
        help="window that the export's config promises to engines, at least the longest rows of training "
        "(default: those, or the imported window where it is longer)",
    )
    return parser


def main() -> int:
    """Run the tool."""
    arguments = build_parser().parse_args()
    from megatron_exact.conversion.export_hf import export_hf

    found = export_hf(
        arguments.checkpoint,
        arguments.output,
        iteration=arguments.iteration,
        dtype=arguments.dtype,
        shard_bytes=arguments.shard_size,
        window=arguments.max_position_embeddings,
    )
    origin = "imported weights" if found.iteration is None else f"iteration {found.iteration}"
    print(
        f"{arguments.output}: {origin}, {found.parameters:,} parameters, {', '.join(found.dtypes)}, "
        f"{found.num_bytes / 1e9:.2f} GB in {len(found.files)} files"
    )
    if found.window != found.imported_window:
        asked = arguments.max_position_embeddings is not None
        print(
            f"max_position_embeddings is {found.window} instead of the imported {found.imported_window}: "
            + ("--max-position-embeddings asks for it" if asked else "the longest rows it was trained on")
        )
    for limit in found.raised:
        print(f"{limit} is raised to {found.window} as well")
    if found.sampling:
        fields = ", ".join(f"{name} {value}" for name, value in found.sampling.items())
        print(f"generation_config.json goes along with {fields}: the defaults of generate()")
    for warning in found.warnings:
        print(f"warning: {arguments.checkpoint}: {warning}", file=sys.stderr)
    if not found.has_tokenizer:
        print(
            f"warning: {arguments.checkpoint}/hf holds no tokenizer: {arguments.output} has none",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    run_tool(main)
